"""Canonical `LoweredModel` -> ONNX in QDQ form, the shape an unmodified ONNX Runtime turns into integer kernels.

    x -> QuantizeLinear(u8) -> Clip(u8) -> [layout ops on codes] -> DequantizeLinear -> Conv -> QuantizeLinear -> ...

The clip stands on the integer side (a float clip breaks the fusion, `docs/lowering.md`); every consumer gets its own
DequantizeLinear; weights are the stored codes, biases int32 codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.packing import pack, tables
from export.skeleton import (
    code_of_fill,
    constant,
    is_mark,
    mark_name,
    moves_codes,
    weight_layer,
    written_by,
)
from export.targets import TARGETS, LayerPlan, Target, plan_layer
from export.thresholds import CODES, WRITE_ZERO_POINT, code_thresholds

IR_VERSION = 10
FLOAT_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def emit_qdq(
    model: LoweredModel, target: Target = TARGETS["ort-int8"]
) -> onnx.ModelProto:
    """The file of a canonical `model` for `target`. Input and output names are the skeleton's.

    Raises ExportError naming a layer the target cannot run.
    """
    return Emitter(model, target).emit()


class Emitter:
    """Walks the skeleton and appends nodes; `export/native_graph.py` builds on it."""

    def __init__(self, model: LoweredModel, target: Target) -> None:
        self.model, self.target = model, target
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        # Skeleton value -> (tensor of codes, its grid)
        self.codes: dict[str, tuple[str, LoweredQuantizer]] = {}
        # Read often, looked up by nobody
        self.scales = {name: f"s{i}" for i, name in enumerate(model.quantizers)}
        self.intermediates = 0
        # Names that mean a layer's codes in the file, and all others that the model's own graph has: nothing of these two
        # and of what is added here may meet. The exporter writes equal tensors once, under the name of one of them.
        self.of_layers = {
            f"{layer.name}.{part}"
            for layer in model.layers.values()
            for part in ("weight", "bias")
        }
        self.given = _names(model.skeleton.graph) - self.of_layers
        self.widened: set[str] = set()  # tables that a Cast has made int32
        self.opsets = [helper.make_opsetid("", target.opset)]

    def emit(self) -> onnx.ModelProto:
        """The ONNX model of the skeleton."""
        graph = self.model.skeleton.graph
        for node in graph:
            self._emit(node)
        outputs = [self._graph_output(value) for value in graph.outputs]
        made = helper.make_graph(
            self.nodes,
            "edgeqat",
            [_value_info(v) for v in graph.inputs],
            outputs,
            list(self.initializers.values()),
        )
        return helper.make_model(
            made,
            opset_imports=self.opsets,
            ir_version=IR_VERSION,
            producer_name="edgeqat",
        )

    def _emit(self, node: ir.Node) -> None:
        if is_mark(node):
            if mark_name(node) in self.model.quantizers:
                self._quantize(node)
            return
        layer = weight_layer(node, self.model)
        if layer is not None:
            self._weighted(node, layer)
        elif (
            node.inputs
            and node.inputs[0] is not None
            and value_name(node.inputs[0]) in self.codes
            and moves_codes(node)
        ):
            source, grid = self.codes[value_name(node.inputs[0])]
            outputs = [f"{value_name(v)}/codes" for v in node.outputs]
            rest = node.inputs[1:]
            joins = node.op_type == "Concat"
            inputs = [
                self.codes[value_name(v)][0]
                if joins and v is not None
                else self._float(v)
                for v in rest
            ]
            if node.op_type == "Pad":
                code = code_of_fill(node, grid)
                inputs[1:2] = [self._constant(f"zero{code}", np.uint8(code))]
            self._copy(node, [source, *inputs], outputs)
            self.codes |= {
                value_name(v): (codes, grid)
                for v, codes in zip(node.outputs, outputs, strict=True)
            }
        else:
            inputs = [self._float(v) for v in node.inputs]
            first = node.inputs[0] if node.inputs else None
            is_dequantized = first is not None and inputs[0] != value_name(first)
            if is_dequantized and _runtime_would_quantize(node):
                # Of slope 1, which changes nothing
                inputs[0] = self._add("LeakyRelu", inputs[:1], alpha=1.0)
            self._copy(node, inputs, [value_name(v) for v in node.outputs])

    def _quantize(self, node: ir.Node) -> None:
        quantizer = self.model.quantizers[mark_name(node)]
        if quantizer.is_binary:
            self._binarize(node, quantizer)
            return
        x = self._float(node.inputs[0])
        needs_clip = (quantizer.low, quantizer.high) != (0, 255)
        if (
            not needs_clip
            and node.inputs[0] is not None
            and value_name(node.inputs[0]) in self.codes
        ):
            # The runtime takes two 8-bit quantizers in a row for one too many and drops one (DoubleQDQPairsRemover). A
            # LeakyRelu of slope 1 changes nothing and keeps them apart. Elsewhere it costs more than it saves.
            x = self._add("LeakyRelu", [x], alpha=1.0)
        first = self._add(
            "QuantizeLinear",
            [x, *self._grid(quantizer)],
            None if needs_clip else quantizer.name,
        )
        if needs_clip:
            bounds = [
                self._constant(f"clip{b}", np.uint8(b))
                for b in (quantizer.low, quantizer.high)
            ]
            self._add("Clip", [first, *bounds], quantizer.name)
        self.codes[value_name(node.outputs[0])] = (quantizer.name, quantizer)

    def _binarize(self, node: ir.Node, quantizer: LoweredQuantizer) -> None:
        """Storage code 254 from the threshold on, 0 below it (`export/thresholds.py`)."""
        source = node.inputs[0]
        assert source is not None
        if value_name(source) in self.codes:
            codes, grid = self.codes[value_name(source)]
            first = code_thresholds(grid, quantizer)
            zero = self._constant(
                f"zero{first}" if first.ndim == 0 else f"{quantizer.name}/t", first
            )
            ones = self._constant(f"ones{first.size}", np.ones(first.shape, np.float32))
            x = self._add("DequantizeLinear", [codes, ones, zero])
            scale = self._constant("1/256", np.float32(1 / CODES))
        elif quantizer.write_scale is not None:
            x, scale = (
                value_name(source),
                self._constant(
                    f"{self.scales[quantizer.name]}w", quantizer.write_scale
                ),
            )
        else:
            raise ExportError(
                f"quantizer {quantizer.name!r}: one bit is decided from a layer's sums or from codes, and it reads neither"
            )
        zero_point = self._constant(
            f"zero{WRITE_ZERO_POINT}", np.uint8(WRITE_ZERO_POINT)
        )
        wide = self._add("QuantizeLinear", [x, scale, zero_point])
        bounds = [
            self._constant(f"clip{b}", np.uint8(b))
            for b in (quantizer.low, quantizer.high)
        ]
        self._add("Clip", [wide, *bounds], quantizer.name)
        self.codes[value_name(node.outputs[0])] = (quantizer.name, quantizer)

    def _weighted(self, node: ir.Node, layer: LoweredLayer) -> None:
        source = self.model.quantizers.get(layer.input_quantizer)
        if (
            node.op_type == "Conv"
            and source is not None
            and not self.target.qdq
            and written_by(node, self.model) is None
        ):
            self._convolve_to_float(node, layer, source)
            return
        inputs = [
            self._float(node.inputs[0]),
            self._weight(layer, source),
            self._bias(layer, source),
        ]
        self._copy(node, inputs, [value_name(v) for v in node.outputs], name=layer.name)

    def _convolve_to_float(
        self, node: ir.Node, layer: LoweredLayer, source: LoweredQuantizer
    ) -> None:
        """A convolution whose results no quantizer reads: ConvInteger, the bias in int32, then one multiplication. In QDQ
        form the runtime would compute it in floating point, for its QLinearConv cannot write floats."""
        assert node.inputs[0] is not None and layer.bias_codes is not None
        plan = plan_layer(self.target, layer, source)
        codes, grid = self.codes[value_name(node.inputs[0])]
        weight_zero_point = (
            self._constant("128", np.uint8(128))
            if plan.uint8
            else self._constant("0", np.int8(0))
        )
        operands = [
            codes,
            self._weight_codes(layer, plan),
            self._grid(grid)[1],
            weight_zero_point,
        ]
        made = helper.make_node(
            "ConvInteger", operands, [self._fresh()], name=layer.name
        )
        made.attribute.extend(
            ir.to_proto(a) for a in node.attributes.values() if not _is_default(node, a)
        )
        self.nodes.append(made)
        axes = [1] * (layer.codes.ndim - 2)
        shape = self._constant(f"channels/{len(axes)}", np.array([-1, *axes]))
        unit = self._add(
            "Mul",
            [
                self._grid(source)[0],
                self._constant(f"{layer.name}.weight/s", layer.stored_scale),
            ],
        )
        bias = self._add(
            "Reshape", [self._constant(f"{layer.name}.bias", layer.bias_codes), shape]
        )
        sums = self._add(
            "Cast", [self._add("Add", [made.output[0], bias])], to=TensorProto.FLOAT
        )
        self._add(
            "Mul",
            [sums, self._add("Reshape", [unit, shape])],
            value_name(node.outputs[0]),
        )

    def _weight(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the layer's codes · weight multiplier."""
        plan = plan_layer(self.target, layer, source)
        name, channels = self._weight_codes(layer, plan), len(layer.scale)
        inputs = [name, self._constant(f"{name}/s", layer.stored_scale)]
        if plan.uint8:
            inputs.append(
                self._constant(f"offsets/{channels}", np.full(channels, 128, np.uint8))
            )
        elif (
            layer.codes.ndim == 2
            # No zero point means 0, but the runtime makes a QGemm only of a weight that has one
        ):
            # With x64quantprecision ONNX Runtime 1.32 cannot load a file in which two layers share this constant.
            owner = name if self.target.session_options else "zeros"
            inputs.append(
                self._constant(f"{owner}/{channels}", np.zeros(channels, np.int8))
            )
        return self._add("DequantizeLinear", inputs, axis=0)

    def _weight_codes(self, layer: LoweredLayer, plan: LayerPlan) -> str:
        """The layer's codes · weight multiplier, which the runtime finds as one byte tensor `<layer>.weight`."""
        name = f"{layer.name}.weight"
        if plan.uint8:
            self._constant(
                name,
                (layer.codes.astype(np.int16) * layer.weight_multiplier + 128).astype(
                    np.uint8
                ),
            )
        elif plan.bits == 8:
            self._constant(
                name,
                (layer.codes.astype(np.int16) * layer.weight_multiplier).astype(
                    np.int8
                ),
            )
        elif self.target.storage == "onnx-int4" and plan.bits in (3, 4):
            nibbles = pack(layer.codes, 4)[0].tobytes()
            self.initializers[f"{name}/int4"] = helper.make_tensor(
                f"{name}/int4", TensorProto.INT4, layer.codes.shape, nibbles, raw=True
            )
            self._widen_int4(f"{name}/int4", layer.weight_multiplier, name)
        else:
            self._unpack(layer, plan.bits)
        return name

    def _widen_int4(self, codes: str, weight_multiplier: int, output: str) -> None:
        """INT4 codes -> int8 codes · weight multiplier; constants all, so the runtime folds them, which
        multiplies no 4-bit integers."""
        if weight_multiplier == 1:
            self._add("Cast", [codes], output, to=TensorProto.INT8)
            return
        wide = self._add("Cast", [codes], to=TensorProto.INT32)
        product = self._add(
            "Mul",
            [
                wide,
                self._constant(f"x{weight_multiplier}", np.int32(weight_multiplier)),
            ],
        )
        self._add("Cast", [product], output, to=TensorProto.INT8)

    def _unpack(self, layer: LoweredLayer, bits: int) -> None:
        """Planes -> int8 codes · weight multiplier by table look-ups; constants all, so the runtime folds them when it
        loads the file.

        What several planes contribute is added in int32: the runtime adds no smaller integers.
        """
        name, count = f"{layer.name}.weight", layer.codes.size
        planes = list(
            zip(
                pack(layer.codes, bits),
                tables(bits, layer.weight_multiplier),
                strict=True,
            )
        )
        padded = any(plane.size * table.shape[1] != count for plane, table in planes)
        columns = planes[0][1].shape[1]
        parts = []
        for index, (plane, table) in enumerate(planes):
            lookup = self._table(
                f"{bits}bit/x{layer.weight_multiplier}/{index}",
                table,
                wide=len(planes) > 1,
            )
            numbers = self._add(
                "Cast",
                [self._constant(f"{name}/p{index}", plane)],
                to=TensorProto.INT32,
            )
            rows = self._add("Gather", [lookup, numbers], axis=0)
            if padded:
                flat = self._add(
                    "Reshape", [rows, self._constant("flat", np.array([-1]))]
                )
                rows = self._add(
                    "Slice",
                    [
                        flat,
                        *(self._constant(f"at{v}", np.array([v])) for v in (0, count)),
                    ],
                )
            # Planes are joined in the shape of the first
            elif table.shape[1] != columns:
                rows = self._add(
                    "Reshape",
                    [rows, self._constant(f"rows{columns}", np.array([-1, columns]))],
                )
            parts.append(rows)
        while len(parts) > 1:
            parts[:2] = [self._add("Add", parts[:2])]
        codes = (
            self._add("Cast", parts, to=TensorProto.INT8)
            if len(planes) > 1
            else parts[0]
        )
        shape = self._constant(
            "x".join(map(str, layer.codes.shape)), np.array(layer.codes.shape)
        )
        self._add("Reshape", [codes, shape], name)

    def _table(self, name: str, table: NDArray[np.int8], wide: bool) -> str:
        """The look-up table of a plane, made int32 by the runtime where `wide`; written once per file."""
        constant = self._constant(name, table)
        if not wide:
            return constant
        widened = f"{name}/wide"
        if widened not in self.widened:
            self.widened.add(widened)
            self._add("Cast", [constant], widened, to=TensorProto.INT32)
        return widened

    def _bias(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the int32 bias; its scale, input times weight scale, is multiplied at load. A layer that
        reads floats adds a float bias."""
        if source is None:
            return self._constant(f"{layer.name}.bias", layer.float_bias)
        assert layer.bias_codes is not None
        codes = self._constant(f"{layer.name}.bias", layer.bias_codes)
        scale = self._add("Mul", [self._grid(source)[0], f"{layer.name}.weight/s"])
        return self._add("DequantizeLinear", [codes, scale], axis=0)

    def _float(self, value: ir.Value | None) -> str:
        """Name of a float tensor holding `value`; codes are dequantized anew for every reader."""
        if value is None:
            return ""
        name = value_name(value)
        if name in self.codes:
            codes, quantizer = self.codes[name]
            return self._add("DequantizeLinear", [codes, *self._grid(quantizer)])
        if value.const_value is not None:
            return self._initializer(
                f"{name}/float" if name in self.of_layers else name,
                value.const_value.numpy(),
            )
        return name

    def _grid(self, quantizer: LoweredQuantizer) -> list[str]:
        return [
            self._constant(self.scales[quantizer.name], quantizer.scale),
            self._constant(
                f"zero{quantizer.zero_point}", np.uint8(quantizer.zero_point)
            ),
        ]

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Note a tensor that the model's own graph does not have; returns the name that it gets."""
        return self._initializer(f"{name}~" if name in self.given else name, value)

    def _initializer(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node; what nobody needs to find by name gets a short one, for names are bytes too."""
        output = output or self._fresh()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _fresh(self) -> str:
        self.intermediates += 1
        name = f"~{self.intermediates}"
        return f"{name}~" if name in self.given else name

    def _copy(
        self,
        node: ir.Node,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str | None = None,
    ) -> None:
        made = helper.make_node(
            node.op_type, inputs, outputs, name=name or "", domain=node.domain
        )
        made.attribute.extend(
            ir.to_proto(a) for a in node.attributes.values() if not _is_default(node, a)
        )
        self.nodes.append(made)

    def _graph_output(self, value: ir.Value) -> onnx.ValueInfoProto:
        name = value_name(value)
        if name in self.codes:
            codes, quantizer = self.codes[name]
            self._add("DequantizeLinear", [codes, *self._grid(quantizer)], name)
            return _value_info(value, TensorProto.FLOAT)
        return _value_info(value)


def _names(graph: ir.Graph) -> set[str]:
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs),
    ]
    return {value_name(value) for value in values}


def _runtime_would_quantize(node: ir.Node) -> bool:
    """Whether the runtime, if `node` read a DequantizeLinear, would compute it on integers of its own: it makes a
    QLinearSoftmax, which rounds halfway, and WeightBiasQuantization rounds float weights and biases."""
    if node.op_type in FLOAT_LAYERS:
        return constant(node.inputs[1]) is not None
    return node.op_type == "Softmax"


def _is_default(node: ir.Node, attribute: ir.Attr) -> bool:
    """Whether the operator would take this value anyway; what is left out is bytes saved in every layer."""
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


def value_name(value: ir.Value) -> str:
    """Name of a value, which every value of a skeleton has."""
    assert value.name is not None
    return value.name


def _value_info(value: ir.Value, kind: int | None = None) -> onnx.ValueInfoProto:
    """kind: of TensorProto; None: the value's own."""
    shape = [d if isinstance(d, int) else str(d) for d in value.shape or []]
    own = TensorProto.FLOAT if value.dtype is None else int(value.dtype)
    return helper.make_tensor_value_info(
        value_name(value), own if kind is None else kind, shape
    )
