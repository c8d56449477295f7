"""Canonical `LoweredModel` -> ONNX in QDQ form, the shape an unmodified ONNX Runtime turns into integer kernels.

    x -> QuantizeLinear(u8) -> Clip(u8) -> [layout ops on codes] -> DequantizeLinear -> Conv -> QuantizeLinear -> ...

The clip stands on the integer side (a float clip breaks the fusion, `docs/lowering.md`); every consumer gets its own
DequantizeLinear; weights are the stored codes, biases int32 codes.
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from export.layer_weights import UINT8_OFFSET, LayerWeights
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.names import bias_of, weight_scale_of
from export.skeleton import (
    code_of_fill,
    constant,
    is_mark,
    mark_name,
    moves_codes,
    reading_quantizer,
    weight_layer,
)
from export.targets import TARGETS, Target, plan_layer
from export.thresholds import CODES, WRITE_ZERO_POINT, code_thresholds
from export.writer import Writer, attributes_of, value_name

FLOAT_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def emit_qdq(
    model: LoweredModel, target: Target = TARGETS["ort-int8"]
) -> onnx.ModelProto:
    """The file of a canonical `model` for `target`. Input and output names are the skeleton's.

    Raises ExportError naming a layer the target cannot run.
    """
    writer = Writer(model, target)
    emitter = Emitter(writer)
    for node in model.skeleton.graph:
        emitter.emit(node)
    outputs = [writer.float_output(value) for value in model.skeleton.graph.outputs]
    return writer.proto(outputs)


class Emitter:
    """Appends what stands for one node of the skeleton after the other."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.model = writer.model
        self.weights = LayerWeights(writer)

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
        source = self.writer.codes_of(node.inputs[0]) if node.inputs else None
        if source is not None and moves_codes(node):
            self._move(node, source)
        else:
            self._compute_in_float(node)

    def _move(self, node: ir.Node, source: tuple[str, LoweredQuantizer]) -> None:
        """A layout operation on codes."""
        codes, grid = source
        inputs = [codes]
        for value in node.inputs[1:]:
            part = self.writer.codes_of(value) if node.op_type == "Concat" else None
            inputs.append(self.writer.float_of(value) if part is None else part[0])
        if node.op_type == "Pad":
            fill = code_of_fill(node, grid)
            inputs[2:3] = [self.writer.constant(f"zero{fill}", np.uint8(fill))]
        names = [value_name(value) for value in node.outputs]
        outputs = [f"{name}/codes" for name in names]
        self.writer.copy(node, inputs, outputs)
        for name, output in zip(names, outputs, strict=True):
            self.writer.codes[name] = (output, grid)

    def _compute_in_float(self, node: ir.Node) -> None:
        inputs = [self.writer.float_of(value) for value in node.inputs]
        first = node.inputs[0] if node.inputs else None
        is_dequantized = first is not None and inputs[0] != value_name(first)
        if is_dequantized and _runtime_would_quantize(node):
            inputs[0] = self._kept_apart(inputs[0])
        self.writer.copy(node, inputs)

    def _kept_apart(self, value: str) -> str:
        """The same floats after a LeakyRelu of slope 1, which changes nothing and hides from the runtime where they come
        from."""
        return self.writer.add("LeakyRelu", [value], alpha=1.0)

    def _quantize(self, node: ir.Node) -> None:
        quantizer = self.model.quantizers[mark_name(node)]
        if quantizer.is_binary:
            self._binarize(node, quantizer)
            return
        x = self.writer.float_of(node.inputs[0])
        needs_clip = (quantizer.low, quantizer.high) != (0, 255)
        if not needs_clip and self.writer.codes_of(node.inputs[0]) is not None:
            # The runtime takes two 8-bit quantizers in a row for one too many and drops one (DoubleQDQPairsRemover).
            # Elsewhere this costs more than it saves.
            x = self._kept_apart(x)
        inputs = [x, *self.writer.scale_and_zero(quantizer)]
        if needs_clip:
            wide = self.writer.add("QuantizeLinear", inputs)
            self._clip(wide, quantizer)
        else:
            self.writer.add("QuantizeLinear", inputs, quantizer.name)
        self._note_codes(node, quantizer)

    def _binarize(self, node: ir.Node, quantizer: LoweredQuantizer) -> None:
        """Storage code 254 from the threshold on, 0 below it (`export/thresholds.py`)."""
        writer = self.writer
        source = node.inputs[0]
        assert source is not None
        codes = writer.codes_of(source)
        if codes is not None:
            x = self._distance_from_threshold(codes, quantizer)
            scale = writer.constant("1/256", np.float32(1 / CODES))
        elif quantizer.write_scale is not None:
            x = value_name(source)
            name = f"{writer.scales[quantizer.name]}w"
            scale = writer.constant(name, quantizer.write_scale)
        else:
            raise ExportError(
                f"quantizer {quantizer.name!r}: one bit is decided from a layer's sums or from codes, and it reads neither"
            )
        zero_point = np.uint8(WRITE_ZERO_POINT)
        zero = writer.constant(f"zero{zero_point}", zero_point)
        wide = writer.add("QuantizeLinear", [x, scale, zero])
        self._clip(wide, quantizer)
        self._note_codes(node, quantizer)

    def _distance_from_threshold(
        self, source: tuple[str, LoweredQuantizer], quantizer: LoweredQuantizer
    ) -> str:
        """How far codes lie above the first one that is +1, as floats."""
        codes, grid = source
        first = code_thresholds(grid, quantizer)
        name = f"zero{first}" if first.ndim == 0 else f"{quantizer.name}/t"
        zero = self.writer.constant(name, first)
        ones = np.ones(first.shape, np.float32)
        scale = self.writer.constant(f"ones{first.size}", ones)
        return self.writer.add("DequantizeLinear", [codes, scale, zero])

    def _clip(self, wide: str, quantizer: LoweredQuantizer) -> None:
        """The codes of `quantizer` from those that QuantizeLinear gives, which are 0 to 255."""
        low = self.writer.constant(f"clip{quantizer.low}", np.uint8(quantizer.low))
        high = self.writer.constant(f"clip{quantizer.high}", np.uint8(quantizer.high))
        self.writer.add("Clip", [wide, low, high], quantizer.name)

    def _note_codes(self, mark: ir.Node, quantizer: LoweredQuantizer) -> None:
        result = value_name(mark.outputs[0])
        self.writer.codes[result] = (quantizer.name, quantizer)

    def _weighted(self, node: ir.Node, layer: LoweredLayer) -> None:
        source = self.model.quantizers.get(layer.input_quantizer)
        writes_floats = reading_quantizer(node, self.model) is None
        if node.op_type == "Conv" and source is not None and writes_floats:
            self._convolve_to_float(node, layer, source)
            return
        x = self.writer.float_of(node.inputs[0])
        weight = self.weights.write_weight(layer, source)
        bias = self.weights.write_bias(layer, source)
        self.writer.copy(node, [x, weight, bias], name=layer.name)

    def _convolve_to_float(
        self, node: ir.Node, layer: LoweredLayer, source: LoweredQuantizer
    ) -> None:
        """A convolution whose results no quantizer reads: ConvInteger, the bias in int32, then one multiplication. In QDQ
        form the runtime would compute it in floating point, for its QLinearConv cannot write floats."""
        writer = self.writer
        sums = self._integer_convolution(node, layer, source)
        image_axes = [1] * (layer.codes.ndim - 2)
        channels = np.array([-1, *image_axes])
        per_channel = writer.constant(f"channels/{len(image_axes)}", channels)
        source_scale, _ = writer.scale_and_zero(source)
        weight_scale = writer.constant(weight_scale_of(layer.name), layer.stored_scale)
        unit = writer.add("Mul", [source_scale, weight_scale])
        assert layer.bias_codes is not None
        bias_codes = writer.constant(bias_of(layer.name), layer.bias_codes)
        bias = writer.add("Reshape", [bias_codes, per_channel])
        total = writer.add("Add", [sums, bias])
        real_sums = writer.add("Cast", [total], to=TensorProto.FLOAT)
        real_unit = writer.add("Reshape", [unit, per_channel])
        result = value_name(node.outputs[0])
        writer.add("Mul", [real_sums, real_unit], result)

    def _integer_convolution(
        self, node: ir.Node, layer: LoweredLayer, source: LoweredQuantizer
    ) -> str:
        """int32 sums of a convolution, without its bias."""
        plan = plan_layer(self.writer.target, layer, source)
        found = self.writer.codes_of(node.inputs[0])
        assert found is not None
        codes, grid = found
        if plan.uint8:
            weight_zero = self.writer.constant("128", np.uint8(UINT8_OFFSET))
        else:
            weight_zero = self.writer.constant("0", np.int8(0))
        weight = self.weights.write_codes(layer, plan)
        _, zero = self.writer.scale_and_zero(grid)
        operands = [codes, weight, zero, weight_zero]
        sums = self.writer.fresh()
        made = helper.make_node("ConvInteger", operands, [sums], name=layer.name)
        made.attribute.extend(attributes_of(node))
        self.writer.nodes.append(made)
        return sums


def _runtime_would_quantize(node: ir.Node) -> bool:
    """Whether the runtime, if `node` read a DequantizeLinear, would compute it on integers of its own: it makes a
    QLinearSoftmax, which rounds halfway, and WeightBiasQuantization rounds float weights and biases."""
    if node.op_type in FLOAT_LAYERS:
        return constant(node.inputs[1]) is not None
    return node.op_type == "Softmax"
