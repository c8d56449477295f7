"""Canonical `LoweredModel` -> ONNX with the operators of `export/kernels` where they exist, and ordinary QDQ elsewhere.

Codes stay in N_H_W_C between native operators; a QTranspose stands only where an ordinary operator reads or writes them. A
layer, the residual sum that follows it and every quantizer that reads the result are one node, whose outputs are

    own codes | codes of the sum | codes of each reader's quantizer, through a table of 256 bytes

A function of one code between two quantizers (a sigmoid, GELU) is part of such a table (`export/functions.py`).
Outputs that nobody reads have no name and are not written; the attribute `codes` says which quantizer each one is, so that
`export/native_file.py` can name and show it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper

from export.arithmetic import (
    multiplier_of_mean,
    ratio_of_product,
    requantized,
    terms_of_norm,
    terms_of_sum,
)
from export.functions import CodeFunction, function_before
from export.graph import Emitter, emit_qdq
from export.lowered import DOMAIN, LoweredLayer, LoweredModel, LoweredQuantizer
from export.names import bias_of, native_codes_of, plane_of, weight_of, weight_scale_of
from export.norms import LayerNorm, norm_on_codes
from export.packing import pack
from export.qdq import emit_plain_qdq
from export.skeleton import (
    constant,
    ints_of,
    is_mark,
    is_set,
    mark_name,
    only_reader,
    quantizer_of,
    weight_layer,
)
from export.softmax import is_softmax_to_codes
from export.targets import Target
from export.thresholds import WRITE_ZERO_POINT, code_thresholds
from export.ties import function as tried_function
from export.writer import Writer, value_name

MOST_TABLES = 4
LAYER_INPUTS = 6  # of a layer's node before the other operand of a residual sum
MOST_AXES = 10  # of a QTranspose, whose order has a digit for each
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
Attribute = int | float | str | list[str]
Attributes = dict[str, Attribute]


def emit(model: LoweredModel, target: Target) -> onnx.ModelProto:
    """The file of a canonical `model` for any target. Raises ExportError naming a layer the target cannot run."""
    if target.native:
        return emit_native(model, target)
    if target.qdq:
        return emit_plain_qdq(model, target)
    return emit_qdq(model, target)


def emit_native(model: LoweredModel, target: Target) -> onnx.ModelProto:
    """The file of a canonical `model` for a target with edgeqat's operators."""
    writer = Writer(model, target)
    writer.opsets.append(helper.make_opsetid(DOMAIN, 1))
    emitter = NativeEmitter(writer)
    for node in model.skeleton.graph:
        emitter.emit(node)
    outputs = [emitter.float_output(value) for value in model.skeleton.graph.outputs]
    writer.nodes = _without_unread_moves(writer.nodes)
    return writer.proto(outputs)


