"""Which arithmetic each integer operator of ONNX Runtime uses, on each processor: the tables of docs/arithmetic.md.

    uv run tools/audit_operators.py                                  # everything, three minutes
    uv run tools/audit_operators.py --rows QLinearAdd Sums --on x86 neoverse-n1

Small models are run on all their inputs (all 256 codes, all 65,536 pairs, all sums of a pool, all pairs of a weight byte and
an input code) here, on other x86 processors and on 64-bit ARM processors under QEMU, and on WebAssembly. Their results are
compared with arithmetics that are written out below in NumPy. Those are written from experiment and share no code with
`export/arithmetic.py`: each checks the other.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.elsewhere import CPUS, PLATFORMS, WASM, run_node, run_python, unavailable
from export.packing import pack, tables

HERE = Path(__file__).parent
INFER_PYTHON, INFER_NODE = HERE / "arm64" / "infer.py", HERE / "wasm" / "infer.mjs"
CONTRIB = "com.microsoft"
LEVEL_NAMES = {"disabled": "DISABLE", "basic": "BASIC", "extended": "EXTENDED"}
OPSET, IR_VERSION = 20, 10

NATIVE = "x86"
MACHINES = (NATIVE, *PLATFORMS["x86"], *PLATFORMS["arm64"], WASM)
ABOUT = {
    NATIVE: "x86, native",
    "haswell": "x86, AVX2 and FMA, no VNNI (Haswell)",
    "sandybridge": "x86, AVX, neither AVX2 nor FMA (Sandy Bridge)",
    "cortex-a72": "arm64, no dot product (Cortex-A72)",
    "neoverse-n1": "arm64, dot product (Neoverse N1)",
    "max": "arm64, i8mm (QEMU's max)",
    WASM: "WebAssembly",
}

Array = NDArray[Any]
Arithmetics = dict[str, Array]


@dataclass(frozen=True)
class Grid:
    scale: np.float32
    zero: int


# ---- arithmetics ----------------------------------------------------------------------------------------------------

one = np.float32


def saturated(values: Array) -> Array:
    return np.clip(values, 0, 255).astype(np.uint8)


def half_away(values: Array) -> Array:
    return np.trunc(values + np.copysign(0.5, values))


def fused(a: Array | np.float32, b: Array | np.float32, c: Array | np.float32) -> Array:
    """float32 a · b + c, rounded once.

    The product is exact in float64. Where its sum with c is not, it is moved to the odd neighbour in the error's direction,
    so that the second rounding, to float32, finds no tie that is none.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    share = total - product
    error = (product - (total - share)) + (addend - share)
    even = (total.view(np.int64) & 1) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, nudged, total).astype(np.float32)


def shifted_half_away(values: Array, shift: int) -> Array:
    """values / 2^shift, rounded half away from zero, on integers."""
    magnitude = (np.abs(values) + (1 << (shift - 1))) >> shift
    return np.sign(values) * magnitude


def add_fixed_point(a: Array, b: Array, grids: tuple[Grid, Grid, Grid]) -> Array | None:
    """Ratios as integers of 22 bits, an exact sum, half away from zero. None where a ratio is out of its range."""
    x, y, out = grids
    ratio_a = one(x.scale / out.scale)
    ratio_b = one(y.scale / out.scale)
    larger = max(ratio_a, ratio_b)
    smaller = min(ratio_a, ratio_b)
    if smaller < 2.0**-14 or larger >= 256.0:
        return None
    exponent = int(np.floor(np.log2(np.float64(larger))))
    shift = 21 - exponent
    if not 13 <= shift <= 31:
        return None
    multiplier_a = int(np.rint(np.float64(ratio_a) * 2.0**shift))
    multiplier_b = int(np.rint(np.float64(ratio_b) * 2.0**shift))
    if max(multiplier_a, multiplier_b) >= 1 << 22:
        return None
    centred_a = a.astype(np.int64) - x.zero
    centred_b = b.astype(np.int64) - y.zero
    total = centred_a * multiplier_a + centred_b * multiplier_b
    return saturated(shifted_half_away(total, shift) + out.zero)


def add_arithmetics(a: Array, b: Array, grids: tuple[Grid, Grid, Grid]) -> Arithmetics:
    """Everything by its name in docs/arithmetic.md: on codes, c + r_a a + r_b b; or on real numbers, divided by s_y."""
    x, y, out = grids
    zero_a = one(x.zero)
    zero_b = one(y.zero)
    zero = one(out.zero)
    float_a = a.astype(np.float32)
    float_b = b.astype(np.float32)

    ratio_a = one(x.scale / out.scale)
    ratio_b = one(y.scale / out.scale)
    shift_a = one(ratio_a * zero_a)
    shift_b = one(ratio_b * zero_b)
    offset = one(zero - one(shift_a + shift_b))
    fused_offset = one(zero - fused(ratio_a, zero_a, shift_b))
    swapped_offset = one(zero - fused(ratio_b, zero_b, shift_a))
    constant_b = (offset + float_b * ratio_b).astype(np.float32)
    constant_a = (offset + float_a * ratio_a).astype(np.float32)
    floats = {
        "fused": fused(float_a, ratio_a, fused(float_b, ratio_b, offset)),
        "fused, swapped": fused(float_b, ratio_b, fused(float_a, ratio_a, offset)),
        "fused, offset fused": fused(float_a, ratio_a, fused(float_b, ratio_b, fused_offset)),
        "fused, offset fused, swapped": fused(float_b, ratio_b, fused(float_a, ratio_a, swapped_offset)),
        "b plain, a fused": fused(float_a, ratio_a, constant_b),
        "a plain, b fused": fused(float_b, ratio_b, constant_a),
        "unfused": (offset + float_a * ratio_a) + float_b * ratio_b,
        "unfused, swapped": (offset + float_b * ratio_b) + float_a * ratio_a,
    }

    centred_a = float_a - zero_a
    centred_b = float_b - zero_b
    real_a = centred_a * x.scale
    real_b = centred_b * y.scale
    real_sums = {
        "divided": real_a + real_b,
        "divided, b's product fused": fused(y.scale, centred_b, real_a),
        "divided, a's product fused": fused(x.scale, centred_a, real_b),
    }
    divided = {}
    for name, real_sum in real_sums.items():
        divided[name] = saturated(np.rint(real_sum / out.scale + zero))

    fixed = add_fixed_point(a, b, grids)
    results = {}
    for name, value in floats.items():
        results[name] = saturated(np.rint(value))
    for name, fallback in divided.items():
        results[f"fixed point (else {name})"] = fallback if fixed is None else fixed
    results["divided"] = divided["divided"]
    results["real sum, zero point after"] = saturated(np.rint((real_a + real_b) / out.scale) + zero)
    return results


def multiply_arithmetics(a: Array, b: Array, grids: tuple[Grid, Grid, Grid]) -> Arithmetics:
    x, y, out = grids
    zero = one(out.zero)
    centred_a = a.astype(np.float32) - one(x.zero)
    centred_b = b.astype(np.float32) - one(y.zero)
    product = centred_a * centred_b
    ratio = one(one(x.scale * y.scale) / out.scale)
    scaled = product * ratio
    real = (centred_a * x.scale) * (centred_b * y.scale)
    divided = real / out.scale
    return {
        "unfused": saturated(np.rint(scaled + zero)),
        "fused": saturated(np.rint(fused(product, ratio, zero))),
        "divided": saturated(np.rint(divided + zero)),
        "real product, zero point after": saturated(np.rint(divided) + zero),
        "zero point after": saturated(np.rint(scaled) + zero),
        "half away": saturated(half_away(scaled) + zero),
    }


