"""One-bit activations in integers (`docs/lowering.md`).

A one-bit quantizer writes the storage code 254 where its value reaches the threshold t and 0 elsewhere; read with zero point
127 these are +127 and -127 (codes ±1), and zero padding is the storage code 127, a true 0. Storage codes 0, 1, 2 would do as
well, but 127 times the code gives the integer bias of the next layer 127 times the precision at the same price. The
comparison is decided in integers:

    after a layer    acc + b/u >= t/u becomes acc + B >= 0 (or <= 0 where u < 0), B an integer. Sums acc are multiples of
                     c, the layer's weight multiplier times its input's gain, so B is put half of c away from the last
                     sum that counts: never a tie, and no float error at lower optimisation levels reaches over.
    after codes      q >= T, the first code whose value reaches t.

QuantizeLinear does the rest with zero point 254 and a scale that takes every difference of 1 (of c/2) to 256 codes; Clip(0,
254) ends it. u = s_x · s_w is the real value of 1 as stored; its sign is the folded batch norm's.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from export.lowered import BINARY_GAIN, ExportError, LoweredLayer, LoweredQuantizer

WRITE_ZERO_POINT = 2 * BINARY_GAIN
CODES = 256  # what the smallest difference is written as
SMALLEST_UNIT = 1e-30  # a batch norm below silences its channel


def with_threshold_bias(
    layer: LoweredLayer, source: LoweredQuantizer, target: LoweredQuantizer
) -> tuple[LoweredLayer, LoweredQuantizer]:
    """The layer with integer biases that put `target`'s thresholds at 0, and `target` with the scale to write it with."""
    stride = layer.weight_multiplier * source.gain
    half = max(stride // 2, 1)
    unit = (source.scale * layer.stored_scale).astype(np.float64)
    bias = np.zeros(len(unit)) if layer.bias is None else layer.bias
    wanted = (
        np.broadcast_to(np.asarray(target.thresholds, np.float64), unit.shape) - bias
    )
    reach = float(1 << 30)
    silent = np.abs(unit) < SMALLEST_UNIT
    crossing = wanted / np.where(silent, 1.0, unit)
    silent |= np.abs(crossing) > reach
    down = unit < 0
    last = stride * np.where(
        down, np.floor(crossing / stride), np.ceil(crossing / stride)
    )
    margin = 0 if stride == 1 else half
    codes = np.where(down, -last - margin, -last + margin)
    codes = np.where(silent, np.where(wanted <= 0, half, -half), codes).astype(np.int32)
    layer = _silenced(layer, silent)
    smallest = np.abs(source.scale * layer.stored_scale).min()
    write_scale = np.float32(smallest * half / CODES)
    return replace(layer, bias_codes=codes, input_quantizer=source.name), replace(
        target, write_scale=write_scale
    )


def _silenced(layer: LoweredLayer, silent: NDArray[np.bool_]) -> LoweredLayer:
    """Weights of silent channels become 0 and their scale positive; 0 is not a 1-bit code, so such a layer takes 2 bits."""
    if not silent.any():
        return layer
    codes, scale = layer.codes.copy(), layer.scale.copy()
    codes[silent], scale[silent] = (
        0,
        np.abs(scale[~silent]).max(initial=np.float32(1e-3)),
    )
    channels = tuple(int(c) for c in np.flatnonzero(silent))
    return replace(
        layer, codes=codes, scale=scale, bits=max(layer.bits, 2), dead_channels=channels
    )


def code_thresholds(
    source: LoweredQuantizer, target: LoweredQuantizer
) -> NDArray[np.uint8]:
    """uint8 () or (C,): the storage code of `source` from which on `target` is +1.

    Raises ExportError for a threshold that no code reaches.
    """
    values = (np.arange(256) - source.zero_point).astype(np.float32) * source.scale
    first = np.searchsorted(
        values, np.asarray(target.thresholds, np.float32), side="left"
    )
    if (first > 255).any():
        channels = np.flatnonzero(first > 255)[:4].tolist()
        raise ExportError(
            f"quantizer {target.name!r}: no code of {source.name!r} reaches the threshold of channels {channels}, which are "
            "-1 throughout; prune them, or train without learned thresholds"
        )
    return (
        first.astype(np.uint8) if first.size > 1 else first.astype(np.uint8).reshape(())
    )
