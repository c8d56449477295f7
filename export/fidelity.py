"""The trained net as the judge: the integer definition, operation by operation from the trained net's own codes, against
what the trained net computes; and the file's answers against the trained net's.

The file is compared with the definition code by code (`export/certificate.py`), but file and definition come from one
lowering and would share its mistakes. The trained net is run by PyTorch and shares none. Three things are judged:

operations  From the trained net's codes before an operation, with biases that are not rounded, the definition gives a real
            number u of codes; it explains the trained code q of the result if |u - q| <= 1/2 + what floats may be off:
                float sums   FLOAT_SUM of the largest sum that the channel can have, for float32 adds in some order
                functions    FUNCTION codes, for the last bits of softmax, layer norm, GELU, and FLOAT_SUM of the largest
                             result: what is far beyond the grid comes from sums as large, and may end next to a tie
                resampling   as often FLOAT_SUM of the largest result as the image has pixels on a side: float32 knows
                             the place to read at to that share of a side
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
from export.rounding import (
    NEGLIGIBLE_CODES,
    BiasRounding,
    bias_roundings,
    largest_results,
)
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
RESAMPLING = {"Resize", "GridSample"}
LARGEST_ROUNDING = 0.5  # codes
LARGEST_SHARE = 0.05  # of the standard deviation of an output
HALF = 0.5 * (1 + 1e-6)  # a unit; 1e-6 is for float32
# Of the largest output, what floats may be off:
OUTPUT_SHARE = 1e-5  # after integer sums
FUNCTION_SHARE = 1e-4  # after functions of them
WEIGHT_ONLY_SHARE = 1e-3  # in a net without codes
DIFFERING_ANSWERS = 0.01  # share of answers that may differ
# Certainty to fail a file whose answers differ by no more: its images are a sample
LEVEL = 0.01
MULTIPLYING = {
    "Conv",
    "ConvTranspose",
    "Einsum",
    "GRU",
    "Gemm",
    "LSTM",
    "MatMul",
    "RNN",
}

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
        """Whether the differing answers give no evidence that more than 1 % of all differ."""
        return within_share(
            self.answers - self.same, self.answers, DIFFERING_ANSWERS, LEVEL
        )

    @property
    def missing(self) -> int:
        """Multiply-adds of the trained net that the file does not make."""
        made = self.on_integers + sum(self.in_float.values())
        return max(self.multiply_adds - made, 0)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.faults()

    def faults(self) -> list[str]:
        """One line for each thing that fails."""
        lines = []
        for name, count in self.unexplained.items():
            lines.append(
                f"{name}: {count:,} codes are not what the trained net computes"
            )
        for name, what in self.biases.items():
            lines.append(f"{name}: {what}")
        for name, share in self.outputs.items():
            lines.append(
                f"output {name}: off by {share:.1e} of its largest value, beyond what rounding explains"
            )
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
        rounded = ""
        if layer:
            rounded = f", bias rounding at most {shift:.1g} codes ({layer})"
        differing = sum(self.unexplained.values())
        text = (
            f"the trained net, operation by operation: {differing:,} of {self.codes:,} codes differ "
            f"({self.at_ties:,} at ties){rounded}; free-running, {self.same:,} of {self.answers:,} answers alike  [{verdict}]"
        )
        first_faults = self.faults()[:8]
        return in_lines([text, *(f"           {fault}" for fault in first_faults)])


def within_share(differing: int, count: int, share: float, level: float) -> bool:
    """Whether `differing` of `count` gives no evidence, at `level`, that more than `share` differ (binomial, one-sided)."""
    if differing <= share * count:
        return True
    fewer = 0.0  # probability that fewer than `differing` differ
    for k in range(differing):
        log_ways = math.lgamma(count + 1)
        log_ways -= math.lgamma(k + 1) + math.lgamma(count - k + 1)
        log_chance = k * math.log(share) + (count - k) * math.log1p(-share)
        fewer += math.exp(log_ways + log_chance)
    return 1 - fewer >= level


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
    from_training = {}
    for name in parts[0]:
        from_training[name] = np.concatenate([part[name] for part in parts])
    if found.keys() != from_training.keys():
        raise ExportError(
            f"the file returns {', '.join(found)}, the trained net {', '.join(from_training)}; export the net again"
        )
    first = next(iter(from_training))
    answers, same = compare_answers(found[first], from_training[first])
    unexplained = {}
    for name in quantizers_in_order(reference.model):
        if name in follower.unexplained:
            unexplained[name] = follower.unexplained[name]
    in_float = {}
    for name, count in follower.in_float.items():
        in_float[name] = count // len(images)
    judged = Fidelity(
        codes=follower.total,
        at_ties=follower.at_ties,
        unexplained=unexplained,
        rounding=_largest_rounding(follower.roundings),
        biases=_wrong_biases(follower.roundings, follower.shares),
        outputs=follower.outputs,
        answers=answers,
        same=same,
        multiply_adds=reference.model.multiply_adds,
        on_integers=follower.on_integers // len(images),
        in_float=in_float,
    )
    return judged, from_training


def _largest_rounding(roundings: Mapping[str, BiasRounding]) -> tuple[str, float]:
    """The layer whose rounded bias moves its results farthest, and by how many codes; ("", 0.0) without layers."""
    if not roundings:
        return "", 0.0
    worst = max(roundings, key=lambda name: roundings[name].largest)
    return worst, roundings[worst].largest


def _wrong_biases(
    roundings: Mapping[str, BiasRounding], shares: Mapping[str, float]
) -> dict[str, str]:
    """Layer -> what is wrong with its integer bias; shares: layer -> how far it moves an output, of the output's spread."""
    wrong: dict[str, str] = {}
    for name, rounding in roundings.items():
        in_units = np.abs(rounding.change) / np.maximum(rounding.unit, 1e-300)
        units = float(in_units.max(initial=0.0))
        share = shares.get(name, 0.0)
        if units > HALF:
            wrong[name] = (
                f"its bias is {units:.3g} units away from the trained one, more than rounding explains"
            )
        elif rounding.largest > LARGEST_ROUNDING:
            wrong[name] = (
                f"rounding its bias moves results by {rounding.largest:.2g} codes"
            )
        elif share > LARGEST_SHARE:
            wrong[name] = (
                f"rounding its bias moves outputs by {share:.0%} of their spread"
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
        self.model = model
        self.roundings = bias_roundings(model)
        self.codes: Mapping[str, NDArray[np.uint8]] = {}
        self.total = 0
        self.at_ties = 0
        self.unexplained: dict[str, int] = {}
        self.outputs: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.on_integers = 0
        self.in_float: dict[str, int] = {}
        moved = [abs(grid.moved_ppm) for grid in model.quantizers.values()]
        self.ppm = max(moved, default=0)
        self.names_at = {value: name for name, value in model.trained_at.items()}
        self.allowances: dict[str, Tensor] = {}

    def __call__(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        self._count(node, values)
        layer = weight_layer(node, self.model)
        if layer is not None and layer.bias_codes is not None:
            values[node.outputs[0]] = with_trained_bias(values[node.outputs[0]], layer)
        name = mark_name(node) if is_mark(node) else ""
        if name in self.model.quantizers:
            self._take_unrounded(name, node, values)
            # The layout operations up to there move what is not rounded yet
            if name in self.model.trained_at:
                return
            self._compare(name, node.outputs[0], values)
        for output in node.outputs:
            if output in self.names_at:
                self._compare(self.names_at[output], output, values)

    def _take_unrounded(
        self, name: str, mark: ir.Node, values: dict[ir.Value, Value]
    ) -> None:
        """Make the quantizer's result what it rounds, in codes, and note how far floats may be off there."""
        source = mark.inputs[0]
        assert source is not None
        grid = self.model.quantizers[name]
        producer = source.producer()
        layer = None if producer is None else weight_layer(producer, self.model)
        unrounded = in_codes(values[source], grid)
        if layer is None:
            error = FLOAT_SUM * _largest(unrounded) * _resampled_side(source)
            allowance = self._function_allowance(grid) + error
        else:
            assert producer is not None
            channel_axis = -1 if producer.op_type == "Gemm" else 1
            per_channel = [1] * unrounded.dim()
            per_channel[channel_axis % unrounded.dim()] = -1
            allowance = self._layer_allowance(layer, grid).view(per_channel)
        self.allowances[name] = allowance
        values[mark.outputs[0]] = Codes(unrounded.float(), grid)

    def _compare(self, name: str, at: ir.Value, values: dict[ir.Value, Value]) -> None:
        """Count the codes at `at` that are not the trained net's, and put the trained net's in their place."""
        grid = self.model.quantizers[name]
        defined = values[at]
        assert isinstance(defined, Codes)
        unrounded = defined.stored
        trained = torch.from_numpy(self.codes[name]).float()
        self.total += trained.numel()
        if trained.shape != unrounded.shape:
            self._note_unexplained(name, trained.numel())
            return
        allowance = self.allowances[name]
        if allowance.dim() and name in self.model.trained_at:
            allowance = allowance.max()  # its channels may lie elsewhere now
        if grid.is_binary:
            wrong = (unrounded >= 0) != (trained > grid.zero_point)
            unexplained = wrong & (unrounded.abs() > allowance)
        else:
            rounded = unrounded.round().clamp(grid.low, grid.high)
            wrong = rounded != trained
            clipped = unrounded.clamp(grid.low, grid.high)
            unexplained = (clipped - trained).abs() > 0.5 + allowance
        self.at_ties += int((wrong & ~unexplained).sum())
        self._note_unexplained(name, int(unexplained.sum()))
        values[at] = Codes(trained, grid)

    def _note_unexplained(self, name: str, count: int) -> None:
        if count:
            self.unexplained[name] = self.unexplained.get(name, 0) + count

    def _moved_codes(self, grid: LoweredQuantizer) -> float:
        """How far the scales that were moved may shift a result, in codes."""
        return 1e-6 * self.ppm * 4 * grid.high

    def _function_allowance(self, grid: LoweredQuantizer) -> Tensor:
        """In codes of `grid`, () float32, after anything but a layer."""
        return torch.tensor(FUNCTION + self._moved_codes(grid))

    def _layer_allowance(self, layer: LoweredLayer, grid: LoweredQuantizer) -> Tensor:
        """In codes of `grid`, float32 (O,), after a layer; in real units where one bit is decided."""
        moved = self._moved_codes(grid)
        sums = self._float_error(layer)
        if grid.is_binary:
            return torch.from_numpy(sums * (1 + moved)).float()
        in_grid = sums / float(grid.scale)
        negligible = NEGLIGIBLE_CODES if layer.bias_only_channels else 0.0
        allowance = in_grid + moved + FLOAT_SUM * grid.high + negligible
        return torch.from_numpy(allowance).float()

    def _float_error(self, layer: LoweredLayer) -> NDArray[np.float64]:
        """float64 (O,), in real units: how far float32 may be off in adding up the layer's results."""
        source = self.model.quantizers[layer.input_quantizer]
        return FLOAT_SUM * (largest_results(layer, source) + np.abs(layer.folded_bias))

    def compare_outputs(self, defined: Outputs, trained: Outputs) -> None:
        """Note the outputs that lie farther from the trained net's than floats may be off."""
        for value in self.model.skeleton.graph.outputs:
            name = str(value.name)
            if name not in trained or defined[name].shape != trained[name].shape:
                self.outputs[name] = 1.0
                continue
            expected = trained[name]
            largest = float(np.abs(expected).max(initial=0.0))
            layer = layer_of_output(value, self.model)
            allowed = self._output_allowance(layer, largest, expected.ndim)
            difference = np.abs(defined[name].astype(np.float64) - expected)
            beyond = float((difference - allowed).max(initial=0.0))
            if not beyond <= 0:  # nan is not
                share = beyond / max(largest, 1e-30)
                self.outputs[name] = max(self.outputs.get(name, 0.0), share)
            if layer is not None and layer.name in self.roundings:
                change = float(np.abs(self.roundings[layer.name].change).max())
                spread = max(float(expected.std()), 1e-30)
                self.shares[layer.name] = change / spread

    def _output_allowance(
        self, layer: LoweredLayer | None, largest: float, rank: int
    ) -> float | NDArray[np.float64]:
        """In real units, of an output with this largest value; per channel for the results of a layer that are vectors."""
        share = OUTPUT_SHARE if layer is not None else FUNCTION_SHARE
        if not self.model.quantizers:
            share = WEIGHT_ONLY_SHARE
        allowed = (share + 4e-6 * self.ppm) * largest
        if layer is None:
            return allowed
        per_channel = self._float_error(layer)
        if rank == 2:
            return allowed + per_channel
        return allowed + float(per_channel.max())

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
    if node.op_type not in MULTIPLYING:
        return 0
    if node.op_type == "Einsum":
        return _einsum_multiply_adds(node, values)
    results = math.prod(shape_of(values[node.outputs[0]]))
    read = _operand_shape(node, 0, values)
    match node.op_type:
        case "GRU" | "LSTM" | "RNN":
            steps, batch = read[:2]
            input_weight = _operand_shape(node, 1, values)
            recurrent_weight = _operand_shape(node, 2, values)
            weights = math.prod(input_weight) + math.prod(recurrent_weight)
            return steps * batch * weights
        case "Conv":
            inputs = read[1] // _int_attribute(node, "group", 1)
            return results * inputs * math.prod(_kernel_shape(node))
        case "ConvTranspose":
            weight = constant(node.inputs[1])
            if weight is None:
                return 0
            return math.prod(read) * math.prod(weight.shape[1:])
        case "Gemm":
            summed_axis = 0 if _int_attribute(node, "transA", 0) == 1 else 1
            return results * read[summed_axis]
        case _:
            return results * read[-1]


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    if name not in node.attributes:
        return default
    return node.attributes[name].as_int()


def _einsum_multiply_adds(node: ir.Node, values: Mapping[ir.Value, Value]) -> int:
    """Those of two operands at least: one alone is only summed."""
    count = len(node.inputs)
    if count == 1:
        return 0
    shapes = [_operand_shape(node, index, values) for index in range(count)]
    return _einsum_products(node.attributes["equation"].as_string(), shapes)


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


def _resampled_side(value: ir.Value) -> int:
    """Pixels on the longest side of an image that is read between its pixels on the way to `value` from the quantizers
    before it; 1 where none is."""
    longest = 1
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        if node is None or is_mark(node):
            continue
        source = node.inputs[0]
        resamples = node.op_type in RESAMPLING and _mode(node) != "nearest"
        if resamples and source is not None and source.shape is not None:
            sides = [side for side in source.shape.dims[2:] if isinstance(side, int)]
            longest = max(longest, *sides)
        for read in node.inputs:
            if read is not None and read not in seen:
                seen.add(read)
                waiting.append(read)
    return longest


def _mode(node: ir.Node) -> str:
    """The `mode` of a Resize, by default nearest, or of a GridSample, by default linear."""
    if "mode" in node.attributes:
        return node.attributes["mode"].as_string()
    return "nearest" if node.op_type == "Resize" else "linear"


def _largest(values: Tensor) -> Tensor:
    """() of values' dtype: the largest finite magnitude, 0 where there is none."""
    magnitudes = values.abs()
    finite = magnitudes[magnitudes.isfinite()]
    if not finite.numel():
        return magnitudes.new_zeros(())
    return finite.max()


def _operand_shape(
    node: ir.Node, index: int, values: Mapping[ir.Value, Value]
) -> tuple[int, ...]:
    operand = node.inputs[index]
    if operand is not None and operand in values:
        return shape_of(values[operand])
    fixed = constant(operand)
    assert fixed is not None
    return tuple(fixed.shape)


def _kernel_shape(node: ir.Node) -> tuple[int, ...]:
    """(kH, kW) of a convolution, or (k,)."""
    if "kernel_shape" in node.attributes:
        return tuple(node.attributes["kernel_shape"].as_ints())
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return tuple(int(d) for d in list(weight.shape)[2:])  # type: ignore[arg-type]


def shape_of(value: Value) -> tuple[int, ...]:
    """Shape of a value, whatever it is carried by."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Codes):
        return tuple(value.stored.shape)
    if isinstance(value, Accumulator):
        return tuple(value.sums.shape)
    return tuple(value.real().shape)


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
    is_sum = isinstance(value, Accumulator)
    real = _real(value)
    if not grid.is_binary:
        return real / float(grid.scale) + grid.zero_point
    per_channel = [-1] + [1] * (real.dim() - 2)
    thresholds = torch.tensor(grid.thresholds).double().view(per_channel)
    above = real - thresholds
    if is_sum:
        return above
    return torch.where(above >= 0, 1.0, -1.0).double()


def _real(value: Value) -> Tensor:
    """The real numbers of `value`, float64; sums of integers are scaled in float64 too."""
    if isinstance(value, Accumulator):
        return value.sums.double() * value.unit.double()
    return real_of(value).double()


def layer_of_output(output: ir.Value, model: LoweredModel) -> LoweredLayer | None:
    """The layer whose results the graph returns as `output`, seen through layout operations."""
    node = output.producer()
    while node is not None and node.op_type in LAYOUT_OPS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    layer = weight_layer(node, model) if node is not None else None
    return layer if layer is not None and layer.input_quantizer else None