def global_pool_arithmetics(sums: Array, count: int, x: Grid, out: Grid) -> Arithmetics:
    """sums: of the codes less their zero point."""
    multiplier = one(x.scale / one(out.scale * one(count)))
    mantissa, exponent = np.frexp(multiplier)
    product = sums.astype(np.int64) * int(np.float64(mantissa) * 2**24)
    scaled = sums.astype(np.float32) * multiplier
    return {
        "float32, half to even": saturated(np.rint(scaled) + out.zero),
        "fixed point": saturated(shifted_half_away(product, 24 - int(exponent)) + out.zero),
        "float32, half away": saturated(half_away(scaled) + out.zero),
    }


def requantize_arithmetics(sums: Array, multiplier: Array | np.float32, zero: int) -> Arithmetics:
    scaled = sums.astype(np.float32) * multiplier
    return {
        "float32, half to even": saturated(np.rint(scaled) + zero),
        "zero point inside": saturated(np.rint(scaled + one(zero))),
        "half away": saturated(half_away(scaled) + zero),
        "float64": saturated(np.rint(sums * np.asarray(multiplier, np.float64)) + zero),
    }


def quantize_arithmetics(real: Array, out: Grid) -> Arithmetics:
    real = real.astype(np.float32)
    return {
        "divided, zero point after": saturated(np.rint(real / out.scale) + out.zero),
        "divided, zero point inside": saturated(np.rint(real / out.scale + one(out.zero))),
        "times the reciprocal": saturated(np.rint(real * one(one(1) / out.scale)) + out.zero),
    }


def softmax_arithmetic(x: Array, grid: Grid, out: Grid) -> Array:
    """A table of exponentials to which the row's maximum is aligned, float32 sums in order."""
    length = np.float32(x.shape[-1])
    largest_term = np.float32(np.finfo(np.float32).max / length)
    reserve = max(0.0, float(np.log(largest_term)) - 5) / float(grid.scale)
    exponents = (np.arange(256.0) - 255 + reserve) * float(grid.scale)
    table = np.exp(exponents).astype(np.float32)
    terms = table[255 - x.max(-1, keepdims=True) + x]
    total = np.cumsum(terms, -1, dtype=np.float32)[..., -1:]
    inverse = np.floor(one(1) / out.scale)
    return saturated(np.rint(terms * inverse / total) + out.zero)


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One output: the row of the table it belongs to, of which kind its scales are, and what each named arithmetic gives."""

    row: str
    kind: str
    arithmetics: Arithmetics


@dataclass
class Case:
    """A model under construction: nodes on shared inputs, each with its own output."""

    inputs: dict[str, Array]
    level: str = "all"
    options: dict[str, str] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def grid(self, grid: Grid) -> list[str]:
        return [self.constant(grid.scale, np.float32), self.constant(grid.zero, np.uint8)]

    def add(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def returns(self, output: str, row: str, arithmetics: Arithmetics, kind: str = "") -> None:
        self.results[output] = Result(row, kind, arithmetics)

    def model(self) -> onnx.ModelProto:
        inputs = []
        for name, value in self.inputs.items():
            inputs.append(value_info(name, value))
        outputs = []
        for name, result in self.results.items():
            expected = next(iter(result.arithmetics.values()))
            outputs.append(value_info(name, expected))
        graph = helper.make_graph(self.nodes, "audit", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def value_info(name: str, example: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(example.dtype), example.shape)


ZERO_POINTS = (0, 1, 7, 8, 127, 128, 255)
ALL_CODES = np.arange(256, dtype=np.uint8)
ALL_A = np.repeat(ALL_CODES[:, None], 256, axis=1)
ALL_B = np.repeat(ALL_CODES[None, :], 256, axis=0)


def ordinary(rng: np.random.Generator) -> Grid:
    return Grid(one(np.exp2(rng.uniform(-7, -1))), int(rng.choice(ZERO_POINTS)))


def power_of_two(rng: np.random.Generator) -> Grid:
    return Grid(one(2.0 ** rng.integers(-7, -1)), int(rng.choice(ZERO_POINTS)))


def extreme(rng: np.random.Generator) -> Grid:
    return Grid(one(np.exp2(rng.uniform(-16, 5))), int(rng.choice(ZERO_POINTS)))


KINDS = {"ordinary": ordinary, "powers of two": power_of_two, "extreme": extreme}


def telling(
    arithmetics: Callable[[tuple[Grid, ...]], Arithmetics], grids: int, rng: np.random.Generator, draws: int
) -> list[tuple[Grid, ...]]:
    """Of many drawn scales those on which two arithmetics differ most, one for each pair of arithmetics."""
    best: dict[tuple[str, str], tuple[int, tuple[Grid, ...]]] = {}
    for index in range(draws):
        draw = ordinary if index % 2 else extreme
        drawn = tuple(draw(rng) for _ in range(grids))
        results = arithmetics(drawn)
        for pair in combinations(results, 2):
            differing = int((results[pair[0]] != results[pair[1]]).sum())
            if differing > best.get(pair, (0, drawn))[0]:
                best[pair] = (differing, drawn)
    return [drawn for _, drawn in best.values()]


def scale_sets(
    grids: int, count: int, rng: np.random.Generator, arithmetics: Callable[[tuple[Grid, ...]], Arithmetics]
) -> Iterator[tuple[str, tuple[Grid, ...]]]:
    for kind, draw in KINDS.items():
        for _ in range(count):
            yield kind, tuple(draw(rng) for _ in range(grids))
    for found in telling(arithmetics, grids, rng, draws=120):
        yield "telling", found


def pairs(op: str, arithmetics: Callable[[Array, Array, Any], Arithmetics]) -> Iterator[Case]:
    """All pairs of codes: both operands as they are, and one of them a row's constant (broadcast)."""
    rng = np.random.default_rng(1)
    column = ALL_CODES[:, None]
    sets = list(scale_sets(3, 8, rng, lambda grids: arithmetics(ALL_A, ALL_B, grids)))
    few = rng.integers(0, 256, (2, 1, 71)).astype(np.uint8)  # every kernel's loop for the rest
    for form, first, second in (
        ("", ALL_A, ALL_B),
        (", 71 elements", few[0], few[1]),
        (", second operand broadcast", ALL_B, column),
        (", first operand broadcast", column, ALL_B),
    ):
        for kind, grids in sets:
            case = Case({"a": first, "b": second})
            x, y, out = (case.grid(grid) for grid in grids)
            a, b = np.broadcast_arrays(first, second)
            node = case.add(op, ["a", *x, "b", *y, *out], CONTRIB)
            case.returns(node, f"{op}{form}", arithmetics(a, b, grids), kind)
            yield case


def float_path(op: str, level: str, options: dict[str, str] | None = None) -> Iterator[Case]:
    """Dequantize, add or multiply, quantize: what the integer operator is made of, at lower optimisation levels."""
    rng = np.random.default_rng(2)
    arithmetics = add_arithmetics if op == "Add" else multiply_arithmetics
    for kind, draw in KINDS.items():
        for _ in range(4):
            grids = draw(rng), draw(rng), draw(rng)
            case = Case({"a": ALL_A, "b": ALL_B}, level=level, options=options or {})
            x, y, out = (case.grid(grid) for grid in grids)
            left, right = case.add("DequantizeLinear", ["a", *x]), case.add("DequantizeLinear", ["b", *y])
            quantized = case.add("QuantizeLinear", [case.add(op, [left, right]), *out])
            case.returns(quantized, f"{op} at {LEVEL_NAMES[level]}", arithmetics(ALL_A, ALL_B, grids), kind)
            yield case


