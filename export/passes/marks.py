"""A quantizer after layout operations moves to before them, where an integer kernel ends."""

import onnx_ir as ir

from export.lowered import LoweredModel, LoweredQuantizer
from export.passes.edit import take_over
from export.skeleton import LAYOUT_OPS, constant, is_mark, mark_name, only_reader


def hoist_marks(model: LoweredModel) -> bool:
    """Mark(Layout(x)) -> Layout(Mark(x)), so that the quantizer follows the integer kernel that computed x."""
    for mark in model.skeleton.graph:
        layout = (
            mark.inputs[0].producer()
            if is_mark(mark) and mark.inputs[0] is not None
            else None
        )
        if (
            layout is None
            or layout.op_type not in LAYOUT_OPS
            or only_reader(layout.outputs[0]) is not mark
        ):
            continue
        if mark_name(mark) not in model.quantizers or not _commutes(
            layout, model.quantizers.get(mark_name(mark))
        ):
            continue
        source = layout.inputs[0]
        if (
            source is None
            or source.producer() is None
            or only_reader(source) is not layout
        ):
            continue
        take_over(layout.outputs[0], mark.outputs[0])
        model.trained_at.setdefault(mark_name(mark), layout.outputs[0])
        mark.replace_input_with(0, source)
        layout.replace_input_with(0, mark.outputs[0])
        mark.outputs[0].shape = source.shape
        graph = model.skeleton.graph
        graph.remove(mark)
        graph.insert_before(layout, mark)
        return True
    return False


def _commutes(layout: ir.Node, quantizer: LoweredQuantizer | None) -> bool:
    """Whether quantizing before `layout` is the same: padding adds zeros, which are not one-bit codes, and thresholds per
    channel stay with their channels through a max pool alone."""
    if layout.op_type == "Pad":
        fill = constant(layout.inputs[2]) if len(layout.inputs) > 2 else None
        if fill is not None and fill.any():
            return False
    if quantizer is None or not quantizer.is_binary:
        return True
    return layout.op_type == "MaxPool" or (
        layout.op_type != "Pad" and len(quantizer.thresholds) == 1
    )
