"""The operators of `export/kernels` as a file may use them: inputs' types, attributes' ranges, outputs' shapes.

The kernels check the same again when they are made and when they run; here a file is refused before a runtime sees it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, TensorProto

from export.lowered import ExportError

Shape = tuple[int, ...]
# Element types that an input may have
BYTES = (TensorProto.UINT8,)
FLOATS = (TensorProto.FLOAT,)
WIDE = (TensorProto.INT32,)
CODES = (TensorProto.UINT8, TensorProto.INT8)
MOST_TABLES = 4
WINDOW = range(1, 4097)
PADDING = range(4097)
BYTE = range(256)
FLAG = range(2)
DIGITS = "0123456789"


@dataclass(frozen=True)
class Operator:
    """One operator: (name, possible element types) per input, how many are needed, how many outputs it can have."""

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    required: int
    outputs: int


_LAYER = (
    ("codes", BYTES),
    ("weight scale", FLOATS),
    ("bias", WIDE),
    ("weight codes", CODES),
    ("weight codes", BYTES),
    ("weight codes", BYTES),
    ("second summand", BYTES),
    ("tables", BYTES),
)
_POOL = (("codes", BYTES), ("tables", BYTES))
OPERATORS: dict[str, Operator] = {
    "QConv": Operator(_LAYER, 4, 2 + MOST_TABLES),
    "QGemm": Operator(_LAYER, 4, 2 + MOST_TABLES),
    "QConvFloat": Operator(_LAYER[:6], 4, 1),
    "QGemmFloat": Operator(_LAYER[:6], 4, 1),
    "QMaxPool": Operator(_POOL, 1, 1 + MOST_TABLES),
    "QAveragePool": Operator(_POOL, 1, 1 + MOST_TABLES),
    "QGlobalPool": Operator(_POOL, 1, 1 + MOST_TABLES),
    "QAdd": Operator(
        (("first summand", BYTES), ("second summand", BYTES), ("tables", BYTES)),
        2,
        1 + MOST_TABLES,
    ),
    "QMul": Operator(
        (("first factor", BYTES), ("second factor", BYTES), ("tables", BYTES)),
        2,
        1 + MOST_TABLES,
    ),
    "QScale": Operator(
        (("codes", BYTES), ("gain", FLOATS), ("tables", BYTES)), 2, 1 + MOST_TABLES
    ),
    "QLayerNorm": Operator(
        (
            ("codes", BYTES),
            ("gain", FLOATS),
            ("shift", FLOATS),
            ("tables", BYTES),
        ),
        3,
        1 + MOST_TABLES,
    ),
    "QSoftmax": Operator((("scores", FLOATS), ("tables", BYTES)), 1, 1 + MOST_TABLES),
    "QTables": Operator(_POOL, 2, MOST_TABLES),
    "QImage": Operator((("images", FLOATS),), 1, 1),
    "QTranspose": Operator((("codes", BYTES),), 1, 1),
}
# Axes of the first input, 4 where it is not here; None: any number of them
RANKS = {
    "QGemm": 2,
    "QGemmFloat": 2,
    "QAdd": None,
    "QMul": None,
    "QScale": None,
    "QLayerNorm": None,
    "QSoftmax": None,
    "QTables": None,
    "QTranspose": None,
}
# Axis -> the attributes of its padding
SIDES = {"h": ("pad_top", "pad_bottom"), "w": ("pad_left", "pad_right")}
WINDOWED = ("QConv", "QConvFloat", "QMaxPool", "QAveragePool")
# Attribute -> its possible numbers, wherever it stands.
RANGES = {
    "bits": range(1, 9), "carry": range(1, 128), "channels_in": range(1, 1 << 20), "channels_out": range(1, 1 << 20),
    "groups": range(1, 1 << 20), "x_zero": BYTE, "x_high": range(1, 256), "y_zero": BYTE, "y_low": BYTE, "y_high": BYTE,
    "a_zero": BYTE, "b_zero": BYTE,
    "sum_low": BYTE, "sum_high": BYTE, "one_bit": FLAG, "threshold": FLAG, "other_first": FLAG, "count_include_pad": FLAG,
    "below_zero": FLAG,
    "rank": range(1, 9), "out_h": range(1, 1 << 16), "out_w": range(1, 1 << 16),
    **{f"{what}_{axis}": WINDOW for what in ("kernel", "stride", "dilation") for axis in "hw"},
    **{f"pad_{side}": PADDING for side in ("top", "left", "bottom", "right")},
}  # fmt: skip


def check_native(node: onnx.NodeProto, where: str) -> None:
    """Raises ExportError beginning with `where` when a native node is none that `export/native_graph.py` writes."""
    operator = OPERATORS[node.op_type]
    is_possible = operator.required <= len(node.input) <= len(operator.inputs)
    if not is_possible or not all(node.input[: operator.required]):
        raise ExportError(
            f"{where}: has {len(node.input)} inputs; it needs {operator.required} to {len(operator.inputs)}"
        )
    if len(node.output) > operator.outputs:
        raise ExportError(
            f"{where}: has {len(node.output)} outputs; {operator.outputs} are possible"
        )
    for attribute in node.attribute:
        if attribute.name in RANGES:
            _check_number(attribute, where)
        elif attribute.name == "codes" and len(attribute.strings) > operator.outputs:
            raise ExportError(
                f"{where}: names codes of {len(attribute.strings)} outputs; {operator.outputs} are possible"
            )


def _check_number(attribute: AttributeProto, where: str) -> None:
    possible = RANGES[attribute.name]
    is_integer = attribute.type == AttributeProto.INT
    if is_integer and attribute.i in possible:
        return
    found = attribute.i if is_integer else "no integer"
    raise ExportError(
        f"{where}: attribute {attribute.name} is {found}; {possible[0]} to {possible[-1]} are possible"
    )


def native_outputs(
    node: onnx.NodeProto, types: Mapping[str, tuple[int, Shape]], where: str
) -> tuple[list[tuple[int, Shape]], int]:
    """((element type, shape) of every output, multiply-adds) of a native node whose inputs have the `types` given.

    Raises ExportError naming an input of another type or rank.
    """
    operator = OPERATORS[node.op_type]
    for (what, possible), tensor in zip(operator.inputs, node.input, strict=False):
        if tensor and types[tensor][0] not in possible:
            found = TensorProto.DataType.Name(types[tensor][0])
            wanted = " or ".join(TensorProto.DataType.Name(one) for one in possible)
            raise ExportError(
                f"{where}: its {what} {tensor!r} is {found}, not {wanted}"
            )
    numbers = {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}
    _, shape = types[node.input[0]]
    rank = RANKS.get(node.op_type, 4)
    if rank is not None and len(shape) != rank:
        raise ExportError(
            f"{where}: its input {node.input[0]!r} has {len(shape)} axes, not {rank}"
        )
    made = _shape(node, shape, numbers, where)
    element = TensorProto.FLOAT if node.op_type.endswith("Float") else TensorProto.UINT8
    return [(element, made)] * len(node.output), _work(node, made, numbers)


def _shape(
    node: onnx.NodeProto, shape: Shape, numbers: Mapping[str, int], where: str
) -> Shape:
    match node.op_type:
        case "QConv" | "QConvFloat":
            height = _places(numbers, "h", shape[1], where)
            width = _places(numbers, "w", shape[2], where)
            return (shape[0], height, width, _number(numbers, "channels_out", where))
        case "QGemm" | "QGemmFloat":
            return (shape[0], _number(numbers, "channels_out", where))
        case "QMaxPool" | "QAveragePool":
            height = _number(numbers, "out_h", where)
            width = _number(numbers, "out_w", where)
            return (shape[0], height, width, shape[3])
        case "QGlobalPool":
            return (shape[0], 1, 1, shape[3])
        case "QImage":
            return (shape[0], shape[2], shape[3], shape[1])
        case "QTranspose":
            return tuple(shape[axis] for axis in _order(node, len(shape), where))
        case _:
            return shape


def _order(node: onnx.NodeProto, axes: int, where: str) -> list[int]:
    """The axis of the input that each axis of the result is."""
    text = next((a.s for a in node.attribute if a.name == "order"), b"")
    digits = text.decode(errors="replace")
    order = [DIGITS.index(digit) for digit in digits if digit in DIGITS]
    if len(order) < len(digits) or sorted(order) != list(range(axes)):
        raise ExportError(
            f"{where}: its order {digits!r} does not name each of {axes} axes once"
        )
    return order


def _places(numbers: Mapping[str, int], axis: str, size: int, where: str) -> int:
    """How many places a window has along `axis` of an image of `size`."""
    first, last = SIDES[axis]
    kernel = _number(numbers, f"kernel_{axis}", where)
    stride = _number(numbers, f"stride_{axis}", where)
    dilation = _number(numbers, f"dilation_{axis}", where)
    padding = _number(numbers, first, where) + _number(numbers, last, where)
    window = dilation * (kernel - 1) + 1
    free = size + padding - window
    if free < 0:
        raise ExportError(f"{where}: has a kernel larger than its padded image")
    return free // stride + 1


def _work(node: onnx.NodeProto, made: Shape, numbers: Mapping[str, int]) -> int:
    """Multiply-adds, or codes looked at."""
    count = math.prod(made)
    if node.op_type in WINDOWED:
        count *= numbers.get("kernel_h", 1) * numbers.get("kernel_w", 1)
    if node.op_type in ("QConv", "QConvFloat", "QGemm", "QGemmFloat"):
        count *= max(numbers.get("channels_in", 1) // numbers.get("groups", 1), 1)
    return count


def _number(numbers: Mapping[str, int], name: str, where: str) -> int:
    if name not in numbers:
        raise ExportError(f"{where}: has no integer attribute {name}")
    return numbers[name]
