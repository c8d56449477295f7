"""What the graph of a file may consist of: known operators, numbers in range, all tensors inside and of the size they claim.

A runtime checks much of this late or not at all: a stride of 0 is a division by zero, a tensor shorter than its shape is read
past its end, an integer division by a zero from the file ends the process.
"""

import math
from collections.abc import Container, Sized

import onnx
from onnx import AttributeProto, TensorProto

from export.graph_limits import Tensors, check_limits
from export.lowered import DOMAIN, ExportError
from export.native_checks import OPERATORS as NATIVE
from export.native_checks import check_native
from export.native_file import code_outputs

STANDARD = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Col2Im", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvInteger", "ConvTranspose", "Cos", "Cosh", "CumSum", "DeformConv", "DepthToSpace",
    "DequantizeLinear", "DFT", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor",
    "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "GRU", "Hardmax", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "LogSoftmax", "LpNormalization", "LpPool", "LRN", "LSTM", "MatMul", "MatMulInteger", "Max", "MaxPool",
    "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "PRelu", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "RMSNormalization", "RNN",
    "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size",
    "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish",
    "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
})  # fmt: skip
OPSETS = {"": range(13, onnx.defs.onnx_opset_version() + 1), DOMAIN: range(1, 2)}
MOST_NODES, MOST_TENSORS, MOST_PARTS = 200_000, 200_000, 1_000
MOST_RANK = 8
BITS_OF: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.DOUBLE: 64, TensorProto.BOOL: 8,
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT16: 16,
    TensorProto.UINT16: 16, TensorProto.INT32: 32, TensorProto.UINT32: 32, TensorProto.INT64: 64, TensorProto.UINT64: 64,
}  # fmt: skip
# Attribute -> what each of its numbers may be.
POSITIVE, NOT_NEGATIVE = range(1, 4097), range(4097)
RANGES: dict[str, Container[int]] = {
    "strides": POSITIVE, "dilations": POSITIVE, "kernel_shape": POSITIVE, "pads": NOT_NEGATIVE,
    "output_padding": NOT_NEGATIVE,
    "output_shape": POSITIVE, "group": range(1, 1 << 20), "blocksize": range(1, 1025), "block_size": range(1 << 20),
    "num_groups": range(1, 1 << 20), "num_outputs": POSITIVE, "axis": range(-MOST_RANK, MOST_RANK),
    "axes": range(-MOST_RANK, MOST_RANK), "perm": range(MOST_RANK), "size": range(1, 1 << 16),
    "batch_dims": range(MOST_RANK), "p": range(1, 3), "stash_type": range(1, 2),
    "to": BITS_OF, "output_dtype": {0, *BITS_OF},
}  # fmt: skip
ANY: Container[int] = range(-(1 << 62), 1 << 62)
NO_FIELDS = (
    "g",
    "graphs",
    "sparse_tensor",
    "sparse_tensors",
    "tp",
    "type_protos",
    "tensors",
)


def check_graph(proto: onnx.ModelProto, name: str, size: int | Tensors | None) -> None:
    """Raises ExportError naming the file `name` and the first node or tensor that no edgeqat file has.

    size: pixels of a side of its images, where the file says it.
    """
    _check_model(proto, name)
    for tensor in proto.graph.initializer:
        _check_tensor(tensor, f"{name}: tensor {_short(tensor.name)}")
    for index, node in enumerate(proto.graph.node):
        _check_node(
            node, f"{name}: node {index} ({_short(node.op_type)} {_short(node.name)})"
        )
    _check_code_names(proto, name)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{name}: not a valid ONNX file ({_short(reason, 200)})"
        ) from error
    check_limits(proto, name, size)


def _check_model(proto: onnx.ModelProto, name: str) -> None:
    graph = proto.graph
    if not graph.node or not graph.input or not graph.output:
        raise ExportError(
            f"{name}: not a valid ONNX file (it has no graph from an input to an output)"
        )
    parts = {
        "functions": proto.functions,
        "training steps": proto.training_info,
        "sparse tensors": graph.sparse_initializer,
    }
    for what, found in parts.items():
        if found:
            raise ExportError(f"{name}: has {what}, which no edgeqat file has")
    domains = [opset.domain for opset in proto.opset_import]
    if len(set(domains)) < len(domains):
        raise ExportError(f"{name}: imports one set of operators twice")
    for opset in proto.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain not in OPSETS:
            raise ExportError(
                f"{name}: needs operators of {_short(opset.domain)}, which no edgeqat file for a runtime has"
            )
        if opset.version not in OPSETS[domain]:
            possible = OPSETS[domain]
            raise ExportError(
                f"{name}: needs version {opset.version} of operators {_short(domain)}; {possible[0]} to {possible[-1]} are "
                "possible"
            )
    if len(graph.node) > MOST_NODES or len(graph.initializer) > MOST_TENSORS:
        raise ExportError(
            f"{name}: has {len(graph.node)} nodes and {len(graph.initializer)} tensors; that is too many"
        )
    if len(graph.input) > MOST_PARTS or len(graph.output) > MOST_PARTS:
        raise ExportError(
            f"{name}: has {len(graph.input)} inputs and {len(graph.output)} outputs; that is too many"
        )


