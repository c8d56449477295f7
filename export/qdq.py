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
import onnx_ir as ir
from onnx import TensorProto, helper

from export.graph import Emitter, value_name
from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer
from export.packing import pack
from export.skeleton import grid_of, is_mark, mark_name, moves_codes, weight_layer
from export.targets import Target, plan_layer

# Operators that a runtime computes on integers when their inputs come from DequantizeLinear, beside layers.
QUANTIZED_OPS = {"Add", "Mul", "MatMul", "Concat", "AveragePool", "GlobalAveragePool"}
FULL_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}


class QdqEmitter(Emitter):
    """Writes the file of a canonical model for a target with `qdq`."""

    def __init__(self, model: LoweredModel, target: Target) -> None:
        super().__init__(model, target)
        self.written_again: dict[str, str] = {}  # float value on a grid -> its codes

    def _emit(self, node: ir.Node) -> None:
        if is_mark(node) or weight_layer(node, self.model) is not None:
            super()._emit(node)
            return
        is_quantized = node.op_type in QUANTIZED_OPS and not moves_codes(node)
        read = self._quantized if is_quantized else self._float
        self._copy(
            node, [read(v) for v in node.inputs], [value_name(v) for v in node.outputs]
        )

    def _quantize(self, node: ir.Node) -> None:
        quantizer, source = self.model.quantizers[mark_name(node)], node.inputs[0]
        assert source is not None
        x = self._float(source)
        # Two pairs in a row look like one too many to ONNX Runtime, which drops one; a Clip keeps them apart.
        if self._is_narrow(quantizer) or value_name(source) in self.codes:
            x = self._add("Clip", [x, *self._bounds(quantizer)])
        self._add("QuantizeLinear", [x, *self._grid(quantizer)], quantizer.name)
        self.codes[value_name(node.outputs[0])] = (quantizer.name, quantizer)

    def _is_narrow(self, quantizer: LoweredQuantizer) -> bool:
        """Whether the quantizer has fewer codes than the type they are written in."""
        shift = quantizer.zero_point if self.target.qdq == "int8" else 0
        return (quantizer.low - shift, quantizer.high - shift) != FULL_RANGE[
            self.target.qdq
        ]

    def _bounds(self, quantizer: LoweredQuantizer) -> list[str]:
        """The real values of the lowest and the highest code."""
        names = []
        for end, code in (("low", quantizer.low), ("high", quantizer.high)):
            value = np.float32(code - quantizer.zero_point) * quantizer.scale
            names.append(self._constant(f"{self.scales[quantizer.name]}/{end}", value))
        return names

    def _quantized(self, value: ir.Value | None) -> str:
        """`value` from DequantizeLinear if it lies on a grid; after a layout operation the pair is written again."""
        name_of_grid = grid_of(value)
        if value is None or name_of_grid is None or value_name(value) in self.codes:
            return self._float(value)
        grid, name = self._grid(self.model.quantizers[name_of_grid]), value_name(value)
        if name not in self.written_again:
            self.written_again[name] = self._add("QuantizeLinear", [name, *grid])
        return self._add("DequantizeLinear", [self.written_again[name], *grid])

    def _weighted(self, node: ir.Node, layer: LoweredLayer) -> None:
        source = self.model.quantizers.get(layer.input_quantizer)
        inputs = [
            self._quantized(node.inputs[0]),
            self._weight(layer, source),
            self._bias(layer, None),
        ]
        self._copy(node, inputs, [value_name(v) for v in node.outputs], name=layer.name)

    def _weight(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the layer's codes as they are, INT4 where the target and the codes allow it."""
        name, channels = f"{layer.name}.weight", len(layer.scale)
        scale = self._constant(f"{name}/s", layer.stored_scale)
        if plan_layer(self.target, layer, source).bits == 4:
            codes = self._int4(f"{name}/int4", layer.codes)
            zeros = self._int4(f"zeros/{channels}/int4", np.zeros(channels, np.int8))
        else:
            codes = self._constant(name, layer.codes)
            zeros = self._constant(f"zeros/{channels}", np.zeros(channels, np.int8))
        return self._add("DequantizeLinear", [codes, scale, zeros], axis=0)

    def _int4(self, name: str, codes: np.ndarray) -> str:
        if name not in self.initializers:
            nibbles = pack(codes, 4)[0].tobytes()
            self.initializers[name] = helper.make_tensor(
                name, TensorProto.INT4, codes.shape, nibbles, raw=True
            )
        return name

    def _grid(self, quantizer: LoweredQuantizer) -> list[str]:
        if self.target.qdq == "uint8":
            return super()._grid(quantizer)
        scale = self._constant(self.scales[quantizer.name], quantizer.scale)
        return [scale, self._constant("zero0", np.int8(0))]
