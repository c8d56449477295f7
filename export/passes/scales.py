"""Scales become positive; their sign moves onto the codes."""

from dataclasses import replace

import numpy as np

from export.lowered import ExportError, LoweredModel
from export.targets import Target


def positive_scales(model: LoweredModel, target: Target) -> bool:
    """Channels whose scale a batch norm made negative get the opposite codes and the opposite scale, which is the same
    weight; where the norm made it 0, codes 0 and any scale.

    Raises ExportError where a code is -128: it has no opposite in int8, and ARM's kernels overflow with it.
    """
    changed = False
    for name, layer in model.layers.items():
        per_channel = layer.codes.reshape(len(layer.codes), -1)
        too_low = np.flatnonzero((per_channel == -128).any(1)).tolist()
        if too_low:
            raise ExportError(
                f"layer {layer.name!r}: target {target.name} takes int8 weights from -127 to 127, and channels "
                f"{too_low[:4]} hold code -128; train it with QuantSpec.of_weight(8), or export for an ort target"
            )
        is_negative = layer.scale < 0
        is_zero = layer.scale == 0
        if not (is_negative | is_zero).any():
            continue
        codes = layer.codes.copy()
        codes[is_negative] *= -1
        codes[is_zero] = 0
        scale = np.abs(layer.scale)
        scale[is_zero] = 1
        # 0 is not a 1-bit code
        bits = max(layer.bits, 2) if is_zero.any() else layer.bits
        model.layers[name] = replace(layer, codes=codes, scale=scale, bits=bits)
        changed = True
    return changed
