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

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from export import arithmetic
from export.arithmetic import disagreements, one
from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer, Tried
from export.skeleton import (
    CODE_OPS,
    constant,
    fill_of,
    grid_of,
    is_mark,
    mark_name,
    weight_layer,
)

OPSET = 20  # of the skeleton's operators
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

# Operations on floats that are computed element by element; the functions among them differ between runtimes.
FUNCTIONS = {
    "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Selu", "Sigmoid", "Softplus", "Tanh",
}  # fmt: skip
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
    source = grid_of(value)
    if source is not None:
        return requantization(model.quantizers[source])
    grids = [model.quantizers.get(grid_of(v) or "") for v in node.inputs]
    known = [grid for grid in grids if grid is not None]
    if len(known) == len(grids):
        match node.op_type:
            case "Add":
                return pair("sum", known[0], known[1], arithmetic.sums, np.add)
            case "Mul":
                return pair(
                    "product", known[0], known[1], arithmetic.products, np.multiply
                )
            case "Concat":
                return concatenation(known)
            case "GlobalAveragePool":
                return global_pool(known[0], _pixels(node))
            case "AveragePool":
                return average_pool(known[0], _window_sizes(node))
    return function(node, model)


def float_quantizers(model: LoweredModel) -> list[str]:
    """Quantizers, in graph order, that read floats which runtimes may compute differently in their last bits: whatever mixes
    elements in floating point (softmax, layer norm, a layer's sums through a function).

    Elementwise sums and products of floats are rounded once each, alike everywhere.
    """
    found = []
    for node in model.skeleton.graph:
        if (
            not is_mark(node)
            or mark_name(node) not in model.quantizers
            or node.inputs[0] is None
        ):
            continue
        producer = node.inputs[0].producer()
        if producer is None or operation_before(node, model) is not None:
            continue
        if weight_layer(producer, model) is None and _mixes_floats(producer, model):
            found.append(mark_name(node))
    return found


def _mixes_floats(node: ir.Node, model: LoweredModel) -> bool:
    if is_mark(node):
        return False
    if weight_layer(
        node, model
    ) is None and node.op_type not in ARITHMETIC | CODE_OPS | {"Concat"}:
        return True
    operands = node.inputs[:1] if node.op_type in CODE_OPS else node.inputs
    producers = [v.producer() for v in operands if v is not None]
    return any(
        _mixes_floats(producer, model) for producer in producers if producer is not None
    )


def pair(
    kind: str,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    arithmetics: Callable[..., arithmetic.Results],
    combine: Callable[..., NDArray[np.float64]],
) -> Operation:
    """All pairs of codes of two grids. Only those near a tie are computed in every arithmetic."""
    a, b = (
        array.ravel()
        for array in np.meshgrid(_codes(first), _codes(second), indexing="ij")
    )
    exact = combine(a * float(first.scale), b * float(second.scale))

    def ties(out: LoweredQuantizer) -> int:
        largest = 255 * (
            1 + (float(first.scale) + float(second.scale)) / float(out.scale)
        )
        near = _near_ties(exact / float(out.scale), out, LARGEST_ERROR * largest)
        return disagreements(arithmetics(a[near], b[near], first, second, out), out)

    return Operation(kind, len(a), ties)


def requantization(source: LoweredQuantizer) -> Operation:
    """Codes of one grid written as codes of another."""
    codes = _codes(source)
    return Operation(
        "requantization",
        len(codes),
        lambda out: disagreements(arithmetic.requantizations(codes, source, out), out),
    )


def concatenation(sources: list[LoweredQuantizer]) -> Operation:
    """Requantization of each part."""
    parts = [requantization(source) for source in sources]
    inputs = sum(part.inputs for part in parts)
    return Operation(
        "concatenation", inputs, lambda out: sum(part.ties(out) for part in parts)
    )


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
    totals = [np.arange(codes[0] * n, codes[-1] * n + 1) for n in window_sizes]
    means = np.concatenate(
        [total / n for total, n in zip(totals, window_sizes, strict=True)]
    )

    def ties(out: LoweredQuantizer) -> int:
        scaled = means * float(source.scale) / float(out.scale)
        error = 4 * FLOAT32_ERROR * (np.abs(scaled) + out.zero_point)
        return int(_near_ties(scaled, out, error).sum())

    return Operation("average pool", len(means), ties)


