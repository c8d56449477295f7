"""A layer's weight and bias in a file for ONNX Runtime: stored as the target says, and the nodes that make them readable.

All of it is computed from constants, so that the runtime folds it when it loads the file.
"""

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.lowered import LoweredLayer, LoweredQuantizer
from export.names import bias_of, int4_weight_of, plane_of, weight_of, weight_scale_of
from export.packing import pack, tables
from export.targets import LayerPlan, plan_layer
from export.writer import Writer

UINT8_OFFSET = 128  # of weights for the u8·u8 kernel


class LayerWeights:
    """Writes weights and biases; what several layers share is written once."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.widened: set[str] = set()  # look-up tables that a Cast has made int32

    def write_weight(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the layer's codes · weight multiplier; returns the name of its result."""
        writer = self.writer
        plan = plan_layer(writer.target, layer, source)
        codes = self.write_codes(layer, plan)
        channels = len(layer.scale)
        scale = writer.constant(weight_scale_of(layer.name), layer.stored_scale)
        inputs = [codes, scale]
        if plan.uint8:
            offsets = np.full(channels, UINT8_OFFSET, np.uint8)
            inputs.append(writer.constant(f"offsets/{channels}", offsets))
        elif layer.codes.ndim == 2:
            # No zero point means 0, but the runtime makes a QGemm only of a weight that has one. With x64quantprecision
            # ONNX Runtime 1.32 cannot load a file in which two layers share this constant.
            owner = codes if writer.target.session_options else "zeros"
            zeros = np.zeros(channels, np.int8)
            inputs.append(writer.constant(f"{owner}/{channels}", zeros))
        return writer.add("DequantizeLinear", inputs, axis=0)

    def write_codes(self, layer: LoweredLayer, plan: LayerPlan) -> str:
        """The layer's codes · weight multiplier, as one tensor of bytes, `<layer>.weight`; returns its name."""
        name = weight_of(layer.name)
        wide = layer.codes.astype(np.int16) * layer.weight_multiplier
        if plan.uint8:
            self.writer.constant(name, (wide + UINT8_OFFSET).astype(np.uint8))
        elif plan.bits == 8:
            self.writer.constant(name, wide.astype(np.int8))
        elif self.writer.target.storage == "onnx-int4" and plan.bits in (3, 4):
            nibbles = self.writer.int4(int4_weight_of(layer.name), layer.codes)
            self._widen_int4(nibbles, layer.weight_multiplier, name)
        else:
            self._unpack(layer, plan.bits, name)
        return name

    def write_bias(self, layer: LoweredLayer, source: LoweredQuantizer | None) -> str:
        """DequantizeLinear of the int32 bias; its scale, input times weight scale, is multiplied at load. A layer that
        reads floats adds a float bias."""
        if source is None:
            return self.write_float_bias(layer)
        assert layer.bias_codes is not None
        writer = self.writer
        codes = writer.constant(bias_of(layer.name), layer.bias_codes)
        source_scale, _ = writer.scale_and_zero(source)
        scale = writer.add("Mul", [source_scale, weight_scale_of(layer.name)])
        return writer.add("DequantizeLinear", [codes, scale], axis=0)

    def write_float_bias(self, layer: LoweredLayer) -> str:
        """The bias as floats."""
        return self.writer.constant(bias_of(layer.name), layer.float_bias)

    def _widen_int4(self, codes: str, weight_multiplier: int, output: str) -> None:
        """INT4 codes -> int8 codes · weight multiplier; the runtime multiplies no 4-bit integers."""
        writer = self.writer
        if weight_multiplier == 1:
            writer.add("Cast", [codes], output, to=TensorProto.INT8)
            return
        wide = writer.add("Cast", [codes], to=TensorProto.INT32)
        multiplier = writer.constant(
            f"x{weight_multiplier}", np.int32(weight_multiplier)
        )
        product = writer.add("Mul", [wide, multiplier])
        writer.add("Cast", [product], output, to=TensorProto.INT8)

    def _unpack(self, layer: LoweredLayer, bits: int, output: str) -> None:
        """Planes -> int8 codes · weight multiplier by table look-ups.

        What several planes contribute is added in int32: the runtime adds no smaller integers.
        """
        writer = self.writer
        planes = pack(layer.codes, bits)
        lookups = tables(bits, layer.weight_multiplier)
        several = len(planes) > 1
        padded = _any_is_padded(planes, lookups, layer.codes.size)
        columns = lookups[0].shape[1]
        parts = []
        for index, (plane, lookup) in enumerate(zip(planes, lookups, strict=True)):
            name = f"{bits}bit/x{layer.weight_multiplier}/{index}"
            table = self._table(name, lookup, wide=several)
            stored = writer.constant(plane_of(layer.name, index), plane)
            numbers = writer.add("Cast", [stored], to=TensorProto.INT32)
            rows = writer.add("Gather", [table, numbers], axis=0)
            if padded:
                rows = self._first(rows, layer.codes.size)
            elif lookup.shape[1] != columns:
                # Planes are joined in the shape of the first
                shape = writer.constant(f"rows{columns}", np.array([-1, columns]))
                rows = writer.add("Reshape", [rows, shape])
            parts.append(rows)
        codes = self._total(parts) if several else parts[0]
        sizes = layer.codes.shape
        shape = writer.constant("x".join(map(str, sizes)), np.array(sizes))
        writer.add("Reshape", [codes, shape], output)

    def _first(self, rows: str, count: int) -> str:
        """The first `count` elements of `rows`, in one axis."""
        writer = self.writer
        one_axis = writer.constant("flat", np.array([-1]))
        flat = writer.add("Reshape", [rows, one_axis])
        start = writer.constant("at0", np.array([0]))
        end = writer.constant(f"at{count}", np.array([count]))
        return writer.add("Slice", [flat, start, end])

    def _total(self, parts: list[str]) -> str:
        """The sum of int32 tensors, as int8."""
        total, *others = parts
        for part in others:
            total = self.writer.add("Add", [total, part])
        return self.writer.add("Cast", [total], to=TensorProto.INT8)

    def _table(self, name: str, table: NDArray[np.int8], wide: bool) -> str:
        """The look-up table of a plane, made int32 by the runtime where `wide`; written once per file."""
        constant = self.writer.constant(name, table)
        if not wide:
            return constant
        widened = f"{name}/wide"
        if widened not in self.widened:
            self.widened.add(widened)
            self.writer.add("Cast", [constant], widened, to=TensorProto.INT32)
        return widened


def _any_is_padded(
    planes: list[NDArray[np.uint8]], lookups: list[NDArray[np.int8]], count: int
) -> bool:
    """Whether the bytes of a plane hold more than `count` codes."""
    pairs = zip(planes, lookups, strict=True)
    return any(plane.size * lookup.shape[1] != count for plane, lookup in pairs)
