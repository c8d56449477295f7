"""QONNX, for FINN and other tools of its kind: the trained graph with a `Quant` node wherever a quantizer stood.

    Quant(x, scale, zero point, bit width): (clip(round(x / scale + zero point), low, high) - zero point) · scale

Weights are stored as codes · scale, so that a Quant node finds exactly the trained codes. Nothing is folded: FINN does that.
"""

import numpy as np
import onnx
import onnx_ir as ir

from export.lowered import DOMAIN as MARKS
from export.lowered import LoweredModel
from export.passes.edit import take_over
from export.skeleton import constant, is_mark, mark_name

DOMAIN = "qonnx.custom_op.general"


def emit_qonnx(model: LoweredModel) -> onnx.ModelProto:
    """The QONNX file of a lowered model, as `lower` gives it (before `to_integers`)."""
    graph = model.skeleton.graph
    marks = [node for node in graph if is_mark(node)]
    for mark in marks:
        _replace(mark, model)
    _drop_unread(graph)
    _fix_batch(graph)
    model.skeleton.opset_imports.pop(MARKS, None)
    model.skeleton.opset_imports[DOMAIN] = 1
    return ir.to_proto(model.skeleton)


def _replace(mark: ir.Node, model: LoweredModel) -> None:
    """Put a Quant node in the place of a mark."""
    graph = model.skeleton.graph
    name = mark_name(mark)
    layer = model.layers.get(name)
    if layer is None:
        grid = model.quantizers[name]
        source = mark.inputs[0]
        assert source is not None
        scale = np.asarray(grid.scale)
        is_signed = grid.zero_point == 1 << (grid.bits - 1)
        zero_point = 0 if is_signed else grid.zero_point
        bits = grid.bits
    else:
        other_axes = (1,) * (layer.codes.ndim - 1)
        scale = layer.scale.reshape((-1, *other_axes))
        values = layer.codes.astype(np.float32) * scale
        source = _constant(graph, f"{name}.codes", values)
        is_signed = True
        zero_point = 0
        bits = layer.bits
    inputs = [
        source,
        _constant(graph, f"{name}.scale", scale),
        _constant(graph, f"{name}.zero", np.float32(zero_point)),
        _constant(graph, f"{name}.bits", np.float32(bits)),
    ]
    node = ir.node(
        "Quant",
        inputs,
        {"signed": int(is_signed), "narrow": 0, "rounding_mode": "ROUND"},
        domain=DOMAIN,
        name=name,
    )
    (quantized,) = node.outputs
    quantized.name = f"{name}.quantized"
    quantized.shape = mark.outputs[0].shape
    quantized.dtype = ir.DataType.FLOAT
    take_over(quantized, mark.outputs[0])
    graph.insert_before(mark, node)
    graph.remove(mark, safe=True)


def _fix_batch(graph: ir.Graph) -> None:
    """Such tools build for one image and infer the shapes between."""
    for value in (*graph.inputs, *graph.outputs):
        sizes = list(value.shape or [])
        value.shape = ir.Shape([1, *sizes[1:]])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def _constant(graph: ir.Graph, name: str, value: np.ndarray | np.generic) -> ir.Value:
    made = ir.Value(
        name=name, const_value=ir.tensor(np.asarray(value, np.float32), name=name)
    )
    graph.initializers[name] = made
    return made


def _drop_unread(graph: ir.Graph) -> None:
    """Latent weights, which nothing reads any more, do not go into the file."""
    for name, value in list(graph.initializers.items()):
        is_read = bool(list(value.uses()))
        if not is_read and constant(value) is not None:
            del graph.initializers[name]
