"""Reading files that `export/native_graph.py` wrote: which codes a node computes, and making them visible."""

from collections.abc import Iterator, Sequence

import onnx
from onnx import AttributeProto, helper

from edgeqat.terminal import printable
from export.lowered import DOMAIN, ExportError
from export.names import named_by_native_codes, native_codes_of

# Operators that run a quantized layer
KERNELS = ("QConv", "QGemm", "QConvFloat", "QGemmFloat")
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def is_native(proto: onnx.ModelProto) -> bool:
    """Whether the file needs the operators of `export/kernels`."""
    return any(opset.domain == DOMAIN for opset in proto.opset_import)


def code_outputs(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto, int]]:
    """(quantizer, node, which of its outputs) for the codes that native nodes compute, named in the file or not.

    Raises ExportError for a node that has `codes` twice or not as texts: which of its outputs they are cannot be told.
    """
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            continue
        for index, label in enumerate(_labels(node)):
            if label:
                yield label.decode(), node, index


def _labels(node: onnx.NodeProto) -> Sequence[bytes]:
    """By output of a native node: the quantizer whose codes it is, empty for none."""
    attributes = [one for one in node.attribute if one.name == "codes"]
    if not attributes:
        return ()
    where = f"node {node.op_type} {printable(node.name)}"
    if len(attributes) > 1:
        raise ExportError(f"{where}: has attribute codes twice")
    (labels,) = attributes
    if labels.type != AttributeProto.STRINGS:
        raise ExportError(f"{where}: attribute codes is not a list of texts")
    return labels.strings


def reveal(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give `proto` (in place) a uint8 tensor N_C_H_W (or N_C) for each quantizer of `names` whose codes a native node
    computes. The node then also writes outputs that it otherwise leaves out; what it computes does not change."""
    wanted = set(names)
    computed: dict[str, tuple[onnx.NodeProto, int]] = {}
    for name, node, index in code_outputs(proto):
        if name in wanted:
            computed[name] = (node, index)
    for name in wanted & _joined(proto):
        in_nhwc = native_codes_of(name)
        proto.graph.node.append(_in_nchw(in_nhwc, name, True))
    for name, (node, index) in computed.items():
        missing = index + 1 - len(node.output)
        node.output.extend([""] * missing)
        if not node.output[index]:
            node.output[index] = native_codes_of(name)
        is_image = _rank(node) == 4
        proto.graph.node.append(_in_nchw(node.output[index], name, is_image))


def quantizer_names(proto: onnx.ModelProto) -> set[str]:
    """Names of the quantizers whose codes native nodes compute, or that a Concat of theirs joins."""
    computed = {name for name, _, _ in code_outputs(proto)}
    return computed | _joined(proto)


def _joined(proto: onnx.ModelProto) -> set[str]:
    """Names of the quantizers whose codes a Concat joins in the order of native operators."""
    names = set()
    for node in proto.graph.node:
        if node.op_type == "Concat":
            name = named_by_native_codes(node.output[0])
            if name is not None:
                names.add(name)
    return names


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
