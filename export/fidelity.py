"""The trained net as the judge: the integer definition, operation by operation from the trained net's own codes, against
what the trained net computes; and the file's answers against the trained net's.

The file is compared with the definition code by code (`export/certificate.py`), but file and definition come from one
lowering and would share its mistakes. The trained net is run by PyTorch and shares none. Three things are judged:

operations  From the trained net's codes before an operation, with biases that are not rounded, the definition gives a real
            number u of codes; it explains the trained code q of the result if |u - q| <= 1/2 + what floats may be off:
                float sums   FLOAT_SUM of the largest sum that the channel can have, for float32 adds in some order
                functions    FUNCTION codes, for the last bits of softmax, layer norm, GELU, and FLOAT_SUM of the largest
                             result: what is far beyond the grid comes from sums as large, and may end next to a tie
                scales       parts per million by which scales were moved (`export/ties.py`)
            One code that is not explained is one too many.
rounding    Every int32 bias is the trained one to half a unit (`export/rounding.py`), and no unit is so coarse that rounding
            moves results by more than LARGEST_ROUNDING codes, or outputs by more than LARGEST_SHARE of their spread.
answers     The file, run freely, answers as the trained net does but for DIFFERING_ANSWERS of the images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeqat.terminal import in_lines
from export.feeds import Given
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.reference import Accumulator, Codes, IntegerReference, Value, real_of
from export.rounding import NEGLIGIBLE_CODES, bias_roundings, largest_results
from export.skeleton import (
    LAYOUT_OPS,
    constant,
    is_mark,
    mark_name,
    modules_of,
    quantizers_in_order,
    weight_layer,
)

FLOAT_SUM = 2.0**-22  # two sums in float32, each off by half a bit a few times
FUNCTION = 1e-3  # codes
LARGEST_ROUNDING = 0.5  # codes
LARGEST_SHARE = 0.05  # of the standard deviation of an output
HALF = 0.5 * (1 + 1e-6)  # a unit; 1e-6 is for float32
# Of the largest output: what floats may be off after integer sums, after functions of them, and in a net without codes.
OUTPUT_SHARE, FUNCTION_SHARE, WEIGHT_ONLY_SHARE = 1e-5, 1e-4, 1e-3
DIFFERING_ANSWERS = 0.01  # share of answers that may differ
# Certainty to fail a file whose answers differ by no more: its images are a sample
LEVEL = 0.01

Outputs = Mapping[str, NDArray[np.float32]]
Trained = Callable[[Any], tuple[Mapping[str, NDArray[np.uint8]], Outputs]]


@dataclass(frozen=True)
class Fidelity:
    """The trained net against the integer definition and the file.

    codes:         compared; `at_ties` of them differ within what floats may be off.
    unexplained:   quantizer -> codes that nothing known explains.
    rounding:      the layer whose rounded bias moves its results farthest, and by how many codes.
    biases:        layers whose integer bias is not the trained one, or too coarse, and how.
    outputs:       output -> how far it lies beyond what is allowed, as a share of its largest value; those that do. 1 where
                   its shape differs.
    answers, same: of the first output, how many there are, and how many are alike when the file runs freely.
    multiply_adds: of the trained net for one image, counted by PyTorch's dispatcher; `on_integers` and `in_float` (by node)
                   are those of the file.
    """

    codes: int
    at_ties: int
    unexplained: dict[str, int]
    rounding: tuple[str, float]
    biases: dict[str, str]
    outputs: dict[str, float]
    answers: int
    same: int
    multiply_adds: int
    on_integers: int
    in_float: dict[str, int]

    @property
    def answers_agree(self) -> bool:
        """Whether the differing answers are no evidence that more than 1 % of all differ."""
        return within_share(
            self.answers - self.same, self.answers, DIFFERING_ANSWERS, LEVEL
        )

    @property
    def missing(self) -> int:
        """Multiply-adds of the trained net that the file does not make."""
        return max(
            self.multiply_adds - self.on_integers - sum(self.in_float.values()), 0
        )

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.faults()

    def faults(self) -> list[str]:
        """One line for each thing that fails."""
        lines = [
            f"{name}: {count:,} codes are not what the trained net computes"
            for name, count in self.unexplained.items()
        ]
        lines += [f"{name}: {what}" for name, what in self.biases.items()]
        lines += [
            f"output {name}: off by {share:.1e} of its largest value, beyond what rounding explains"
            for name, share in self.outputs.items()
        ]
        if self.missing:
            lines.append(
                f"{self.missing:,} multiply-adds of the trained net are not in the file"
            )
        if not self.answers_agree:
            lines.append(
                "fewer than 99 % of the answers are alike: settle the net (qat.settle.settle_; a recipe does when it is "
                "finished, again with --resume), measure it and export it again"
            )
        return lines

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        layer, shift = self.rounding
        rounded = (
            f", bias rounding at most {shift:.1g} codes ({layer})" if layer else ""
        )
        text = (
            f"the trained net, operation by operation: {sum(self.unexplained.values()):,} of {self.codes:,} codes differ "
            f"({self.at_ties:,} at ties){rounded}; free-running, {self.same:,} of {self.answers:,} answers alike  [{verdict}]"
        )
        return in_lines([text, *(f"           {fault}" for fault in self.faults()[:8])])


def within_share(differing: int, count: int, share: float, level: float) -> bool:
    """Whether `differing` of `count` is no evidence, at `level`, that more than `share` differ (binomial, one-sided)."""
    if differing <= share * count:
        return True
    log_terms = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)
        for k in range(differing)
    ]  # fmt: skip
    return 1 - sum(math.exp(term) for term in log_terms) >= level


def fidelity(
    reference: IntegerReference,
    images: Given,
    trained: Trained,
    found: Outputs,
    batch: int,
) -> tuple[Fidelity, Outputs]:
    """Judge the definition, and the outputs `found` that the file gave, on `images`; also returns the trained net's outputs.

    trained: images -> (storage codes per quantizer, outputs by name) of the trained net.
    """
    follower = _Follower(reference.model)
    parts: list[Outputs] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        follower.codes, expected = trained(part)
        _, defined = reference.run(part, follow=follower)
        follower.compare_outputs(defined, expected)
        parts.append(expected)
    from_training = {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    roundings = {
        name: rounding.largest for name, rounding in follower.roundings.items()
    }
    worst = max(roundings, key=lambda name: roundings[name], default="")
    if found.keys() != from_training.keys():
        raise ExportError(
            f"the file returns {', '.join(found)}, the trained net {', '.join(from_training)}; export the net again"
        )
    first = next(iter(from_training))
    answers, same = compare_answers(found[first], from_training[first])
    order = quantizers_in_order(reference.model)
    return Fidelity(
        codes=follower.total,
        at_ties=follower.at_ties,
        unexplained={
            name: follower.unexplained[name]
            for name in order
            if name in follower.unexplained
        },
        rounding=(worst, roundings[worst]) if worst else ("", 0.0),
        biases=_wrong_biases(follower, roundings),
        outputs=follower.outputs,
        answers=answers,
        same=same,
        multiply_adds=reference.model.multiply_adds,
        on_integers=follower.on_integers // len(images),
        in_float={
            name: count // len(images) for name, count in follower.in_float.items()
        },
    ), from_training


def _wrong_biases(
    follower: "_Follower", roundings: Mapping[str, float]
) -> dict[str, str]:
    wrong: dict[str, str] = {}
    for name, rounding in follower.roundings.items():
        units = float(
            (np.abs(rounding.change) / np.maximum(rounding.unit, 1e-300)).max(
                initial=0.0
            )
        )
        if units > HALF:
            wrong[name] = (
                f"its bias is {units:.3g} units away from the trained one, more than rounding explains"
            )
        elif roundings[name] > LARGEST_ROUNDING:
            wrong[name] = (
                f"rounding its bias moves results by {roundings[name]:.2g} codes"
            )
        elif follower.shares.get(name, 0.0) > LARGEST_SHARE:
            wrong[name] = (
                f"rounding its bias moves outputs by {follower.shares[name]:.0%} of their spread"
            )
    return wrong


def compare_answers(
    first: NDArray[np.float32], second: NDArray[np.float32]
) -> tuple[int, int]:
    """(answers, how many are alike): the largest of axis 1 per image, and per place where there are several."""
    if first.ndim < 2:
        return 0, 0
    same = first.argmax(1) == second.argmax(1)
    return same.size, int(same.sum())


class _Follower:
    """Called by the reference after every node. Compares each result with the trained net's codes and puts these in its
    place, so that the next operation starts from them."""

    def __init__(self, model: LoweredModel) -> None:
        self.model, self.roundings = model, bias_roundings(model)
        self.codes: Mapping[str, NDArray[np.uint8]] = {}
        self.total = self.at_ties = 0
        self.unexplained: dict[str, int] = {}
        self.outputs: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.on_integers = 0
        self.in_float: dict[str, int] = {}
        self.ppm = max(
            (abs(grid.moved_ppm) for grid in model.quantizers.values()), default=0
        )
        self.names_at = {value: name for name, value in model.trained_at.items()}
        self.allowances: dict[str, Tensor] = {}

    def __call__(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        self._count(node, values)
        layer = weight_layer(node, self.model)
        if layer is not None and layer.bias_codes is not None:
            values[node.outputs[0]] = with_trained_bias(values[node.outputs[0]], layer)
        name = mark_name(node) if is_mark(node) else ""
        if name in self.model.quantizers:
            source = node.inputs[0]
            assert source is not None
            grid = self.model.quantizers[name]
            producer = source.producer()
            layer = weight_layer(producer, self.model) if producer is not None else None
            before = in_codes(values[source], grid)
            axis = -1 if producer is not None and producer.op_type == "Gemm" else 1
            channels = [
                -1 if a == axis % before.dim() else 1 for a in range(before.dim())
            ]
            allowance = self._allowance(layer, grid).view(
                channels if layer is not None else ()
            )
            if layer is None:
                allowance = allowance + FLOAT_SUM * _largest(before)
            self.allowances[name] = allowance
            values[node.outputs[0]] = Codes(before.float(), grid)
            # The layout operations up to there move what is not rounded yet
            if name in self.model.trained_at:
                return
            self._compare(name, node.outputs[0], values)
        for output in node.outputs:
            if output in self.names_at:
                self._compare(self.names_at[output], output, values)

    def _compare(self, name: str, at: ir.Value, values: dict[ir.Value, Value]) -> None:
        grid, expected = self.model.quantizers[name], self.codes[name]
        found = values[at]
        assert isinstance(found, Codes)
        trained = torch.from_numpy(expected).float()
        self.total += trained.numel()
        if trained.shape != found.stored.shape:
            self.unexplained[name] = self.unexplained.get(name, 0) + trained.numel()
            return
        allowance = self.allowances[name]
        if allowance.dim() and name in self.model.trained_at:
            allowance = allowance.max()  # its channels may lie elsewhere now
        if grid.is_binary:
            wrong = (found.stored >= 0) != (trained > grid.zero_point)
            unexplained = wrong & (found.stored.abs() > allowance)
        else:
            rounded = found.stored.round().clamp(grid.low, grid.high)
            wrong = rounded != trained
            clipped = found.stored.clamp(grid.low, grid.high)
            unexplained = (clipped - trained).abs() > 0.5 + allowance
        self.at_ties += int((wrong & ~unexplained).sum())
        if count := int(unexplained.sum()):
            self.unexplained[name] = self.unexplained.get(name, 0) + count
        values[at] = Codes(trained, grid)

    def _allowance(self, layer: LoweredLayer | None, grid: LoweredQuantizer) -> Tensor:
        """In codes of `grid`, per channel after a layer; in real units where one bit is decided."""
        moved = 1e-6 * self.ppm * 4 * grid.high
        if layer is None:
            return torch.tensor(FUNCTION + moved)
        sums = self._float_error(layer)
        if grid.is_binary:
            return torch.from_numpy(sums * (1 + moved)).float()
        negligible = NEGLIGIBLE_CODES if layer.dead_channels else 0.0
        return torch.from_numpy(
            sums / float(grid.scale) + moved + FLOAT_SUM * grid.high + negligible
        ).float()

    def _float_error(self, layer: LoweredLayer) -> NDArray[np.float64]:
        """float64 (O,), in real units: how far float32 may be off in adding up the layer's results."""
        source = self.model.quantizers[layer.input_quantizer]
        return FLOAT_SUM * (largest_results(layer, source) + np.abs(layer.folded_bias))

    def compare_outputs(self, defined: Outputs, trained: Outputs) -> None:
        for value in self.model.skeleton.graph.outputs:
            name = str(value.name)
            if name not in trained or defined[name].shape != trained[name].shape:
                self.outputs[name] = 1.0
                continue
            largest = float(np.abs(trained[name]).max(initial=0.0))
            layer = layer_of_output(value, self.model)
            share = OUTPUT_SHARE if layer is not None else FUNCTION_SHARE
            if not self.model.quantizers:
                share = WEIGHT_ONLY_SHARE
            allowed: float | NDArray[np.float64] = (share + 4e-6 * self.ppm) * largest
            if layer is not None:
                per_channel = self._float_error(layer)
                allowed = allowed + (
                    per_channel if trained[name].ndim == 2 else float(per_channel.max())
                )
            difference = np.abs(defined[name].astype(np.float64) - trained[name])
            beyond = float((difference - allowed).max(initial=0.0))
            if not beyond <= 0:
                self.outputs[name] = max(
                    self.outputs.get(name, 0.0), beyond / max(largest, 1e-30)
                )
            if layer is not None and layer.name in self.roundings:
                change = float(np.abs(self.roundings[layer.name].change).max())
                self.shares[layer.name] = change / max(
                    float(trained[name].std()), 1e-30
                )

    def _count(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        """Multiply-adds of a convolution or matrix product, where they run and whose they are."""
        count = multiply_adds(node, values)
        if not count:
            return
        if isinstance(values[node.outputs[0]], Accumulator):
            self.on_integers += count
        else:
            name = self._owner(node)
            self.in_float[name] = self.in_float.get(name, 0) + count

    def _owner(self, node: ir.Node) -> str:
        """Name of the layer, else of the module, else of the node itself."""
        layer = weight_layer(node, self.model)
        if layer is not None:
            return layer.name
        around = modules_of(node)
        return around[-1] if around and around[-1] else str(node.name)


def multiply_adds(node: ir.Node, values: Mapping[ir.Value, Value]) -> int:
    """How many multiply-adds `node` makes with the operands at hand; 0 for other operations."""
    if node.op_type not in (
        "Conv",
        "ConvTranspose",
        "Einsum",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "RNN",
    ):
        return 0
    if node.op_type == "Einsum":
        shapes = [
            _shape_in(value, values) for value in node.inputs if value is not None
        ]
        return (
            _einsum_products(node.attributes["equation"].as_string(), shapes)
            if len(shapes) > 1
            else 0
        )
    first, second = node.inputs[:2]
    assert first is not None and second is not None
    made = math.prod(shape_of(values[node.outputs[0]]))
    read = _shape_in(first, values)
    match node.op_type:
        case "GRU" | "LSTM" | "RNN":
            steps, batch = read[:2]
            recurrent_weight = node.inputs[2]
            assert recurrent_weight is not None
            weights = math.prod(_shape_in(second, values)) + math.prod(
                _shape_in(recurrent_weight, values)
            )
            return steps * batch * weights
        case "Conv":
            per_output = (
                read[1] // node.attributes["group"].as_int()
                if "group" in node.attributes
                else read[1]
            )
            return made * per_output * math.prod(_kernel_shape(node, second))
        case "ConvTranspose":
            weight = constant(second)
            return (
                0 if weight is None else math.prod(read) * math.prod(weight.shape[1:])
            )
        case "Gemm":
            transposed = (
                "transA" in node.attributes and node.attributes["transA"].as_int() == 1
            )
            return made * read[0 if transposed else 1]
        case _:
            return made * read[-1]


def _einsum_products(equation: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """One multiply-add for each combination of the indices; axes of an ellipsis are counted from its end."""
    sizes: dict[str | int, int] = {}
    operands = equation.replace(" ", "").split("->")[0].split(",")
    for operand, shape in zip(operands, shapes, strict=True):
        before, dots, after = operand.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        indices = [*before, *range(-hidden, 0), *after]
        for index, size in zip(indices, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return math.prod(sizes.values())


def _largest(values: Tensor) -> Tensor:
    """() of values' dtype: the largest finite magnitude, 0 where there is none."""
    magnitudes = values.abs()
    return (
        magnitudes[magnitudes.isfinite()].max()
        if bool(magnitudes.isfinite().any())
        else magnitudes.new_zeros(())
    )


def _shape_in(value: ir.Value, values: Mapping[ir.Value, Value]) -> tuple[int, ...]:
    if value in values:
        return shape_of(values[value])
    return tuple(constant(value).shape)  # type: ignore[union-attr]


def _kernel_shape(node: ir.Node, weight: ir.Value) -> tuple[int, ...]:
    if "kernel_shape" in node.attributes:
        return tuple(node.attributes["kernel_shape"].as_ints())
    assert weight.shape is not None
    return tuple(int(d) for d in list(weight.shape)[2:])  # type: ignore[arg-type]


def shape_of(value: Value) -> tuple[int, ...]:
    """Shape of a value, whatever it is carried by."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Codes):
        return tuple(value.stored.shape)
    return tuple(
        value.sums.shape if isinstance(value, Accumulator) else value.real().shape
    )


def with_trained_bias(value: Value, layer: LoweredLayer) -> Value:
    """A layer's sums with the bias as it was trained in place of the integer one."""
    assert isinstance(value, Accumulator) and layer.bias_codes is not None
    channels = value.unit.shape
    bias_codes = torch.from_numpy(layer.bias_codes).double().view(channels)
    bias = torch.from_numpy(layer.folded_bias).view(channels)
    return Accumulator(value.sums - bias_codes + bias / value.unit.double(), value.unit)


def in_codes(value: Value, grid: LoweredQuantizer) -> Tensor:
    """What `value` is on `grid` before it is rounded or clipped, zero point included, float64.

    One bit has no such scale: how far results lie above the threshold, in real units, or +1 and -1 where codes are compared
    with it.
    """
    real = (
        value.sums.double() * value.unit.double()
        if isinstance(value, Accumulator)
        else real_of(value).double()
    )
    if not grid.is_binary:
        return real / float(grid.scale) + grid.zero_point
    thresholds = torch.tensor(grid.thresholds).double()
    above = real - thresholds.view(-1, *[1] * (real.dim() - 2))
    return (
        above
        if isinstance(value, Accumulator)
        else torch.where(above >= 0, 1.0, -1.0).double()
    )


def layer_of_output(output: ir.Value, model: LoweredModel) -> LoweredLayer | None:
    """The layer whose results the graph returns as `output`, seen through layout operations."""
    node = output.producer()
    while node is not None and node.op_type in LAYOUT_OPS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    layer = weight_layer(node, model) if node is not None else None
    return layer if layer is not None and layer.input_quantizer else None
