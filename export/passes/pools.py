"""Means over the image and average pools become the forms that integer kernels have."""

import onnx_ir as ir

from export.lowered import ExportError, LoweredModel
from export.passes.edit import replace_node
from export.skeleton import constant


def pools_from_means(model: LoweredModel) -> bool:
    """ReduceMean over height and width is GlobalAveragePool, which has an integer kernel."""
    changed = False
    for node in list(model.skeleton.graph):
        if (
            node.op_type != "ReduceMean"
            or node.inputs[0] is None
            or node.inputs[0].shape is None
        ):
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if (
            axes is None
            or len(node.inputs[0].shape) != 4
            or {int(a) % 4 for a in axes.ravel()} != {2, 3}
        ):
            continue
        keeps = (
            "keepdims" not in node.attributes
            or node.attributes["keepdims"].as_int() == 1
        )
        pool = ir.node(
            "GlobalAveragePool", [node.inputs[0]], name=f"{node.outputs[0].name}/pool"
        )
        new = (
            [pool]
            if keeps
            else [
                pool,
                ir.node(
                    "Flatten", [pool.outputs[0]], name=f"{node.outputs[0].name}/flatten"
                ),
            ]
        )
        replace_node(node, new)
        changed = True
    return changed


def plain_average_pools(model: LoweredModel) -> bool:
    """AveragePool without padding counts what is inside: the runtime's integer kernel, unlike its float one, divides a
    ceil-mode border window by the whole kernel when it is told to include padding."""
    changed = False
    for node in model.skeleton.graph:
        if node.op_type != "AveragePool" or "count_include_pad" not in node.attributes:
            continue
        if node.attributes["count_include_pad"].as_int() == 0:
            continue
        if "pads" not in node.attributes or not any(node.attributes["pads"].as_ints()):
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
            changed = True
        elif (
            "ceil_mode" in node.attributes
            and node.attributes["ceil_mode"].as_int() == 1
        ):
            raise ExportError(
                f"node {node.name!r}: AveragePool with padding, ceil_mode and count_include_pad is not exact"
            )
    return changed