def lookups() -> Iterator[Case]:
    """Functions of one code, all codes."""
    rng = np.random.default_rng(3)
    for kind, draw in KINDS.items():
        case = Case({"x": ALL_CODES.reshape(1, 256)})
        for _ in range(100):
            x = draw(rng)
            out = draw(rng)
            # A sigmoid lies in 0 to 1: on a grid made for it every code is reached.
            codes_per_unit = 256.0 if kind == "powers of two" else rng.uniform(250, 260)
            of_sigmoid = Grid(one(1 / codes_per_unit), 0)
            add_lookups(case, x, out, of_sigmoid, kind)
        yield case


def add_lookups(case: Case, x: Grid, out: Grid, of_sigmoid: Grid, kind: str) -> None:
    """Append every function of the codes "x", on the grid `x`, with results on `out` or `of_sigmoid`."""
    real = ((ALL_CODES.astype(np.float32) - one(x.zero)) * x.scale).reshape(1, 256)
    source = case.grid(x)
    target = case.grid(out)
    requantized = quantize_arithmetics(real, out)
    twice = {name: np.tile(codes, (1, 2)) for name, codes in requantized.items()}

    node = case.add("QLinearConcat", [*target, "x", *source, "x", *source], CONTRIB, axis=1)
    case.returns(node, "QLinearConcat", twice, kind)
    floats = case.add("DequantizeLinear", ["x", *source])
    node = case.add("QuantizeLinear", [floats, *target])
    case.returns(node, "DequantizeLinear, QuantizeLinear", requantized, kind)
    node = case.add("DequantizeLinear", ["x", *source])
    case.returns(node, "DequantizeLinear", {"float32 product": real}, kind)
    for alpha in (0.1, 1.0):
        leaky = np.where(real >= 0, real, real * one(alpha)).astype(np.float32)
        node = case.add("QLinearLeakyRelu", ["x", *source, *target], CONTRIB, alpha=alpha)
        case.returns(node, f"QLinearLeakyRelu, slope {alpha}", quantize_arithmetics(leaky, out), kind)
    sigmoid = 0.5 * (1 + np.tanh(0.5 * real.astype(np.float64)))
    node = case.add("QLinearSigmoid", ["x", *source, *case.grid(of_sigmoid)], CONTRIB)
    case.returns(node, "QLinearSigmoid", quantize_arithmetics(sigmoid, of_sigmoid), kind)


def quantizing() -> Iterator[Case]:
    """QuantizeLinear on floats at and around every tie."""
    rng = np.random.default_rng(4)
    for kind, draw in KINDS.items():
        for _ in range(20):
            out = draw(rng)
            ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * out.scale
            around = [ties]
            for direction in (np.inf, -np.inf):
                near = ties
                for _ in range(3):
                    near = np.nextafter(near, one(direction))
                    around.append(near)
            at_random = rng.normal(0, 128, 4096).astype(np.float32) * out.scale
            x = np.concatenate([*around, at_random])
            case = Case({"x": x})
            node = case.add("QuantizeLinear", ["x", *case.grid(out)])
            case.returns(node, "QuantizeLinear", quantize_arithmetics(x, out), kind)
            yield case


def global_pools() -> Iterator[Case]:
    """A channel for every possible sum."""
    rng = np.random.default_rng(5)
    for size in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (7, 7), (8, 8)):
        count = size[0] * size[1]
        sums = np.arange(255 * count + 1)
        first = codes_of_sums(sums, count).reshape(1, -1, *size)
        last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
        for x, is_last in ((first, False), (last, True)):
            case = Case({"x": x})
            for kind, draw in KINDS.items():
                for grid, out in grids_of_pools(draw, rng, count):
                    add_global_pools(case, sums, size, is_last, grid, out, kind)
            yield case


def codes_of_sums(sums: Array, count: int) -> Array:
    """(sums, count): `count` codes for each sum, as equal as they can be."""
    position = np.arange(count)
    remainder = sums[:, None] % count
    return (sums[:, None] // count + (position[None, :] < remainder)).astype(np.uint8)


def grids_of_pools(
    draw: Callable[[np.random.Generator], Grid], rng: np.random.Generator, count: int
) -> Iterator[tuple[Grid, Grid]]:
    """Eight pairs of grids whose multiplier the runtime accepts."""
    accepted = 0
    while accepted < 8:
        grid = draw(rng)
        out = draw(rng)
        if 2.0**-31 < grid.scale / (out.scale * count) < 255:
            accepted += 1
            yield grid, out


def add_global_pools(
    case: Case, sums: Array, size: tuple[int, int], is_last: bool, grid: Grid, out: Grid, kind: str
) -> None:
    """Append both operators that take the mean of whole images. is_last: whether channels are the last axis."""
    count = size[0] * size[1]
    shape = (1, 1, 1, sums.size) if is_last else (1, sums.size, 1, 1)
    expected = {}
    for name, codes in global_pool_arithmetics(sums - count * grid.zero, count, grid, out).items():
        expected[name] = codes.reshape(shape)
    channels_last = int(is_last)
    inputs = ["x", *case.grid(grid), *case.grid(out)]
    node = case.add("QLinearGlobalAveragePool", inputs, CONTRIB, channels_last=channels_last)
    case.returns(node, "QLinearGlobalAveragePool", expected, kind)
    inputs = ["x", *case.grid(grid), *case.grid(out)]
    node = case.add("QLinearAveragePool", inputs, CONTRIB, channels_last=channels_last, kernel_shape=size)
    case.returns(node, "QLinearAveragePool, the whole image", expected, kind)


@dataclass(frozen=True)
class Window:
    name: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    ceil: int = 0
    counts_padding: int = 0

    def attributes(self) -> dict[str, Any]:
        return {
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "pads": self.pads,
            "ceil_mode": self.ceil,
            "count_include_pad": self.counts_padding,
        }

    def of_one_row(self) -> "Window":
        """The same for a sequence that is written as an image of one row."""
        before, after = self.pads
        pads = (0, before, 0, after)
        return replace(self, kernel=(1, *self.kernel), strides=(1, *self.strides), pads=pads)

    def places(self, axis: int, size: int) -> list[range]:
        """Along one axis of an image of `size`, the pixels that each place of the window covers."""
        kernel = self.kernel[axis]
        stride = self.strides[axis]
        before = self.pads[axis]
        after = self.pads[axis + 2]
        free = size + before + after - kernel
        count = free // stride + 1
        if self.ceil and free % stride:
            count += 1
        places = []
        for index in range(count):
            start = index * stride - before
            # A last place that lies in the padding alone is left out
            if start < size:
                places.append(range(max(start, 0), min(start + kernel, size)))
        return places


WINDOWS = (
    Window("2x2", (2, 2), (2, 2), (0, 0, 0, 0)),
    Window("3x3, padded", (3, 3), (2, 2), (1, 1, 1, 1)),
    Window("3x3, padding counted", (3, 3), (1, 1), (1, 1, 1, 1), counts_padding=1),
    Window("3x3, ceil mode", (3, 3), (2, 2), (0, 0, 0, 0), ceil=1),
    Window("7x7", (7, 7), (1, 1), (0, 0, 0, 0)),
    Window("3, of a sequence", (3,), (2,), (1, 1)),
    Window("12x12, the whole image", (12, 12), (1, 1), (0, 0, 0, 0)),
)


def window_sums(real: Array, window: Window) -> tuple[Array, Array]:
    """Sums in the order of the rows, in the type of `real` (N_C_H_W or N_C_L), and what they are divided by."""
    if len(window.kernel) == 1:
        sums, counts = window_sums(real[:, :, None], window.of_one_row())
        return sums[:, :, 0], counts[0]
    height, width = real.shape[2:]
    rows_of = window.places(0, height)
    columns_of = window.places(1, width)
    sums = np.zeros((*real.shape[:2], len(rows_of), len(columns_of)), real.dtype)
    counts = np.zeros((len(rows_of), len(columns_of)), real.dtype)
    for row, rows in enumerate(rows_of):
        for column, columns in enumerate(columns_of):
            for i in rows:
                for j in columns:
                    sums[:, :, row, column] += real[:, :, i, j]
            counts[row, column] = len(rows) * len(columns)
    if window.counts_padding:
        counts[:] = window.kernel[0] * window.kernel[1]
    return sums, counts


def window_pools() -> Iterator[Case]:
    rng = np.random.default_rng(6)
    for window in WINDOWS[:-1]:
        shape = (1, 16, 24) if len(window.kernel) == 1 else (1, 16, 12, 12)
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        integers, _ = window_sums(codes.astype(np.int64), window)
        for form in ("first", "last"):
            x = codes if form == "first" else channels_last(codes)
            case = Case({"x": x})
            attributes = window.attributes() | {"channels_last": int(form == "last")}
            for kind, draw in KINDS.items():
                for _ in range(10):
                    grid = draw(rng)
                    out = draw(rng)
                    expected = window_arithmetics(codes, integers, window, grid, out)
                    if form == "last":
                        expected = {name: channels_last(values) for name, values in expected.items()}
                    inputs = ["x", *case.grid(grid), *case.grid(out)]
                    node = case.add("QLinearAveragePool", inputs, CONTRIB, **attributes)
                    case.returns(node, f"QLinearAveragePool, {window.name}", expected, kind)
            yield case


def channels_last(values: Array) -> Array:
    """N_C_... as N_..._C."""
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))


