"""Canonical `LoweredModel` -> the plain QuantizeLinear/DequantizeLinear file that OpenVINO, TensorRT, QNN and others read.

    x -> [Clip] -> QuantizeLinear -> DequantizeLinear -> Conv -> ...
                            codes -> DequantizeLinear ---^

Everything between the pairs is an ordinary operator on floats; which of them run on integers is the runtime's choice.
* Weights are the stored codes, with zero point 0 and one positive scale per output channel. Biases are float32.
* Codes that leave room in the 8-bit type are clipped as floats before QuantizeLinear: clip and rounding are monotone, so the
  codes are the same, and every runtime reads it.
* A layout operation runs on floats too; the pair is written again before a layer, sum, product or pool after it.
  Values on a grid are quantized to themselves, so that is exact.
"""

import numpy as np
import onnx
import onnx_ir as ir

from export.layer_weights import LayerWeights
from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer
from export.names import int4_weight_of, weight_of, weight_scale_of
from export.skeleton import is_mark, mark_name, moves_codes, quantizer_of, weight_layer
from export.targets import Target, plan_layer
from export.writer import Writer, value_name

# Operators that a runtime computes on integers when their inputs come from DequantizeLinear, beside layers.
QUANTIZED_OPS = {"Add", "Mul", "MatMul", "Concat", "AveragePool", "GlobalAveragePool"}
FULL_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}


def emit_plain_qdq(model: LoweredModel, target: Target) -> onnx.ModelProto:
    """The file of a canonical model for a target with `qdq`."""
    writer = Writer(model, target)
    emitter = QdqEmitter(writer)
    for node in model.skeleton.graph:
        emitter.emit(node)
    outputs = [writer.float_output(value) for value in model.skeleton.graph.outputs]
    return writer.proto(outputs)


class QdqEmitter:
    """Appends what stands for one node of the skeleton after the other."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.model = writer.model
        self.weights = LayerWeights(writer)
        self.written_again: dict[str, str] = {}  # float value on a grid -> its codes

    def emit(self, node: ir.Node) -> None:
        """Append the nodes of one of the skeleton's, all before which are there already."""
        if is_mark(node):
            if mark_name(node) in self.model.quantizers:
                self._quantize(node)
            return
        layer = weight_layer(node, self.model)
        if layer is not None:
            self._weighted(node, layer)
            return
        is_quantized = node.op_type in QUANTIZED_OPS and not moves_codes(node)
        read = self._quantized if is_quantized else self.writer.float_of
        self.writer.copy(node, [read(value) for value in node.inputs])

    def _quantize(self, node: ir.Node) -> None:
        quantizer = self.model.quantizers[mark_name(node)]
        x = self.writer.float_of(node.inputs[0])
        follows_another = self.writer.codes_of(node.inputs[0]) is not None
        # Two pairs in a row look like one too many to ONNX Runtime, which drops one; a Clip keeps them apart.
        if self._is_narrow(quantizer) or follows_another:
            x = self.writer.add("Clip", [x, *self._bounds(quantizer)])
        grid = self.writer.scale_and_zero(quantizer)
        self.writer.add("QuantizeLinear", [x, *grid], quantizer.name)
        result = value_name(node.outputs[0])
        self.writer.codes[result] = (quantizer.name, quantizer)

    def _is_narrow(self, quantizer: LoweredQuantizer) -> bool:
        """Whether the quantizer has fewer codes than the type they are written in."""
        kind = self.writer.target.qdq
        shift = quantizer.zero_point if kind == "int8" else 0
        codes = (quantizer.low - shift, quantizer.high - shift)
        return codes != FULL_RANGE[kind]

    def _bounds(self, quantizer: LoweredQuantizer) -> list[str]:
        """The real values of the lowest and the highest code."""
        scale_name = self.writer.scales[quantizer.name]
        names = []
        for end, code in (("low", quantizer.low), ("high", quantizer.high)):
            value = np.float32(code - quantizer.zero_point) * quantizer.scale
            names.append(self.writer.constant(f"{scale_name}/{end}", value))
        return names

    def _quantized(self, value: ir.Value | None) -> str:
        """`value` from DequantizeLinear if it lies on a grid; after a layout operation the pair is written again."""
        writer = self.writer
        quantizer = quantizer_of(value)
        if value is None or quantizer is None or writer.codes_of(value) is not None:
            return writer.float_of(value)
        grid = writer.scale_and_zero(self.model.quantizers[quantizer])
        name = value_name(value)
        if name not in self.written_again:
            self.written_again[name] = writer.add("QuantizeLinear", [name, *grid])
        return writer.add("DequantizeLinear", [self.written_again[name], *grid])

    def _weighted(self, node: ir.Node, layer: LoweredLayer) -> None:
        source = self.model.quantizers.get(layer.input_quantizer)
        x = self._quantized(node.inputs[0])
        weight = self._weight(layer, source)
        bias = self.weights.write_float_bias(layer)
        self.writer.copy(node, [x, weight, bias], name=layer.name)

    def _weight(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the layer's codes as they are, INT4 where the target and the codes allow it."""
        writer = self.writer
        scale = writer.constant(weight_scale_of(layer.name), layer.stored_scale)
        channels = len(layer.scale)
        no_offsets = np.zeros(channels, np.int8)
        if plan_layer(writer.target, layer, source).bits == 4:
            codes = writer.int4(int4_weight_of(layer.name), layer.codes)
            zeros = writer.int4(f"zeros/{channels}/int4", no_offsets)
        else:
            codes = writer.constant(weight_of(layer.name), layer.codes)
            zeros = writer.constant(f"zeros/{channels}", no_offsets)
        return writer.add("DequantizeLinear", [codes, scale, zeros], axis=0)
