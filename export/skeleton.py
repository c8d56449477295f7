"""Reading a skeleton: marks, layers, and which codes a value carries."""

import ast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowered import DOMAIN, MARK, LoweredLayer, LoweredModel, LoweredQuantizer

# Paths of the modules around an operation, then its own name
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# Operations that move or pick codes; they commute with a quantizer of one scale. MaxPool does because rounding is monotone.
LAYOUT_OPS = {
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Identity",
    "DepthToSpace",
    "Pad",
}
# These too give codes for codes, but no quantizer is moved before them.
# Resize by nearest neighbour
PICK_OPS = {"Split", "Gather", "Expand", "Tile", "Resize"}
CODE_OPS = LAYOUT_OPS | PICK_OPS
WEIGHTED_OPS = {"Conv", "Gemm"}


def is_mark(node: ir.Node | None) -> bool:
    """Whether a node stands for a quantizer."""
    return node is not None and node.domain == DOMAIN and node.op_type == MARK


def mark_name(node: ir.Node) -> str:
    """Name of the quantizer that a mark stands for."""
    return node.attributes["name"].as_string()


def modules_of(node: ir.Node) -> list[str]:
    """Paths of the modules around an operation, the innermost last, as the exporter notes them."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    return scopes[:-1]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, or None where there are more, fewer, or the graph returns it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The value of an initializer or folded constant, None for anything else."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def ints_of(node: ir.Node, attribute: str, default: list[int]) -> list[int]:
    """A node's attribute that is a list of integers, or `default` where the node has none of this name."""
    if attribute not in node.attributes:
        return default
    return list(node.attributes[attribute].as_ints())


def is_set(node: ir.Node, attribute: str) -> bool:
    """Whether an attribute that may be 0 or 1 is 1; without it a node does as if it were 0."""
    return attribute in node.attributes and node.attributes[attribute].as_int() == 1


def weight_layer(node: ir.Node, model: LoweredModel) -> LoweredLayer | None:
    """The lowered layer whose marked weight `node` reads, if it is a quantized Conv or Gemm."""
    if node.op_type not in WEIGHTED_OPS or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    mark = weight.producer() if weight is not None else None
    if mark is None or not is_mark(mark):
        return None
    return model.layers.get(mark_name(mark))


def reading_quantizer(node: ir.Node, model: LoweredModel) -> LoweredQuantizer | None:
    """The activation quantizer that alone reads the result of `node`, if one does."""
    reader = only_reader(node.outputs[0])
    if reader is None or not is_mark(reader):
        return None
    return model.quantizers.get(mark_name(reader))


def quantizers_in_order(model: LoweredModel) -> list[str]:
    """Names of the activation quantizers, in graph order."""
    marks = [node for node in model.skeleton.graph if is_mark(node)]
    names = [mark_name(mark) for mark in marks]
    return [name for name in names if name in model.quantizers]


def quantizer_of(value: ir.Value | None) -> str | None:
    """Name of the quantizer whose codes `value` carries, seen through operations on codes; None for a float value."""
    node = value.producer() if value is not None else None
    while node is not None and moves_codes(node):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return mark_name(node) if node is not None and is_mark(node) else None


def fill_of(pad: ir.Node) -> float | None:
    """The value that a Pad fills with, or None where it is computed."""
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return 0.0
    fill = constant(pad.inputs[2])
    return None if fill is None else float(fill.reshape(()))


def code_of_fill(pad: ir.Node, grid: LoweredQuantizer) -> int:
    """The storage code that a Pad on codes fills with: a zero is the zero point, and minus infinity, which a max pool never
    picks, the lowest code."""
    return grid.zero_point if fill_of(pad) == 0.0 else grid.low


def moves_codes(node: ir.Node) -> bool:
    """Whether `node`, on codes, gives codes of the same grid. A Concat does where all its parts have one grid (a roll is
    two slices put together again) and no quantizer follows it."""
    if node.domain != "" or not node.inputs:
        return False
    match node.op_type:
        case "Pad":
            return fill_of(node) in (0.0, -np.inf)
        case "Resize":
            return _picks_nearest(node)
        case "Concat":
            if is_mark(only_reader(node.outputs[0])):
                return False
            grids = {quantizer_of(part) for part in node.inputs}
            return len(grids) == 1
        case _:
            return node.op_type in CODE_OPS


def _picks_nearest(resize: ir.Node) -> bool:
    mode = resize.attributes.get("mode")
    return mode is None or mode.as_string() == "nearest"
