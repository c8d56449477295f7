"""How much memory and work a file asks for, told before it runs: every tensor's shape for one image, node by node.

A size that only the run would tell (a Reshape by numbers that depend on the image) is refused: nothing bounds it. The bounds
grow with the image: what a thousand pixels may cost is several times what the largest vision transformers need for them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from export.lowered import DOMAIN, ExportError
from export.native_checks import native_outputs

Shape = tuple[int, ...]
Value = NDArray[np.generic]
MOST_RANK = 8
SMALL = 4096  # elements of a tensor that is computed here, for it may be a shape
LEAST_PIXELS = 64 * 64
# Multiply-adds; ViT-H/14 needs 3.3 million, ResNet-152 0.23 million
WORK_PER_PIXEL = 1 << 23
# At one time; attention over 64 x 64 places of a 1024-pixel image needs 3 thousand
BYTES_PER_PIXEL = 1 << 13
LEAST_BYTES = 1 << 28
# Eight weights of one bit are 32 bytes as floats, and as many while they are made
BYTES_PER_WEIGHT_BYTE = 64
MOST_BYTES = 1 << 34
MOST_INPUT_ELEMENTS = 1 << 28
ELEMENT_WORK = 8  # multiply-adds in the time of one element of any other operator
INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32,
            TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64}  # fmt: skip
# Of an element; every other type counts as 4
ELEMENT_BYTES: dict[int, int] = {
    TensorProto.DOUBLE: 8,
    TensorProto.INT64: 8,
    TensorProto.UINT64: 8,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
}
DEFAULT_OPSET = 13  # of a file that does not say which
# What shapes are computed with.
ARITHMETIC = frozenset({
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
    "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "Reshape",
    "Shape", "Size", "Slice", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip
# Operator -> inputs that decide the shape of its output, or how much memory it touches.
DECIDING: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Pad": (1, 3), "TopK": (1,),
    "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "CumSum": (1,),
    "Trilu": (1,), "Col2Im": (1, 2),
    **{f"Reduce{what}": (1,) for what in ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
}  # fmt: skip
# Recurrent operator -> how many of its gates have weights
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# What PyTorch's exporter writes there: any value, or the one that it always has.
RECURRENT_ATTRIBUTES = {
    "direction": None,
    "hidden_size": None,
    "linear_before_reset": None,
    "layout": 0,
    "input_forget": 0,
}

# Input -> its shape without the batch, and its type, as metadata say them
Tensors = Mapping[str, Mapping[str, Any]]


def check_limits(proto: onnx.ModelProto, name: str, size: int | Tensors | None) -> None:
    """Raises ExportError naming the file `name` and the node that asks for too much, or for what nobody can tell.

    size: pixels of a side of the images, where the file says it; or its inputs, where it takes tensors.
    """
    Walk(proto, name, size).run()


class Walk:
    """Nodes in their order, with the type of every tensor and the values of the small ones that shapes may depend on."""

    def __init__(
        self, proto: onnx.ModelProto, name: str, size: int | Tensors | None
    ) -> None:
        self.graph = proto.graph
        self.name = name
        self.opsets = list(proto.opset_import)
        self.opset = standard_opset(proto)
        self.types: dict[str, tuple[int, Shape]] = {}
        self.values: dict[str, Value] = {}
        for tensor in self.graph.initializer:
            self.types[tensor.name] = (tensor.data_type, tuple(tensor.dims))
            if math.prod(tensor.dims) <= SMALL:
                self.values[tensor.name] = np.asarray(numpy_helper.to_array(tensor))
        pixels = self._read_inputs(size)
        # Tensors that are there before the first node
        self.initial = frozenset(self.types)
        self.most_work = WORK_PER_PIXEL * pixels
        for_images = max(BYTES_PER_PIXEL * pixels, LEAST_BYTES)
        held = sum(tensor.ByteSize() for tensor in self.graph.initializer)
        for_weights = BYTES_PER_WEIGHT_BYTE * held
        self.most_bytes = min(for_images + for_weights, MOST_BYTES)

    def _read_inputs(self, size: int | Tensors | None) -> int:
        """Note the types of what the file takes; returns how many pixels or positions that is."""
        if isinstance(size, Mapping):
            return self._read_tensors(size)
        return self._read_images(size)

    def _read_images(self, size: int | None) -> int:
        """Note the type of the images; returns the pixels of all of one run, at least `LEAST_PIXELS`."""
        inputs = [value for value in self.graph.input if value.name not in self.types]
        if len(inputs) != 1:
            raise ExportError(
                f"{self.name}: has {len(inputs)} inputs; an edgeqat file has one, the images"
            )
        image = inputs[0]
        declared = image.type.tensor_type
        dims = _declared_dims(declared)
        if declared.elem_type != TensorProto.FLOAT or len(dims) != 4:
            raise ExportError(
                f"{self.name}: its input {image.name!r} is not a float32 batch of images N_3_H_W"
            )
        shape: list[int] = []
        for dim, usual in zip(dims, (1, 3, size, size), strict=True):
            length = usual if dim is None else dim
            if length is None:
                raise ExportError(f"{self.name}: does not say how large its images are")
            shape.append(length)
        if min(shape) < 1 or math.prod(shape) > MOST_INPUT_ELEMENTS:
            raise ExportError(
                f"{self.name}: its input of shape {shape} is impossible or too large"
            )
        self.types[image.name] = (TensorProto.FLOAT, tuple(shape))
        samples, _, height, width = shape
        return max(samples * height * width, LEAST_PIXELS)

    def _read_tensors(self, said: Tensors) -> int:
        """Note the types of all inputs; returns how many positions their samples have, at least `LEAST_PIXELS`."""
        positions = 0
        for value in self.graph.input:
            if value.name in self.types:
                continue
            if value.name not in said:
                raise ExportError(
                    f"{self.name}: its metadata says nothing of its input {value.name!r}"
                )
            declared = value.type.tensor_type
            entry = said[value.name]
            expected = (1, *entry["shape"])
            element = helper.np_dtype_to_tensor_dtype(np.dtype(entry["dtype"]))
            fits = _fits_but_for_batch(_declared_dims(declared), expected)
            if declared.elem_type != element or not fits:
                raise ExportError(
                    f"{self.name}: its input {value.name!r} is not the {entry['dtype']} {list(expected)} of its metadata"
                )
            self.types[value.name] = (element, expected)
            positions += math.prod(expected)
        return max(positions, LEAST_PIXELS)

    def run(self) -> None:
        """Check every node. Raises ExportError naming the node that is beyond a limit."""
        readers = self._readers()
        work = 0
        live_bytes = 0
        for index, node in enumerate(self.graph.node):
            where = f"{self.name}: node {index} ({_shown(node)})"
            if node.domain == DOMAIN:
                made, products = native_outputs(node, self.types, where)
            else:
                made, products = self._standard(node, where)
            for tensor, (element, shape) in zip(node.output, made, strict=True):
                if tensor:
                    self._check_shape(shape, where)
                    self.types[tensor] = (element, shape)
                    live_bytes += self._bytes(tensor)
            elements = sum(math.prod(shape) for _, shape in made)
            elements += sum(self._elements(tensor) for tensor in node.input if tensor)
            work += products + ELEMENT_WORK * elements
            if work > self.most_work:
                raise ExportError(
                    f"{where}: with it the file asks for more than {self.most_work:.1e} operations per image"
                )
            if live_bytes > self.most_bytes:
                raise ExportError(
                    f"{where}: with it the file asks for more than {self.most_bytes >> 20} MiB per image"
                )
            live_bytes -= self._freed_bytes(node, readers)

    def _readers(self) -> Counter[str]:
        """How many nodes read a tensor; the graph's outputs are read once more, so they stay."""
        readers: Counter[str] = Counter()
        for node in self.graph.node:
            readers.update(tensor for tensor in set(node.input) if tensor)
        readers.update(value.name for value in self.graph.output)
        return readers

    def _freed_bytes(self, node: onnx.NodeProto, readers: Counter[str]) -> int:
        """Bytes that nobody needs once `node` has run, which is one reader less of its inputs."""
        freed = 0
        for tensor in node.output:
            if tensor and not readers[tensor]:
                freed += self._bytes(tensor)
        for tensor in set(node.input):
            if not tensor:
                continue
            readers[tensor] -= 1
            if not readers[tensor] and tensor not in self.initial:
                freed += self._bytes(tensor)
        return freed

    def _elements(self, tensor: str) -> int:
        return math.prod(self.types[tensor][1])

    def _bytes(self, tensor: str) -> int:
        element, _ = self.types[tensor]
        return self._elements(tensor) * ELEMENT_BYTES.get(element, 4)

    def _check_shape(self, shape: Shape, where: str) -> None:
        is_empty = len(shape) != 1 and 0 in shape
        is_impossible = is_empty or min(shape, default=0) < 0
        is_too_large = len(shape) > MOST_RANK or math.prod(shape) > self.most_bytes
        if is_impossible or is_too_large:
            raise ExportError(
                f"{where}: makes a tensor of shape {list(shape)}, which is impossible or too large"
            )

    def _standard(
        self, node: onnx.NodeProto, where: str
    ) -> tuple[list[tuple[int, Shape]], int]:
        """Types of what a standard operator makes, and its multiply-adds; also notes its value, where it may be a shape."""
        self._check_deciding(node, where)
        self._check_operands(node, where)
        types = {}
        data = {}
        for tensor in node.input:
            if tensor:
                types[tensor] = helper.make_tensor_type_proto(*self.types[tensor])
            if tensor in self.values:
                data[tensor] = numpy_helper.from_array(self.values[tensor], tensor)
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
            inferred = shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self.opsets
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"{where}: its operands do not fit ({reason[:200]})"
            ) from error
        made: list[tuple[int, Shape]] = []
        for tensor in node.output:
            if tensor:
                made.append(_inferred_type(inferred.get(tensor), where))
            else:
                made.append((TensorProto.FLOAT, ()))
        _, shape = made[0]
        if node.op_type in ARITHMETIC and len(node.output) == 1:
            self._compute(node, shape, data)
        return made, self._multiply_adds(node, shape)

    def _check_deciding(self, node: onnx.NodeProto, where: str) -> None:
        """What decides a shape is a constant, or follows from the images' shape."""
        for position in DECIDING.get(node.op_type, ()):
            tensor = node.input[position] if position < len(node.input) else ""
            if tensor and tensor not in self.values:
                raise ExportError(
                    f"{where}: its shape depends on {tensor!r}, which is not known before it runs"
                )

    def _check_operands(self, node: onnx.NodeProto, where: str) -> None:
        """What ends a process: dividing integers by 0 (or the least one by -1), a border that reflects beyond the image."""
        if node.op_type in ("Div", "Mod"):
            self._check_divisor(node, where)
        if node.op_type in GATES:
            self._check_recurrent(node, where)
        if node.op_type == "Pad":
            self._check_borders(node, where)

    def _check_divisor(self, node: onnx.NodeProto, where: str) -> None:
        """Integers are divided by constants above 0 alone."""
        element, _ = self.types[node.input[0]]
        if element not in INTEGERS:
            return
        divisor = self.values.get(node.input[1])
        if divisor is None or (divisor.astype(np.int64) < 1).any():
            raise ExportError(
                f"{where}: divides integers by what is not known to be above 0"
            )

    def _check_borders(self, node: onnx.NodeProto, where: str) -> None:
        """A border is not huge, and one that reflects is smaller than the image."""
        borders = self.values[node.input[1]].astype(np.int64).ravel()
        if (abs(borders) > SMALL).any():
            raise ExportError(
                f"{where}: pads by {abs(borders).max()}; {SMALL} is the most"
            )
        if _attribute(node, "mode", b"constant") == b"constant":
            return
        _, sizes = self.types[node.input[0]]
        has_axes = len(node.input) > 3 and bool(node.input[3])
        if not has_axes and len(borders) == 2 * len(sizes):
            before, after = np.split(borders, 2)
            largest = np.maximum(before, after).tolist()
        else:
            # Which axes they belong to is not worked out: the largest against the shortest
            largest = [int(borders.max())]
            sizes = (min(sizes, default=0),)
        for border, size in zip(largest, sizes, strict=True):
            if border > 0 and border >= size:
                raise ExportError(
                    f"{where}: reflects a border that is as large as the image"
                )

    def _check_recurrent(self, node: onnx.NodeProto, where: str) -> None:
        """Weights, biases and first states have the shapes that the input and `hidden_size` ask for; nothing else is set."""
        attributes = _attributes(node)
        for name, value in attributes.items():
            is_known = name in RECURRENT_ATTRIBUTES
            if not is_known or RECURRENT_ATTRIBUTES[name] not in (None, value):
                raise ExportError(
                    f"{where}: attribute {name!r} has a value that edgeqat never writes"
                )
        directions = 2 if attributes.get("direction") == b"bidirectional" else 1
        hidden = attributes.get("hidden_size", 0)
        shapes = [self.types[tensor][1] if tensor else None for tensor in node.input]
        sequence = shapes[0]
        if sequence is None or len(sequence) != 3:
            raise ExportError(
                f"{where}: its input is not a sequence x batch x features"
            )
        _, batch, features = sequence
        rows = GATES[node.op_type] * hidden
        state = (directions, batch, hidden)
        weights = [(directions, rows, features), (directions, rows, hidden)]
        bias = (directions, 2 * rows)
        lengths = None  # of the sequences: an input that stays away
        expected = [sequence, *weights, bias, lengths, state, state]
        fits = 3 <= len(shapes) <= len(expected) and None not in shapes[:3]
        for shape, right in zip(shapes, expected, strict=False):
            if shape is not None and shape != right:
                fits = False
        if not fits:
            raise ExportError(
                f"{where}: the shapes of its weights and states {shapes[1:]} do not fit its input {list(sequence)}"
            )

    def _compute(
        self, node: onnx.NodeProto, shape: Shape, data: Mapping[str, Any]
    ) -> None:
        """Note the value of a small tensor all of whose operands are known."""
        if math.prod(shape) > SMALL:
            return
        (output,) = node.output
        if node.op_type == "Shape":
            _, sizes = self.types[node.input[0]]
            first = _attribute(node, "start", None)
            last = _attribute(node, "end", None)
            self.values[output] = np.array(sizes[first:last], np.int64)
            return
        if node.op_type == "Size":
            self.values[output] = np.array(self._elements(node.input[0]), np.int64)
            return
        operands = [tensor for tensor in node.input if tensor]
        if not all(tensor in data for tensor in operands):
            return
        result = self._evaluated(node, operands)
        if result is not None and result.shape == shape:
            self.values[output] = result

    def _evaluated(self, node: onnx.NodeProto, operands: Sequence[str]) -> Value | None:
        """The result of a node by its definition, or None where it has none."""
        infos = []
        for tensor in dict.fromkeys(operands):
            infos.append(helper.make_tensor_value_info(tensor, *self.types[tensor]))
        result = onnx.ValueInfoProto(name=node.output[0])
        graph = helper.make_graph([node], "node", infos, [result])
        feeds = {tensor: self.values[tensor] for tensor in operands}
        try:
            with np.errstate(all="ignore"):
                model = helper.make_model(graph, opset_imports=self.opsets)
                (value,) = ReferenceEvaluator(model).run(None, feeds)
        # Whatever it was: the value stays unknown, and what depends on it is refused
        except Exception:
            return None
        return np.asarray(value)

    def _multiply_adds(self, node: onnx.NodeProto, made: Shape) -> int:
        """Products of sums that `node` computes; 0 of operators that look at each element once."""
        outputs = math.prod(made)
        first = self.types[node.input[0]][1] if node.input and node.input[0] else ()
        match node.op_type:
            case "Conv" | "ConvInteger":
                return outputs * self._kernel_elements(node.input[1])
            case "QLinearConv":
                return outputs * self._kernel_elements(node.input[3])
            case "ConvTranspose":
                return math.prod(first) * self._kernel_elements(node.input[1])
            case "MatMul" | "MatMulInteger" | "QLinearMatMul":
                return outputs * (first[-1] if first else 1)
            case "Gemm":
                return outputs * max(first, default=1)
            case "GRU" | "LSTM" | "RNN":
                steps_times_batch = math.prod(first[:2])
                weights = sum(self._elements(tensor) for tensor in node.input[1:3])
                return steps_times_batch * weights
            case "AveragePool" | "MaxPool" | "LRN":
                return ELEMENT_WORK * outputs * _window_elements(node)
            case "Einsum":
                return math.prod(self._elements(tensor) for tensor in node.input)
            case "Resize" | "GridSample":
                return 16 * ELEMENT_WORK * outputs
            case _:
                return 0

    def _kernel_elements(self, weight: str) -> int:
        """Elements of a convolution's weight per channel of its first axis."""
        _, shape = self.types[weight]
        return math.prod(shape[1:])


