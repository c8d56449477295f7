"""The trained net as the judge: the integer definition, operation by operation from the trained net's own codes, against
what the trained net computes; and the file's answers against the trained net's.

The file is compared with the definition code by code (`export/certificate.py`), but file and definition come from one
lowering and would share its mistakes. The trained net is run by PyTorch and shares none. From its codes before an operation,
integers may differ from its codes behind it by what is known of each tensor, in codes of its own scale:

    bias         |b_rounded - b| / s_y, per channel: the int32 bias (`export/rounding.py`)
    scales       parts per million by which scales were moved (`export/ties.py`), of the result
    float sums   FLOAT_SUM of the largest sum that the channel can have, for float32 adds in some order
    functions    FUNCTION codes, for the last bits of softmax, layer norm, GELU

A result u, in codes before it is rounded, explains a trained code q if |u - q| <= 1/2 + the allowance. One result that
explains nothing is one too many. The allowance is no licence: rounding that moves a tensor by more than LARGEST_ROUNDING
codes fails too, and so do answers that differ on more than 1 image in 100.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer
from export.reference import Accumulator, Codes, IntegerReference, Value, real_of
from export.rounding import bias_roundings
from export.skeleton import LAYOUT_OPS, constant, is_mark, mark_name, quantizers_in_order, weight_layer

FLOAT_SUM = 2.0**-22  # two sums in float32, each off by half a bit a few times
FUNCTION = 1e-3  # codes
LARGEST_ROUNDING = 0.5  # codes
OUTPUT_SHARE = 1e-5  # of the largest output, where floats are computed behind the last layer
DIFFERING_ANSWERS = 0.01  # share of answers that may differ
LEVEL = 0.01  # certainty to fail a file whose answers differ by no more: its images are a sample

Images = NDArray[np.float32]
Outputs = Mapping[str, Images]
Trained = Callable[[Images], tuple[Mapping[str, NDArray[np.uint8]], Outputs]]


@dataclass(frozen=True)
class Fidelity:
    """The trained net against the integer definition and the file.

    codes:         compared; `differing` of them differ and are explained.
    unexplained:   quantizer -> codes that nothing known explains.
    roundings:     layer -> codes by which its rounded bias moves results, where that is more than LARGEST_ROUNDING.
    outputs:       output -> how far it lies beyond what is allowed, as a share of its largest value; those that do.
    answers, same: of the first output, how many there are, and how many are alike when the file runs freely.
    multiply_adds: of the trained net for one image, counted by PyTorch's dispatcher; `on_integers` and `in_float` (by node)
                   are those of the file.
    """

    codes: int
    differing: int
    unexplained: dict[str, int]
    roundings: dict[str, float]
    outputs: dict[str, float]
    answers: int
    same: int
    multiply_adds: int
    on_integers: int
    in_float: dict[str, int]

    @property
    def agreement(self) -> float:
        return self.same / max(self.answers, 1)

    @property
    def answers_agree(self) -> bool:
        return within_share(self.answers - self.same, self.answers, DIFFERING_ANSWERS, LEVEL)

    @property
    def missing(self) -> int:
        """Multiply-adds of the trained net that the file does not make."""
        return max(self.multiply_adds - self.on_integers - sum(self.in_float.values()), 0)

    @property
    def passed(self) -> bool:
        faults = self.unexplained or self.roundings or self.outputs or self.missing
        return not faults and self.answers_agree

    def faults(self) -> list[str]:
        """One line for each thing that fails."""
        lines = [
            f"{name}: {count:,} codes are not what the trained net computes" for name, count in self.unexplained.items()
        ]
        lines += [
            f"{name}: rounding its bias moves results by {codes:.2g} codes; settle the net (qat.settle) and measure it again"
            for name, codes in self.roundings.items()
        ]
        lines += [
            f"output {name}: off by {share:.1e} of its largest value, beyond what rounding explains"
            for name, share in self.outputs.items()
        ]
        if self.missing:
            lines.append(f"{self.missing:,} multiply-adds of the trained net are not in the file")
        if not self.answers_agree:
            lines.append("fewer than 99 % of the answers are alike; settle the net (qat.settle) and measure it again")
        return lines

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        text = (
            f"trained net: from its own codes {self.differing:,} of {self.codes:,} differ by rounding, "
            f"{sum(self.unexplained.values()):,} by anything else; {self.same:,} of {self.answers:,} answers alike  "
            f"[{verdict}]"
        )
        return "\n".join([text, *(f"           {fault}" for fault in self.faults()[:8])])


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
    reference: IntegerReference, images: Images, trained: Trained, found: Outputs, batch: int
) -> tuple[Fidelity, Outputs]:
    """Judge the definition, and the outputs `found` that the file gave, on `images`; also returns the trained net's outputs.

    trained: images -> (carrier codes per quantizer, outputs by name) of the trained net.
    """
    follower = _Follower(reference.model)
    parts: list[Outputs] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        follower.codes, expected = trained(part)
        _, defined = reference.run(torch.from_numpy(part), follow=follower)
        follower.compare_outputs(defined, expected)
        parts.append(expected)
    from_training = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    roundings = {name: rounding.largest for name, rounding in follower.roundings.items()}
    first = next(iter(from_training))
    answers, same = compare_answers(found[first], from_training[first])
    order = quantizers_in_order(reference.model)
    return Fidelity(
        codes=follower.total,
        differing=follower.differing,
        unexplained={name: follower.unexplained[name] for name in order if name in follower.unexplained},
        roundings={name: codes for name, codes in roundings.items() if codes > LARGEST_ROUNDING},
        outputs=follower.outputs,
        answers=answers,
        same=same,
        multiply_adds=reference.model.multiply_adds,
        on_integers=follower.on_integers // len(images),
        in_float={name: count // len(images) for name, count in follower.in_float.items()},
    ), from_training


def compare_answers(first: Images, second: Images) -> tuple[int, int]:
    """(answers, how many are alike): the largest of axis 1 per image, and per place where there are several."""
    if first.ndim < 2:
        return 0, 0
    same = first.argmax(1) == second.argmax(1)
    return same.size, int(same.sum())


class _Follower:
    """Called by the reference behind every node. Compares each result with the trained net's codes and puts these in its
    place, so that the next operation starts from them."""

    def __init__(self, model: LoweredModel) -> None:
        self.model, self.roundings = model, bias_roundings(model)
        self.codes: Mapping[str, NDArray[np.uint8]] = {}
        self.total = self.differing = 0
        self.unexplained: dict[str, int] = {}
        self.outputs: dict[str, float] = {}
        self.on_integers = 0
        self.in_float: dict[str, int] = {}
        self.ppm = max((abs(grid.moved_ppm) for grid in model.quantizers.values()), default=0)
        self.behind = {value: name for name, value in model.trained_at.items()}
        self.allowances: dict[str, Tensor] = {}

    def __call__(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        self._count(node, values)
        name = mark_name(node) if is_mark(node) else ""
        if name in self.model.quantizers:
            source = node.inputs[0]
            assert source is not None
            grid = self.model.quantizers[name]
            producer = source.producer()
            layer = weight_layer(producer, self.model) if producer is not None else None
            before = in_codes(values[source], grid, layer)
            axis = -1 if producer is not None and producer.op_type == "Gemm" else 1
            channels = [-1 if a == axis % before.dim() else 1 for a in range(before.dim())]
            self.allowances[name] = self._allowance(layer, grid).view(channels if layer is not None else ())
            values[node.outputs[0]] = Codes(before.float(), grid)
            if name in self.model.trained_at:  # the layout operations up to there move what is not rounded yet
                return
            self._compare(name, node.outputs[0], values)
        for output in node.outputs:
            if output in self.behind:
                self._compare(self.behind[output], output, values)

    def _compare(self, name: str, at: ir.Value, values: dict[ir.Value, Value]) -> None:
        grid, expected = self.model.quantizers[name], self.codes[name]
        found = values[at]
        assert isinstance(found, Codes)
        trained = torch.from_numpy(expected).float()
        self.total += trained.numel()
        if trained.shape != found.carrier.shape:
            self.unexplained[name] = self.unexplained.get(name, 0) + trained.numel()
            return
        allowance = self.allowances[name]
        if allowance.dim() and name in self.model.trained_at:
            allowance = allowance.max()  # its channels may lie elsewhere now
        if grid.is_binary:
            wrong = (found.carrier >= 0) != (trained > grid.zero_point)
            unexplained = wrong & (found.carrier.abs() > allowance)
        else:
            rounded = found.carrier.round().clamp(grid.low, grid.high)
            wrong = rounded != trained
            clipped = found.carrier.clamp(grid.low, grid.high)
            unexplained = (clipped - trained).abs() > 0.5 + allowance
        self.differing += int((wrong & ~unexplained).sum())
        if count := int(unexplained.sum()):
            self.unexplained[name] = self.unexplained.get(name, 0) + count
        values[at] = Codes(trained, grid)

    def _allowance(self, layer: LoweredLayer | None, grid: LoweredQuantizer) -> Tensor:
        """In codes of `grid`, per channel behind a layer; in real units where one bit is decided."""
        moved = 1e-6 * self.ppm * 4 * grid.high
        if layer is None:
            return torch.tensor(FUNCTION + moved)
        sums = FLOAT_SUM * largest_results(layer, self.model.quantizers[layer.input_quantizer])
        if grid.is_binary:
            return torch.from_numpy(sums * (1 + moved)).float()
        allowed = sums / float(grid.scale) + moved + FLOAT_SUM * grid.high
        rounding = self.roundings.get(layer.name)
        if rounding is not None and rounding.in_codes is not None:
            allowed = allowed + np.abs(rounding.in_codes)
        return torch.from_numpy(allowed).float()

    def compare_outputs(self, defined: Outputs, trained: Outputs) -> None:
        for value in self.model.skeleton.graph.outputs:
            name = str(value.name)
            if name not in trained or defined[name].shape != trained[name].shape:
                self.outputs[name] = math.inf
                continue
            largest = float(np.abs(trained[name]).max(initial=0.0))
            allowed: float | NDArray[np.float64] = (OUTPUT_SHARE + 4e-6 * self.ppm) * largest
            layer = layer_behind(value, self.model)
            if layer is not None:
                per_channel = FLOAT_SUM * largest_results(layer, self.model.quantizers[layer.input_quantizer])
                if layer.name in self.roundings:
                    per_channel = per_channel + np.abs(self.roundings[layer.name].change)
                allowed = allowed + (per_channel if trained[name].ndim == 2 else float(per_channel.max()))
            difference = np.abs(defined[name].astype(np.float64) - trained[name])
            beyond = float((difference - allowed).max(initial=0.0))
            if not beyond <= 0:
                self.outputs[name] = max(self.outputs.get(name, 0.0), beyond / max(largest, 1e-30))

    def _count(self, node: ir.Node, values: dict[ir.Value, Value]) -> None:
        """Multiply-adds of a convolution or matrix product, where they run and whose they are."""
        count = multiply_adds(node, values)
        if not count:
            return
        if isinstance(values[node.outputs[0]], Accumulator):
            self.on_integers += count
        else:
            layer = weight_layer(node, self.model)
            name = layer.name if layer is not None else str(node.name)
            self.in_float[name] = self.in_float.get(name, 0) + count


def multiply_adds(node: ir.Node, values: Mapping[ir.Value, Value]) -> int:
    """How many multiply-adds `node` makes with the operands at hand; 0 for what is no contraction."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = node.inputs[:2]
    assert first is not None and second is not None
    made = math.prod(shape_of(values[node.outputs[0]]))
    read = shape_of(values[first]) if first in values else tuple(constant(first).shape)  # type: ignore[union-attr]
    match node.op_type:
        case "Conv":
            per_output = read[1] // node.attributes["group"].as_int() if "group" in node.attributes else read[1]
            return made * per_output * math.prod(_kernel_shape(node, second))
        case "ConvTranspose":
            weight = constant(second)
            return 0 if weight is None else math.prod(read) * math.prod(weight.shape[1:])
        case "Gemm":
            transposed = "transA" in node.attributes and node.attributes["transA"].as_int() == 1
            return made * read[0 if transposed else 1]
        case _:
            return made * read[-1]


