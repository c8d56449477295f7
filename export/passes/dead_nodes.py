"""What nobody reads goes, and weights leave the graph for the layers."""

from export.lowered import LoweredModel
from export.skeleton import is_mark, mark_name


def cut_weights_off(model: LoweredModel) -> bool:
    """A marked weight is known by its codes; what computed it (weight standardization) is not in the file."""
    changed = False
    for node in model.skeleton.graph:
        if (
            is_mark(node)
            and mark_name(node) in model.layers
            and node.inputs[0] is not None
        ):
            node.replace_input_with(0, None)
            changed = True
    return changed


def remove_dead_nodes(model: LoweredModel) -> bool:
    """Drop what nothing reads, such as the transposes of weights that became Gemms."""
    changed = False
    for node in reversed(list(model.skeleton.graph)):
        if not any(list(v.uses()) or v.is_graph_output() for v in node.outputs):
            model.skeleton.graph.remove(node, safe=True)
            changed = True
    return changed
