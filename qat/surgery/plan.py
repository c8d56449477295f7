"""Where stream quantizers (of 8 bits, unless `quantize_` is told otherwise) must stand so that the runtime stays in integers
(`docs/lowering.md`).

ONNX Runtime computes a convolution, linear, add, concat or average pool on integers only when every input comes from a
quantizer and the output goes, through a clip at most, into exactly one. A *fused group* is such an operation with the batch
norm and clip activation that follow it. So a quantizer stands

- on the result of a fused group, unless one layer alone reads it, with its own input quantizer;
- on every floating-point result that such an operation reads.

A layer whose input has one bit compares codes with a threshold, so it reads a weighted layer's sums directly, or 8-bit
codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qat.surgery.frames import image_address
from qat.surgery.trace import MULTIPLIES, Call, Trace

PRODUCTS = {"matmul"}  # of two activations: attention's q·kᵀ and attn·v
MERGES = {"add", "cat", "mul"} | PRODUCTS
# The runtime's integer kernels of these can write floats, so a floating-point operation may read them unquantized.
FLOAT_OUTPUT = {"linear"} | PRODUCTS
# Functions of one tensor, element by element: of codes they are tables of 256 bytes (`export/functions.py`).
TABULATED = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "mish", "selu", "sigmoid", "silu", "softplus",
    "softsign", "sqrt", "tanh",
}  # fmt: skip
# Operations that only move, pick or repeat codes: quantizing before or after them is the same.
LAYOUTS = {
    "flatten", "reshape", "view", "permute", "transpose", "contiguous", "max_pool2d", "dropout", "getitem", "squeeze",
    "unsqueeze", "chunk", "split", "unbind", "pixel_shuffle", "channel_shuffle", "pad", "clone", "detach", "to", "type",
    "type_as", "float", "expand", "expand_as", "repeat", "roll", "flip", "reshape_as", "view_as", "t", "swapaxes", "movedim",
    "unflatten", "narrow", "tensor_split", "nearest", "copy", "alias", "split_with_sizes",
}  # fmt: skip
# Products of two activations, or of a weight, that no quantizer reaches yet. (Times a table: `multiplies_table`.)
UNSUPPORTED_MULTIPLIES = {
    "einsum", "baddbmm", "addmm", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "conv3d", "conv_transpose3d", "tensordot", "inner", "mv", "dot", "vdot", "addbmm", "addmv",
    "chain_matmul", "multi_dot", "deform_conv2d", "transformer_encoder_layer_fwd", "native_multi_head_attention",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where 8-bit quantizers stand.

    points:   addresses whose output is quantized to 8 bits; `#input0` and so on are the model's own inputs.
    on_grid:  layers whose input comes from such a quantization point.
    relus:    (address, convolution, upper clip) of each ReLU whose result that convolution alone reads.
    absorbed: addresses of the batch norms and clips that go into the layer before them.
    """

    points: tuple[str, ...]
    on_grid: frozenset[str]
    relus: tuple[tuple[str, str, float], ...] = ()
    absorbed: frozenset[str] = frozenset()


def unsupported(trace: Trace) -> list[Call]:
    """The operations that multiply in a way that no quantizer reaches."""
    calls = []
    for call in trace.calls:
        if call.kind in UNSUPPORTED_MULTIPLIES and not multiplies_table(call):
            calls.append(call)
    return calls


def plan_points(
    trace: Trace,
    binary_inputs: frozenset[str] = frozenset(),
    in_float: frozenset[str] = frozenset(),
    without_table: frozenset[str] = frozenset(),
) -> Placement:
    """Decide the 8-bit points of a traced model.

    binary_inputs: layers that read one-bit codes. in_float: layers that are not quantized. without_table: layers whose
    results functions of one tensor read in floating point.
    Raises ValueError naming a layer that would binarize the model's input.
    """
    flow = _Flow(trace, in_float, without_table)
    addresses: list[str] = []
    absorbed: set[str] = set()
    for call in trace.calls:
        if is_integer(call):
            end = flow.group_end(call)
            absorbed.update(flow.absorbed(call))
            if flow.needs_point(call, end):
                addresses.append(flow.producer[end].address)
        if is_merge(call):
            addresses += [flow.source(value) for value in call.inputs]
    addresses += flow.read_by_binary(binary_inputs, in_float)
    points = tuple(dict.fromkeys(addresses))
    return Placement(
        points,
        flow.layers_that_read(points),
        tuple(flow.relus_of_one_conv(trace)),
        frozenset(absorbed),
    )


def multiplies_table(call: Call) -> bool:
    """Whether it is a product of one activation with what does not depend on the image, such as a table of positions."""
    return call.kind in ({"einsum"} | PRODUCTS) and len(call.inputs) == 1


def is_merge(call: Call) -> bool:
    """An integer operation without weights: sum, product or concat of two activations, average pooling over space."""
    return call.pools_space or (call.kind in MERGES and len(call.inputs) > 1)


def is_integer(call: Call) -> bool:
    """Whether a file has an integer kernel for a call: a convolution or linear (on codes, if it is quantized), or a merge."""
    return call.kind in MULTIPLIES or is_merge(call)


