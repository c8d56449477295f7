"""Canonical `LoweredModel` -> ONNX with the operators of `export/kernels` where they exist, and ordinary QDQ elsewhere.

Codes stay in N_H_W_C between native operators; a Transpose stands only where an ordinary operator reads or writes them. A
layer, the residual sum that follows it and every quantizer that reads the result are one node, whose outputs are

    own codes | codes of the sum | codes of each reader's quantizer, through a table of 256 bytes

Outputs that nobody reads have no name and are not written; the attribute `codes` says which quantizer each one is, so that
`export/native_file.py` can name and show it.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper

from export.arithmetic import constant_of_sum
from export.graph import Emitter, emit_qdq, value_name
from export.lowered import DOMAIN, LoweredLayer, LoweredModel, LoweredQuantizer
from export.packing import pack
from export.qdq import QdqEmitter
from export.skeleton import grid_of, is_mark, mark_name, only_reader, weight_layer
from export.targets import Target
from export.thresholds import WRITE_ZERO_POINT, code_thresholds

MOST_TABLES = 4
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
Attribute = int | float | str | list[str]


def emit(model: LoweredModel, target: Target) -> onnx.ModelProto:
    """The file of a canonical `model` for any target. Raises ExportError naming a layer the target cannot run."""
    if target.native:
        return NativeEmitter(model, target).emit()
    if target.qdq:
        return QdqEmitter(model, target).emit()
    return emit_qdq(model, target)


def requantizing_table(
    source: LoweredQuantizer, target: LoweredQuantizer
) -> NDArray[np.uint8]:
    """uint8 (256,): the code on `target` of every code on `source`, as export/reference.py defines it."""
    codes = np.arange(256)
    if target.is_binary:
        return np.where(
            codes >= int(code_thresholds(source, target)), target.high, target.low
        ).astype(np.uint8)
    real = (codes - source.zero_point).astype(np.float32) * source.scale
    return np.clip(
        np.rint(real / target.scale) + target.zero_point, target.low, target.high
    ).astype(np.uint8)


class NativeEmitter(Emitter):
    """Emits nodes in the skeleton's order; what a native node computed ahead is in `done`."""

    def __init__(self, model: LoweredModel, target: Target) -> None:
        super().__init__(model, target)
        # Skeleton value -> (codes N_H_W_C or N_C, grid)
        self.native: dict[str, tuple[str, LoweredQuantizer]] = {}
        self.done: set[ir.Node] = set()
        self.opsets.append(helper.make_opsetid(DOMAIN, 1))
        self.handlers: dict[str, Callable[[ir.Node], bool]] = {
            "Conv": self._layer, "Gemm": self._layer, "MaxPool": self._max_pool, "AveragePool": self._average_pool,
            "GlobalAveragePool": self._global_pool, "Add": self._add_codes, "Concat": self._concat,
            "Reshape": self._flat, "Flatten": self._flat,
        }  # fmt: skip

    def _emit(self, node: ir.Node) -> None:
        if node in self.done:
            return
        if is_mark(node):
            if mark_name(node) not in self.model.quantizers or self._mark(node):
                return
        elif (
            node.domain == ""
            and node.op_type in self.handlers
            and self.handlers[node.op_type](node)
        ):
            return
        for value in node.inputs:
            self._to_ordinary(value)
        super()._emit(node)

    def _layer(self, node: ir.Node) -> bool:
        """Conv or Gemm on codes with everything that follows it."""
        layer, reader = weight_layer(node, self.model), only_reader(node.outputs[0])
        source = self._codes(node.inputs[0])
        if (
            layer is None
            or source is None
            or len(_sizes(node.inputs[0])) != (2 if node.op_type == "Gemm" else 4)
        ):
            return False
        kind = "Q" + node.op_type
        attributes = self._layer_attributes(node, layer, source[1])
        inputs = [source[0], *self._parameters(layer)]
        if reader is None or not is_mark(reader):
            self._real_output(node, kind + "Float", inputs, attributes, layer.name)
            return True
        own = self.model.quantizers[mark_name(reader)]
        other = self._summand(reader)
        last, quantizers = reader, [own]
        attributes |= _written(own) | _no_sum()
        if other is not None:
            add = only_reader(reader.outputs[0])
            assert add is not None
            last = next(iter(add.outputs[0].uses())).node
            quantizers.append(self.model.quantizers[mark_name(last)])
            attributes |= self._sum_attributes(add, quantizers[-1]) | {
                "other_first": int(add.inputs[0] is other)
            }
            self.done.update((add, last))
        self.done.add(reader)
        codes_of_other = None if other is None else self._codes(other)
        inputs += [""] * (6 - len(inputs))
        inputs.append("" if codes_of_other is None else codes_of_other[0])
        names = (
            ["", self._name_if_read(last)]
            if other is not None
            else [self._name_if_read(last), ""]
        )
        self._native(kind, inputs, names, quantizers, last, attributes, layer.name)
        return True

    def _summand(self, mark: ir.Node) -> ir.Value | None:
        """The other operand of the residual sum that alone reads `mark`, if its codes are there already."""
        add = only_reader(mark.outputs[0])
        if (
            add is None
            or add.op_type != "Add"
            or self.model.quantizers[mark_name(mark)].is_binary
        ):
            return None
        others = [v for v in add.inputs if v is not None and v is not mark.outputs[0]]
        if (
            len(others) != 1
            or self._codes(others[0]) is None
            or _sizes(others[0]) != _sizes(mark.outputs[0])
        ):
            return None
        end = only_reader(add.outputs[0])
        if (
            end is None
            or not is_mark(end)
            or self.model.quantizers[mark_name(end)].is_binary
        ):
            return None
        return others[0]

    def _native(
        self,
        kind: str,
        inputs: Sequence[str],
        names: Sequence[str],
        quantizers: Sequence[LoweredQuantizer],
        last: ir.Node,
        attributes: dict[str, Attribute],
        name: str = "",
        label: bool = True,
    ) -> None:
        """A node whose codes `last` (a mark, or a max pool) ends, with tables for the quantizers that read them.

        names: of its outputs before the tables; quantizers: theirs, the last one that of the tables' input. label: whether
        those outputs are the quantizers' own codes (a max pool's are not).
        """
        readers = self._table_readers(last.outputs[0])
        grids = [self.model.quantizers[mark_name(r)] for r in readers]
        outputs = [*names, *(f"@{g.name}" for g in grids)]
        labels = [q.name if label else "" for q in quantizers] + [""] * (
            len(names) - len(quantizers)
        )
        labels += [g.name for g in grids]
        inputs = [*inputs, *self._tables(quantizers[-1], grids)]
        self._custom(kind, inputs, outputs, attributes | {"codes": labels}, name)
        if tensor := names[len(quantizers) - 1]:
            self.native[value_name(last.outputs[0])] = (tensor, quantizers[-1])
        for reader, grid in zip(readers, grids, strict=True):
            self.native[value_name(reader.outputs[0])] = (f"@{grid.name}", grid)
        self.done.update(readers)

    def _table_readers(self, value: ir.Value) -> list[ir.Node]:
        marks = [use.node for use in value.uses() if is_mark(use.node)]
        known = [
            m
            for m in marks
            if (q := self.model.quantizers.get(mark_name(m))) and len(q.thresholds) <= 1
        ]
        return known[:MOST_TABLES]

    def _tables(
        self, source: LoweredQuantizer, grids: Sequence[LoweredQuantizer]
    ) -> list[str]:
        if not grids:
            return []
        name = (
            "tables/"
            + self.scales[source.name]
            + ">"
            + "+".join(self.scales[g.name] for g in grids)
        )
        return [
            self._constant(
                name, np.stack([requantizing_table(source, g) for g in grids])
            )
        ]

    def _name_if_read(self, mark: ir.Node) -> str:
        """A name for the codes of `mark`, or none where tables serve all that read them."""
        value = mark.outputs[0]
        served = self._table_readers(value)
        if (
            all(use.node in served for use in value.uses())
            and not value.is_graph_output()
        ):
            return ""
        return f"@{mark_name(mark)}" if is_mark(mark) else f"@{value_name(value)}"

    def _parameters(self, layer: LoweredLayer) -> list[str]:
        assert layer.bias_codes is not None
        weight = f"{layer.name}.weight"
        inputs = [
            self._constant(f"{weight}/s", layer.stored_scale),
            self._constant(f"{layer.name}.bias", layer.bias_codes),
        ]
        if layer.bits == 8:
            return [*inputs, self._constant(weight, layer.codes)]
        planes = pack(layer.codes, layer.bits)
        return [
            *inputs,
            *(
                self._constant(f"{weight}/p{i}", plane)
                for i, plane in enumerate(planes)
            ),
        ]

    def _layer_attributes(
        self, node: ir.Node, layer: LoweredLayer, source: LoweredQuantizer
    ) -> dict[str, Attribute]:
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        window = (
            _window(node, layer.codes.shape[2:]) | {"groups": groups}
            if node.op_type == "Conv"
            else {}
        )
        return window | {
            "layer": layer.name, "bits": layer.bits, "carry": layer.weight_multiplier,
            "channels_in": layer.codes.shape[1] * groups,
            "channels_out": layer.codes.shape[0], "x_scale": float(source.scale), "x_zero": source.zero_point,
            "x_high": source.high, "one_bit": int(layer.bits == 1 and source.is_binary and not _is_padded(node.inputs[0])),
        }  # fmt: skip

    def _sum_attributes(
        self, add: ir.Node, grid: LoweredQuantizer
    ) -> dict[str, Attribute]:
        """See `_fused_sum` in export/reference.py; operands in the node's order."""
        one = np.float32
        a, b = (self.model.quantizers[grid_of(v) or ""] for v in add.inputs)
        ratio_a, ratio_b = one(a.scale / grid.scale), one(b.scale / grid.scale)
        offset = constant_of_sum(ratio_a, ratio_b, a, b, grid)
        return {
            "ratio_first": float(ratio_a), "ratio_second": float(ratio_b), "offset": float(offset),
            "sum_low": grid.low, "sum_high": grid.high,
        }  # fmt: skip

    def _real_output(
        self,
        node: ir.Node,
        kind: str,
        inputs: Sequence[str],
        attributes: dict[str, Attribute],
        name: str,
    ) -> None:
        output = value_name(node.outputs[0])
        if node.op_type == "Gemm":
            self._custom(kind, inputs, [output], attributes, name)
            return
        self._custom(kind, inputs, [f"@{output}"], attributes, name)
        self._add("Transpose", [f"@{output}"], output, perm=TO_NCHW)

    def _mark(self, node: ir.Node) -> bool:
        """A quantizer of codes (a table), or of the images."""
        grid = self.model.quantizers[mark_name(node)]
        source = self._codes(node.inputs[0])
        if source is not None and len(grid.thresholds) <= 1:
            rank = len(_sizes(node.inputs[0]))
            name = f"@{grid.name}"
            table = self._tables(source[1], [grid])
            self._custom(
                "QTables",
                [source[0], *table],
                [name],
                {"codes": [grid.name], "rank": rank},
            )
            self.native[value_name(node.outputs[0])] = (name, grid)
            return True
        image = node.inputs[0]
        if (
            image is None
            or not image.is_graph_input()
            or len(_sizes(image)) != 4
            or grid.is_binary
        ):
            return False
        self._custom(
            "QImage",
            [value_name(image)],
            [f"@{grid.name}"],
            _written(grid) | {"codes": [grid.name]},
        )
        self.native[value_name(node.outputs[0])] = (f"@{grid.name}", grid)
        return True

    def _max_pool(self, node: ir.Node) -> bool:
        source, size = self._codes(node.inputs[0]), _static_size(node.outputs[0])
        if source is None or size is None:
            return False
        attributes = _window(node) | {"out_h": size[0], "out_w": size[1]}
        self._native(
            "QMaxPool",
            [source[0]],
            [self._name_if_read(node)],
            [source[1]],
            node,
            attributes,
            label=False,
        )
        return True

    def _average_pool(self, node: ir.Node) -> bool:
        source, size, reader = (
            self._codes(node.inputs[0]),
            _static_size(node.outputs[0]),
            only_reader(node.outputs[0]),
        )
        if (
            source is None
            or size is None
            or not self._ends_in_codes(reader)
            or reader is None
        ):
            return False
        grid = self.model.quantizers[mark_name(reader)]
        counts = (
            "count_include_pad" in node.attributes
            and node.attributes["count_include_pad"].as_int() == 1
        )
        attributes = _window(node) | _written(grid) | {
            "out_h": size[0], "out_w": size[1], "count_include_pad": int(counts),
            "x_scale": float(source[1].scale), "x_zero": source[1].zero_point,
        }  # fmt: skip
        self._native(
            "QAveragePool",
            [source[0]],
            [self._name_if_read(reader)],
            [grid],
            reader,
            attributes,
        )
        self.done.add(reader)
        return True

    def _global_pool(self, node: ir.Node) -> bool:
        source, size, reader = (
            self._codes(node.inputs[0]),
            _static_size(node.inputs[0]),
            only_reader(node.outputs[0]),
        )
        if (
            source is None
            or size is None
            or not self._ends_in_codes(reader)
            or reader is None
        ):
            return False
        grid = self.model.quantizers[mark_name(reader)]
        # float32 throughout, as the definition has it
        multiplier = source[1].scale / (grid.scale * np.float32(size[0] * size[1]))
        attributes = _written(grid) | {
            "x_zero": source[1].zero_point,
            "multiplier": float(multiplier),
        }
        self._native(
            "QGlobalPool",
            [source[0]],
            [self._name_if_read(reader)],
            [grid],
            reader,
            attributes,
        )
        self.done.add(reader)
        return True

    def _add_codes(self, node: ir.Node) -> bool:
        reader = only_reader(node.outputs[0])
        operands = [self._codes(v) for v in node.inputs]
        if None in operands or not self._ends_in_codes(reader) or reader is None:
            return False
        if _sizes(node.inputs[0]) != _sizes(node.inputs[1]) or any(
            grid.is_binary for _, grid in filter(None, operands)
        ):
            return False
        grid = self.model.quantizers[mark_name(reader)]
        attributes = (
            _written(grid)
            | self._sum_attributes(node, grid)
            | {"rank": len(_sizes(node.inputs[0]))}
        )
        tensors = [operand[0] for operand in operands if operand is not None]
        self._native(
            "QAdd", tensors, [self._name_if_read(reader)], [grid], reader, attributes
        )
        self.done.add(reader)
        return True

    def _concat(self, node: ir.Node) -> bool:
        """Along the channels: every part goes through a table onto the result's grid."""
        reader = only_reader(node.outputs[0])
        parts = [self._codes(v) for v in node.inputs]
        axis = node.attributes["axis"].as_int()
        if (
            None in parts
            or not self._ends_in_codes(reader)
            or reader is None
            or len(_sizes(node.inputs[0])) != 4
            or axis != 1
        ):
            return False
        grid = self.model.quantizers[mark_name(reader)]
        joined = []
        for tensor, source in filter(None, parts):
            joined.append(self._fresh())
            self._custom(
                "QTables",
                [tensor, *self._tables(source, [grid])],
                joined[-1:],
                {"codes": [""], "rank": 4},
            )
        name = f"@{grid.name}"
        self.nodes.append(helper.make_node("Concat", joined, [name], axis=3))
        self.native[value_name(reader.outputs[0])] = (name, grid)
        self.done.add(reader)
        return True

    def _flat(self, node: ir.Node) -> bool:
        """Codes of one pixel are the same in both layouts, and so are their rows."""
        source, sizes = self._codes(node.inputs[0]), _sizes(node.inputs[0])
        if source is None or sizes[2:] != [1, 1] or len(_sizes(node.outputs[0])) != 2:
            return False
        output = f"@{value_name(node.outputs[0])}"
        self._copy(
            node, [source[0], *(self._float(v) for v in node.inputs[1:])], [output]
        )
        self.native[value_name(node.outputs[0])] = (output, source[1])
        return True

    def _ends_in_codes(self, reader: ir.Node | None) -> bool:
        """Whether `reader` is an activation quantizer of more than one bit."""
        return (
            reader is not None
            and is_mark(reader)
            and not self.model.quantizers[mark_name(reader)].is_binary
        )

    def _codes(self, value: ir.Value | None) -> tuple[str, LoweredQuantizer] | None:
        """The codes of `value` as native operators read them, with a Transpose if an ordinary one wrote them."""
        if value is None:
            return None
        name = value_name(value)
        if name not in self.native and name in self.codes:
            tensor, grid = self.codes[name]
            if len(_sizes(value)) == 4:
                tensor = self._add("Transpose", [tensor], f"@{name}", perm=TO_NHWC)
            self.native[name] = (tensor, grid)
        return self.native.get(name)

    def _to_ordinary(self, value: ir.Value | None) -> None:
        """Make codes that a native operator wrote readable for an ordinary one."""
        if (
            value is None
            or value_name(value) in self.codes
            or value_name(value) not in self.native
        ):
            return
        tensor, grid = self.native[value_name(value)]
        if len(_sizes(value)) == 4:
            tensor = self._add("Transpose", [tensor], perm=TO_NCHW)
        self.codes[value_name(value)] = (tensor, grid)

    def _graph_output(self, value: ir.Value) -> onnx.ValueInfoProto:
        self._to_ordinary(value)
        return super()._graph_output(value)

    def _custom(
        self,
        kind: str,
        inputs: Iterable[str],
        outputs: Sequence[str],
        attributes: dict[str, Attribute],
        name: str = "",
    ) -> None:
        made = helper.make_node(
            kind, list(inputs), list(outputs), name=name, domain=DOMAIN
        )
        made.attribute.extend(
            helper.make_attribute(key, value) for key, value in attributes.items()
        )
        self.nodes.append(made)


