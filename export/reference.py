"""The integer definition of a canonical `LoweredModel`, in torch (`docs/lowering.md`).

`export/arithmetic.py` states how results become codes; here it is run on whole nets. This is what ONNX Runtime's integer
kernels compute on the CPU, found by experiment over all pairs of codes; the certificate proves it for each file. A bias is an
integer; where a file holds a float instead (export/qdq.py), it is that float divided by s_x · s_w.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.arithmetic import (
    multiplier_of_mean,
    normalized,
    ratio_of_product,
    softmax_codes,
    terms_of_norm,
    terms_of_sum,
)
from export.feeds import Feeds, named
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.norms import LayerNorm, norm_on_codes
from export.skeleton import (
    code_of_fill,
    constant,
    ints_of,
    is_mark,
    is_set,
    mark_name,
    moves_codes,
    weight_layer,
)
from export.softmax import is_softmax_to_codes
from export.thresholds import code_thresholds

# Integers up to here are exact in float32, so float32 convolutions of codes are too
FLOAT32_EXACT = 1 << 24


@dataclass(frozen=True)
class Codes:
    """uint8 storage codes held as float32 integers."""

    stored: Tensor
    grid: LoweredQuantizer

    def centred(self) -> Tensor:
        """Codes minus the zero point."""
        return self.stored - self.grid.zero_point

    def real(self) -> Tensor:
        """What the codes stand for, float32."""
        return self.centred() * float(self.grid.scale)


@dataclass(frozen=True)
class Accumulator:
    """Integer sums of a layer, bias included, float64; `unit` is the real value of 1 per output channel, float32."""

    sums: Tensor
    unit: Tensor

    def real(self) -> Tensor:
        """What the sums stand for, float32."""
        return self.sums.float() * self.unit


@dataclass(frozen=True)
class Sum:
    """Sum of two quantized tensors, not yet rounded to a grid."""

    first: Codes
    second: Codes

    def real(self) -> Tensor:
        """In floating point."""
        return self.first.real() + self.second.real()


@dataclass(frozen=True)
class Product:
    """Elementwise product of two tensors, broadcast."""

    first: Codes
    second: Codes

    def real(self) -> Tensor:
        """In floating point."""
        return self.first.real() * self.second.real()


@dataclass(frozen=True)
class Joined:
    """Concatenation: every part is requantized on its own."""

    parts: tuple[Codes, ...]
    axis: int

    def real(self) -> Tensor:
        """In floating point."""
        return torch.cat([part.real() for part in self.parts], self.axis)


@dataclass(frozen=True)
class Mean:
    """Mean over the pixels of quantized images, not yet rounded to a grid."""

    source: Codes

    def real(self) -> Tensor:
        """In floating point."""
        return self.source.real().mean(dim=(2, 3), keepdim=True)


@dataclass(frozen=True)
class Window:
    """Where a pool looks: heights and widths; a sequence (N, C, L) is an image of one row.

    pads: top, left, bottom, right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False

    @classmethod
    def of(cls, node: ir.Node) -> "Window":
        """The window of a pool's node."""
        kernel = list(node.attributes["kernel_shape"].as_ints())
        stride = list(node.attributes["strides"].as_ints())
        pads = ints_of(node, "pads", [0, 0] * len(kernel))
        dilation = ints_of(node, "dilations", [1] * len(kernel))
        if len(kernel) == 1:
            kernel = [1, *kernel]
            stride = [1, *stride]
            pads = [0, pads[0], 0, pads[1]]
            dilation = [1, *dilation]
        top, left, bottom, right = pads
        return cls(
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (top, left, bottom, right),
            (dilation[0], dilation[1]),
            is_set(node, "ceil_mode"),
        )

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Padding in the order of `F.pad`."""
        top, left, bottom, right = self.pads
        return left, right, top, bottom


@dataclass(frozen=True)
class WindowMean:
    """Average pooling over windows: float32 sums in the kernel's order, as the runtime's kernel adds them."""

    source: Codes
    window: Window
    counts_padding: bool

    def real(self) -> Tensor:
        """In floating point."""
        x = self.source.real()
        if x.dim() == 3:  # a sequence
            return self._of_images(x.unsqueeze(2)).squeeze(2)
        return self._of_images(x)

    def _of_images(self, x: Tensor) -> Tensor:
        edges = self.window.edges
        height = self._outputs(x.shape[2], 0)
        width = self._outputs(x.shape[3], 1)
        padded = self._extended(F.pad(x, edges), height, width)
        inside = torch.ones_like(x[:1, :1])
        counted = F.pad(inside, edges, value=float(self.counts_padding))
        counted = self._extended(counted, height, width)
        total = torch.zeros(())
        count = torch.zeros(())
        for row in range(self.window.kernel[0]):
            for column in range(self.window.kernel[1]):
                total = total + self._tap(padded, row, column, height, width)
                count = count + self._tap(counted, row, column, height, width)
        return total / count

    def _outputs(self, size: int, axis: int) -> int:
        before = self.window.pads[axis]
        after = self.window.pads[axis + 2]
        stride = self.window.stride[axis]
        free = size + before + after - self.window.kernel[axis]
        if not self.window.ceil:
            return free // stride + 1
        last = -(-free // stride)
        starts_inside = last * stride < size + before
        return last + 1 if starts_inside else last

    def _extended(self, x: Tensor, height: int, width: int) -> Tensor:
        """With zeros at the end as far as the last window reaches, which ceil mode lets hang over."""
        rows = (height - 1) * self.window.stride[0] + self.window.kernel[0]
        columns = (width - 1) * self.window.stride[1] + self.window.kernel[1]
        missing_rows = max(rows - x.shape[2], 0)
        missing_columns = max(columns - x.shape[3], 0)
        return F.pad(x, [0, missing_columns, 0, missing_rows])

    def _tap(self, x: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
        """One element of every window, for all windows at once."""
        down, across = self.window.stride
        rows = slice(row, row + (height - 1) * down + 1, down)
        columns = slice(column, column + (width - 1) * across + 1, across)
        return x[:, :, rows, columns]


@dataclass(frozen=True)
class Normalized:
    """Layer norm of codes over their last axis, not yet rounded to a grid."""

    source: Codes
    norm: LayerNorm

    def real(self) -> Tensor:
        """In floating point."""
        gain = torch.from_numpy(self.norm.gain)
        shift = torch.from_numpy(self.norm.shift)
        x = self.source.real()
        return F.layer_norm(x, gain.shape, gain, shift, self.norm.epsilon)

    def on(self, grid: LoweredQuantizer) -> Tensor:
        """Storage codes before the clip, float32 integers."""
        norm = self.norm
        terms = terms_of_norm(norm.gain, norm.shift, norm.epsilon, norm.grid, grid)
        codes = self.source.stored.numpy().astype(np.int64)
        return torch.from_numpy(normalized(codes, terms, grid)).float()


@dataclass(frozen=True)
class Softmaxed:
    """Softmax of floats over their last axis, not yet rounded to a grid."""

    scores: Tensor

    def real(self) -> Tensor:
        """In floating point."""
        return self.scores.softmax(-1)

    def on(self, grid: LoweredQuantizer) -> Tensor:
        """Storage codes before the clip, float32 integers."""
        codes = softmax_codes(self.scores.float().numpy(), grid)
        return torch.from_numpy(codes).float()


Value = (
    Tensor
    | Codes
    | Accumulator
    | Sum
    | Product
    | Joined
    | Mean
    | WindowMean
    | Normalized
    | Softmaxed
)
Follow = Callable[[ir.Node, dict[ir.Value, "Value"]], None]


def _inputs(
    images: Tensor | NDArray[np.generic] | Feeds, graph: ir.Graph
) -> list[Tensor]:
    """The graph's inputs in its order; numbers of floating point in float32."""
    if isinstance(images, Tensor):
        given = [images]
    else:
        names = [str(value.name) for value in graph.inputs]
        given = [torch.from_numpy(array) for array in named(images, names).values()]
    return [x.float() if x.is_floating_point() else x for x in given]