def _kernel_shape(node: ir.Node, weight: ir.Value) -> tuple[int, ...]:
    if "kernel_shape" in node.attributes:
        return tuple(node.attributes["kernel_shape"].as_ints())
    assert weight.shape is not None
    return tuple(int(d) for d in list(weight.shape)[2:])  # type: ignore[arg-type]


def shape_of(value: Value) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Codes):
        return tuple(value.carrier.shape)
    return tuple(value.sums.shape if isinstance(value, Accumulator) else value.real().shape)


def in_codes(value: Value, grid: LoweredQuantizer, layer: LoweredLayer | None) -> Tensor:
    """What `value` is on `grid` before it is rounded or clipped, zero point included, float64.

    One bit has no such scale: how far the results of `layer` lie above the threshold, in real units, or +1 and -1 where codes
    are compared with it.
    """
    if grid.is_binary:
        thresholds = torch.tensor(grid.thresholds).double()
        if isinstance(value, Accumulator) and layer is not None:
            return _above_thresholds(value, layer, thresholds)
        real = real_of(value).double()
        return torch.where(real >= thresholds.view(-1, *[1] * (real.dim() - 2)), 1.0, -1.0).double()
    if isinstance(value, Accumulator):
        return value.sums.double() * (value.unit.double() / float(grid.scale)) + grid.zero_point
    return real_of(value).double() / float(grid.scale) + grid.zero_point


