"""Reading files that `export/native_graph.py` wrote: which codes a node computes, and making them visible."""

from collections.abc import Iterator, Sequence

import onnx
from onnx import helper

from export.lowered import DOMAIN

# Operators that run a quantized layer
KERNELS = ("QConv", "QGemm", "QConvFloat", "QGemmFloat")
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def is_native(proto: onnx.ModelProto) -> bool:
    """Whether the file needs the operators of `export/kernels`."""
    return any(opset.domain == DOMAIN for opset in proto.opset_import)


def code_outputs(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto, int]]:
    """(quantizer, node, which of its outputs) for the codes that native nodes compute, named in the file or not."""
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            labels = next(
                (list(a.strings) for a in node.attribute if a.name == "codes"), []
            )
            yield from (
                (label.decode(), node, i) for i, label in enumerate(labels) if label
            )


def reveal(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give `proto` (in place) a uint8 tensor N_C_H_W (or N_C) for each quantizer of `names` whose codes a native node
    computes. The node then also writes outputs that it otherwise leaves out; what it computes does not change."""
    wanted = set(names)
    found = {
        name: (node, index)
        for name, node, index in code_outputs(proto)
        if name in wanted
    }
    joined = {
        node.output[0][1:]: node.output[0]
        for node in proto.graph.node
        if node.op_type == "Concat"
    }
    for name in wanted & set(joined):
        if joined[name] == f"@{name}":
            proto.graph.node.append(_in_nchw(joined[name], name, True))
    for name, (node, index) in found.items():
        node.output.extend([""] * (index + 1 - len(node.output)))
        node.output[index] = node.output[index] or f"@{name}"
        proto.graph.node.append(_in_nchw(node.output[index], name, _rank(node) == 4))


def quantizer_names(proto: onnx.ModelProto) -> set[str]:
    """Names of the quantizers whose codes native nodes compute, or that a Concat of theirs joins."""
    joined = {
        o[1:]
        for node in proto.graph.node
        if node.op_type == "Concat"
        for o in node.output
        if o.startswith("@")
    }
    return {name for name, _, _ in code_outputs(proto)} | joined


def layer_part(
    proto: onnx.ModelProto, node: onnx.NodeProto, output: str, shape: tuple[int, ...]
) -> onnx.ModelProto:
    """The native layer `node` alone, without the sum and the tables that follow it.

    It reads uint8 `codes` of `shape` (N_C_H_W or N_C, any N) and writes its own codes as `output`.
    """
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[6:]
    del alone.output[:]
    image = _rank(node) == 4
    alone.output.append("own")
    nodes = [alone]
    if image:
        alone.input[0] = "moved"
        nodes = [
            helper.make_node("Transpose", ["codes"], ["moved"], perm=TO_NHWC),
            alone,
        ]
    else:
        alone.input[0] = "codes"
    nodes.append(_in_nchw("own", output, image))
    used = set(alone.input)
    graph = helper.make_graph(
        nodes,
        node.name,
        [
            helper.make_tensor_value_info(
                "codes", onnx.TensorProto.UINT8, ["batch", *shape[1:]]
            )
        ],
        [helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None)],
        [t for t in proto.graph.initializer if t.name in used],
    )
    return helper.make_model(
        graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version
    )


def _in_nchw(tensor: str, name: str, image: bool) -> onnx.NodeProto:
    if image:
        return helper.make_node("Transpose", [tensor], [name], perm=TO_NCHW)
    return helper.make_node("Identity", [tensor], [name])


def _rank(node: onnx.NodeProto) -> int:
    if node.op_type == "QGemm":
        return 2
    return next((a.i for a in node.attribute if a.name == "rank"), 4)
