"""Edits of a skeleton that several passes make."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def take_over(new: ir.Value, old: ir.Value) -> None:
    """`new` stands wherever `old` was read. Where the graph returned `old` it returns `new`, by the name that `old` had."""
    was_returned = old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if was_returned:
        old.name, new.name = new.name, old.name
        new.type = old.type
        new.shape = old.shape


def bypass(node: ir.Node) -> None:
    """Remove a node; what read its result reads its first input."""
    source = node.inputs[0]
    assert source is not None and node.graph is not None
    take_over(source, node.outputs[0])
    node.graph.remove(node, safe=True)


def replace_node(node: ir.Node, new: list[ir.Node]) -> None:
    """Put a chain of nodes in the place of one; the last one's result takes its result's name."""
    assert node.graph is not None
    last, old = new[-1].outputs[0], node.outputs[0]
    last.name, last.shape, last.type = old.name, old.shape, old.type
    node.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def new_constant(graph: ir.Graph, name: str, value: NDArray[np.int64]) -> ir.Value:
    """A new initializer of the graph."""
    made = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    graph.initializers[name] = made
    return made