def window_arithmetics(codes: Array, integers: Array, window: Window, grid: Grid, out: Grid) -> Arithmetics:
    real = (codes.astype(np.float32) - one(grid.zero)) * grid.scale
    sums, counts = window_sums(real, window)
    in_codes = sums / counts / out.scale
    zero = one(out.zero)
    results = {
        "float32 sums by rows": saturated(np.rint(in_codes + zero)),
        "float32 sums by rows, zero point after": saturated(np.rint(in_codes) + zero),
    }
    if window.kernel == codes.shape[2:]:
        count = int(np.prod(window.kernel))
        results |= global_pool_arithmetics(integers - count * grid.zero, count, grid, out)
    return results


def float_pools(level: str) -> Iterator[Case]:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 256, (1, 64, 12, 12)).astype(np.uint8)
    for op, window in (("AveragePool", WINDOWS[0]), ("AveragePool", WINDOWS[1]), ("GlobalAveragePool", WINDOWS[-1])):
        integers, _ = window_sums(codes.astype(np.int64), window)
        attributes = window.attributes() if op == "AveragePool" else {}
        for kind, draw in KINDS.items():
            case = Case({"x": codes}, level=level)
            for _ in range(8):
                grid, out = draw(rng), draw(rng)
                pooled = case.add(op, [case.add("DequantizeLinear", ["x", *case.grid(grid)])], **attributes)
                node = case.add("QuantizeLinear", [pooled, *case.grid(out)])
                expected = window_arithmetics(codes, integers, window, grid, out)
                case.returns(node, f"{op}, {window.name}, at {LEVEL_NAMES[level]}", expected, kind)
            yield case


