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
    for mark in [node for node in graph if is_mark(node)]:
        source, name = mark.inputs[0], mark_name(mark)
        assert source is not None
        if name in model.layers:
            layer = model.layers[name]
            shape = (-1, *(1,) * (layer.codes.ndim - 1))
            scale, zero, bits, signed = layer.scale.reshape(shape), 0, layer.bits, 1
            source = _constant(
                graph, f"{name}.codes", layer.codes.astype(np.float32) * scale
            )
        else:
            grid = model.quantizers[name]
            signed = int(grid.zero_point == 1 << (grid.bits - 1))
            scale, zero, bits = (
                np.asarray(grid.scale),
                0 if signed else grid.zero_point,
                grid.bits,
            )
        inputs = [source, *(_constant(graph, f"{name}.{kind}", value) for kind, value in
                            (("scale", scale), ("zero", np.float32(zero)), ("bits", np.float32(bits))))]  # fmt: skip
        node = ir.node(
            "Quant",
            inputs,
            {"signed": signed, "narrow": 0, "rounding_mode": "ROUND"},
            domain=DOMAIN,
            name=name,
        )
        node.outputs[0].shape, node.outputs[0].dtype = (
            mark.outputs[0].shape,
            ir.DataType.FLOAT,
        )
        node.outputs[0].name = f"{name}.quantized"
        take_over(node.outputs[0], mark.outputs[0])
        graph.insert_before(mark, node)
        graph.remove(mark, safe=True)
    _drop_unread(graph)
    # Such tools build for one image and infer the shapes between
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape([1, *list(value.shape or [])[1:]])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    model.skeleton.opset_imports.pop(MARKS, None)
    model.skeleton.opset_imports[DOMAIN] = 1
    return ir.to_proto(model.skeleton)


def _constant(graph: ir.Graph, name: str, value: np.ndarray | np.generic) -> ir.Value:
    made = ir.Value(
        name=name, const_value=ir.tensor(np.asarray(value, np.float32), name=name)
    )
    graph.initializers[name] = made
    return made


def _drop_unread(graph: ir.Graph) -> None:
    """Latent weights, which nothing reads any more, do not go into the file."""
    for name in [
        n
        for n, value in graph.initializers.items()
        if not list(value.uses()) and constant(value) is not None
    ]:
        del graph.initializers[name]