FloatOperator = Callable[
    [ir.Node, list[NDArray[np.generic] | None]], list[NDArray[np.generic]]
]


class IntegerReference:
    """Runs a canonical model on integers.

    float_operator: evaluates a node that stays in floating point (softmax, LayerNorm, GELU, gates); without it such a node
    raises ExportError.

    `run(images)` returns ({quantizer: uint8 storage codes}, {output: float32}). With `given`, every quantizer's codes are
    computed from the *given* codes of the tensors before it: a difference then names the operation it arose in. `follow` is
    called after every node with all values so far, and may put others in their place (`export/fidelity.py`).

    farthest_from_tie: of the last run with `given`, how far results that differ from the given codes lie from a tie at most,
    in codes. Floats added in another order can decide a result near a tie, and no other.
    """

    def __init__(
        self, model: LoweredModel, float_operator: FloatOperator | None = None
    ) -> None:
        self.model, self.float_operator = model, float_operator
        self.farthest_from_tie = 0.0

    @torch.no_grad()
    def run(
        self,
        images: Tensor | NDArray[np.generic] | Feeds,
        given: Mapping[str, NDArray[np.generic]] | None = None,
        follow: Follow | None = None,
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
        """Codes of every quantizer and outputs, by name, for one batch.

        given: codes to start each operation from instead of the computed ones; follow: called after every node.
        """
        graph = self.model.skeleton.graph
        self.farthest_from_tie = 0.0
        inputs = _inputs(images, graph)
        values: dict[ir.Value, Value] = dict(zip(graph.inputs, inputs, strict=False))
        computed: dict[str, NDArray[np.uint8]] = {}
        readers = Counter(v for node in graph for v in node.inputs if v is not None)
        for node in graph:
            if is_mark(node):
                self._mark(node, values, computed, given)
            else:
                results = self._apply(node, values)
                values |= zip(node.outputs, results, strict=True)
            if follow is not None:
                follow(node, values)
            for value in filter(None, node.inputs):
                readers[value] -= 1
                if not readers[value] and not value.is_graph_output():
                    values.pop(value, None)
        outputs: dict[str, NDArray[np.float32]] = {}
        for value in graph.outputs:
            outputs[str(value.name)] = real_of(values[value]).float().numpy()
        return computed, outputs

    def _mark(
        self,
        node: ir.Node,
        values: dict[ir.Value, Value],
        computed: dict[str, NDArray[np.uint8]],
        given: Mapping[str, NDArray[np.generic]] | None,
    ) -> None:
        quantizer = self.model.quantizers.get(mark_name(node))
        if quantizer is None:
            return  # a weight: its codes are the layer's
        assert node.inputs[0] is not None
        value = values[node.inputs[0]]
        stored = quantize(value, quantizer)
        computed[quantizer.name] = stored.to(torch.uint8).numpy()
        if given is not None:
            known = _given_codes(given, quantizer, stored)
            differing = known != stored
            if differing.any():
                distance = float(distance_from_tie(value, quantizer)[differing].max())
                self.farthest_from_tie = max(self.farthest_from_tie, distance)
            stored = known
        values[node.outputs[0]] = Codes(stored, quantizer)

    def _apply(self, node: ir.Node, values: dict[ir.Value, Value]) -> Sequence[Value]:
        """What `node` gives, one value per output."""
        operands = [values.get(v) if v is not None else None for v in node.inputs]
        if not node.inputs or node.inputs[0] is None:
            return self._in_float(node, operands)
        x = operands[0]
        layer = weight_layer(node, self.model)
        if layer is not None and not layer.input_quantizer:
            return [self._weight_only(node, layer, x)]
        if layer is not None:
            return [accumulate(node, layer, _codes(x, node))]
        if node.op_type == "Reshape" and x is not None:
            shape = constant(node.inputs[1])
            if shape is not None:
                return [_reshaped(node, x, shape)]
        norm = norm_on_codes(node, self.model)
        if norm is not None:
            return [Normalized(_codes(x, node), norm)]
        if is_softmax_to_codes(node, self.model):
            assert x is not None
            return [Softmaxed(real_of(x))]
        codes = [operand for operand in operands if isinstance(operand, Codes)]
        if len(codes) == len(operands):
            result = _on_codes(node, codes)
            if result is not None:
                return [result]
        return self._in_float(node, operands)

    def _weight_only(
        self, node: ir.Node, layer: LoweredLayer, x: Value | None
    ) -> Tensor:
        """A layer that reads floats: the runtime's operator on the codes times their scale, as DequantizeLinear has them."""
        assert x is not None
        scale = layer.stored_scale.reshape(-1, *[1] * (layer.codes.ndim - 1))
        weight = layer.codes.astype(np.float32) * layer.weight_multiplier * scale
        operands = [real_of(x).contiguous().numpy(), weight, layer.float_bias]
        return self._evaluate(node, operands)[0]

    def _in_float(
        self, node: ir.Node, operands: Sequence[Value | None]
    ) -> Sequence[Value]:
        if operands and isinstance(operands[0], Codes) and moves_codes(node):
            return self._moved(node, operands[0], operands)
        given = []
        for value, operand in zip(node.inputs, operands, strict=True):
            given.append(_operand(value, operand))
        return self._evaluate(node, given)

    def _moved(
        self, node: ir.Node, source: Codes, operands: Sequence[Value | None]
    ) -> list[Codes]:
        """The codes of `source` where `node` puts them, as in the file."""
        given: list[NDArray[np.generic] | None] = []
        for value, operand in zip(node.inputs, operands, strict=True):
            if isinstance(operand, Codes):
                given.append(operand.stored.numpy())
            else:
                given.append(_operand(value, operand))
        if node.op_type == "Pad":
            given[2:3] = [np.array(code_of_fill(node, source.grid), np.float32)]
        return [Codes(codes, source.grid) for codes in self._evaluate(node, given)]

    def _evaluate(
        self, node: ir.Node, operands: Sequence[NDArray[np.generic] | None]
    ) -> list[Tensor]:
        if self.float_operator is None:
            raise ExportError(
                f"node {node.name!r}: {node.op_type} has no integer definition"
            )
        results = self.float_operator(node, list(operands))
        return [torch.from_numpy(np.array(result)) for result in results]


def _given_codes(
    given: Mapping[str, NDArray[np.generic]],
    quantizer: LoweredQuantizer,
    computed: Tensor,
) -> Tensor:
    """The given codes of `quantizer`, float32; raises ExportError where their shape is not that of the computed ones."""
    known = given[quantizer.name]
    if known.shape != tuple(computed.shape):
        raise ExportError(
            f"quantizer {quantizer.name!r}: given codes of shape {known.shape}, it computes {tuple(computed.shape)}"
        )
    return torch.from_numpy(np.ascontiguousarray(known)).float()


def _operand(
    value: ir.Value | None, computed: Value | None
) -> NDArray[np.generic] | None:
    """What an operator in floating point reads: a computed value, or a constant of the graph."""
    if computed is None:
        return constant(value)
    return real_of(computed).contiguous().numpy()


def _on_codes(node: ir.Node, operands: Sequence[Codes]) -> Value | None:
    """What `node` gives for codes alone, None where it has no definition on codes."""
    x = operands[0]
    match node.op_type:
        case "Add":
            return Sum(x, operands[1])
        case "Mul":
            return Product(x, operands[1])
        case "MatMul":
            return _matmul(x, operands[1])
        case "Concat" if not moves_codes(node):
            return Joined(tuple(operands), node.attributes["axis"].as_int())
        case "GlobalAveragePool":
            return Mean(x)
        case "AveragePool":
            return _average_pool(node, x)
        case "MaxPool":
            return Codes(_max_pool(node, x.stored), x.grid)
        case "Flatten":
            return Codes(x.stored.flatten(1), x.grid)
        case "Transpose":
            order = tuple(node.attributes["perm"].as_ints())
            return Codes(x.stored.permute(order).contiguous(), x.grid)
    return None


def _reshaped(node: ir.Node, x: Value, shape: NDArray[np.generic]) -> Value:
    if isinstance(x, Codes):
        return Codes(x.stored.reshape(_resolved(node, shape, x.stored)), x.grid)
    real = real_of(x)
    return real.reshape(_resolved(node, shape, real))


def _resolved(node: ir.Node, shape: NDArray[np.generic], x: Tensor) -> list[int]:
    """The shape a Reshape asks for; 0 copies the input's size unless allowzero is set."""
    wanted = [int(size) for size in shape.ravel()]
    if is_set(node, "allowzero"):
        return wanted
    return [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]


def _matmul(a: Codes, b: Codes) -> Accumulator:
    sums = a.centred().double() @ b.centred().double()
    return Accumulator(sums, torch.tensor(float(a.grid.scale * b.grid.scale)))


def distance_from_tie(value: Value, grid: LoweredQuantizer) -> Tensor:
    """How far each result lies from the nearest tie between two codes, in codes; 0.5 in the middle. One bit has none: 0.5."""
    real = real_of(value).double()
    if grid.is_binary:
        return torch.full_like(real, 0.5)
    scaled = real / float(grid.scale)
    return (scaled - scaled.floor() - 0.5).abs()


def quantize(value: Value, grid: LoweredQuantizer) -> Tensor:
    """Storage codes (float32 integers) of `value` on `grid`, as `export/arithmetic.py` defines them."""
    if grid.is_binary:
        return _binarize(value, grid)
    if isinstance(value, Joined):
        parts = [quantize(part, grid) for part in value.parts]
        return torch.cat(parts, value.axis)
    return _unclipped(value, grid).clamp_(grid.low, grid.high)


def _unclipped(value: Value, grid: LoweredQuantizer) -> Tensor:
    scale = torch.tensor(float(grid.scale))
    match value:
        case Accumulator():
            scaled = value.sums.float() * (value.unit / scale)
            return torch.round(scaled) + grid.zero_point
        case Sum():
            return torch.round(_fused_sum(value, grid))
        case Product():
            a, b = value.first, value.second
            ratio = torch.tensor(float(ratio_of_product(a.grid, b.grid, grid)))
            return torch.round(a.centred() * b.centred() * ratio + grid.zero_point)
        case Mean():
            x = value.source
            count = x.stored.shape[2] * x.stored.shape[3]
            multiplier = torch.tensor(float(multiplier_of_mean(x.grid, count, grid)))
            sums = x.centred().double().sum(dim=(2, 3), keepdim=True).float()
            return torch.round(sums * multiplier) + grid.zero_point
        case Normalized() | Softmaxed():
            return value.on(grid)
        case WindowMean():
            # Added before rounding: it decides near ties
            return torch.round(value.real() / scale + grid.zero_point)
        case _:
            return torch.round(real_of(value) / scale) + grid.zero_point


def _binarize(value: Value, grid: LoweredQuantizer) -> Tensor:
    """Storage code 0 or 254, decided in integers: a layer's biased sum in the direction of its scale, or a code's
    threshold."""
    if isinstance(value, Accumulator):
        is_one = value.sums * value.unit.sign() >= 0
    elif isinstance(value, Codes):
        thresholds = code_thresholds(value.grid, grid).astype(np.float32)
        spatial_axes = value.stored.dim() - 2
        first = torch.from_numpy(thresholds).view(-1, *[1] * spatial_axes)
        is_one = value.stored >= first
    else:
        raise ExportError(
            f"quantizer {grid.name!r}: one bit is decided from a layer's sums or from codes, not from floats"
        )
    return grid.high * is_one.float()


def _fused_sum(value: Sum, grid: LoweredQuantizer) -> Tensor:
    a, b = value.first, value.second
    terms = terms_of_sum(a.grid, b.grid, grid)
    # float64 holds a product of a code and a float32 exactly, so rounding after the sum is a fused multiply-add.
    product_b = b.stored.double() * float(terms.ratio_b)
    inner = (product_b + float(terms.constant)).float()
    product_a = a.stored.double() * float(terms.ratio_a)
    return (product_a + inner.double()).float()


def accumulate(node: ir.Node, layer: LoweredLayer, x: Codes) -> Accumulator:
    """Exact integer sums of a Conv or Gemm node on codes, bias included."""
    weight = torch.from_numpy(layer.codes.astype(np.float32) * layer.weight_multiplier)
    dtype = _exact_dtype(weight, x.grid)
    weight = weight.to(dtype)
    codes = x.centred().to(dtype)
    unit = torch.from_numpy(np.float32(x.grid.scale) * layer.stored_scale)
    bias = _bias_in_units(layer, unit)
    if node.op_type == "Gemm":
        return Accumulator(F.linear(codes, weight).double() + bias, unit)
    sums = _convolved(node, codes, weight)
    channels = (-1, *[1] * (weight.dim() - 2))
    return Accumulator(sums.double() + bias.view(channels), unit.view(channels))


def _exact_dtype(weight: Tensor, grid: LoweredQuantizer) -> torch.dtype:
    """A type in which no sum of products of `weight` (O_...) and codes on `grid` is rounded."""
    largest_code = max(grid.high - grid.zero_point, grid.zero_point - grid.low)
    largest_sum = largest_code * float(weight.abs().flatten(1).sum(1).max())
    return torch.float32 if largest_sum < FLOAT32_EXACT else torch.float64


def _bias_in_units(layer: LoweredLayer, unit: Tensor) -> Tensor:
    """float64 (O,): the bias in units of the layer's sums; a float bias is divided by them."""
    if layer.bias_codes is None:
        return torch.from_numpy(layer.float_bias).double() / unit.double()
    return torch.from_numpy(layer.bias_codes).double()


def _convolved(node: ir.Node, codes: Tensor, weight: Tensor) -> Tensor:
    axes = weight.dim() - 2
    pads = ints_of(node, "pads", [0] * (2 * axes))
    edges = []  # F.pad's order
    for axis in reversed(range(axes)):
        edges += [pads[axis], pads[axis + axes]]
    convolve = F.conv1d if axes == 1 else F.conv2d
    return convolve(
        F.pad(codes, edges),
        weight,
        stride=tuple(node.attributes["strides"].as_ints()),
        dilation=tuple(node.attributes["dilations"].as_ints()),
        groups=node.attributes["group"].as_int(),
    )


def _average_pool(node: ir.Node, source: Codes) -> WindowMean:
    window = Window.of(node)
    if window.dilation != (1, 1):
        raise ExportError(
            f"node {node.name!r}: a dilated AveragePool has no integer definition"
        )
    return WindowMean(source, window, is_set(node, "count_include_pad"))


def _max_pool(node: ir.Node, stored: Tensor) -> Tensor:
    window = Window.of(node)
    is_sequence = stored.dim() == 3
    if is_sequence:
        stored = stored.unsqueeze(2)
    # 0 is the smallest storage code
    padded = F.pad(stored, window.edges, value=0.0)
    pooled = F.max_pool2d(
        padded, window.kernel, window.stride, 0, window.dilation, window.ceil
    )
    return pooled.squeeze(2) if is_sequence else pooled


def _codes(value: Value | None, node: ir.Node) -> Codes:
    if not isinstance(value, Codes):
        raise ExportError(
            f"node {node.name!r}: {node.op_type} reads a tensor that no quantizer precedes"
        )
    return value


def real_of(value: Value) -> Tensor:
    """What a value stands for, float32."""
    return value if isinstance(value, Tensor) else value.real()
