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
MOST_BYTES = 1 << 34
ELEMENT_WORK = 8  # multiply-adds in the time of one element of any other operator
INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32,
            TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64}  # fmt: skip
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
    "Trilu": (1,),
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
        self.graph, self.name = proto.graph, name
        self.opsets = list(proto.opset_import)
        self.opset = next(
            (o.version for o in self.opsets if o.domain in ("", "ai.onnx")), 13
        )
        self.types: dict[str, tuple[int, Shape]] = {}
        self.values: dict[str, Value] = {}
        for tensor in self.graph.initializer:
            self.types[tensor.name] = (tensor.data_type, tuple(tensor.dims))
            if math.prod(tensor.dims) <= SMALL:
                self.values[tensor.name] = np.asarray(numpy_helper.to_array(tensor))
        pixels = (
            self._read_tensors(size)
            if isinstance(size, Mapping)
            else self._read_input(size)
        )
        self.most_work = WORK_PER_PIXEL * pixels
        self.most_bytes = min(max(BYTES_PER_PIXEL * pixels, LEAST_BYTES), MOST_BYTES)

    def _read_input(self, size: int | None) -> int:
        """Note the type of the images; returns the pixels of all of one run, at least `LEAST_PIXELS`."""
        inputs = [value for value in self.graph.input if value.name not in self.types]
        if len(inputs) != 1:
            raise ExportError(
                f"{self.name}: has {len(inputs)} inputs; an edgeqat file has one, the images"
            )
        declared = inputs[0].type.tensor_type
        dims = [
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in declared.shape.dim
        ]
        if declared.elem_type != TensorProto.FLOAT or len(dims) != 4:
            raise ExportError(
                f"{self.name}: its input {inputs[0].name!r} is not a float32 batch of images N_3_H_W"
            )
        usual = (1, 3, size, size)
        shape = tuple(
            usual[axis] if dim is None else dim for axis, dim in enumerate(dims)
        )
        known = tuple(dim for dim in shape if dim is not None)
        if len(known) < 4:
            raise ExportError(f"{self.name}: does not say how large its images are")
        if min(known) < 1 or math.prod(known) > 1 << 28:
            raise ExportError(
                f"{self.name}: its input of shape {list(known)} is impossible or too large"
            )
        self.types[inputs[0].name] = (TensorProto.FLOAT, known)
        return max(known[0] * known[2] * known[3], LEAST_PIXELS)

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
            dims = [
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in declared.shape.dim
            ]
            entry = said[value.name]
            expected = (1, *entry["shape"])
            element = helper.np_dtype_to_tensor_dtype(np.dtype(entry["dtype"]))
            fits = len(dims) == len(expected) and all(
                dim in (None, size)
                for dim, size in zip(dims[1:], expected[1:], strict=True)
            )
            if declared.elem_type != element or not fits:
                raise ExportError(
                    f"{self.name}: its input {value.name!r} is not the {entry['dtype']} {list(expected)} of its metadata"
                )
            self.types[value.name] = (element, expected)
            positions += math.prod(expected)
        return max(positions, LEAST_PIXELS)

    def run(self) -> None:
        """Check every node. Raises ExportError naming the node that is beyond a limit."""
        readers = Counter(
            tensor for node in self.graph.node for tensor in set(node.input) if tensor
        )
        readers.update(value.name for value in self.graph.output)
        work = live = 0
        for index, node in enumerate(self.graph.node):
            where = f"{self.name}: node {index} ({node.op_type} {node.name or '-> ' + next(filter(None, node.output))})"
            made, macs = (
                self._native(node, where)
                if node.domain == DOMAIN
                else self._standard(node, where)
            )
            for tensor, (element, shape) in zip(node.output, made, strict=True):
                if tensor:
                    self._check_shape(shape, where)
                    self.types[tensor] = (element, shape)
                    live += self._bytes(tensor)
            elements = sum(math.prod(shape) for _, shape in made)
            elements += sum(
                math.prod(self.types[tensor][1]) for tensor in node.input if tensor
            )
            work += macs + ELEMENT_WORK * elements
            if work > self.most_work:
                raise ExportError(
                    f"{where}: with it the file asks for more than {self.most_work:.1e} operations per image"
                )
            if live > self.most_bytes:
                raise ExportError(
                    f"{where}: with it the file asks for more than {self.most_bytes >> 20} MiB per image"
                )
            live -= sum(
                self._bytes(tensor)
                for tensor in node.output
                if tensor and not readers[tensor]
            )
            for tensor in set(node.input):
                if tensor:
                    readers[tensor] -= 1
                    if not readers[tensor] and tensor not in self.initial:
                        live -= self._bytes(tensor)

    @property
    def initial(self) -> frozenset[str]:
        """Tensors that are there before the first node."""
        if not hasattr(self, "_initial"):
            names = [t.name for t in self.graph.initializer] + [
                v.name for v in self.graph.input
            ]
            self._initial = frozenset(names)
        return self._initial

    def _bytes(self, tensor: str) -> int:
        element, shape = self.types[tensor]
        wide: dict[int, int] = {
            TensorProto.DOUBLE: 8,
            TensorProto.INT64: 8,
            TensorProto.UINT64: 8,
            TensorProto.INT8: 1,
            TensorProto.UINT8: 1,
        }
        return math.prod(shape) * wide.get(element, 4)

    def _check_shape(self, shape: Shape, where: str) -> None:
        is_empty = len(shape) != 1 and 0 in shape
        if (
            len(shape) > MOST_RANK
            or min(shape, default=0) < 0
            or is_empty
            or math.prod(shape) > self.most_bytes
        ):
            raise ExportError(
                f"{where}: makes a tensor of shape {list(shape)}, which is impossible or too large"
            )

    def _native(
        self, node: onnx.NodeProto, where: str
    ) -> tuple[list[tuple[int, Shape]], int]:
        return native_outputs(node, self.types, where)

    def _standard(
        self, node: onnx.NodeProto, where: str
    ) -> tuple[list[tuple[int, Shape]], int]:
        self._check_deciding(node, where)
        self._check_operands(node, where)
        types = {
            tensor: helper.make_tensor_type_proto(*self.types[tensor])
            for tensor in node.input
            if tensor
        }
        data = {
            t: numpy_helper.from_array(self.values[t], t)
            for t in node.input
            if t in self.values
        }
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
        made = [
            self._inferred(node, inferred.get(tensor), where) if tensor else (1, ())
            for tensor in node.output
        ]
        if node.op_type in ARITHMETIC and len(node.output) == 1:
            self._compute(node, made[0][1], data)
        return made, self._multiply_adds(node, made[0][1])

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
        if node.op_type in ("Div", "Mod") and self.types[node.input[0]][0] in INTEGERS:
            divisor = self.values.get(node.input[1])
            if divisor is None or (divisor.astype(np.int64) < 1).any():
                raise ExportError(
                    f"{where}: divides integers by what is not known to be above 0"
                )
        if node.op_type in GATES:
            self._check_recurrent(node, where)
        if node.op_type == "Pad":
            borders = self.values[node.input[1]].astype(np.int64).ravel()
            if (abs(borders) > SMALL).any():
                raise ExportError(
                    f"{where}: pads by {abs(borders).max()}; {SMALL} is the most"
                )
            mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
            smallest = min(self.types[node.input[0]][1], default=0)
            axes_given = len(node.input) > 3 and bool(node.input[3])
            per_axis = self.types[node.input[0]][1]
            fits = not axes_given and len(borders) == 2 * len(per_axis)
            largest = (
                [
                    max(borders[i], borders[i + len(per_axis)])
                    for i in range(len(per_axis))
                ]
                if fits
                else [max(borders)]
            )
            room = per_axis if fits else (smallest,)
            if mode != b"constant" and any(
                border >= size
                for border, size in zip(largest, room, strict=True)
                if border > 0
            ):
                raise ExportError(
                    f"{where}: reflects a border that is as large as the image"
                )

    def _check_recurrent(self, node: onnx.NodeProto, where: str) -> None:
        """Weights, biases and first states have the shapes that the input and `hidden_size` ask for; nothing else is set."""
        attributes = {
            attribute.name: helper.get_attribute_value(attribute)
            for attribute in node.attribute
        }
        for name, value in attributes.items():
            if name not in RECURRENT_ATTRIBUTES or RECURRENT_ATTRIBUTES[name] not in (
                None,
                value,
            ):
                raise ExportError(
                    f"{where}: attribute {name!r} has a value that edgeqat never writes"
                )
        directions = 2 if attributes.get("direction") == b"bidirectional" else 1
        hidden = attributes.get("hidden_size", 0)
        shapes = [self.types[tensor][1] if tensor else None for tensor in node.input]
        steps = shapes[0]
        if steps is None or len(steps) != 3:
            raise ExportError(
                f"{where}: its input is not a sequence x batch x features"
            )
        rows = GATES[node.op_type] * hidden
        state = (directions, steps[1], hidden)
        weights = [(directions, rows, steps[2]), (directions, rows, hidden)]
        bias = (directions, 2 * rows)
        lengths = None  # of the sequences: an input that stays away
        expected = [steps, *weights, bias, lengths, state, state]
        fits = 3 <= len(shapes) <= len(expected) and None not in shapes[:3]
        if not fits or any(
            found not in (None, right)
            for found, right in zip(shapes, expected, strict=False)
        ):
            raise ExportError(
                f"{where}: the shapes of its weights and states {shapes[1:]} do not fit its input {list(steps)}"
            )

    def _inferred(
        self, node: onnx.NodeProto, found: onnx.TypeProto | None, where: str
    ) -> tuple[int, Shape]:
        if (
            found is None
            or not found.HasField("tensor_type")
            or not found.tensor_type.HasField("shape")
        ):
            raise ExportError(
                f"{where}: the shape of what it makes is not known before it runs"
            )
        dims = found.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims):
            raise ExportError(
                f"{where}: the shape of what it makes is not known before it runs"
            )
        return found.tensor_type.elem_type, tuple(dim.dim_value for dim in dims)

    def _compute(
        self, node: onnx.NodeProto, shape: Shape, data: Mapping[str, Any]
    ) -> None:
        """Note the value of a small tensor all of whose operands are known."""
        if math.prod(shape) > SMALL:
            return
        if node.op_type == "Shape":
            first, last = (
                next((a.i for a in node.attribute if a.name == key), None)
                for key in ("start", "end")
            )
            self.values[node.output[0]] = np.array(
                self.types[node.input[0]][1][first:last], np.int64
            )
            return
        if node.op_type == "Size":
            self.values[node.output[0]] = np.array(
                math.prod(self.types[node.input[0]][1]), np.int64
            )
            return
        operands = [tensor for tensor in node.input if tensor]
        if not all(tensor in data for tensor in operands):
            return
        found = self._evaluated(node, operands)
        if found is not None and found.shape == shape:
            self.values[node.output[0]] = found

    def _evaluated(self, node: onnx.NodeProto, operands: Sequence[str]) -> Value | None:
        """The result of a node by its definition, or None where it has none."""
        infos = [
            helper.make_tensor_value_info(t, *self.types[t])
            for t in dict.fromkeys(operands)
        ]
        result = onnx.ValueInfoProto(name=node.output[0])
        graph = helper.make_graph([node], "node", infos, [result])
        try:
            with np.errstate(all="ignore"):
                runner = ReferenceEvaluator(
                    helper.make_model(graph, opset_imports=self.opsets)
                )
                (found,) = runner.run(None, {t: self.values[t] for t in operands})
        # Whatever it was: the value stays unknown, and what depends on it is refused
        except Exception:
            return None
        return np.asarray(found)

    def _multiply_adds(self, node: onnx.NodeProto, made: Shape) -> int:
        """Products of sums that `node` computes; 0 of operators that look at each element once."""
        count = math.prod(made)
        first = self.types[node.input[0]][1] if node.input and node.input[0] else ()
        match node.op_type:
            case "Conv" | "ConvInteger":
                return count * math.prod(self.types[node.input[1]][1][1:])
            case "QLinearConv":
                return count * math.prod(self.types[node.input[3]][1][1:])
            case "ConvTranspose":
                return math.prod(first) * math.prod(self.types[node.input[1]][1][1:])
            case "MatMul" | "MatMulInteger" | "QLinearMatMul":
                return count * (first[-1] if first else 1)
            case "Gemm":
                return count * max(first, default=1)
            case "GRU" | "LSTM" | "RNN":
                steps_times_batch = math.prod(first[:2])
                weights = sum(
                    math.prod(self.types[tensor][1]) for tensor in node.input[1:3]
                )
                return steps_times_batch * weights
            case "AveragePool" | "MaxPool" | "LRN":
                window = [
                    list(a.ints) or [a.i]
                    for a in node.attribute
                    if a.name in ("kernel_shape", "size")
                ]
                return ELEMENT_WORK * count * math.prod(window[0] if window else [1])
            case "Einsum":
                return math.prod(
                    math.prod(self.types[tensor][1]) for tensor in node.input
                )
            case "Resize" | "GridSample":
                return 16 * ELEMENT_WORK * count
            case _:
                return 0
