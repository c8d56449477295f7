"""One-bit activations in integers (`docs/lowering.md`).

A one-bit quantizer writes the storage code 254 where its value reaches the threshold t and 0 elsewhere; read with zero point
127 these are +127 and -127 (codes ±1), and zero padding is the storage code 127, a true 0. Storage codes 0, 1, 2 would do as
well, but 127 times the code gives the integer bias of the next layer 127 times the precision at the same price. The
comparison is decided in integers. Here acc is a layer's sum, u the real value of 1 in it (s_x · s_w, whose sign is the folded
batch norm's), b its real bias, B its integer bias, and q a storage code:

    after a layer    acc + b/u >= t/u becomes acc + B >= 0 (or <= 0 where u < 0), B an integer. Sums acc are multiples of
                     c, the layer's weight multiplier times its input's gain, so B is put half of c away from the last
                     sum that counts: never a tie, and no float error at lower optimisation levels reaches over.
    after codes      q >= T, the first code whose value reaches t.

QuantizeLinear does the rest with zero point 254 and a scale that takes every difference of 1 (of c/2) to 256 codes; Clip(0,
254) ends it.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from export.lowered import BINARY_GAIN, ExportError, LoweredLayer, LoweredQuantizer

WRITE_ZERO_POINT = 2 * BINARY_GAIN
CODES = 256  # what the smallest difference is written as
# Below it sums decide nothing: a batch norm has switched its channel off
SMALLEST_UNIT = 1e-30
# In sums: none reaches a threshold beyond
FARTHEST_CROSSING = float(1 << 30)


def with_threshold_bias(
    layer: LoweredLayer, source: LoweredQuantizer, reader: LoweredQuantizer
) -> tuple[LoweredLayer, LoweredQuantizer]:
    """The layer with integer biases that put `reader`'s thresholds at 0, and `reader` with the scale to write it with."""
    stride = layer.weight_multiplier * source.gain
    half = max(stride // 2, 1)
    unit = (source.scale * layer.stored_scale).astype(np.float64)
    bias = np.zeros(len(unit)) if layer.bias is None else layer.bias
    wanted = np.asarray(reader.thresholds, np.float64) - bias
    is_bias_only = np.abs(unit) < SMALLEST_UNIT
    crossing = wanted / np.where(is_bias_only, 1.0, unit)
    is_bias_only |= np.abs(crossing) > FARTHEST_CROSSING
    decided_by_sums = _biases_at_crossing(crossing, unit < 0, stride)
    decided_by_bias = np.where(wanted <= 0, half, -half)
    bias_codes = np.where(is_bias_only, decided_by_bias, decided_by_sums)
    layer = _without_sums(layer, is_bias_only)
    smallest_unit = np.abs(source.scale * layer.stored_scale).min()
    write_scale = np.float32(smallest_unit * half / CODES)
    layer = replace(
        layer, bias_codes=bias_codes.astype(np.int32), input_quantizer=source.name
    )
    return layer, replace(reader, write_scale=write_scale)


def _biases_at_crossing(
    crossing: NDArray[np.float64], is_down: NDArray[np.bool_], stride: int
) -> NDArray[np.float64]:
    """float64 (O,): integer biases that put the threshold between the last sum that counts and the one before it.

    crossing: the sum at the threshold. is_down: whether smaller sums are +1. stride: between two possible sums.
    """
    last_up = stride * np.ceil(crossing / stride)
    last_down = stride * np.floor(crossing / stride)
    # Half of the way to the next sum; sums that lie 1 apart leave no integer between them
    margin = 0 if stride == 1 else stride // 2
    return np.where(is_down, -last_down - margin, -last_up + margin)


def _without_sums(layer: LoweredLayer, is_bias_only: NDArray[np.bool_]) -> LoweredLayer:
    """Weights of those channels become 0 and their scale positive; 0 is not a 1-bit code, so such a layer takes 2 bits."""
    if not is_bias_only.any():
        return layer
    codes = layer.codes.copy()
    codes[is_bias_only] = 0
    scale = layer.scale.copy()
    others = np.abs(scale[~is_bias_only])
    scale[is_bias_only] = others.max(initial=np.float32(1e-3))
    return replace(
        layer,
        codes=codes,
        scale=scale,
        bits=max(layer.bits, 2),
        bias_only_channels=tuple(np.flatnonzero(is_bias_only).tolist()),
    )


def code_thresholds(
    source: LoweredQuantizer, reader: LoweredQuantizer
) -> NDArray[np.uint8]:
    """uint8 () or (C,): the storage code of `source` from which on `reader` is +1.

    Raises ExportError for a threshold that no code reaches.
    """
    values = (np.arange(256) - source.zero_point).astype(np.float32) * source.scale
    thresholds = np.asarray(reader.thresholds, np.float32)
    first = np.searchsorted(values, thresholds, side="left")
    if (first > 255).any():
        channels = np.flatnonzero(first > 255)[:4].tolist()
        raise ExportError(
            f"quantizer {reader.name!r}: no code of {source.name!r} reaches the threshold of channels {channels}, which are "
            "-1 throughout; prune them, or train without learned thresholds"
        )
    codes = first.astype(np.uint8)
    return codes if codes.size > 1 else codes.reshape(())