@dataclass(frozen=True)
class Shape:
    """A convolution's. size: of the image, a number for each axis."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    pad: int = 0
    stride: int = 1
    dilation: int = 1
    group: int = 1

    def attributes(self) -> dict[str, Any]:
        axes = len(self.kernel)
        return {
            "kernel_shape": self.kernel,
            "pads": [self.pad] * (2 * axes),
            "strides": [self.stride] * axes,
            "dilations": [self.dilation] * axes,
            "group": self.group,
        }


SHAPES = (
    Shape("dense 3x3, 1 channel", 1, 16, (3, 3), (6, 6), pad=1),
    Shape("dense 3x3, 3 channels, strided", 3, 20, (3, 3), (9, 9), pad=1, stride=2),
    Shape("dense 3x3, 16 channels", 16, 16, (3, 3), (6, 6), pad=1),
    Shape("dense 3x3, 33 to 20 channels, dilated", 33, 20, (3, 3), (7, 7), pad=2, dilation=2),
    Shape("dense 3x3, 64 channels", 64, 64, (3, 3), (6, 6), pad=1),
    Shape("dense 3x3, 67 channels, no padding", 67, 67, (3, 3), (5, 5)),
    Shape("dense 1x1, 8 channels", 8, 8, (1, 1), (5, 5)),
    Shape("dense 1x1, 24 to 67 channels", 24, 67, (1, 1), (5, 5)),
    Shape("dense 1x1, 64 channels, strided", 64, 64, (1, 1), (6, 6), stride=2),
    Shape("dense 1x1, 67 channels, one pixel", 67, 64, (1, 1), (1, 1)),
    Shape("depthwise 3x3, 16 channels", 16, 16, (3, 3), (6, 6), pad=1, group=16),
    Shape("depthwise 3x3, 24 channels, strided", 24, 24, (3, 3), (7, 7), pad=1, stride=2, group=24),
    Shape("depthwise 3x3, 67 channels", 67, 67, (3, 3), (5, 5), pad=1, group=67),
    Shape("depthwise 5x5, 32 channels", 32, 32, (5, 5), (8, 8), pad=2, group=32),
    Shape("depthwise 5x5, 20 channels, dilated", 20, 20, (5, 5), (10, 10), pad=4, dilation=2, group=20),
    Shape("depthwise 7x7, 16 channels", 16, 16, (7, 7), (8, 8), pad=3, group=16),
    Shape("grouped 3x3, 2 channels each", 16, 16, (3, 3), (6, 6), pad=1, group=8),
    Shape("grouped 3x3, 16 channels each", 64, 64, (3, 3), (5, 5), pad=1, group=4),
    Shape("1 channel to 2 each, 3x3", 16, 32, (3, 3), (5, 5), pad=1, group=16),
    Shape("sequence, dense 3", 24, 24, (3,), (12,), pad=1),
    Shape("sequence, depthwise 9", 32, 32, (9,), (20,), pad=4, group=32),
)


def family(shape: Shape) -> str:
    """What decides which kernel a layer is given to."""
    if shape.group == 1:
        return "dense 1x1" if set(shape.kernel) == {1} else "dense"
    if shape.group != shape.inputs or shape.outputs != shape.inputs:
        return "grouped"
    return "depthwise, channels a multiple of 8" if shape.inputs % 8 == 0 else "depthwise, other numbers of channels"


def exact_sums(x: Array, weight: Array, shape: Shape) -> Array:
    """Sums of products of integers, N_C_H_W or N_C_L. float64 holds them exactly."""
    edge = (shape.pad, shape.pad)
    if len(shape.kernel) == 1:
        if shape.stride != 1 or shape.dilation != 1:
            raise ValueError(f"{shape.name}: a sequence with a stride or a dilation is not written out here")
        padded = np.pad(x, [(0, 0), (0, 0), edge])
        as_image = replace(shape, kernel=(1, *shape.kernel), size=(1, *shape.size), pad=0)
        return exact_sums(padded[:, :, None], weight[:, :, None], as_image)[:, :, 0]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), edge, edge])
    batch, _, height, width = padded.shape
    rows = places_of_kernel(shape, 0, height)
    columns = places_of_kernel(shape, 1, width)
    in_group = shape.inputs // shape.group
    out_group = shape.outputs // shape.group
    grouped = weight.astype(np.float64).reshape(shape.group, out_group, in_group, *shape.kernel)
    sums = np.zeros((batch, shape.group, out_group, rows, columns))
    for i in range(shape.kernel[0]):
        for j in range(shape.kernel[1]):
            top = i * shape.dilation
            left = j * shape.dilation
            in_rows = slice(top, top + (rows - 1) * shape.stride + 1, shape.stride)
            in_columns = slice(left, left + (columns - 1) * shape.stride + 1, shape.stride)
            taps = padded[:, :, in_rows, in_columns].reshape(batch, shape.group, in_group, rows, columns)
            sums += np.einsum("goi,bgirc->bgorc", grouped[..., i, j], taps, optimize=True)
    return sums.reshape(batch, shape.outputs, rows, columns).astype(np.int64)


def places_of_kernel(shape: Shape, axis: int, size: int) -> int:
    """How many places the kernel has along `axis` of a padded image of `size`."""
    reach = (shape.kernel[axis] - 1) * shape.dilation + 1
    return (size - reach) // shape.stride + 1


def hostile_inputs(rng: np.random.Generator, channels: int, size: tuple[int, ...]) -> Array:
    """Images all 0, all 255, of 0 and 255 in turn, of 0 and 255 at random, half 0, and random."""
    shape = (channels, *size)
    turns = np.indices(shape).sum(0) % 2 * 255
    images = [
        np.zeros(shape),
        np.full(shape, 255),
        turns,
        rng.choice([0, 255], shape),
        rng.integers(0, 256, shape) * rng.integers(0, 2, shape),
        rng.integers(0, 256, shape),
    ]
    return np.stack(images).astype(np.uint8)


WEIGHTS: dict[str, tuple[int, int]] = {
    "bytes −64 to 64": (-64, 64),
    "bytes −127 to 127": (-127, 127),
    "bytes −128 to 127": (-128, 127),
}


def convolutions() -> Iterator[Case]:
    """Every kernel that a convolution may be given to, with weights up to three limits and hostile inputs."""
    rng = np.random.default_rng(8)
    for shape in SHAPES:
        x = hostile_inputs(rng, shape.inputs, shape.size)
        case = Case({"x": x})
        for limits, (low, high) in WEIGHTS.items():
            row = f"{family(shape)}, int8 {limits}"
            if high == 64:
                row = f"every layer, int8 {limits}"
            for signed in (True, False):
                if not signed:
                    row = "every layer, uint8 of any bytes"
                for lowest_only in (False, True):
                    for zero in (0, 128):
                        size = (shape.outputs, shape.inputs // shape.group, *shape.kernel)
                        weight = np.full(size, low) if lowest_only else rng.integers(low, high + 1, size)
                        add_convolution(case, shape, weight, signed, zero, row)
        yield case


def stored_weight(weight: Array, signed: bool, channels: int) -> tuple[Array, Array]:
    """Weights between -128 and 127 as int8, or as uint8 with zero point 128; and the zero points of the channels."""
    if signed:
        return weight.astype(np.int8), np.zeros(channels, np.int8)
    return (weight + 128).astype(np.uint8), np.full(channels, 128, np.uint8)


def add_qlinear_conv(
    case: Case, shape: Shape, x: Grid, out: Grid, weights: tuple[Array, Array, Array], bias: Array | None = None
) -> str:
    """Append a QLinearConv on "x". weights: stored, their scales, their zero points."""
    stored, scales, zeros = weights
    inputs = ["x", *case.grid(x), case.constant(stored), case.constant(scales), case.constant(zeros), *case.grid(out)]
    if bias is not None:
        inputs.append(case.constant(bias))
    return case.add("QLinearConv", inputs, **shape.attributes())


def add_convolution(case: Case, shape: Shape, weight: Array, signed: bool, zero: int, row: str) -> None:
    """Append a QLinearConv whose output shows an overflow: its sums fill the 8 bits."""
    sums = exact_sums(case.inputs["x"].astype(np.int64) - zero, weight, shape)
    lowest = int(sums.min())
    highest = int(sums.max())
    fitting = 250 / (float(highest - lowest) or 1.0)
    # Half of the layers on ordinary scales, the others on powers of two, which make ties.
    multiplier = fitting if signed else 2.0 ** np.floor(np.log2(fitting))
    scales = np.full(shape.outputs, multiplier, np.float32)
    middle = -(highest + lowest) // 2
    bias = np.full(shape.outputs, middle, np.int32)
    x = Grid(one(1 / 64), zero)
    out = Grid(one(1 / 64), 128)
    stored, weight_zeros = stored_weight(weight, signed, shape.outputs)
    node = add_qlinear_conv(case, shape, x, out, (stored, scales, weight_zeros), bias)
    factors = (x.scale * scales / out.scale).astype(np.float32)
    per_channel = factors.reshape(-1, *[1] * len(shape.kernel))
    expected = requantize_arithmetics(sums + middle, per_channel, out.zero)
    case.returns(node, f"Layer: {row}", {"exact": expected["float32, half to even"]})


def requantizations() -> Iterator[Case]:
    """Sums of many sizes through a convolution, a product of matrices and a fully connected layer."""
    rng = np.random.default_rng(9)
    rows, depth, columns = 64, 16, 64
    a = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    image = np.ascontiguousarray(a.T.reshape(1, depth, 8, 8))
    weight = rng.integers(-16, 17, (columns, depth)).astype(np.int8)
    for kind, draw in KINDS.items():
        largest_bias = 1 << 28 if kind == "extreme" else 9000
        images = Case({"x": image})
        matrices = Case({"a": a})
        for _ in range(12):
            x = draw(rng)
            out = draw(rng)
            scales = np.array([draw(rng).scale for _ in range(columns)], np.float32)
            bias = rng.integers(-largest_bias, largest_bias, columns).astype(np.int32)
            addend = rng.normal(0, 10, columns).astype(np.float32)
            product = Product(a, weight, scales, x, out)
            add_biased_layers(images, matrices, product, bias, kind)
            add_matrix_products(matrices, product, addend, kind)
        yield images
        yield matrices


@dataclass(frozen=True)
class Product:
    """A matrix of codes on the grid `x` times the transpose of an int8 weight (columns, depth) with a scale per column;
    results on the grid `out`."""

    a: Array
    weight: Array
    scales: Array
    x: Grid
    out: Grid

    def sums(self) -> Array:
        """Exact, (rows, columns)."""
        centred = self.a.astype(np.int64) - self.x.zero
        return centred @ self.weight.T.astype(np.int64)

    def units(self) -> Array:
        """Real value of a sum of 1, float32 (columns,)."""
        return (self.x.scale * self.scales).astype(np.float32)


def add_biased_layers(images: Case, matrices: Case, product: Product, bias: Array, kind: str) -> None:
    """Append `product` with an integer bias as a convolution and as fully connected layers."""
    x = product.x
    out = product.out
    weight = product.weight
    columns, depth = weight.shape
    zeros = np.zeros(columns, np.int8)
    sums = product.sums() + bias
    factors = (product.units() / out.scale).astype(np.float32)
    expected = requantize_arithmetics(sums, factors, out.zero)

    shape = Shape("", depth, columns, (1, 1), (8, 8))
    weights = (weight[:, :, None, None], product.scales, zeros)
    node = add_qlinear_conv(images, shape, x, out, weights, bias)
    as_images = {}
    for name, codes in expected.items():
        as_images[name] = np.ascontiguousarray(codes.T).reshape(1, columns, 8, 8)
    images.returns(node, "QLinearConv", as_images, kind)

    layer = [matrices.constant(weight), matrices.constant(product.scales), matrices.constant(zeros)]
    layer.append(matrices.constant(bias))
    inputs = ["a", *matrices.grid(x), *layer, *matrices.grid(out)]
    node = matrices.add("QGemm", inputs, CONTRIB, transB=1)
    matrices.returns(node, "QGemm, uint8 output", expected, kind)
    inputs = ["a", *matrices.grid(x), *layer]
    node = matrices.add("QGemm", inputs, CONTRIB, transB=1)
    real = sums.astype(np.float32) * product.units()
    matrices.returns(node, "QGemm, float output", {"float32 product": real}, kind)


def add_matrix_products(matrices: Case, product: Product, addend: Array, kind: str) -> None:
    """Append `product` with one scale for all columns, to codes and to floats, and to floats with `addend`."""
    x = product.x
    out = product.out
    sums = product.sums()
    unit = product.units()[0]
    weight = matrices.constant(np.ascontiguousarray(product.weight.T))
    scale = matrices.constant(product.scales[0])
    zero = matrices.constant(0, np.int8)

    inputs = ["a", *matrices.grid(x), weight, scale, zero, *matrices.grid(out)]
    node = matrices.add("QLinearMatMul", inputs)
    expected = requantize_arithmetics(sums, one(unit / out.scale), out.zero)
    matrices.returns(node, "QLinearMatMul", expected, kind)

    a_scale, a_zero = matrices.grid(x)
    inputs = ["a", weight, a_scale, scale, a_zero, zero]
    node = matrices.add("MatMulIntegerToFloat", inputs, CONTRIB)
    real = sums.astype(np.float32) * unit
    matrices.returns(node, "MatMulIntegerToFloat", {"float32 product": real}, kind)

    node = matrices.add("MatMulIntegerToFloat", [*inputs, matrices.constant(addend)], CONTRIB)
    both = {
        "product, then sum": real + addend,
        "product and sum fused": fused(sums.astype(np.float32), unit, addend),
    }
    matrices.returns(node, "MatMulIntegerToFloat, bias", both, kind)


def softmaxes() -> Iterator[Case]:
    rng = np.random.default_rng(10)
    for length in (7, 64, 197):
        x = rng.integers(0, 256, (64, length)).astype(np.uint8)
        case = Case({"x": x})
        for _ in range(12):
            grid, out = ordinary(rng), Grid(one(1 / 256), 0)
            node = case.add("QLinearSoftmax", ["x", *case.grid(grid), *case.grid(out)], CONTRIB, axis=-1, opset=13)
            case.returns(node, "QLinearSoftmax", {"table, float32 sums": softmax_arithmetic(x, grid, out)})
        yield case


def movers() -> Iterator[Case]:
    """Operators that only pick codes."""
    rng = np.random.default_rng(11)
    x = rng.integers(0, 256, (1, 8, 9, 9)).astype(np.uint8)
    case = Case({"x": x})
    bounds = [case.constant(8, np.uint8), case.constant(247, np.uint8)]
    case.returns(case.add("Clip", ["x", *bounds]), "Clip on uint8", {"exact": np.clip(x, 8, 247)})
    pooled = case.add("MaxPool", ["x"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    case.returns(pooled, "MaxPool on uint8", {"exact": windows.max((-1, -2))})
    factors = case.constant([1, 1, 2, 2], np.float32)
    resized = case.add(
        "Resize", ["x", "", factors], mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    case.returns(resized, "Resize by nearest neighbour on uint8", {"exact": x.repeat(2, 2).repeat(2, 3)})
    edges = case.constant([0, 0, 1, 2, 0, 0, 1, 2], np.int64)
    moved = case.add("Pad", ["x", edges, case.constant(7, np.uint8)])
    filled = np.pad(x, [(0, 0), (0, 0), (1, 1), (2, 2)], constant_values=7)
    case.returns(moved, "Pad on uint8", {"exact": filled})
    yield case
    for bits in (2, 3, 4):
        yield unpacking(bits, rng)


def unpacking(bits: int, rng: np.random.Generator) -> Case:
    """Planes to int8 codes by table look-ups, as `export/graph.py` writes them; in the end a uint8, to be returned."""
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), 960).astype(np.int8)
    weight_multiplier = 127 // (1 << (bits - 1))
    case = Case({"x": np.zeros(1, np.uint8)})
    parts = []
    for plane, table in zip(pack(codes, bits), tables(bits, weight_multiplier), strict=True):
        numbers = case.add("Cast", [case.constant(plane)], to=TensorProto.INT32)
        widened = case.add("Cast", [case.constant(table)], to=TensorProto.INT32)
        rows = case.add("Gather", [widened, numbers], axis=0)
        parts.append(case.add("Reshape", [rows, case.constant([codes.size], np.int64)]))
    while len(parts) > 1:
        parts[:2] = [case.add("Add", parts[:2])]
    unpacked = case.add("Cast", [case.add("Cast", parts, to=TensorProto.INT8)], to=TensorProto.FLOAT)
    offset = case.constant(128, np.uint8)
    shown = case.add("QuantizeLinear", [unpacked, case.constant(1, np.float32), offset])
    expected = (codes.astype(np.int16) * weight_multiplier + 128).astype(np.uint8)
    case.returns(shown, f"unpacking {bits}-bit planes", {"exact": expected})
    return case


UNIT = Grid(one(1), 0)
CENTRED = Grid(one(1), 128)

# Sums: a channel for each weight byte, an image for each input code, so that every pair is seen.
GRID_SHAPES = (
    Shape("depthwise 3x3", 256, 256, (3, 3), (4, 4), group=256),
    Shape("depthwise 5x5", 256, 256, (5, 5), (6, 6), group=256),
    Shape("depthwise 7x7", 256, 256, (7, 7), (8, 8), group=256),
    Shape("depthwise 3x3, 257 channels", 257, 257, (3, 3), (4, 4), group=257),
    Shape("sequence, depthwise 3", 256, 256, (3,), (6,), group=256),
    Shape("dense 3x3, 16 channels", 16, 256, (3, 3), (5, 5)),
    Shape("dense 3x3, 64 channels", 64, 256, (3, 3), (5, 5)),
    Shape("dense 3x3, 67 to 257 channels", 67, 257, (3, 3), (5, 5)),
    Shape("dense 3x3, 1 channel", 1, 256, (3, 3), (5, 5)),
    Shape("dense 1x1, 32 channels", 32, 256, (1, 1), (3, 3)),
    Shape("dense 1x1, 32 channels, one pixel", 32, 256, (1, 1), (1, 1)),
    Shape("1 channel to 2 each, 3x3", 128, 256, (3, 3), (5, 5), group=128),
    Shape("grouped 3x3, 4 channels each", 16, 1024, (3, 3), (5, 5), group=4),
)


def grids_of_sums(options: dict[str, str] | None = None, note: str = "") -> Iterator[Case]:
    """Every pair of an input code, of all pixels of an image, and a weight byte, of all weights of a channel."""
    for shape in GRID_SHAPES:
        images = filled(ALL_CODES, (256, shape.inputs, *shape.size))
        case = Case({"x": images}, options=options or {})
        values = np.arange(shape.outputs) % 256 - 128
        weight = filled(values, (shape.outputs, shape.inputs // shape.group, *shape.kernel))
        depth = weight[0].size
        sums = depth * values[None, :] * ALL_CODES.astype(np.int64)[:, None]
        size = output_size(shape)
        expected = np.broadcast_to(
            visible_sums(sums, depth).reshape(*sums.shape, *[1] * len(size)), (*sums.shape, *size)
        )
        scales = np.full(shape.outputs, visible_scale(depth), np.float32)
        for signed in (True, False):
            stored, zeros = stored_weight(weight, signed, shape.outputs)
            node = add_qlinear_conv(case, shape, UNIT, CENTRED, (stored, scales, zeros))
            case.returns(node, row_of_sums(shape.name, signed, note), {"exact": np.ascontiguousarray(expected)})
        yield case
    yield from matrix_grids(options, note)


def filled(values: Array, shape: tuple[int, ...]) -> Array:
    """An array whose entry i along the first axis holds values[i] alone."""
    first_axis = values.reshape(-1, *[1] * (len(shape) - 1))
    return np.ascontiguousarray(np.broadcast_to(first_axis, shape))


def output_size(shape: Shape) -> list[int]:
    """Of a convolution without padding, stride or dilation."""
    sizes = []
    for size, kernel in zip(shape.size, shape.kernel, strict=True):
        sizes.append(size - kernel + 1)
    return sizes


# Partners: a channel for each pair of positions, −128 at both and 0 elsewhere; an image of 0 and one of 255.
PARTNER_SHAPES = (
    Shape("depthwise 3x3", 40, 40, (3, 3), (3, 3), group=40),
    Shape("depthwise 5x5", 304, 304, (5, 5), (5, 5), group=304),
    Shape("dense 1x1, 20 channels", 20, 190, (1, 1), (2, 2)),
    Shape("dense 3x3, 2 channels", 2, 153, (3, 3), (4, 4)),
)


def all_partners(at_least: int) -> list[tuple[int, int]]:
    """Pairs of positions in the order of PARTNER_SHAPES' channels."""
    depth = 2
    while depth * (depth + 1) // 2 <= at_least:
        depth += 1
    return list(combinations(range(depth), 2))