def _written(grid: LoweredQuantizer) -> dict[str, Attribute]:
    if grid.is_binary:  # the sign of a sum: export/kernels/op_layer.cpp
        return {
            "threshold": 1,
            "y_scale": 1.0,
            "y_zero": WRITE_ZERO_POINT,
            "y_low": grid.low,
            "y_high": grid.high,
        }
    scale, zero_point = float(grid.scale), grid.zero_point
    return {
        "threshold": 0,
        "y_scale": scale,
        "y_zero": zero_point,
        "y_low": grid.low,
        "y_high": grid.high,
    }


def _no_sum() -> dict[str, Attribute]:
    return {
        "other_first": 0, "ratio_first": 0.0, "ratio_second": 0.0, "offset": 0.0, "sum_low": 0, "sum_high": 255,
    }  # fmt: skip


def _window(
    node: ir.Node, kernel: tuple[int, ...] | None = None
) -> dict[str, Attribute]:
    get = {
        name: list(a.as_ints())
        for name, a in node.attributes.items()
        if a.type == ir.AttributeType.INTS
    }
    kernel = tuple(get["kernel_shape"]) if kernel is None else kernel
    strides, dilations, pads = (
        get.get("strides", [1, 1]),
        get.get("dilations", [1, 1]),
        get.get("pads", [0, 0, 0, 0]),
    )
    pairs = {"kernel": kernel, "stride": strides, "dilation": dilations}
    found: dict[str, Attribute] = {
        f"{k}_{axis}": v[i] for k, v in pairs.items() for i, axis in enumerate("hw")
    }
    return found | {
        f"pad_{side}": pads[i]
        for i, side in enumerate(("top", "left", "bottom", "right"))
    }


def _sizes(value: ir.Value | None) -> list[object]:
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else str(d) for d in value.shape]


def _static_size(value: ir.Value | None) -> tuple[int, int] | None:
    sizes = _sizes(value)
    if (
        len(sizes) != 4
        or not isinstance(sizes[2], int)
        or not isinstance(sizes[3], int)
    ):
        return None
    return sizes[2], sizes[3]


def _is_padded(value: ir.Value | None) -> bool:
    """Whether a Pad stands between `value` and its quantizer: its zeros are no one-bit codes."""
    node = value.producer() if value is not None else None
    while node is not None and not is_mark(node):
        if node.op_type == "Pad":
            return True
        node = (
            node.inputs[0].producer()
            if node.inputs and node.inputs[0] is not None
            else None
        )
    return False