def _without_unread_moves(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """`nodes` without each QTranspose that nobody reads, as one has that became a part of the next."""
    kept = []
    read: set[str] = set()
    for node in reversed(nodes):
        if node.op_type == "QTranspose" and node.output[0] not in read:
            continue
        kept.append(node)
        read.update(node.input)
    return kept[::-1]


def requantizing_table(
    source: LoweredQuantizer, target: LoweredQuantizer
) -> NDArray[np.uint8]:
    """uint8 (256,): the code on `target` of every code on `source`, as export/arithmetic.py defines it."""
    codes = np.arange(256)
    if target.is_binary:
        is_one = codes >= int(code_thresholds(source, target))
        return np.where(is_one, target.high, target.low).astype(np.uint8)
    results = requantized(codes - source.zero_point, source, target)
    return results.clip(target.low, target.high).astype(np.uint8)


class NativeCodes(NamedTuple):
    """uint8 codes as native operators order them (N_H_W_C or N_C), and their grid; no tensor where nobody reads them."""

    tensor: str
    grid: LoweredQuantizer


class ResidualSum(NamedTuple):
    """A sum of a layer's codes and other codes that are there already; `mark` quantizes it."""

    add: ir.Node
    other: ir.Value
    other_codes: str
    mark: ir.Node


class NativeEmitter:
    """Emits nodes in the skeleton's order; what a native node computed ahead is in `done`.

    functions: by mark, the function of one code that a table computes together with the quantizer.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.model = writer.model
        self.ordinary = Emitter(writer)
        self.native: dict[str, NativeCodes] = {}  # by skeleton value
        # Codes whose axes a QTranspose has put in another order -> what it reads, and that order
        self.moved: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.done: set[ir.Node] = set()
        self.functions = _functions_in_tables(self.model)
        self.replaced = _only_for(self.functions, self.model.skeleton.graph)
        self.handlers: dict[str, Callable[[ir.Node], bool]] = {
            "Conv": self._layer,
            "Gemm": self._layer,
            "MaxPool": self._max_pool,
            "AveragePool": self._average_pool,
            "GlobalAveragePool": self._global_pool,
            "Add": self._add_codes,
            "Mul": self._multiply,
            "Concat": self._concat,
            "Reshape": self._flat,
            "Flatten": self._flat,
            "Transpose": self._transpose,
            "LayerNormalization": self._layer_norm,
            "Softmax": self._softmax,
            "PRelu": self._parametric_relu,
        }

    def emit(self, node: ir.Node) -> None:
        """Append the nodes of one of the skeleton's, all before which are there already."""
        if node in self.done or node in self.replaced or self._is_native(node):
            return
        for value in node.inputs:
            self._to_ordinary(value)
        self.ordinary.emit(node)

    def float_output(self, value: ir.Value) -> onnx.ValueInfoProto:
        """Write an output of the graph, in floating point."""
        self._to_ordinary(value)
        return self.writer.float_output(value)

    def _is_native(self, node: ir.Node) -> bool:
        """Whether native operators compute `node`; they are written then."""
        if is_mark(node):
            is_weight = mark_name(node) not in self.model.quantizers
            return is_weight or self._mark(node)
        if node.domain != "" or node.op_type not in self.handlers:
            return False
        return self.handlers[node.op_type](node)

    def _layer(self, node: ir.Node) -> bool:
        """Conv or Gemm on codes with everything that follows it."""
        layer = weight_layer(node, self.model)
        source = self._codes(node.inputs[0])
        rank = 2 if node.op_type == "Gemm" else 4
        if layer is None or source is None or len(_sizes(node.inputs[0])) != rank:
            return False
        attributes = self._layer_attributes(node, layer, source.grid)
        inputs = [source.tensor, *self._parameters(layer)]
        mark = only_reader(node.outputs[0])
        if mark is None or not is_mark(mark):
            self._layer_to_floats(node, inputs, attributes, layer.name)
        else:
            self._layer_to_codes(node, inputs, attributes, layer.name, mark)
        return True

    def _layer_to_codes(
        self,
        node: ir.Node,
        inputs: Sequence[str],
        attributes: Attributes,
        name: str,
        mark: ir.Node,
    ) -> None:
        """A layer whose results the quantizer `mark` alone reads, and the residual sum after that if there is one."""
        own = self.model.quantizers[mark_name(mark)]
        self.done.add(mark)
        inputs = [*inputs, *[""] * (LAYER_INPUTS - len(inputs))]
        attributes |= _written(own) | _no_sum()
        kind = f"Q{node.op_type}"
        residual = self._residual_sum(mark)
        if residual is None:
            codes = NativeCodes(self._name_if_read(mark), own)
            self._native(
                kind, [*inputs, ""], [codes, None], mark, attributes, name=name
            )
            return
        grid = self.model.quantizers[mark_name(residual.mark)]
        attributes |= self._sum_attributes(residual.add, grid)
        attributes["other_first"] = int(residual.add.inputs[0] is residual.other)
        self.done.update((residual.add, residual.mark))
        codes = NativeCodes(self._name_if_read(residual.mark), grid)
        self._native(
            kind,
            [*inputs, residual.other_codes],
            [NativeCodes("", own), codes],
            residual.mark,
            attributes,
            name=name,
        )

    def _layer_to_floats(
        self,
        node: ir.Node,
        inputs: Sequence[str],
        attributes: Attributes,
        name: str,
    ) -> None:
        """A layer whose results no quantizer alone reads."""
        output = value_name(node.outputs[0])
        if node.op_type == "Gemm":
            self._custom("QGemmFloat", inputs, [output], attributes, name)
            return
        in_nhwc = native_codes_of(output)
        self._custom("QConvFloat", inputs, [in_nhwc], attributes, name)
        self.writer.add("Transpose", [in_nhwc], output, perm=TO_NCHW)

    def _residual_sum(self, mark: ir.Node) -> ResidualSum | None:
        """The sum that alone reads `mark`, if it ends in codes and the codes of its other operand are there already."""
        own = mark.outputs[0]
        add = only_reader(own)
        if add is None or add.op_type != "Add":
            return None
        if self.model.quantizers[mark_name(mark)].is_binary:
            return None
        others = [value for value in add.inputs if value not in (None, own)]
        if len(others) != 1 or others[0] is None:
            return None
        (other,) = others
        codes = self._codes(other)
        if codes is None or _sizes(other) != _sizes(own):
            return None
        end = self._quantizer_after(add)
        if end is None:
            return None
        return ResidualSum(add, other, codes.tensor, end)

    def _native(
        self,
        kind: str,
        inputs: Sequence[str],
        results: Sequence[NativeCodes | None],
        last: ir.Node,
        attributes: Attributes,
        *,
        name: str = "",
        label: bool = True,
    ) -> None:
        """A node whose codes `last` (a mark, or a max pool) ends, with tables for the quantizers that read them.

        results: its outputs before the tables, None for one that it does not write; the last one written is what the tables
        read. label: whether those outputs are the quantizers' own codes (a max pool's are not).
        """
        outputs: list[str] = []
        labels: list[str] = []
        for result in results:
            outputs.append("" if result is None else result.tensor)
            labels.append(result.grid.name if result is not None and label else "")
        written = [result for result in results if result is not None][-1]
        if written.tensor:
            self.native[value_name(last.outputs[0])] = written
        readers = self._table_readers(last.outputs[0])
        for reader in readers:
            grid = self.model.quantizers[mark_name(reader)]
            codes = NativeCodes(native_codes_of(grid.name), grid)
            self.native[value_name(reader.outputs[0])] = codes
            outputs.append(codes.tensor)
            labels.append(grid.name)
        self.done.update(readers)
        inputs = [*inputs, *self._tables(written.grid, readers)]
        self._custom(kind, inputs, outputs, attributes | {"codes": labels}, name)

    def _readers(self, value: ir.Value) -> list[ir.Node]:
        """What reads `value`; of a function that tables compute, the quantizers after it."""
        readers: list[ir.Node] = []
        for use in value.uses():
            if use.node in self.replaced:
                readers += self._readers(use.node.outputs[0])
            else:
                readers.append(use.node)
        return list(dict.fromkeys(readers))

    def _table_readers(self, value: ir.Value) -> list[ir.Node]:
        """The marks that read `value`, through a function or not, and whose codes a table gives."""
        readers = []
        for node in self._readers(value):
            if not is_mark(node):
                continue
            function = self.functions.get(node)
            quantizer = self.model.quantizers.get(mark_name(node))
            reads_value = function is None or function.sources == {value}
            if quantizer is not None and _fits_table(quantizer) and reads_value:
                readers.append(node)
        return readers[:MOST_TABLES]

    def _tables(
        self, source: LoweredQuantizer, readers: Sequence[ir.Node]
    ) -> list[str]:
        """Name of the tensor (readers, 256) of the tables of marks that read codes on `source`, in a list; an empty one where
        there are none."""
        if not readers:
            return []
        names = []
        tables = []
        for reader in readers:
            grid = self.model.quantizers[mark_name(reader)]
            function = self.functions.get(reader)
            if function is None:
                names.append(self.writer.scales[grid.name])
                tables.append(requantizing_table(source, grid))
            else:
                names.append(f"f({self.writer.scales[grid.name]})")
                tables.append(function.table(grid))
        name = f"tables/{self.writer.scales[source.name]}>{'+'.join(names)}"
        return [self.writer.constant(name, np.stack(tables))]

    def _name_if_read(self, node: ir.Node) -> str:
        """A name for the codes that `node` gives, or none where tables serve all that read them."""
        value = node.outputs[0]
        served = self._table_readers(value)
        all_served = all(reader in served for reader in self._readers(value))
        if all_served and not value.is_graph_output():
            return ""
        return native_codes_of(mark_name(node) if is_mark(node) else value_name(value))

    def _parameters(self, layer: LoweredLayer) -> list[str]:
        """Names of a layer's scale, bias and weight, the last in planes."""
        assert layer.bias_codes is not None
        writer = self.writer
        inputs = [
            writer.constant(weight_scale_of(layer.name), layer.stored_scale),
            writer.constant(bias_of(layer.name), layer.bias_codes),
        ]
        if layer.bits == 8:
            return [*inputs, writer.constant(weight_of(layer.name), layer.codes)]
        for index, plane in enumerate(pack(layer.codes, layer.bits)):
            inputs.append(writer.constant(plane_of(layer.name, index), plane))
        return inputs

    def _layer_attributes(
        self, node: ir.Node, layer: LoweredLayer, source: LoweredQuantizer
    ) -> Attributes:
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        attributes: Attributes = {}
        if node.op_type == "Conv":
            height, width = layer.codes.shape[2:]
            attributes = _window(node, [height, width]) | {"groups": groups}
        on_one_bit = layer.bits == 1 and source.is_binary
        return attributes | {
            "layer": layer.name,
            "bits": layer.bits,
            "carry": layer.weight_multiplier,
            "channels_in": layer.codes.shape[1] * groups,
            "channels_out": layer.codes.shape[0],
            "x_scale": float(source.scale),
            "x_zero": source.zero_point,
            "x_high": source.high,
            "one_bit": int(on_one_bit and not _is_padded(node.inputs[0])),
        }

    def _sum_attributes(self, add: ir.Node, grid: LoweredQuantizer) -> Attributes:
        """What the definition of a sum computes with; operands in the node's order."""
        first, second = (
            self.model.quantizers[quantizer_of(value) or ""] for value in add.inputs
        )
        terms = terms_of_sum(first, second, grid)
        return {
            "ratio_first": float(terms.ratio_a),
            "ratio_second": float(terms.ratio_b),
            "offset": float(terms.constant),
            "sum_low": grid.low,
            "sum_high": grid.high,
        }

    def _mark(self, node: ir.Node) -> bool:
        """A quantizer of codes (a table), or of the images."""
        grid = self.model.quantizers[mark_name(node)]
        value = node.inputs[0]
        if node in self.functions:
            (value,) = self.functions[node].sources
        if _fits_table(grid) and self._translate_in_place(value, node):
            return True
        source = self._codes(value)
        result = NativeCodes(native_codes_of(grid.name), grid)
        if source is not None and _fits_table(grid):
            rank = len(_sizes(value))
            tables = self._tables(source.grid, [node])
            self._translate(
                source, result, tables, {"codes": [grid.name], "rank": rank}
            )
        elif _is_image(value) and not grid.is_binary:
            assert value is not None
            attributes = _written(grid) | {"codes": [grid.name]}
            self._custom("QImage", [value_name(value)], [result.tensor], attributes)
        else:
            return False
        self.native[value_name(node.outputs[0])] = result
        return True

    def _translate_in_place(self, value: ir.Value | None, mark: ir.Node) -> bool:
        """Put codes of four axes that lie as the net orders them through the table of `mark`, and leave them so."""
        if value is None or value_name(value) in self.native:
            return False
        ordinary = self.writer.codes_of(value)
        if ordinary is None or len(_sizes(value)) != 4:
            return False
        source = NativeCodes(*ordinary)
        grid = self.model.quantizers[mark_name(mark)]
        tables = self._tables(source.grid, [mark])
        self._translate(source, NativeCodes(grid.name, grid), tables, {})
        self.writer.codes[value_name(mark.outputs[0])] = (grid.name, grid)
        return True

    def _translate(
        self,
        source: NativeCodes,
        result: NativeCodes,
        tables: Sequence[str],
        attributes: Attributes,
    ) -> None:
        """A node that puts codes through a table."""
        inputs = [source.tensor, *tables]
        self._custom("QTables", inputs, [result.tensor], attributes)

    def _max_pool(self, node: ir.Node) -> bool:
        source = self._codes(node.inputs[0])
        size = _static_size(node.outputs[0])
        if source is None or size is None:
            return False
        attributes = _window(node) | _output_size(size)
        result = NativeCodes(self._name_if_read(node), source.grid)
        self._native(
            "QMaxPool", [source.tensor], [result], node, attributes, label=False
        )
        return True

    def _average_pool(self, node: ir.Node) -> bool:
        source = self._codes(node.inputs[0])
        size = _static_size(node.outputs[0])
        mark = self._quantizer_after(node)
        if source is None or size is None or mark is None:
            return False
        grid = self.model.quantizers[mark_name(mark)]
        attributes = _window(node) | _written(grid) | _output_size(size)
        attributes |= {
            "count_include_pad": int(is_set(node, "count_include_pad")),
            "x_scale": float(source.grid.scale),
            "x_zero": source.grid.zero_point,
        }
        self._to_codes("QAveragePool", [source.tensor], mark, attributes)
        return True

    def _global_pool(self, node: ir.Node) -> bool:
        source = self._codes(node.inputs[0])
        size = _static_size(node.inputs[0])
        mark = self._quantizer_after(node)
        if source is None or size is None or mark is None:
            return False
        grid = self.model.quantizers[mark_name(mark)]
        height, width = size
        multiplier = multiplier_of_mean(source.grid, height * width, grid)
        attributes = _written(grid) | {
            "x_zero": source.grid.zero_point,
            "multiplier": float(multiplier),
        }
        self._to_codes("QGlobalPool", [source.tensor], mark, attributes)
        return True

    def _add_codes(self, node: ir.Node) -> bool:
        mark = self._quantizer_after(node)
        if mark is None or _sizes(node.inputs[0]) != _sizes(node.inputs[1]):
            return False
        operands = [self._codes(value) for value in node.inputs]
        known = [operand for operand in operands if operand is not None]
        if len(known) < len(operands) or any(x.grid.is_binary for x in known):
            return False
        grid = self.model.quantizers[mark_name(mark)]
        attributes = _written(grid) | self._sum_attributes(node, grid)
        attributes["rank"] = len(_sizes(node.inputs[0]))
        tensors = [operand.tensor for operand in known]
        self._to_codes("QAdd", tensors, mark, attributes)
        return True

    def _multiply(self, node: ir.Node) -> bool:
        """A product of codes with codes, or with a constant for each channel."""
        return self._multiply_codes(node) or self._scale_channels(node)

    def _scale_channels(self, node: ir.Node) -> bool:
        """Codes times a constant for each channel, as a layer scale has them: what float32 operators would compute."""
        value, factor = node.inputs
        if constant(factor) is None:
            value, factor = factor, value
        return self._times_constants(node, value, factor, below_zero=False)

    def _parametric_relu(self, node: ir.Node) -> bool:
        """A PReLU with a slope for each channel. (One slope for all is a function of one code.)"""
        value, slope = node.inputs
        return self._times_constants(node, value, slope, below_zero=True)

    def _times_constants(
        self,
        node: ir.Node,
        value: ir.Value | None,
        factor: ir.Value | None,
        *,
        below_zero: bool,
    ) -> bool:
        mark = self._quantizer_after(node)
        if mark is None:
            return False
        gain = constant(factor)
        if gain is None or _sizes(value) != _sizes(node.outputs[0]):
            return False
        per_channel = _per_channel(np.asarray(gain, np.float32), _sizes(value))
        source = self._codes(value)
        if per_channel is None or source is None or source.grid.is_binary:
            return False
        grid = self.model.quantizers[mark_name(mark)]
        attributes = _written(grid) | {
            "x_scale": float(source.grid.scale),
            "x_zero": source.grid.zero_point,
            "below_zero": int(below_zero),
            "rank": len(_sizes(value)),
        }
        constants = self.writer.constant(f"{grid.name}/gain", per_channel)
        self._to_codes("QScale", [source.tensor, constants], mark, attributes)
        return True

    def _multiply_codes(self, node: ir.Node) -> bool:
        """A product of codes of one shape, or of codes and a gate that is spread over some of their axes."""
        mark = self._quantizer_after(node)
        if mark is None:
            return False
        first, second = node.inputs
        if _sizes(first) != _sizes(node.outputs[0]):
            first, second = second, first
        if not _is_spread(_sizes(second), _sizes(first)):
            return False
        operands = [self._codes(first), self._codes(second)]
        known = [operand for operand in operands if operand is not None]
        if len(known) < len(operands) or any(x.grid.is_binary for x in known):
            return False
        a, b = known
        grid = self.model.quantizers[mark_name(mark)]
        attributes = _written(grid) | {
            "a_zero": a.grid.zero_point,
            "b_zero": b.grid.zero_point,
            "ratio": float(ratio_of_product(a.grid, b.grid, grid)),
            "rank": len(_sizes(first)),
        }
        self._to_codes("QMul", [a.tensor, b.tensor], mark, attributes)
        return True

    def _to_codes(
        self, kind: str, inputs: Sequence[str], mark: ir.Node, attributes: Attributes
    ) -> None:
        """A node whose results the quantizer `mark` alone reads."""
        grid = self.model.quantizers[mark_name(mark)]
        result = NativeCodes(self._name_if_read(mark), grid)
        self._native(kind, inputs, [result], mark, attributes)
        self.done.add(mark)

    def _layer_norm(self, node: ir.Node) -> bool:
        """Over the last axis of codes as the net orders them: one node for each quantizer that reads the results."""
        norm = norm_on_codes(node, self.model)
        if norm is None:
            return False
        self._to_ordinary(norm.source)
        codes = self.writer.codes_of(norm.source)
        if codes is None:
            return False
        tensor, _ = codes
        for use in node.outputs[0].uses():
            self._normalize(tensor, norm, use.node)
        return True

    def _normalize(self, tensor: str, norm: LayerNorm, mark: ir.Node) -> None:
        grid = self.model.quantizers[mark_name(mark)]
        terms = terms_of_norm(norm.gain, norm.shift, norm.epsilon, norm.grid, grid)
        gain = self.writer.constant(f"{grid.name}/gain", terms.gain)
        shift = self.writer.constant(f"{grid.name}/shift", terms.shift)
        attributes = _written(grid) | {"epsilon": float(terms.epsilon)}
        self._custom("QLayerNorm", [tensor, gain, shift], [grid.name], attributes)
        self.writer.codes[value_name(mark.outputs[0])] = (grid.name, grid)
        self.done.add(mark)

    def _softmax(self, node: ir.Node) -> bool:
        """Over the last axis of floats: one node for each quantizer that reads the results."""
        if not is_softmax_to_codes(node, self.model):
            return False
        self._to_ordinary(node.inputs[0])
        scores = self.writer.float_of(node.inputs[0])
        for use in node.outputs[0].uses():
            mark = use.node
            grid = self.model.quantizers[mark_name(mark)]
            self._custom("QSoftmax", [scores], [grid.name], _written(grid))
            self.writer.codes[value_name(mark.outputs[0])] = (grid.name, grid)
            self.done.add(mark)
        return True

    def _transpose(self, node: ir.Node) -> bool:
        """Nothing to do where a net reads images channels last, or goes on with such: native codes lie like that."""
        source, result = node.inputs[0], node.outputs[0]
        if source is None:
            return False
        order = tuple(node.attributes["perm"].as_ints())
        if order == TO_NHWC and value_name(source) in self.native:
            codes, grid = self.native[value_name(source)]
            self.writer.codes[value_name(result)] = (codes, grid)
            return True
        ordinary = self.writer.codes_of(source)
        if order == TO_NCHW and ordinary is not None:
            tensor, grid = ordinary
            self.native[value_name(result)] = NativeCodes(tensor, grid)
            return True
        self._to_ordinary(source)
        ordinary = self.writer.codes_of(source)
        if ordinary is None or len(order) > MOST_AXES:
            return False
        tensor, grid = ordinary
        self.writer.codes[value_name(result)] = (self._in_order(tensor, order), grid)
        return True

    def _in_order(self, tensor: str, order: tuple[int, ...]) -> str:
        """Name of the codes `tensor` with their axes in another order."""
        if tensor in self.moved:
            tensor, before = self.moved[tensor]
            order = tuple(before[axis] for axis in order)
        if order == tuple(sorted(order)):
            return tensor
        result = self.writer.fresh()
        digits = "".join(str(axis) for axis in order)
        self._custom("QTranspose", [tensor], [result], {"order": digits})
        self.moved[result] = (tensor, order)
        return result

    def _concat(self, node: ir.Node) -> bool:
        """Along the channels: every part goes through a table onto the result's grid."""
        mark = self._quantizer_after(node)
        along_channels = node.attributes["axis"].as_int() == 1
        if mark is None or not along_channels or len(_sizes(node.inputs[0])) != 4:
            return False
        parts = [self._codes(value) for value in node.inputs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return False
        grid = self.model.quantizers[mark_name(mark)]
        joined = []
        for part in known:
            result = NativeCodes(self.writer.fresh(), grid)
            source_name = self.writer.scales[part.grid.name]
            name = f"tables/{source_name}>{self.writer.scales[grid.name]}"
            table = requantizing_table(part.grid, grid)
            tables = [self.writer.constant(name, table[np.newaxis])]
            self._translate(part, result, tables, {"codes": [""], "rank": 4})
            joined.append(result.tensor)
        name = native_codes_of(grid.name)
        self.writer.nodes.append(helper.make_node("Concat", joined, [name], axis=3))
        self.native[value_name(mark.outputs[0])] = NativeCodes(name, grid)
        self.done.add(mark)
        return True

    def _flat(self, node: ir.Node) -> bool:
        """Codes of one pixel are the same in both layouts, and so are their rows."""
        is_one_pixel = _sizes(node.inputs[0])[2:] == [1, 1]
        gives_rows = len(_sizes(node.outputs[0])) == 2
        if not is_one_pixel or not gives_rows:
            return False
        source = self._codes(node.inputs[0])
        if source is None:
            return False
        output = native_codes_of(value_name(node.outputs[0]))
        inputs = [source.tensor]
        for value in node.inputs[1:]:
            inputs.append(self.writer.float_of(value))
        self.writer.copy(node, inputs, [output])
        self.native[value_name(node.outputs[0])] = NativeCodes(output, source.grid)
        return True

    def _quantizer_after(self, node: ir.Node) -> ir.Node | None:
        """The mark of a quantizer of more than one bit that alone reads the result of `node`, if one does."""
        reader = only_reader(node.outputs[0])
        if reader is None or not is_mark(reader):
            return None
        is_binary = self.model.quantizers[mark_name(reader)].is_binary
        return None if is_binary else reader

    def _codes(self, value: ir.Value | None) -> NativeCodes | None:
        """The codes of `value` as native operators read them, with a QTranspose if an ordinary one wrote them."""
        if value is None:
            return None
        name = value_name(value)
        ordinary = self.writer.codes_of(value)
        if name not in self.native and ordinary is not None:
            tensor, grid = ordinary
            if len(_sizes(value)) == 4:
                tensor = self._in_order(tensor, TO_NHWC)
            self.native[name] = NativeCodes(tensor, grid)
        return self.native.get(name)

    def _to_ordinary(self, value: ir.Value | None) -> None:
        """Make codes that a native operator wrote readable for an ordinary one."""
        if value is None or self.writer.codes_of(value) is not None:
            return
        name = value_name(value)
        if name not in self.native:
            return
        tensor, grid = self.native[name]
        if len(_sizes(value)) == 4:
            tensor = self._in_order(tensor, TO_NCHW)
        self.writer.codes[name] = (tensor, grid)

    def _custom(
        self,
        kind: str,
        inputs: Iterable[str],
        outputs: Sequence[str],
        attributes: Attributes,
        name: str = "",
    ) -> None:
        made = helper.make_node(
            kind, list(inputs), list(outputs), name=name, domain=DOMAIN
        )
        for key, value in attributes.items():
            made.attribute.append(helper.make_attribute(key, value))
        self.writer.nodes.append(made)


def _functions_in_tables(model: LoweredModel) -> dict[ir.Node, CodeFunction]:
    """The functions of one code that tables compute, by the mark after them.

    Not those with a result so near a tie that a runtime may compute another code than the table holds: the grid's scale is a
    power of two then, and stays where it is.
    """
    found: dict[ir.Node, CodeFunction] = {}
    for node in model.skeleton.graph:
        if not is_mark(node) or mark_name(node) not in model.quantizers:
            continue
        grid = model.quantizers[mark_name(node)]
        function = None if grid.is_binary else function_before(node, model)
        if function is None or not function.keeps_places:
            continue
        (source,) = function.sources
        same_shape = _sizes(node.inputs[0]) == _sizes(source)
        if same_shape and tried_function(function).ties(grid) == 0:
            found[node] = function
    return found


def _only_for(
    functions: Mapping[ir.Node, CodeFunction], graph: ir.Graph
) -> set[ir.Node]:
    """The nodes that compute `functions` and nothing else."""
    parts = {node for function in functions.values() for node in function.nodes}
    replaced: set[ir.Node] = set()
    for node in reversed(graph):
        result = node.outputs[0]
        if node not in parts or result.is_graph_output():
            continue
        readers = {use.node for use in result.uses()}
        if readers <= replaced | functions.keys():
            replaced.add(node)
    return replaced


def _fits_table(quantizer: LoweredQuantizer) -> bool:
    """Whether the quantizer gives one code for each code it reads, whatever the channel."""
    return len(quantizer.thresholds) <= 1


def _written(grid: LoweredQuantizer) -> Attributes:
    """How a node writes codes on `grid`."""
    range_of_codes: Attributes = {"y_low": grid.low, "y_high": grid.high}
    if grid.is_binary:  # the sign of a sum: export/kernels/op_layer.cpp
        in_one_bit: Attributes = {
            "threshold": 1,
            "y_scale": 1.0,
            "y_zero": WRITE_ZERO_POINT,
        }
        return in_one_bit | range_of_codes
    rounded: Attributes = {
        "threshold": 0,
        "y_scale": float(grid.scale),
        "y_zero": grid.zero_point,
    }
    return rounded | range_of_codes


def _no_sum() -> Attributes:
    """The attributes of a residual sum for a layer without one."""
    return {
        "other_first": 0,
        "ratio_first": 0.0,
        "ratio_second": 0.0,
        "offset": 0.0,
        "sum_low": 0,
        "sum_high": 255,
    }


def _window(node: ir.Node, kernel: list[int] | None = None) -> Attributes:
    """Where a convolution or pool looks; kernel: height and width, the node's own where None."""
    if kernel is None:
        kernel = list(node.attributes["kernel_shape"].as_ints())
    stride = ints_of(node, "strides", [1, 1])
    dilation = ints_of(node, "dilations", [1, 1])
    top, left, bottom, right = ints_of(node, "pads", [0, 0, 0, 0])
    return {
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "stride_h": stride[0],
        "stride_w": stride[1],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "pad_top": top,
        "pad_left": left,
        "pad_bottom": bottom,
        "pad_right": right,
    }


def _output_size(size: tuple[int, int]) -> Attributes:
    height, width = size
    return {"out_h": height, "out_w": width}


def _sizes(value: ir.Value | None) -> list[object]:
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else str(size) for size in value.shape]


def _per_channel(
    gain: NDArray[np.float32], sizes: Sequence[object]
) -> NDArray[np.float32] | None:
    """The constant for each channel of codes of these `sizes`, (C,), where `gain` has one for each; axis 1 of images is the
    channels', and the last axis of anything else."""
    axis = 1 if len(sizes) == 4 else len(sizes) - 1
    missing = len(sizes) - gain.ndim
    if missing < 0 or not np.isfinite(gain).all():
        return None
    shape = [1] * missing + list(gain.shape)
    channels = sizes[axis]
    expected: list[object] = [1] * len(sizes)
    expected[axis] = channels
    if shape != expected or not isinstance(channels, int):
        return None
    return gain.reshape(channels)


def _is_spread(sizes: Sequence[object], over: Sequence[object]) -> bool:
    """Whether a tensor of `sizes` is, or is repeated to, one of the sizes `over`, of at most four axes as it has itself."""
    if len(sizes) != len(over) or len(over) > 4:
        return False
    pairs = zip(sizes, over, strict=True)
    return all(size in (1, whole) for size, whole in pairs)


def _static_size(value: ir.Value | None) -> tuple[int, int] | None:
    """Height and width of images, None where they are not fixed, or `value` holds no images."""
    sizes = _sizes(value)
    if len(sizes) != 4:
        return None
    height, width = sizes[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return height, width


def _is_image(value: ir.Value | None) -> bool:
    """Whether `value` is an input N_C_H_W of the graph."""
    return value is not None and value.is_graph_input() and len(_sizes(value)) == 4


def _is_padded(value: ir.Value | None) -> bool:
    """Whether a Pad stands between `value` and its quantizer: its zeros are no one-bit codes."""
    node = value.producer() if value is not None else None
    while node is not None and not is_mark(node):
        if node.op_type == "Pad":
            return True
        first = node.inputs[0] if node.inputs else None
        node = first.producer() if first is not None else None
    return False