def _above_thresholds(value: Accumulator, layer: LoweredLayer, thresholds: Tensor) -> Tensor:
    """The integer bias holds the threshold, rounded to where no sum lies; this is the trained bias in its place."""
    assert layer.bias_codes is not None
    channels = value.unit.shape
    bias_codes, bias = torch.from_numpy(layer.bias_codes).double(), torch.from_numpy(layer.folded_bias)
    above = (bias - thresholds).view(channels)
    return (value.sums - bias_codes.view(channels)) * value.unit.double() + above


def largest_results(layer: LoweredLayer, source: LoweredQuantizer) -> NDArray[np.float64]:
    """float64 (O,): the largest magnitude a channel's result can have in real units, bias included."""
    largest_input = max(source.high - source.zero_point, source.zero_point - source.low) * float(source.scale)
    magnitudes = np.abs(layer.codes.astype(np.float64)).reshape(len(layer.codes), -1).sum(1)
    return magnitudes * np.abs(layer.scale.astype(np.float64)) * largest_input + np.abs(layer.folded_bias)


def layer_behind(output: ir.Value, model: LoweredModel) -> LoweredLayer | None:
    """The layer whose results the graph returns as `output`, seen through layout operations."""
    node = output.producer()
    while node is not None and node.op_type in LAYOUT_OPS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    layer = weight_layer(node, model) if node is not None else None
    return layer if layer is not None and layer.input_quantizer else None