def function(node: ir.Node, model: LoweredModel) -> Operation | None:
    """What is computed from single codes of one grid in floating point, if a function is part of it."""
    nodes = _elementwise_nodes(node)
    sources = {grid_of(v) for n in nodes for v in n.inputs} - {None}
    if len(sources) != 1 or not any(n.op_type in FUNCTIONS for n in nodes):
        return None
    source = model.quantizers[sources.pop() or ""]
    codes = _codes(source)
    real = codes.astype(np.float64) * float(source.scale)
    result = _evaluate(nodes, real)
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


def _elementwise_nodes(last: ir.Node) -> list[ir.Node]:
    """The nodes from codes to `last`, in order, or none where one of them is not elementwise or reads a constant tensor."""
    found: list[ir.Node] = []

    def visit(node: ir.Node) -> bool:
        if node in found:
            return True
        if node.domain != "" or node.op_type not in FUNCTIONS | ARITHMETIC | CODE_OPS:
            return False
        if node.op_type == "Pad" and fill_of(node) != 0.0:
            return False
        operands = node.inputs[:1] if node.op_type in CODE_OPS else node.inputs
        for value in filter(None, operands):
            if grid_of(value) is not None:
                continue
            fixed = constant(value)
            if fixed is not None and fixed.size == 1:
                continue
            producer = value.producer()
            if fixed is not None or producer is None or not visit(producer):
                return False
        found.append(node)
        return True

    return found if visit(last) else []


def _evaluate(nodes: list[ir.Node], codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last of `nodes` in float64, given the real values `codes` wherever codes are read.

    The nodes are elementwise and `codes` has one axis, so that layout operations are left out.
    """
    names: dict[ir.Value, str] = {}
    constants: list[onnx.TensorProto] = []
    made: list[onnx.NodeProto] = []

    def name_of(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value not in names:
            fixed = constant(value)
            names[value] = "codes" if fixed is None else f"constant{len(constants)}"
            if fixed is not None:
                scalar = np.asarray(fixed, np.float64).reshape(())
                constants.append(onnx.numpy_helper.from_array(scalar, names[value]))
        return names[value]

    for index, node in enumerate(nodes):
        if node.op_type in CODE_OPS:
            names[node.outputs[0]] = name_of(node.inputs[0])
            continue
        inputs = [name_of(value) for value in node.inputs]
        names[node.outputs[0]] = f"value{index}"
        copied = onnx.helper.make_node(node.op_type, inputs, [f"value{index}"])
        copied.attribute.extend(
            ir.to_proto(attribute) for attribute in node.attributes.values()
        )
        made.append(copied)
    result = names[nodes[-1].outputs[0]]
    graph = onnx.helper.make_graph(
        made,
        "function",
        [
            onnx.helper.make_tensor_value_info(
                "codes", onnx.TensorProto.DOUBLE, [len(codes)]
            )
        ],
        [
            onnx.helper.make_tensor_value_info(
                result, onnx.TensorProto.DOUBLE, [len(codes)]
            )
        ],
        constants,
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    (values,) = ReferenceEvaluator(onnx.shape_inference.infer_shapes(model)).run(
        None, {"codes": codes}
    )
    return np.asarray(values, np.float64)


def _pixels(pool: ir.Node) -> int:
    shape = pool.inputs[0].shape if pool.inputs[0] is not None else None
    assert shape is not None
    return int(np.prod([int(d) for d in list(shape)[2:]]))  # type: ignore[arg-type]


def _window_sizes(pool: ir.Node) -> list[int]:
    """How many elements a window of an average pool may have: fewer than the kernel's at a border."""
    kernel = pool.attributes["kernel_shape"].as_ints()
    whole = int(np.prod(kernel))
    has_padding = "pads" in pool.attributes and any(pool.attributes["pads"].as_ints())
    hangs_over = (
        "ceil_mode" in pool.attributes and pool.attributes["ceil_mode"].as_int() == 1
    )
    if not (has_padding or hangs_over):
        return [whole]
    sizes = {1}
    for extent in kernel:
        sizes = {size * part for size in sizes for part in range(1, extent + 1)}
    return sorted(sizes)
