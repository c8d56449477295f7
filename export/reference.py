"""The integer definition of a canonical `LoweredModel`, in torch (`docs/lowering.md`).

    conv, linear   q = clip(rint(fp32(acc + bias) · m) + z, low, high),   m = fp32(fp32(s_x · s_w) / s_y)
    add            q = clip(rint(fma(a, r_a, fma(b, r_b, c))), low, high), r = s / s_y, c = z_y - fma(r_a, z_a, r_b z_b)
    global pool    q = clip(rint(fp32(sum of codes) · fp32(s_x / (s_y · n))) + z, low, high)
    average pool   q = clip(rint((((x_1 + x_2) + x_3) + ...) / n / s_y + z)), x = fp32((q_x - z_x) · s_x), row by row
    one bit        q = 254 where acc + bias >= 0 (<= 0 where m < 0), or where a code reaches its threshold, else 0
    requantize     q = clip(rint(fp32((q_x - z_x) · s_x) / s_y) + z, low, high)

acc is the exact integer sum; all multipliers are float32; rint rounds half to even. This is what ONNX Runtime's integer
kernels compute on the CPU, found by experiment over all pairs of codes; the certificate proves it for each file. bias is an
integer; where a file holds a float instead (export/qdq.py), it is that float divided by s_x · s_w.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.arithmetic import constant_of_sum
from export.feeds import Feeds, named
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.skeleton import (
    code_of_fill,
    constant,
    is_mark,
    mark_name,
    moves_codes,
    weight_layer,
)
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
class WindowMean:
    """Average pooling over windows: float32 sums in the kernel's order, as the runtime's kernel adds them.

    Over one axis, as a sequence (N, C, L) is pooled, it is that of an image of one row.
    """

    source: Codes
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    ceil: bool
    counts_padding: bool

    def real(self) -> Tensor:
        """In floating point."""
        x = self.source.real()
        if is_sequence := x.dim() == 3:
            x = x.unsqueeze(2)
        height, width = (self._outputs(x.shape[2 + axis], axis) for axis in (0, 1))
        top, left, bottom, right = self.pads
        edges = [left, right, top, bottom]
        padded = self._extended(F.pad(x, edges), height, width)
        counted = F.pad(
            torch.ones_like(x[:1, :1]), edges, value=float(self.counts_padding)
        )
        counted = self._extended(counted, height, width)
        total, count = torch.zeros(()), torch.zeros(())
        for row in range(self.kernel[0]):
            for column in range(self.kernel[1]):
                total = total + self._tap(padded, row, column, height, width)
                count = count + self._tap(counted, row, column, height, width)
        return (total / count).squeeze(2) if is_sequence else total / count

    def _outputs(self, size: int, axis: int) -> int:
        free = size + self.pads[axis] + self.pads[axis + 2] - self.kernel[axis]
        count = (
            -(-free // self.stride[axis]) if self.ceil else free // self.stride[axis]
        ) + 1
        starts_inside = (count - 1) * self.stride[axis] < size + self.pads[axis]
        return count if starts_inside else count - 1

    def _extended(self, x: Tensor, height: int, width: int) -> Tensor:
        """With zeros at the end as far as the last window reaches, which ceil mode lets hang over."""
        rows = (height - 1) * self.stride[0] + self.kernel[0]
        columns = (width - 1) * self.stride[1] + self.kernel[1]
        return F.pad(x, [0, max(columns - x.shape[3], 0), 0, max(rows - x.shape[2], 0)])

    def _tap(self, x: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
        rows = slice(row, row + (height - 1) * self.stride[0] + 1, self.stride[0])
        return x[
            :,
            :,
            rows,
            column : column + (width - 1) * self.stride[1] + 1 : self.stride[1],
        ]


Value = Tensor | Codes | Accumulator | Sum | Product | Joined | Mean | WindowMean
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
    return [
        tensor.float() if tensor.is_floating_point() else tensor for tensor in given
    ]


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
        values: dict[ir.Value, Value] = dict(
            zip(graph.inputs, _inputs(images, graph), strict=False)
        )
        computed: dict[str, NDArray[np.uint8]] = {}
        readers = Counter(v for node in graph for v in node.inputs if v is not None)
        for node in graph:
            if is_mark(node):
                self._mark(node, values, computed, given)
            else:
                results = self._apply(node, values)
                values |= zip(
                    node.outputs,
                    results if isinstance(results, list) else [results],
                    strict=True,
                )
            if follow is not None:
                follow(node, values)
            for value in filter(None, node.inputs):
                readers[value] -= 1
                if not readers[value] and not value.is_graph_output():
                    values.pop(value, None)
        outputs = {
            str(value.name): real_of(values[value]).float().numpy()
            for value in graph.outputs
        }
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
            known = given[quantizer.name]
            if known.shape != tuple(stored.shape):
                raise ExportError(
                    f"quantizer {quantizer.name!r}: given codes of shape {known.shape}, it computes {tuple(stored.shape)}"
                )
            found = torch.from_numpy(np.ascontiguousarray(known)).float()
            differing = found != stored
            if differing.any():
                distance = float(distance_from_tie(value, quantizer)[differing].max())
                self.farthest_from_tie = max(self.farthest_from_tie, distance)
            stored = found
        values[node.outputs[0]] = Codes(stored, quantizer)

    def _apply(
        self, node: ir.Node, values: dict[ir.Value, Value]
    ) -> Value | list[Value]:
        if not node.inputs or node.inputs[0] is None:
            return self._in_float(node, values)
        x = values.get(node.inputs[0])
        layer = weight_layer(node, self.model)
        if layer is not None and not layer.input_quantizer:
            return self._weight_only(node, layer, x)
        if layer is not None:
            return accumulate(node, layer, _codes(x, node))
        if node.op_type == "Reshape" and isinstance(x, Accumulator):
            x = x.real()
        match node.op_type:
            case "Add" if self._reads_codes_only(node, values):
                assert node.inputs[1] is not None
                return Sum(_codes(x, node), _codes(values[node.inputs[1]], node))
            case "Concat" if self._reads_codes_only(node, values) and not moves_codes(
                node
            ):
                parts = tuple(
                    _codes(values[v], node) for v in node.inputs if v is not None
                )
                return Joined(parts, node.attributes["axis"].as_int())
            case "GlobalAveragePool" if isinstance(x, Codes):
                return Mean(_codes(x, node))
            case "AveragePool" if isinstance(x, Codes):
                return _average_pool(node, _codes(x, node))
            case "MaxPool" if isinstance(x, Codes):
                return Codes(_max_pool(node, x.stored), x.grid)
            case "Flatten" if isinstance(x, Codes):
                return Codes(x.stored.flatten(1), x.grid)
            case "Reshape" if constant(node.inputs[1]) is not None and x is not None:
                shape = _resolved(node, x)
                return (
                    Codes(x.stored.reshape(shape), x.grid)
                    if isinstance(x, Codes)
                    else real_of(x).reshape(shape)
                )
            case "Transpose" if isinstance(x, Codes):
                return Codes(
                    x.stored.permute(
                        tuple(node.attributes["perm"].as_ints())
                    ).contiguous(),
                    x.grid,
                )
            case "Mul" | "MatMul" if self._reads_codes_only(node, values):
                second = _codes(values[node.inputs[1]], node)  # type: ignore[index]
                return (
                    Product(_codes(x, node), second)
                    if node.op_type == "Mul"
                    else _matmul(_codes(x, node), second)
                )
        return self._in_float(node, values)

    def _weight_only(
        self, node: ir.Node, layer: LoweredLayer, x: Value | None
    ) -> Tensor:
        """A layer that reads floats: the runtime's operator on the codes times their scale, as DequantizeLinear has them."""
        assert x is not None
        scale = layer.stored_scale.reshape(-1, *[1] * (layer.codes.ndim - 1))
        weight = layer.codes.astype(np.float32) * layer.weight_multiplier * scale
        return self._evaluate(
            node, [real_of(x).contiguous().numpy(), weight, layer.float_bias]
        )[0]

    def _reads_codes_only(self, node: ir.Node, values: dict[ir.Value, Value]) -> bool:
        return all(
            v is not None and isinstance(values.get(v), Codes) for v in node.inputs
        )

    def _in_float(self, node: ir.Node, values: dict[ir.Value, Value]) -> list[Value]:
        given = [values.get(v) if v is not None else None for v in node.inputs]
        source = given[0] if given else None
        if isinstance(source, Codes) and moves_codes(node):  # as in the file
            rest = [
                x.stored.numpy() if isinstance(x, Codes) else self._operand(v, x)
                for v, x in zip(node.inputs[1:], given[1:], strict=True)
            ]
            if node.op_type == "Pad":
                rest[1:2] = [np.array(code_of_fill(node, source.grid), np.float32)]
            outputs = self._evaluate(node, [source.stored.numpy(), *rest])
            return [Codes(codes, source.grid) for codes in outputs]
        return list(
            self._evaluate(
                node,
                [self._operand(v, x) for v, x in zip(node.inputs, given, strict=True)],
            )
        )

    def _operand(
        self, name: ir.Value | None, value: Value | None
    ) -> NDArray[np.generic] | None:
        return constant(name) if value is None else real_of(value).contiguous().numpy()

    def _evaluate(
        self, node: ir.Node, operands: list[NDArray[np.generic] | None]
    ) -> list[Tensor]:
        if self.float_operator is None:
            raise ExportError(
                f"node {node.name!r}: {node.op_type} has no integer definition"
            )
        return [
            torch.from_numpy(np.array(result))
            for result in self.float_operator(node, operands)
        ]