def _check_code_names(proto: onnx.ModelProto, name: str) -> None:
    """No two outputs of native nodes are named the codes of one quantizer: one of them would never be looked at."""
    named: set[str] = set()
    try:
        for quantizer, node, _ in code_outputs(proto):
            if quantizer in named:
                raise ExportError(
                    f"node {node.op_type} {_short(node.name)}: names codes of {_short(quantizer)}, as another output does"
                )
            named.add(quantizer)
    except ExportError as error:
        raise ExportError(f"{name}: {error}") from None


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Its bytes are in the file, as many as its shape says."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise ExportError(
            f"{where}: lies in another file; an edgeqat file holds all its tensors"
        )
    if tensor.HasField("segment"):
        raise ExportError(f"{where}: is a part of a tensor")
    if tensor.data_type not in BITS_OF:
        raise ExportError(
            f"{where}: its type {tensor.data_type} is none that edgeqat writes"
        )
    if len(tensor.dims) > MOST_RANK or any(size < 0 for size in tensor.dims):
        raise ExportError(
            f"{where}: its shape {_short(list(tensor.dims))} is impossible"
        )
    count = math.prod(tensor.dims)
    expected = (count * BITS_OF[tensor.data_type] + 7) // 8
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != expected:
            raise ExportError(
                f"{where}: holds {len(tensor.raw_data)} bytes; its shape needs {_short(expected)}"
            )
        return
    _check_typed_data(tensor, count, where)


def _check_typed_data(tensor: onnx.TensorProto, count: int, where: str) -> None:
    """The numbers of a tensor that is not stored as bytes."""
    fields: dict[int, Sized] = {
        TensorProto.FLOAT: tensor.float_data, TensorProto.DOUBLE: tensor.double_data, TensorProto.INT64: tensor.int64_data,
        TensorProto.UINT32: tensor.uint64_data, TensorProto.UINT64: tensor.uint64_data,
    }  # fmt: skip
    found = len(fields.get(tensor.data_type, tensor.int32_data))
    needed = (count + 1) // 2 if BITS_OF[tensor.data_type] == 4 else count
    if found != needed:
        raise ExportError(
            f"{where}: holds {found} numbers; its shape needs {_short(needed)}"
        )


def _check_node(node: onnx.NodeProto, where: str) -> None:
    if (
        len(node.input) > MOST_PARTS
        or len(node.output) > MOST_PARTS
        or len(node.attribute) > MOST_PARTS
    ):
        raise ExportError(f"{where}: has too many inputs, outputs or attributes")
    is_standard = node.domain in ("", "ai.onnx") and node.op_type in STANDARD
    is_native = node.domain == DOMAIN and node.op_type in NATIVE
    if not is_standard and not is_native:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise ExportError(
            f"{where}: operator {_short(operator)} is none that an edgeqat file may have; compute it before or after the "
            "net, or in another way"
        )
    if not any(node.output):
        raise ExportError(f"{where}: has no outputs")
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in names:
            raise ExportError(f"{where}: has attribute {_short(attribute.name)} twice")
        names.add(attribute.name)
        _check_attribute(attribute, node, where)
    if is_native:
        check_native(node, where)


def _check_attribute(
    attribute: AttributeProto, node: onnx.NodeProto, where: str
) -> None:
    here = f"{where}: attribute {_short(attribute.name)}"
    if attribute.ref_attr_name:
        raise ExportError(f"{here}: refers to another")
    for field in NO_FIELDS:
        found = getattr(attribute, field)
        is_set = (
            len(found) > 0 if hasattr(found, "__len__") else attribute.HasField(field)
        )
        if is_set:
            raise ExportError(
                f"{here}: holds a graph, a type or a list of tensors, which no edgeqat file has"
            )
    if attribute.type == AttributeProto.TENSOR:
        if node.op_type not in ("Constant", "ConstantOfShape"):
            raise ExportError(f"{here}: holds a tensor")
        _check_tensor(attribute.t, here)
    if attribute.type in (AttributeProto.STRING, AttributeProto.STRINGS):
        _check_texts([attribute.s, *attribute.strings], here)
    possible = RANGES.get(attribute.name, ANY) if node.domain != DOMAIN else ANY
    for number in (
        [attribute.i, *attribute.ints]
        if attribute.type != AttributeProto.INTS
        else attribute.ints
    ):
        is_the_default = (
            attribute.type not in (AttributeProto.INT, AttributeProto.INTS)
            and number == 0
        )
        if not is_the_default and number not in possible:
            raise ExportError(f"{here} is {_short(number)}; {_possible(possible)}")


def _check_texts(texts: list[bytes], here: str) -> None:
    for text in texts:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise ExportError(f"{here}: is not text") from error
        if len(decoded) > MOST_PARTS:
            raise ExportError(f"{here}: is a text of {len(decoded)} characters")


def _possible(numbers: object) -> str:
    if isinstance(numbers, range):
        return f"{numbers[0]} to {numbers[-1]} are possible"
    return "it names no type that edgeqat writes"


def _short(value: object, most: int = 60) -> str:
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
