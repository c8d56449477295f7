"""Biases become int32 codes, or floats for targets whose files hold such."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.names import layer_of, weight_of
from export.rounding import NEGLIGIBLE_CODES, largest_results, largest_sums
from export.skeleton import (
    CODE_OPS,
    fill_of,
    moves_codes,
    quantizer_of,
    reading_quantizer,
    weight_layer,
)
from export.targets import SUM_LIMIT, Target, weight_multiplier_of
from export.thresholds import with_threshold_bias

# Of a channel whose results stay floats, where 32 bits cannot hold bias and sums: only the bias is kept if the largest sum
# is at most this share of it
NEGLIGIBLE_SHARE = 2.0**-20


def quantize_biases(model: LoweredModel, target: Target) -> None:
    """Biases as int32 in units of input scale times weight scale, as integer kernels add them; once
    per model. A net without activation quantizers (weight-only) computes in floating point on its weight codes; its biases
    stay."""
    reached: set[str] = set()
    for node in model.skeleton.graph:
        layer = weight_layer(node, model)
        if layer is None:
            continue
        reached.add(weight_of(layer.name))
        if not model.quantizers:
            continue
        quantizer_name = quantizer_of(node.inputs[0])
        if quantizer_name is None:
            raise ExportError(
                f"layer {layer.name!r}: {_why_no_codes(node.inputs[0])}, so no integer kernel can run it"
            )
        if node.op_type == "Gemm":
            _check_gemm(node, layer)
        source = model.quantizers[quantizer_name]
        reader = reading_quantizer(node, model)
        if reader is not None and reader.is_binary:
            multiplier = weight_multiplier_of(target, layer.bits, source)
            layer = replace(layer, weight_multiplier=multiplier)
            layer, decided = with_threshold_bias(layer, source, reader)
            model.quantizers[reader.name] = decided
        else:
            layer = _with_bias_codes(layer, source, reader, target)
            if layer.bias_only_channels:
                channels = list(layer.bias_only_channels)
                model.notes.append(
                    f"layer {layer.name!r}: in channels {channels} only the bias decides; only it is kept"
                )
        model.put_layer(layer)
        check_sums(layer, source)
    missing = [name for name in model.layers if name not in reached]
    if missing:
        raise ExportError(
            f"layer {layer_of(missing[0])!r}: nothing that the model returns depends on it, so no file can hold it; take the "
            "call out of the model's forward"
        )


def check_sums(layer: LoweredLayer, source: LoweredQuantizer) -> None:
    """Raises ExportError when a sum of the layer, bias included, may exceed the 32 bits that every kernel adds it in."""
    assert layer.bias_codes is not None
    largest = largest_sums(layer, source) * layer.weight_multiplier
    largest = largest + np.abs(layer.bias_codes.astype(np.float64))
    if (largest > SUM_LIMIT).any():
        channel = int(largest.argmax())
        raise ExportError(
            f"layer {layer.name!r}: sums of output channel {channel} may reach {largest[channel]:,.0f}, which 32 bits cannot "
            "hold; use fewer bits or fewer input channels"
        )


def _why_no_codes(value: ir.Value | None) -> str:
    """Why `value`, which a layer reads, carries no codes."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in CODE_OPS:
        if node.op_type == "Pad" and not moves_codes(node):
            return f"its input is padded with {fill_of(node):g}, which is not a code (pad with 0)"
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return "its input is not quantized"


def float_biases(model: LoweredModel) -> bool:
    """Layers add their bias as it was trained, in floating point: plain QDQ files hold no integer biases."""
    changed = False
    for name, layer in model.layers.items():
        if layer.bias_codes is not None:
            model.layers[name] = replace(layer, bias_codes=None)
            changed = True
    return changed


def _check_gemm(node: ir.Node, layer: LoweredLayer) -> None:
    """Raises ExportError for a Gemm that is not x·Wᵀ + b."""
    options = {name: one.value for name, one in node.attributes.items()}
    is_turned = options.get("transB", 0) == 1 and not options.get("transA", 0)
    is_plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0
    if not is_turned or not is_plain:
        raise ExportError(f"layer {layer.name!r}: Gemm with {options} is not x·Wᵀ + b")