def _resolved(node: ir.Node, x: Value) -> list[int]:
    """The shape a Reshape asks for; 0 copies the input's size unless allowzero is set."""
    wanted = constant(node.inputs[1])
    assert wanted is not None
    sizes = (x.stored if isinstance(x, Codes) else real_of(x)).shape
    keeps_zero = (
        "allowzero" in node.attributes and node.attributes["allowzero"].as_int() == 1
    )
    return [
        sizes[i] if d == 0 and not keeps_zero else int(d)
        for i, d in enumerate(wanted.ravel())
    ]


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
    """Storage codes (float32 integers) of `value` on `grid`."""
    scale = torch.tensor(float(grid.scale))
    if grid.is_binary:
        return _binarize(value, grid)
    if isinstance(value, Accumulator):
        code = torch.round(value.sums.float() * (value.unit / scale)) + grid.zero_point
    elif isinstance(value, Sum):
        code = torch.round(_fused_sum(value, grid))
    elif isinstance(value, Product):
        a, b = value.first, value.second
        ratio = torch.tensor(
            float(np.float32(a.grid.scale * b.grid.scale) / grid.scale)
        )
        code = torch.round(a.centred() * b.centred() * ratio + grid.zero_point)
    elif isinstance(value, Joined):
        return torch.cat([quantize(part, grid) for part in value.parts], value.axis)
    elif isinstance(value, Mean):
        x = value.source
        count = x.stored.shape[2] * x.stored.shape[3]
        sums = x.centred().double().sum(dim=(2, 3), keepdim=True).float()
        code = (
            torch.round(sums * (torch.tensor(float(x.grid.scale)) / (scale * count)))
            + grid.zero_point
        )
    elif isinstance(value, WindowMean):
        # Added before rounding: it decides near ties
        code = torch.round(value.real() / scale + grid.zero_point)
    else:
        code = torch.round(real_of(value) / scale) + grid.zero_point
    return code.clamp_(grid.low, grid.high)


