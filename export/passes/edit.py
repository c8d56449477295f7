"""Edits of a skeleton that several passes make."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def bypass(node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def replace_node(node: ir.Node, new: list[ir.Node]) -> None:
    assert node.graph is not None
    last, old = new[-1].outputs[0], node.outputs[0]
    last.name, last.shape, last.type = old.name, old.shape, old.type
    node.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def new_constant(graph: ir.Graph, name: str, value: NDArray[np.int64]) -> ir.Value:
    made = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    graph.initializers[name] = made
    return made
