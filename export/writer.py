"""Writing nodes and tensors of a file under names that do not meet; each form of file (`export/graph.py`, `export/qdq.py`,
`export/native_graph.py`) decides which nodes there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.lowered import LoweredModel, LoweredQuantizer
from export.names import bias_of, weight_of
from export.packing import pack
from export.targets import Target

IR_VERSION = 10


class Writer:
    """The file of a canonical model as far as it is written.

    codes: skeleton value -> (the uint8 or int8 tensor of its codes, their grid), where the value has codes.
    """

    def __init__(self, model: LoweredModel, target: Target) -> None:
        self.model, self.target = model, target
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.codes: dict[str, tuple[str, LoweredQuantizer]] = {}
        # Read often, looked up by nobody
        self.scales = {name: f"s{i}" for i, name in enumerate(model.quantizers)}
        self.intermediates = 0
        # Names that mean a layer's codes in the file, and all others that the model's own graph has: nothing of these two
        # and of what is added here may meet. The exporter writes equal tensors once, under the name of one of them.
        self.of_layers: set[str] = set()
        for layer in model.layers.values():
            self.of_layers |= {weight_of(layer.name), bias_of(layer.name)}
        self.given = _names(model.skeleton.graph) - self.of_layers
        self.opsets = [helper.make_opsetid("", target.opset)]

    def proto(self, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The finished file. Input names are the skeleton's."""
        graph = helper.make_graph(
            self.nodes,
            "edgeqat",
            [value_info(value) for value in self.model.skeleton.graph.inputs],
            outputs,
            list(self.initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=self.opsets,
            ir_version=IR_VERSION,
            producer_name="edgeqat",
        )

    def codes_of(self, value: ir.Value | None) -> tuple[str, LoweredQuantizer] | None:
        """The codes of a skeleton value and their grid, None where it has none."""
        return None if value is None else self.codes.get(value_name(value))

    def float_of(self, value: ir.Value | None) -> str:
        """Name of a float tensor holding `value`; codes are dequantized anew for every reader."""
        if value is None:
            return ""
        name = value_name(value)
        if name in self.codes:
            codes, quantizer = self.codes[name]
            return self.add(
                "DequantizeLinear", [codes, *self.scale_and_zero(quantizer)]
            )
        if value.const_value is not None:
            # A layer's own names stand for its codes
            own = f"{name}/float" if name in self.of_layers else name
            return self.initializer(own, value.const_value.numpy())
        return name

    def float_output(self, value: ir.Value) -> onnx.ValueInfoProto:
        """Write an output of the graph, in floating point."""
        name = value_name(value)
        if name in self.codes:
            codes, quantizer = self.codes[name]
            self.add("DequantizeLinear", [codes, *self.scale_and_zero(quantizer)], name)
            return value_info(value, TensorProto.FLOAT)
        return value_info(value)

    def scale_and_zero(self, quantizer: LoweredQuantizer) -> list[str]:
        """Names of a quantizer's scale and zero point."""
        scale = self.constant(self.scales[quantizer.name], quantizer.scale)
        if self.target.qdq == "int8":
            return [scale, self.constant("zero0", np.int8(0))]
        zero_point = quantizer.zero_point
        return [scale, self.constant(f"zero{zero_point}", np.uint8(zero_point))]

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Write a tensor that the model's own graph does not have; returns the name that it gets."""
        free = f"{name}~" if name in self.given else name
        return self.initializer(free, value)

    def initializer(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Write a tensor under this name, once; returns the name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def int4(self, name: str, codes: NDArray[np.int8]) -> str:
        """Write codes of 4 bits as ONNX's INT4 under this name, once; returns the name."""
        if name not in self.initializers:
            nibbles = pack(codes, 4)[0].tobytes()
            self.initializers[name] = helper.make_tensor(
                name, TensorProto.INT4, codes.shape, nibbles, raw=True
            )
        return name

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node; what nobody needs to find by name gets a short one, for names are bytes too."""
        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def fresh(self) -> str:
        """A name that nothing has."""
        self.intermediates += 1
        name = f"~{self.intermediates}"
        return f"{name}~" if name in self.given else name

    def copy(
        self,
        node: ir.Node,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        name: str = "",
    ) -> None:
        """Append a skeleton's node with other inputs; outputs: the node's own where None."""
        if outputs is None:
            outputs = [value_name(value) for value in node.outputs]
        made = helper.make_node(
            node.op_type, inputs, outputs, name=name, domain=node.domain
        )
        made.attribute.extend(attributes_of(node))
        self.nodes.append(made)


def value_name(value: ir.Value) -> str:
    """Name of a value, which every value of a skeleton has."""
    assert value.name is not None
    return value.name


def value_info(value: ir.Value, kind: int | None = None) -> onnx.ValueInfoProto:
    """kind: of TensorProto; None: the value's own."""
    shape = [size if isinstance(size, int) else str(size) for size in value.shape or []]
    if kind is None:
        kind = TensorProto.FLOAT if value.dtype is None else int(value.dtype)
    return helper.make_tensor_value_info(value_name(value), kind, shape)


def attributes_of(node: ir.Node) -> list[onnx.AttributeProto]:
    """The attributes of a node that differ from what its operator would take anyway: bytes are saved in every layer."""
    kept = []
    for attribute in node.attributes.values():
        if not _is_default(node, attribute):
            kept.append(ir.to_proto(attribute))
    return kept


def _names(graph: ir.Graph) -> set[str]:
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
    return {value_name(value) for value in values}


def _is_default(node: ir.Node, attribute: ir.Attr) -> bool:
    """Whether the operator would take this value anyway."""
    match attribute.name:
        case "auto_pad":
            return attribute.as_string() == "NOTSET"
        case "group":
            return attribute.as_int() == 1
        case "dilations" | "strides":
            return set(attribute.as_ints()) == {1}
        case "pads":
            return not any(attribute.as_ints())
        case "kernel_shape":
            return node.op_type == "Conv"  # the weight has it
        case _:
            return False