def _binarize(value: Value, grid: LoweredQuantizer) -> Tensor:
    """Storage code 0 or 254, decided in integers: a layer's biased sum in the direction of its scale, or a code's
    threshold."""
    if isinstance(value, Accumulator):
        return grid.high * (value.sums * value.unit.sign() >= 0).float()
    if isinstance(value, Codes):
        first = torch.from_numpy(code_thresholds(value.grid, grid).astype(np.float32))
        return (
            grid.high
            * (value.stored >= first.view(-1, *[1] * (value.stored.dim() - 2))).float()
        )
    raise ExportError(
        f"quantizer {grid.name!r}: one bit is decided from a layer's sums or from codes, not from floats"
    )


def _fused_sum(value: Sum, grid: LoweredQuantizer) -> Tensor:
    a, b, one = value.first, value.second, np.float32
    ratio_a, ratio_b = one(a.grid.scale / grid.scale), one(b.grid.scale / grid.scale)
    offset = constant_of_sum(ratio_a, ratio_b, a.grid, b.grid, grid)
    # float64 holds a product of a code and a float32 exactly, so rounding after the sum is a fused multiply-add.
    inner = (b.stored.double() * float(ratio_b) + float(offset)).float()
    return (a.stored.double() * float(ratio_a) + inner.double()).float()