class _Flow:
    """What flows where in a traced model: who makes a value, and who reads it. in_float: layers that are not quantized;
    without_table: see `plan_points`."""

    def __init__(
        self,
        trace: Trace,
        in_float: frozenset[str] = frozenset(),
        without_table: frozenset[str] = frozenset(),
    ) -> None:
        self.in_float = in_float
        self.without_table = without_table
        self.calls = trace.calls
        self.producer = trace.producer()
        self.readers = trace.consumers()
        self.outputs = set(trace.model_outputs)
        self.images = {}
        for position, value in enumerate(trace.model_inputs):
            self.images[value] = image_address(position)

    def layers_that_read(self, points: tuple[str, ...]) -> frozenset[str]:
        """Layers all of whose calls read a result that is quantized at one of `points`."""
        on_grid = set()
        elsewhere = set()
        for call in self.calls:
            if call.kind not in MULTIPLIES:
                continue
            if self.source(call.inputs[0]) in points:
                on_grid.add(call.layer)
            else:
                elsewhere.add(call.layer)
        return frozenset(on_grid - elsewhere)

    def group_end(self, call: Call) -> int:
        """The value after the batch norm and clip that the runtime absorbs into `call`."""
        value = call.outputs[0]
        may_normalize = call.kind in MULTIPLIES
        while True:
            reader = self.only_reader(value)
            if reader is None or reader.kind not in ("clip", "batch_norm"):
                return value
            if reader.kind == "batch_norm" and not may_normalize:
                return value
            if reader.kind == "clip":
                may_normalize = False
            value = reader.outputs[0]

    def only_reader(self, value: int) -> Call | None:
        """The call that alone reads `value`; None where others do, or the model returns it."""
        readers = self.readers[value]
        if len(readers) != 1 or value in self.outputs:
            return None
        return readers[0]

    def absorbed(self, call: Call) -> Iterator[str]:
        """Addresses of the operations between `call` and the end of its fused group."""
        value = call.outputs[0]
        end = self.group_end(call)
        while value != end:
            reader = self.readers[value][0]
            yield reader.address
            value = reader.outputs[0]

    def final_readers(self, value: int) -> list[Call | None]:
        """Who reads `value`, looking through layout operations; None stands for the model's output."""
        readers: list[Call | None] = []
        if value in self.outputs:
            readers.append(None)
        for reader in self.readers[value]:
            if reader.kind not in LAYOUTS:
                readers.append(reader)
                continue
            for moved in reader.outputs:
                readers += self.final_readers(moved)
        return readers

    def needs_point(self, call: Call, end: int) -> bool:
        """Whether the fused group of `call`, ending in value `end`, must quantize its result itself."""
        if self.read_by_one_layer(end) or self.is_model_output(end):
            return False
        may_write_floats = call.kind in FLOAT_OUTPUT and end == call.outputs[0]
        if not may_write_floats:
            return True
        readers = self.final_readers(end)
        if any(reader is None or self.reads_codes(reader) for reader in readers):
            return True
        return self.is_tabulated(call, readers)

    def is_tabulated(self, call: Call, readers: list[Call | None]) -> bool:
        """Whether what reads the result of `call` are functions of one tensor that end in codes: tables, if it has codes."""
        if call.kind not in MULTIPLIES or not readers:
            return False
        if call.layer in self.in_float | self.without_table:
            return False
        return all(self.is_table(reader) for reader in readers)

    def is_table(self, reader: Call | None) -> bool:
        """Whether it is a function of one tensor whose results nothing reads but what computes on codes."""
        if reader is None or reader.kind not in TABULATED:
            return False
        after = self.final_readers(reader.outputs[0])
        if not after:
            return False
        return all(last is not None and self.reads_codes(last) for last in after)

    def reads_codes(self, call: Call) -> bool:
        """Whether it computes on integers; a layer that is not quantized reads floats."""
        if call.kind in MULTIPLIES and call.layer in self.in_float:
            return False
        return is_integer(call)

    def read_by_one_layer(self, value: int) -> bool:
        """Whether one layer alone reads `value` and quantizes it by itself."""
        readers = self.final_readers(value)
        if len(readers) != 1 or readers[0] is None:
            return False
        reader = readers[0]
        return reader.kind in MULTIPLIES and reader.layer not in self.in_float

    def relus_of_one_conv(self, trace: Trace) -> Iterator[tuple[str, str, float]]:
        """(address, convolution, upper clip) of each ReLU whose result one convolution alone reads."""
        for call in trace.calls:
            if call.ceiling is None:
                continue
            value = call.outputs[0]
            reader = self.only_reader(value)
            if reader is None or reader.kind != "conv2d":
                continue
            if reader.inputs[0] == value:
                yield call.address, reader.layer, call.ceiling

    def read_by_binary(
        self, binary_inputs: frozenset[str], in_float: frozenset[str]
    ) -> list[str]:
        """Addresses whose results layers with one-bit inputs read, but for the sums of quantized layers."""
        sums = set()
        for call in self.calls:
            if call.kind in MULTIPLIES and call.layer not in in_float:
                sums.add(self.producer[self.group_end(call)].address)
        addresses = []
        for call in self.calls:
            if call.kind not in MULTIPLIES or call.layer not in binary_inputs:
                continue
            origin = self.origin(call.inputs[0])
            if origin is None:
                raise ValueError(
                    f"layer {call.layer!r} would binarize the model's input; give it a rule with more input bits"
                )
            if origin.address not in sums:
                addresses.append(origin.address)
        return addresses

    def is_model_output(self, value: int) -> bool:
        """Whether the model returns `value`, moved at most, and nothing else reads it."""
        return self.final_readers(value) in ([None], [])

    def origin(self, value: int) -> Call | None:
        """The call that computed `value`, looking back through layout operations; None for the model's input."""
        return self.producer.get(self._moved_from(value))

    def source(self, value: int) -> str:
        """Address of what computed `value`, looking back through layout operations: a call, or one of the model's inputs."""
        first = self._moved_from(value)
        if first in self.producer:
            return self.producer[first].address
        return self.images[first]

    def _moved_from(self, value: int) -> int:
        call = self.producer.get(value)
        while call is not None and call.kind in LAYOUTS:
            value = call.inputs[0]
            call = self.producer.get(value)
        return value