def standard_opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operators that a file says it uses."""
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            return opset.version
    return DEFAULT_OPSET


def _shown(node: onnx.NodeProto) -> str:
    """Its operator, and its name or else that of its first output."""
    if node.name:
        return f"{node.op_type} {node.name}"
    first = next(filter(None, node.output))
    return f"{node.op_type} -> {first}"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {}
    for attribute in node.attribute:
        values[attribute.name] = helper.get_attribute_value(attribute)
    return values


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return _attributes(node).get(name, default)


def _declared_dims(declared: onnx.TypeProto.Tensor) -> list[int | None]:
    """The length of each axis; None where the file leaves it open."""
    dims: list[int | None] = []
    for dim in declared.shape.dim:
        dims.append(dim.dim_value if dim.HasField("dim_value") else None)
    return dims


def _fits_but_for_batch(dims: Sequence[int | None], expected: Sequence[int]) -> bool:
    """Whether a declared shape is the expected one; its first axis may have any length."""
    if len(dims) != len(expected):
        return False
    pairs = zip(dims[1:], expected[1:], strict=True)
    return all(dim is None or dim == length for dim, length in pairs)


def _inferred_type(inferred: onnx.TypeProto | None, where: str) -> tuple[int, Shape]:
    """Element type and shape. Raises ExportError where any length is open."""
    unknown = ExportError(
        f"{where}: the shape of what it makes is not known before it runs"
    )
    if inferred is None or not inferred.HasField("tensor_type"):
        raise unknown
    if not inferred.tensor_type.HasField("shape"):
        raise unknown
    shape = []
    for dim in inferred.tensor_type.shape.dim:
        if not dim.HasField("dim_value"):
            raise unknown
        shape.append(dim.dim_value)
    return inferred.tensor_type.elem_type, tuple(shape)


def _window_elements(node: onnx.NodeProto) -> int:
    """Elements that a pool reads for each of its results."""
    for attribute in node.attribute:
        if attribute.name in ("kernel_shape", "size"):
            return math.prod(list(attribute.ints) or [attribute.i])
    return 1
