"""Linear layers become Gemm, the one operator that takes an integer bias."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from export.lowered import ExportError, LoweredLayer, LoweredModel
from export.passes.edit import new_constant, replace_node
from export.skeleton import (
    LAYOUT_OPS,
    constant,
    is_mark,
    mark_name,
    only_reader,
    weight_layer,
)


def gemms_from_matmuls(model: LoweredModel) -> bool:
    """A linear layer on more than two axes, MatMul(x, Wᵀ) [+ b], becomes Reshape, Gemm, Reshape: only Gemm takes an integer
    bias, and reshaping codes is free."""
    changed = False
    for node in list(model.skeleton.graph):
        mark = _turned_weight(node)
        # The latter: a product of two activations
        if mark is None or mark_name(mark) not in model.layers:
            continue
        _make_gemm(model, node, mark)
        changed = True
    return changed


def _turned_weight(node: ir.Node) -> ir.Node | None:
    """The mark whose transpose the MatMul `node` multiplies by."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if (
        transpose is None
        or transpose.op_type != "Transpose"
        or transpose.inputs[0] is None
    ):
        return None
    mark = transpose.inputs[0].producer()
    return mark if is_mark(mark) else None


def _make_gemm(model: LoweredModel, node: ir.Node, mark: ir.Node) -> None:
    graph = model.skeleton.graph
    layer = model.layers[mark_name(mark)]
    add = _added_constant(node, len(layer.scale))
    last = node if add is None else add
    name = last.outputs[0].name
    width = layer.codes.shape[1]
    open_shape = _open_shape(last, layer.name)
    rows = new_constant(graph, f"{name}/shape_in", np.array([-1, width], np.int64))
    result = new_constant(graph, f"{name}/shape_out", np.array(open_shape, np.int64))
    flat = ir.node("Reshape", [node.inputs[0], rows], name=f"{name}/flatten")
    flat.outputs[0].name = f"{name}/flat"
    flat.outputs[0].shape = ir.Shape([None, width])
    operands = [flat.outputs[0], mark.outputs[0]]
    if add is not None:
        bias = next(value for value in add.inputs if constant(value) is not None)
        assert bias is not None
        operands.append(bias)
        layer = replace(layer, bias=np.asarray(constant(bias), np.float64))
    elif layer.bias is not None:  # the graph computes it, and adds it after the product
        layer = replace(layer, bias=None, bias_parameter="")
    model.layers[mark_name(mark)] = layer
    gemm = ir.node("Gemm", operands, attributes={"transB": 1}, name=layer.name)
    gemm.outputs[0].name = f"{name}/gemm"
    restored = ir.node("Reshape", [gemm.outputs[0], result], name=f"{name}/restore")
    replace_node(last, [flat, gemm, restored])
    if add is not None:
        graph.remove(node, safe=True)


def _open_shape(node: ir.Node, layer: str) -> list[int]:
    """Shape of the result with -1 for the batch, wherever that is. Raises ExportError for more than one open axis."""
    shape = node.outputs[0].shape
    if shape is None or sum(not isinstance(size, int) for size in shape) > 1:
        raise ExportError(
            f"layer {layer!r}: its output has several dynamic axes; only the batch may be dynamic"
        )
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if -1 in sizes else [-1, *sizes[1:]]


def gemms_from_classifiers(model: LoweredModel) -> bool:
    """A 1x1 convolution on one pixel whose result the graph returns becomes Flatten, Gemm, Reshape: of the integer kernels
    only the Gemm's can write floats."""
    changed = False
    for node in list(model.skeleton.graph):
        layer = weight_layer(node, model) if node.op_type == "Conv" else None
        if layer is None or not _is_classifier(node, layer):
            continue
        _classifier_to_gemm(model, node, layer)
        changed = True
    return changed


def _is_classifier(convolution: ir.Node, layer: LoweredLayer) -> bool:
    """Whether a convolution reads one pixel of all channels and the graph returns its result."""
    source = convolution.inputs[0]
    if source is None or source.shape is None:
        return False
    if list(source.shape)[2:] != [1, 1]:
        return False
    reads_all_channels = layer.codes.shape[1:] == (source.shape[1], 1, 1)
    return reads_all_channels and _is_returned(convolution.outputs[0])


def _classifier_to_gemm(
    model: LoweredModel, node: ir.Node, layer: LoweredLayer
) -> None:
    source, mark = node.inputs[:2]
    name = node.outputs[0].name
    classes, channels = layer.codes.shape[:2]
    shape = new_constant(
        model.skeleton.graph,
        f"{name}/shape_out",
        np.array([-1, classes, 1, 1], np.int64),
    )
    flat = ir.node("Flatten", [source], name=f"{name}/flatten")
    flat.outputs[0].name = f"{name}/flat"
    flat.outputs[0].shape = ir.Shape([None, channels])
    operands = [flat.outputs[0], mark]
    gemm = ir.node("Gemm", operands, attributes={"transB": 1}, name=layer.name)
    gemm.outputs[0].name = f"{name}/gemm"
    restored = ir.node("Reshape", [gemm.outputs[0], shape], name=f"{name}/restore")
    linear = replace(layer, kind="linear", codes=layer.codes[:, :, 0, 0])
    model.put_layer(linear)
    replace_node(node, [flat, gemm, restored])


def _is_returned(value: ir.Value) -> bool:
    """Whether the graph returns `value`, seen through layout operations."""
    while not value.is_graph_output():
        reader = only_reader(value)
        if reader is None or reader.op_type not in LAYOUT_OPS:
            return False
        value = reader.outputs[0]
    return True


def _added_constant(node: ir.Node, width: int) -> ir.Node | None:
    """The Add of a constant vector of `width` that alone reads `node`'s result."""
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    sizes = [c.size for v in add.inputs if (c := constant(v)) is not None]
    return add if sizes == [width] else None