def accumulate(node: ir.Node, layer: LoweredLayer, x: Codes) -> Accumulator:
    """Exact integer sums of a Conv or Gemm node on codes, bias included."""
    weight = torch.from_numpy(layer.codes.astype(np.float32) * layer.weight_multiplier)
    largest = max(x.grid.high - x.grid.zero_point, x.grid.zero_point - x.grid.low)
    bound = largest * float(weight.abs().flatten(1).sum(1).max())
    dtype = torch.float32 if bound < FLOAT32_EXACT else torch.float64
    codes, weight = x.centred().to(dtype), weight.to(dtype)
    unit = torch.from_numpy(np.float32(x.grid.scale) * layer.stored_scale)
    if layer.bias_codes is None:  # a float bias, in units of the sum
        bias = torch.from_numpy(layer.float_bias).double() / unit.double()
    else:
        bias = torch.from_numpy(layer.bias_codes).double()
    if node.op_type == "Gemm":
        return Accumulator(F.linear(codes, weight).double() + bias, unit)
    get = node.attributes
    axes = weight.dim() - 2
    pads = get["pads"].as_ints() if "pads" in get else [0] * (2 * axes)
    # F.pad's order
    both_ends = [
        p for axis in reversed(range(axes)) for p in (pads[axis], pads[axis + axes])
    ]
    convolve = F.conv1d if axes == 1 else F.conv2d
    sums = convolve(
        F.pad(codes, both_ends),
        weight,
        stride=tuple(get["strides"].as_ints()),
        dilation=tuple(get["dilations"].as_ints()),
        groups=get["group"].as_int(),
    )
    channels = (-1, *[1] * axes)
    return Accumulator(sums.double() + bias.view(channels), unit.view(channels))


def _average_pool(node: ir.Node, source: Codes) -> WindowMean:
    get = node.attributes
    ceil, counts_padding = (
        name in get and get[name].as_int() == 1
        for name in ("ceil_mode", "count_include_pad")
    )
    if "dilations" in get and set(get["dilations"].as_ints()) != {1}:
        raise ExportError(
            f"node {node.name!r}: a dilated AveragePool has no integer definition"
        )
    kernel, stride = list(get["kernel_shape"].as_ints()), list(get["strides"].as_ints())
    pads = list(get["pads"].as_ints()) if "pads" in get else [0] * (2 * len(kernel))
    if len(kernel) == 1:
        kernel, stride, pads = [1, *kernel], [1, *stride], [0, pads[0], 0, pads[1]]
    top, left, bottom, right = pads
    return WindowMean(
        source,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (top, left, bottom, right),
        ceil,
        counts_padding,
    )


def _max_pool(node: ir.Node, stored: Tensor) -> Tensor:
    """Of an image, or of a sequence (N, C, L) as an image of one row."""
    get = node.attributes
    kernel, stride = list(get["kernel_shape"].as_ints()), list(get["strides"].as_ints())
    pads = list(get["pads"].as_ints()) if "pads" in get else [0] * (2 * len(kernel))
    dilation = (
        list(get["dilations"].as_ints()) if "dilations" in get else [1] * len(kernel)
    )
    ceil = "ceil_mode" in get and get["ceil_mode"].as_int() == 1
    if is_sequence := len(kernel) == 1:
        kernel, stride, dilation, pads = (
            [1, *kernel],
            [1, *stride],
            [1, *dilation],
            [0, pads[0], 0, pads[1]],
        )
        stored = stored.unsqueeze(2)
    top, left, bottom, right = pads
    # 0 is the smallest storage code
    padded = F.pad(stored, (left, right, top, bottom), value=0.0)
    pooled = F.max_pool2d(
        padded, tuple(kernel), tuple(stride), 0, tuple(dilation), ceil
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