def _with_bias_codes(
    layer: LoweredLayer,
    source: LoweredQuantizer,
    reader: LoweredQuantizer | None,
    target: Target,
) -> LoweredLayer:
    """The layer with integer biases; its bias-only channels keep only their bias.

    source: the quantizer it reads; reader: the one that reads its results, None where they stay in floating point.
    Raises ExportError for a channel whose bias no int32 code can hold though its sums matter.
    """
    # Without a multiplier again where 32 bits overflow with it
    for weight_multiplier in (weight_multiplier_of(target, layer.bits, source), 1):
        layer = replace(
            layer, weight_multiplier=weight_multiplier, input_quantizer=source.name
        )
        # In float32, as the runtime multiplies them
        unit = (source.scale * layer.stored_scale).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.rint(layer.folded_bias / unit)
        largest = np.abs(codes) + largest_sums(layer, source) * weight_multiplier
        out_of_range = ~(largest <= SUM_LIMIT)  # nan is, too
        if not out_of_range.any():
            return replace(layer, bias_codes=codes.astype(np.int32))
        needed = out_of_range & ~_sums_are_negligible(layer, source, reader)
        if not needed.any():
            return _in_units_of_their_bias(layer, source, codes, out_of_range)
    # Whether the sums alone are too large
    check_sums(replace(layer, bias_codes=np.zeros(len(unit), np.int32)), source)
    channel = int(np.flatnonzero(needed)[0])
    raise ExportError(
        f"layer {layer.name!r}: the bias of output channel {channel} is {layer.folded_bias[channel]:g}, in units of "
        f"{unit[channel]:.3g}: 32 bits cannot hold both it and the sums it is added to; look at the batch norm after this "
        "layer (a gamma next to 0, or a bias out of all proportion)"
    )


def _sums_are_negligible(
    layer: LoweredLayer, source: LoweredQuantizer, reader: LoweredQuantizer | None
) -> NDArray[np.bool_]:
    """bool (O,): channels whose largest possible sum decides no result, or whose result is clipped whatever the sum."""
    largest = largest_results(layer, source)
    bias = layer.folded_bias
    if reader is None:
        return largest <= NEGLIGIBLE_SHARE * np.abs(bias)
    lowest = float(reader.scale) * (reader.low - reader.zero_point)
    highest = float(reader.scale) * (reader.high - reader.zero_point)
    is_clipped = (bias - largest >= highest) | (bias + largest <= lowest)
    return is_clipped | (largest <= NEGLIGIBLE_CODES * float(reader.scale))


def _in_units_of_their_bias(
    layer: LoweredLayer,
    source: LoweredQuantizer,
    bias_codes: NDArray[np.float64],
    is_bias_only: NDArray[np.bool_],
) -> LoweredLayer:
    """The layer with weights 0 in those channels, in a unit that leaves their biases 20 bits of precision."""
    multiplier = layer.weight_multiplier
    input_scale = float(source.scale)
    bias = layer.folded_bias[is_bias_only]
    magnitude = np.maximum(np.abs(bias), 1e-6)
    codes = layer.codes.copy()
    codes[is_bias_only] = 0
    scale = layer.scale.copy()  # float32, so it rounds what it is given
    scale[is_bias_only] = multiplier * magnitude / (input_scale * (1 << 20))
    unit = input_scale * scale[is_bias_only].astype(np.float64) / multiplier
    bias_codes = bias_codes.copy()
    bias_codes[is_bias_only] = np.rint(bias / unit)
    return replace(
        layer,
        codes=codes,
        scale=scale,
        bits=max(layer.bits, 2),  # 0 is not a 1-bit code
        bias_only_channels=tuple(np.flatnonzero(is_bias_only).tolist()),
        bias_codes=bias_codes.astype(np.int32),
    )