def partners() -> Iterator[Case]:
    for shape in PARTNER_SHAPES:
        images = filled(np.array([0, 255], np.uint8), (2, shape.inputs, *shape.size))
        case = Case({"x": images})
        depth = int(np.prod(shape.kernel)) * (shape.inputs // shape.group)
        weight = np.zeros((shape.outputs, depth), np.int8)
        for channel, positions in enumerate(all_partners(shape.outputs)[: shape.outputs]):
            weight[channel, list(positions)] = -128
        # Kernels see a position as row, column, channel.
        taps = weight.reshape(shape.outputs, *shape.kernel, -1).transpose(0, 3, 1, 2)
        sums_of_255 = 255 * weight.astype(np.int64).sum(1)
        sums = np.stack([0 * sums_of_255, sums_of_255])
        codes = visible_sums(sums, 2)[:, :, None, None]
        expected = np.broadcast_to(codes, (2, shape.outputs, *output_size(shape)))
        scales = np.full(shape.outputs, visible_scale(2), np.float32)
        zeros = np.zeros(shape.outputs, np.int8)
        weights = (np.ascontiguousarray(taps), scales, zeros)
        node = add_qlinear_conv(case, shape, UNIT, CENTRED, weights)
        case.returns(node, f"Partners: {shape.name}", {"exact": np.ascontiguousarray(expected)})
        yield case


def row_of_sums(kernel: str, signed: bool, note: str) -> str:
    return f"Sums: {kernel}{note}" if signed else f"Sums: every kernel, uint8{note}"


def visible_scale(depth: int) -> np.float32:
    """What makes the largest sum 127 codes."""
    return one(127 / (depth * 255 * 128))


def visible_sums(sums: Array, depth: int) -> Array:
    return saturated(np.rint(sums.astype(np.float32) * visible_scale(depth)) + 128)


def matrix_grids(options: dict[str, str] | None, note: str) -> Iterator[Case]:
    depth = 64
    case = Case({"a": filled(ALL_CODES, (256, depth))}, options=options or {})
    values = np.arange(256) - 128
    weight_transposed = filled(values, (256, depth))
    sums = depth * values[None, :] * ALL_CODES.astype(np.int64)[:, None]
    scales = np.full(256, visible_scale(depth), np.float32)
    codes = {"exact": visible_sums(sums, depth)}
    floats = {"exact": sums.astype(np.float32) * visible_scale(depth)}
    for signed in (True, False):
        stored_transposed, zeros = stored_weight(weight_transposed, signed, 256)
        stored = np.ascontiguousarray(stored_transposed.T)
        a_scale, a_zero = case.grid(UNIT)
        out = case.grid(CENTRED)
        weight = [case.constant(stored_transposed), case.constant(scales), case.constant(zeros)]
        node = case.add("QGemm", ["a", a_scale, a_zero, *weight, "", *out], CONTRIB, transB=1)
        case.returns(node, row_of_sums("QGemm", signed, note), codes)
        weight = [case.constant(stored), case.constant(scales), case.constant(zeros)]
        node = case.add("QLinearMatMul", ["a", a_scale, a_zero, *weight, *out])
        case.returns(node, row_of_sums("QLinearMatMul", signed, note), codes)
        # With x64quantprecision the runtime refuses a file in which two of these operators share a weight.
        bytes_, scale, zero = case.constant(stored), case.constant(scales), case.constant(zeros)
        node = case.add("MatMulIntegerToFloat", ["a", bytes_, a_scale, scale, a_zero, zero], CONTRIB)
        case.returns(node, row_of_sums("MatMulIntegerToFloat", signed, note), floats)
    yield case


SEEN_LOSS = 1200  # what products must lose together to be seen: a little over two codes of `visible_scale`

PRECISE = {"session.x64quantprecision": "1"}


def cases() -> Iterator[Case]:
    yield from pairs("QLinearAdd", add_arithmetics)
    yield from pairs("QLinearMul", multiply_arithmetics)
    yield from lookups()
    yield from quantizing()
    yield from global_pools()
    yield from window_pools()
    yield from requantizations()
    yield from softmaxes()
    yield from movers()
    for level in ("disabled", "basic", "extended"):
        yield from float_path("Add", level)
        yield from float_path("Mul", level)
        yield from float_pools(level)
    yield from convolutions()
    yield from partners()
    yield from grids_of_sums()
    yield from grids_of_sums(PRECISE, ", x64quantprecision")


# ---- machines -------------------------------------------------------------------------------------------------------


def missing(machine: str) -> str | None:
    """Why `machine` cannot be used here, with the command that helps, or None if it can."""
    if machine == NATIVE:
        return None if platform.machine() == "x86_64" else "this is not an x86-64 machine"
    return unavailable(machine, onnxruntime.__version__)


def infer(machine: str, folder: Path) -> str:
    """Run the manifest of `folder` on `machine`; outputs are left in the folder. Returns the runtime's version."""
    if machine == WASM:
        done = run_node([str(INFER_NODE), str(folder)])
    elif machine in CPUS:
        done = run_python(CPUS[machine], onnxruntime.__version__, [str(INFER_PYTHON), str(folder)])
    else:
        command = [sys.executable, str(INFER_PYTHON), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{machine}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.split()[-1]


def run_cases(machine: str, given: Sequence[Case]) -> tuple[str, list[dict[str, Array]]]:
    """The runtime's version, and the outputs of every case, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = []
        for index, case in enumerate(given):
            onnx.save(case.model(), str(folder / f"{index}.onnx"))
            entry: dict[str, Any] = {"model": f"{index}.onnx", "level": case.level, "options": case.options}
            entry["inputs"], entry["outputs"] = {}, {}
            for key, value in case.inputs.items():
                (folder / f"{index}.{key}").write_bytes(np.ascontiguousarray(value).tobytes())
                entry["inputs"][key] = {"type": str(value.dtype), "shape": value.shape, "file": f"{index}.{key}"}
            for key in case.results:
                entry["outputs"][key] = f"{index}.{key}"
            manifest.append(entry)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        version = infer(machine, folder)
        found = []
        for index, case in enumerate(given):
            outputs = {}
            for key, result in case.results.items():
                expected = next(iter(result.arithmetics.values()))
                data = np.fromfile(folder / f"{index}.{key}", expected.dtype)
                outputs[key] = data.reshape(expected.shape)
            found.append(outputs)
    return version, found


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What one machine did in one row."""

    results: int = 0
    differing: dict[str, int] = field(default_factory=dict)  # from the first machine, by kind of scales
    mistaken: dict[str, int] = field(default_factory=dict)  # arithmetic: results it does not explain
    errors: list[Array] = field(
        default_factory=list
    )  # of rows of sums: by input code and channel, in codes of the output

    def found(self) -> str:
        """The first arithmetic that explains all results, or the best one and how many it does not explain."""
        name, wrong = min(self.mistaken.items(), key=lambda item: item[1])
        return name if wrong == 0 else f"{name}, except {wrong:,}"


def differs(a: Array, b: Array) -> Array:
    """Floats are compared in their bits."""
    if a.dtype == np.float32:
        return a.view(np.uint32) != b.view(np.uint32)
    return a != b


def summarize(given: Sequence[Case], outputs: dict[str, list[dict[str, Array]]]) -> dict[str, dict[str, Cell]]:
    """Cells by row and machine."""
    rows: dict[str, dict[str, Cell]] = {}
    reference = outputs[next(iter(outputs))]
    for machine, found in outputs.items():
        for case, results, compared in zip(given, found, reference, strict=True):
            for key, result in case.results.items():
                cell = rows.setdefault(result.row, {}).setdefault(machine, Cell())
                got = results[key]
                cell.results += got.size
                differing = int(differs(got, compared[key]).sum())
                cell.differing[result.kind] = cell.differing.get(result.kind, 0) + differing
                for name, expected in result.arithmetics.items():
                    wrong = differs(got, np.ascontiguousarray(expected))
                    cell.mistaken[name] = cell.mistaken.get(name, 0) + int(wrong.sum())
                    if result.row.startswith(("Sums", "Partners")):
                        cell.errors.append(largest_errors(got, expected))
    return rows


def largest_errors(found: Array, expected: Array) -> Array:
    """By image and channel, the largest of all pixels."""
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    images, channels = error.shape[:2]
    return error.reshape(images, channels, -1).max(-1)


def shown_arithmetic(cell: Cell) -> str:
    by_kind = []
    for kind, count in cell.differing.items():
        if count:
            by_kind.append(f"{kind} {count:,}".strip())
    if not by_kind:
        return cell.found()
    return f"{cell.found()} (differ: {', '.join(by_kind)})"


def shown_mistakes(cell: Cell) -> str:
    return f"{cell.mistaken['exact']:,}"


def shown_sums(cell: Cell) -> str:
    """Which (input code, weight byte) pairs were wrong, as a rule, with the largest safe weight."""
    if not any(errors.any() for errors in cell.errors):
        return "exact"
    (errors,) = cell.errors
    for offset in (0, 128):
        for terms in range(2, 10):
            rule = rule_of_overflow(errors, offset, terms)
            if rule:
                return rule
    return f"{int((errors > 0).sum()):,} pairs, by no rule known here"


def rule_of_overflow(errors: Array, offset: int, terms: int) -> str:
    """Whether `errors` (input codes, channels) are those of a sum of `terms` products (code - offset) · byte in 16 bits, in
    words; empty where they are not."""
    codes = np.arange(256)[:, None]
    weight_bytes = (np.arange(errors.shape[1]) % 256 - 128)[None, :]
    total = terms * (codes - offset) * weight_bytes
    lost = np.abs(total - np.clip(total, -32768, 32767))
    overflows = lost > 0
    # Saturation loses what is over the limit, which is seen from a code of the output on; a sum that wraps around is
    # far off at once.
    barely = overflows & (lost <= SEEN_LOSS)
    wraps = bool((errors[barely] > 10).any())
    seen = overflows if wraps else lost > SEEN_LOSS
    failed = errors > 0
    if failed[~overflows].any() or not failed[seen].all():
        return ""
    unsafe_bytes = np.broadcast_to(weight_bytes, lost.shape)[overflows]
    safe = int(np.abs(unsafe_bytes).min()) - 1
    product = "x·w" if offset == 0 else f"(x − {offset})·w"
    what_happens = "wrap" if wraps else "saturate"
    return f"{terms} products {product} in 16 bits that {what_happens}: to ±{safe}"


def shown_partners(cell: Cell) -> str:
    """The positions of weights that are added in 16 bits, by their distance."""
    wrong = cell.errors[0].max(0) > 0
    by_distance: dict[int, list[int]] = {}
    for (first, second), is_wrong in zip(all_partners(wrong.size), wrong, strict=False):
        if is_wrong:
            by_distance.setdefault(second - first, []).append(first)
    shown = []
    for distance, firsts in sorted(by_distance.items()):
        shown.append(f"k and k + {distance} for k = {', '.join(map(str, firsts))}")
    return "; ".join(shown) or "none"


@dataclass(frozen=True)
class Table:
    """rows: how they begin; without any, the table takes what no other does."""

    title: str
    rows: str
    show: Callable[[Cell], str]


TABLES = (
    Table("operator", "", shown_arithmetic),
    Table("layer and weights: wrong results", "Layer: ", shown_mistakes),
    Table(
        "kernel, int8 where not said: how it adds, and which weights are safe with 8-bit inputs", "Sums: ", shown_sums
    ),
    Table("kernel: positions k of weights that are added in 16 bits", "Partners: ", shown_partners),
)


def print_table(table: Table, rows: dict[str, dict[str, Cell]], machines: Sequence[str]) -> None:
    """Rows whose cells are alike are one; "same" is as in the cell before."""
    others = tuple(other.rows for other in TABLES if other.rows)
    alike: dict[tuple[str, ...], list[str]] = {}
    for row, cells in rows.items():
        is_ours = row.startswith(table.rows)
        if not table.rows:
            is_ours = not row.startswith(others)
        if is_ours:
            shown = tuple(table.show(cells[machine]) for machine in machines)
            alike.setdefault(shown, []).append(row)
    if not alike:
        return
    print("\n" + line_of_table([table.title, "results", *(ABOUT[machine] for machine in machines)]))
    print("|---|---|" + "---|" * len(machines))
    for shown, names in alike.items():
        results = 0
        for name in names:
            results += rows[name][machines[0]].results
        title = "; ".join(name.removeprefix(table.rows) for name in names)
        entries = [title, f"{results:,}", shown[0]]
        for before, cell in pairwise(shown):
            entries.append("same" if cell == before else cell)
        print(line_of_table(entries))


def line_of_table(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--on", nargs="+", choices=MACHINES, default=list(MACHINES), help="machines; the first is compared with"
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows that begin with one of these words")
    given = parser.parse_args()
    for machine in given.on:
        reason = missing(machine)
        if reason:
            sys.exit(f"{machine}: {reason}")
    wanted = tuple(given.rows)
    chosen = []
    for case in cases():
        rows_of_case = [result.row for result in case.results.values()]
        if any(row.startswith(wanted) for row in rows_of_case):
            chosen.append(case)
    outputs = {}
    for machine in given.on:
        version, outputs[machine] = run_cases(machine, chosen)
        print(f"* {ABOUT[machine]}: ONNX Runtime {version}", flush=True)
    rows = summarize(chosen, outputs)
    for table in TABLES:
        print_table(table, rows, given.on)


if __name__ == "__main__":
    main()
