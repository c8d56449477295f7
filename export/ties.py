"""No result near a tie: output scales are moved by parts per million until every known arithmetic gives the same codes.

Runtimes compute sums, products, requantizations and pools of codes in different ways (`export/arithmetic.py`). They agree but
for results that lie at a tie between two codes, or nearly so. A scale moved by parts per million has none: inputs are few
(2^16 pairs of codes, 2^8 codes, bounded sums), so all of them can be tried when a file is written. What reads the codes
is given the moved scale too; training's function changes by as little.

    sum, product        every pair of codes of the two grids
    requantization      every code, for each part of a concatenation
    global pool         every sum of codes, under every known arithmetic
    average pool        every sum of codes of every window; no mean may lie nearer to a tie than its quotients can round
    function            every code through what is computed in floating point between two quantizers (a sigmoid, GELU, a
                        product with it): runtimes differ in its last bits, so no result may lie nearer to a tie than these

Layers need none of it to be alike in every runtime: all requantize integer sums by one multiplication and round half to
even. But a trained net computes them in floating point, so that a settled one gets scales on which no sum lies at a tie
(`factors_off_ties`). What mixes several tensors in floating point (softmax, layer norm) cannot be tried and is listed by
`float_quantizers`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export import arithmetic
from export.arithmetic import disagreements, one
from export.functions import CodeFunction, function_before
from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer, Tried
from export.norms import norm_on_codes
from export.skeleton import (
    CODE_OPS,
    ints_of,
    is_mark,
    is_set,
    mark_name,
    quantizer_of,
    weight_layer,
)

PPM = 1e-6
FARTHEST = 1000  # parts per million
FLOAT32_ERROR = 2.0**-24  # of one operation in float32, relative to its result
# Of a runtime's sigmoid, erf or the like, relative to the larger of x and f(x)
FUNCTION_ERROR = 16 * FLOAT32_ERROR
# Relative: a few products in float32 away from where a scale was put
SETTLED = 16 * FLOAT32_ERROR
# To a code, between which a layer's scale is chosen: it moves by less than 1 in so many
FEWEST_SUMS = 1024
# Of any known arithmetic, relative to the largest value in it: fixed point has 21 bits
LARGEST_ERROR = 2.0**-19

# Each of these rounds once, alike everywhere
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Clip", "Neg", "Abs"}

Ties = Callable[[LoweredQuantizer], int]


@dataclass(frozen=True)
class Operation:
    """What ends in a quantizer. ties: tries all inputs and counts those whose code on a grid runtimes may differ in."""

    kind: str
    inputs: int
    ties: Ties


def avoid_ties(model: LoweredModel, *, may_move: bool = True) -> bool:
    """Move scales in place, in graph order: an operation reads grids that are final already.

    may_move: False for a target that must keep the trained scales; ties are then only counted, as they are for powers of two,
    whose net rounds at ties as this runtime does, and others may not.
    """
    model.tried.clear()
    for node in model.skeleton.graph:
        name = mark_name(node) if is_mark(node) else ""
        if name not in model.quantizers or model.quantizers[name].is_binary:
            continue
        operation = operation_before(node, model)
        if operation is None:
            continue
        grid = model.quantizers[name]
        if may_move and not grid.is_fixed:
            grid, remaining = nearest_without_ties(grid, operation.ties)
        else:
            remaining = operation.ties(grid)
        model.quantizers[name] = grid
        model.tried.append(
            Tried(name, operation.kind, operation.inputs, grid.moved_ppm, remaining)
        )
    return any(tried.ppm for tried in model.tried)


def nearest_without_ties(
    grid: LoweredQuantizer, ties: Ties
) -> tuple[LoweredQuantizer, int]:
    """`grid` with the scale moved as little as avoids all ties, and how many remain where no move does."""
    best, fewest = grid, ties(grid)
    for distance in range(1, FARTHEST + 1):
        for ppm in (distance, -distance):
            if fewest == 0:
                return best, 0
            moved = replace(
                grid, scale=one(float(grid.scale) * (1 + ppm * PPM)), moved_ppm=ppm
            )
            count = ties(moved)
            if count < fewest:
                best, fewest = moved, count
    return best, fewest


def factors_off_ties(
    layer: LoweredLayer, source: LoweredQuantizer, written: LoweredQuantizer
) -> NDArray[np.float64]:
    """float64 (O,): what to multiply the layer's scales with, so that none of its sums lies at or next to a tie of `written`.

    A sum is an integer n, and its code n / D rounded, D = s_y / unit. With D = d / 2^j for an odd d no n is halfway between
    two codes: 2 n 2^j is even and d times an odd number is not. The nearest lies 1 / (2 d) codes away, farther than float32
    sums are off. d is the odd number next to D 2^j, j the largest that leaves it below 2 FEWEST_SUMS. Exactly 1 where D is
    such a number already, but for the precision of float32.
    """
    unit = np.abs((source.scale * layer.stored_scale).astype(np.float64))
    usable = unit > 0
    sums_to_a_code = np.divide(
        float(written.scale), unit, out=np.ones_like(unit), where=usable
    )
    doublings = np.maximum(np.ceil(np.log2(FEWEST_SUMS / sums_to_a_code)), 0.0)
    wanted = sums_to_a_code * 2.0**doublings
    odd = 2 * np.floor(wanted / 2) + 1
    factors = wanted / odd
    is_there = np.abs(factors - 1) < SETTLED
    return np.where(usable & ~is_there, factors, 1.0)


def operation_before(mark: ir.Node, model: LoweredModel) -> Operation | None:
    """The operation on codes that ends in `mark`; None for a layer, for floats that mix tensors, and for the images."""
    value = mark.inputs[0]
    node = value.producer() if value is not None else None
    if node is None:
        return None
    source = quantizer_of(value)
    if source is not None:
        return requantization(model.quantizers[source])
    grids = [
        model.quantizers.get(quantizer_of(operand) or "") for operand in node.inputs
    ]
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids):
        return _function(mark, model)
    match node.op_type:
        case "Add":
            first, second = known
            return pair("sum", first, second, arithmetic.sums, np.add)
        case "Mul":
            first, second = known
            return pair("product", first, second, arithmetic.products, np.multiply)
        case "Concat":
            return concatenation(known)
        case "GlobalAveragePool":
            return global_pool(known[0], _pixels(node))
        case "AveragePool":
            return average_pool(known[0], _window_sizes(node))
        case _:
            return _function(mark, model)


def _function(mark: ir.Node, model: LoweredModel) -> Operation | None:
    found = function_before(mark, model)
    return None if found is None else function(found)


def float_quantizers(model: LoweredModel) -> list[str]:
    """Quantizers, in graph order, that read floats which runtimes may compute differently in their last bits: whatever mixes
    elements in floating point (softmax, layer norm, a layer's sums through a function).

    Elementwise sums and products of floats are rounded once each, alike everywhere.
    """
    found = []
    for node in model.skeleton.graph:
        if not is_mark(node) or mark_name(node) not in model.quantizers:
            continue
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        if producer is None or operation_before(node, model) is not None:
            continue
        if norm_on_codes(producer, model) is not None:
            continue  # by our own kernels, which are exact
        if weight_layer(producer, model) is None and _mixes_floats(producer, model):
            found.append(mark_name(node))
    return found


def _mixes_floats(node: ir.Node, model: LoweredModel) -> bool:
    if is_mark(node):
        return False
    is_elementwise = node.op_type in ARITHMETIC | CODE_OPS | {"Concat"}
    if not is_elementwise and weight_layer(node, model) is None:
        return True
    operands = node.inputs[:1] if node.op_type in CODE_OPS else node.inputs
    for value in operands:
        producer = value.producer() if value is not None else None
        if producer is not None and _mixes_floats(producer, model):
            return True
    return False


def pair(
    kind: str,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    arithmetics: Callable[..., arithmetic.Results],
    combine: Callable[..., NDArray[np.float64]],
) -> Operation:
    """All pairs of codes of two grids. Only those near a tie are computed in every arithmetic."""
    grid_a, grid_b = np.meshgrid(_codes(first), _codes(second), indexing="ij")
    a = grid_a.ravel()
    b = grid_b.ravel()
    exact = combine(a * float(first.scale), b * float(second.scale))

    def ties(out: LoweredQuantizer) -> int:
        scale = float(out.scale)
        ratios = (float(first.scale) + float(second.scale)) / scale
        largest = 255 * (1 + ratios)
        near = _near_ties(exact / scale, out, LARGEST_ERROR * largest)
        return disagreements(arithmetics(a[near], b[near], first, second, out), out)

    return Operation(kind, len(a), ties)


def requantization(source: LoweredQuantizer) -> Operation:
    """Codes of one grid written as codes of another."""
    codes = _codes(source)

    def ties(out: LoweredQuantizer) -> int:
        return disagreements(arithmetic.requantizations(codes, source, out), out)

    return Operation("requantization", len(codes), ties)


def concatenation(sources: list[LoweredQuantizer]) -> Operation:
    """Requantization of each part."""
    parts = [requantization(source) for source in sources]

    def ties(out: LoweredQuantizer) -> int:
        return sum(part.ties(out) for part in parts)

    return Operation("concatenation", sum(part.inputs for part in parts), ties)


def global_pool(source: LoweredQuantizer, pixels: int) -> Operation:
    """Mean over `pixels` codes."""
    codes = _codes(source)
    totals = np.arange(codes[0] * pixels, codes[-1] * pixels + 1)
    exact = totals * float(source.scale) / pixels

    def ties(out: LoweredQuantizer) -> int:
        largest = 255 * (1 + float(source.scale) / float(out.scale))
        near = _near_ties(exact / float(out.scale), out, LARGEST_ERROR * largest)
        return disagreements(
            arithmetic.global_means(totals[near], pixels, source, out), out
        )

    return Operation("global pool", len(totals), ties)


def average_pool(source: LoweredQuantizer, window_sizes: list[int]) -> Operation:
    """Every sum of `n` codes for every number n of elements that a window may have.

    All runtimes add the elements' real values in the same order; the error is that of the quotients and the zero point.
    """
    codes = _codes(source)
    of_sizes = []
    for size in window_sizes:
        totals = np.arange(codes[0] * size, codes[-1] * size + 1)
        of_sizes.append(totals / size)
    means = np.concatenate(of_sizes)

    def ties(out: LoweredQuantizer) -> int:
        scaled = means * float(source.scale) / float(out.scale)
        error = 4 * FLOAT32_ERROR * (np.abs(scaled) + out.zero_point)
        return int(_near_ties(scaled, out, error).sum())

    return Operation("average pool", len(means), ties)


def function(found: CodeFunction) -> Operation:
    """Every code through what is computed from it in floating point."""
    codes = _codes(found.grid)
    real = codes.astype(np.float64) * float(found.grid.scale)
    result = found.of(real)
    size = np.maximum(np.abs(real), np.abs(result))

    def ties(out: LoweredQuantizer) -> int:
        error = FUNCTION_ERROR * size / float(out.scale)
        return int(_near_ties(result / float(out.scale), out, error).sum())

    return Operation("function", len(codes), ties)


def _codes(grid: LoweredQuantizer) -> arithmetic.Integers:
    """All centred codes of a grid."""
    if grid.is_binary:
        return np.array([grid.low, grid.high]) - grid.zero_point
    return np.arange(grid.low, grid.high + 1) - grid.zero_point


def _near_ties(
    scaled: NDArray[np.float64],
    out: LoweredQuantizer,
    error: float | NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which results, in units of the output's scale, lie within `error` of a tie between two codes of the output."""
    tie = np.floor(scaled) + 0.5
    between_codes = (tie > out.low - out.zero_point) & (tie < out.high - out.zero_point)
    return between_codes & (np.abs(scaled - tie) <= error)


def _pixels(pool: ir.Node) -> int:
    """Height times width of the images that a global pool reads."""
    shape = pool.inputs[0].shape if pool.inputs[0] is not None else None
    assert shape is not None
    sizes = [int(size) for size in list(shape)[2:]]  # type: ignore[arg-type]
    return math.prod(sizes)


def _window_sizes(pool: ir.Node) -> list[int]:
    """How many elements a window of an average pool may have: fewer than the kernel's at a border."""
    kernel = pool.attributes["kernel_shape"].as_ints()
    is_padded = any(ints_of(pool, "pads", []))
    if not is_padded and not is_set(pool, "ceil_mode"):
        return [math.prod(kernel)]
    sizes = {1}
    for extent in kernel:
        sizes = {size * part for size in sizes for part in range(1, extent + 1)}
    return sorted(sizes)
