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
        if (layer.codes == -128).any():
            channels = [
                int(c)
                for c in np.flatnonzero(
                    (layer.codes == -128).reshape(len(layer.codes), -1).any(1)
                )
            ]
            raise ExportError(
                f"layer {layer.name!r}: target {target.name} takes int8 weights from -127 to 127, and channels "
                f"{channels[:4]} hold code -128; train it with QuantSpec.of_weight(8), or export for an ort target"
            )
        negative, silent = layer.scale < 0, layer.scale == 0
        if not (negative | silent).any():
            continue
        codes, scale = layer.codes.copy(), np.abs(layer.scale)
        codes[negative] *= -1
        codes[silent], scale[silent] = 0, 1
        # 0 is not a 1-bit code
        bits = max(layer.bits, 2) if silent.any() else layer.bits
        model.layers[name] = replace(layer, codes=codes, scale=scale, bits=bits)
        changed = True
    return changed
