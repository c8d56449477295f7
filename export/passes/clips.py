"""A clip between a layer and its quantizer goes into the bounds of the quantizer."""

import numpy as np
import onnx_ir as ir

from export.lowered import LoweredModel
from export.passes.edit import bypass
from export.skeleton import constant, is_mark, mark_name, only_reader


def absorb_clips(model: LoweredModel) -> bool:
    """Mark(Relu(x)) and Mark(Clip(x)) -> Mark(x) with the clip on the quantizer's bounds."""
    changed = False
    for mark in list(model.skeleton.graph):
        clip = (
            mark.inputs[0].producer()
            if is_mark(mark) and mark.inputs[0] is not None
            else None
        )
        if (
            clip is None
            or clip.op_type not in ("Relu", "Clip")
            or only_reader(clip.outputs[0]) is not mark
        ):
            continue
        lowest, highest = _clip_bounds(clip)
        name = mark_name(mark)
        if lowest is None or highest is None or name not in model.quantizers:
            continue
        model.quantizers[name] = model.quantizers[name].clipped(lowest, highest)
        bypass(clip)
        changed = True
    return changed


def _clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds: list[float | None] = []
    for index, absent in ((1, -np.inf), (2, np.inf)):
        bound = node.inputs[index] if len(node.inputs) > index else None
        value = constant(bound)
        if bound is None:
            bounds.append(absent)
        else:
            bounds.append(None if value is None else float(value.reshape(())))
    return bounds[0], bounds[1]
