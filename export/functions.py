"""Functions of one code: what is computed element by element in floating point between two quantizers.

A sigmoid, GELU, x · sigmoid(x) or a leaky ReLU between two quantizers has as many arguments as the first one has codes, 256
at most. All of them are computed here in float64. `export/ties.py` keeps the results clear of ties, so that every runtime
gives the same codes, and `export/native_graph.py` writes them as a table of 256 bytes:

    table[q] = clip(rint(f((q - z_x) · s_x) / s_y) + z_y, low, high)
"""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from export.lowered import LoweredModel, LoweredQuantizer
from export.skeleton import CODE_OPS, constant, fill_of, quantizer_of

OPSET = 20  # of the skeleton's operators
CODES = 256

# Operations on floats that are computed element by element. All are continuous: where an argument is off in its last bits,
# so is the result.
ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
    "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softplus",
    "Softsign", "Sqrt", "Sub", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class CodeFunction:
    """A function of one code.

    nodes: what computes it, in order, layout operations among them. sources: the values that carry the codes it reads.
    grid: of these codes.
    """

    nodes: tuple[ir.Node, ...]
    sources: frozenset[ir.Value]
    grid: LoweredQuantizer

    @property
    def keeps_places(self) -> bool:
        """Whether every result is computed from the code at its own place of one tensor."""
        moved = any(node.op_type in CODE_OPS for node in self.nodes)
        return len(self.sources) == 1 and not moved

    def of(self, real: NDArray[np.floating]) -> NDArray[np.float64]:
        """float64: the function of real values (any number, one axis)."""
        return _evaluate(self.nodes, real)

    def table(self, out: LoweredQuantizer) -> NDArray[np.uint8]:
        """uint8 (256,): the code on `out` of every code; of a code that the grid does not have, that of the nearest one."""
        codes = np.arange(CODES).clip(self.grid.low, self.grid.high)
        real = (codes - self.grid.zero_point) * float(self.grid.scale)
        rounded = np.rint(self.of(real) / float(out.scale)) + out.zero_point
        return rounded.clip(out.low, out.high).astype(np.uint8)


def function_before(mark: ir.Node, model: LoweredModel) -> CodeFunction | None:
    """What is computed from single codes of one grid in floating point before the quantizer `mark`, if anything is.

    None for sums and products of codes, which have a definition of their own (`export/arithmetic.py`), and where the function
    has no finite result for one of the codes.
    """
    value = mark.inputs[0]
    last = value.producer() if value is not None else None
    if last is None or quantizer_of(value) is not None or _merges_codes(last):
        return None
    nodes = _elementwise_nodes(last)
    sources = set[ir.Value]()
    for node in nodes:
        for operand in _operands(node):
            if quantizer_of(operand) is not None:
                sources.add(operand)
    names = {quantizer_of(source) for source in sources}
    if len(names) != 1:
        return None
    grid = model.quantizers.get(names.pop() or "")
    if grid is None or grid.is_binary:
        return None
    found = CodeFunction(tuple(nodes), frozenset(sources), grid)
    codes = np.arange(grid.low, grid.high + 1) - grid.zero_point
    results = found.of(codes * float(grid.scale))
    return found if np.isfinite(results).all() else None


def _merges_codes(node: ir.Node) -> bool:
    """Whether it adds or multiplies tensors of codes."""
    on_codes = all(quantizer_of(value) is not None for value in node.inputs)
    return on_codes and node.op_type in ("Add", "Mul")


def _operands(node: ir.Node) -> list[ir.Value]:
    """What `node` reads, but for the shapes and indices of a layout operation."""
    inputs = node.inputs[:1] if node.op_type in CODE_OPS else node.inputs
    return [value for value in inputs if value is not None]


def _elementwise_nodes(last: ir.Node) -> list[ir.Node]:
    """The nodes from codes to `last`, in order, or none where one of them is not elementwise or reads a constant tensor."""
    found: list[ir.Node] = []

    def visit(node: ir.Node) -> bool:
        if node in found:
            return True
        if node.domain != "" or node.op_type not in ELEMENTWISE | CODE_OPS:
            return False
        if node.op_type == "Pad" and fill_of(node) != 0.0:
            return False
        for value in _operands(node):
            if quantizer_of(value) is not None:
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


def _evaluate(
    nodes: tuple[ir.Node, ...], codes: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The last of `nodes` in float64, given the real values `codes` wherever codes are read.

    The nodes are elementwise and `codes` has one axis, so that layout operations are left out.
    """
    graph = _ScalarGraph()
    for node in nodes:
        graph.append(node)
    result = graph.name_of(nodes[-1].outputs[0])
    model = graph.model(result, len(codes))
    with np.errstate(all="ignore"):  # what is not finite is refused
        (values,) = ReferenceEvaluator(model).run(None, {"codes": codes})
    return np.asarray(values, np.float64)


class _ScalarGraph:
    """Elementwise nodes in float64 on one input `codes` of one axis."""

    def __init__(self) -> None:
        self.names: dict[ir.Value, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def append(self, node: ir.Node) -> None:
        """Add a node; a layout operation is left out."""
        result = node.outputs[0]
        if node.op_type in CODE_OPS:
            self.names[result] = self.name_of(node.inputs[0])
            return
        inputs = [self.name_of(value) for value in node.inputs]
        self.names[result] = f"value{len(self.nodes)}"
        copied = onnx.helper.make_node(node.op_type, inputs, [self.names[result]])
        for attribute in node.attributes.values():
            copied.attribute.append(ir.to_proto(attribute))
        self.nodes.append(copied)

    def name_of(self, value: ir.Value | None) -> str:
        """Name of a value here: a node's result, a constant, or the input where it is neither."""
        if value is None:
            return ""
        if value not in self.names:
            fixed = constant(value)
            self.names[value] = "codes" if fixed is None else self._constant(fixed)
        return self.names[value]

    def _constant(self, value: NDArray[np.generic]) -> str:
        name = f"constant{len(self.constants)}"
        scalar = np.asarray(value, np.float64).reshape(())
        self.constants.append(onnx.numpy_helper.from_array(scalar, name))
        return name

    def model(self, result: str, size: int) -> onnx.ModelProto:
        """The model from `size` codes to the value `result`."""
        double = onnx.TensorProto.DOUBLE
        graph = onnx.helper.make_graph(
            self.nodes,
            "function",
            [onnx.helper.make_tensor_value_info("codes", double, [size])],
            [onnx.helper.make_tensor_value_info(result, double, [size])],
            self.constants,
        )
        opset = onnx.helper.make_opsetid("", OPSET)
        model = onnx.helper.make_model(graph, opset_imports=[opset])
        return onnx.shape_inference.infer_shapes(model)
