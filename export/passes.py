"""Passes over the skeleton: each does one thing and returns whether it changed anything.

After `to_integers` the skeleton is *canonical*: every quantized Conv or Gemm reads codes and a marked weight, every value
that is quantized is marked right where an integer kernel ends, batch norms and clip activations live in the layers'
scale and bias and in the quantizers' bounds, and no scale leaves a result to the runtime's way of rounding.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowered import BIAS_PARAMETER, ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.rounding import NEGLIGIBLE_CODES, largest_results, largest_sums
from export.skeleton import (
    CODE_OPS,
    LAYOUT_OPS,
    constant,
    fill_of,
    grid_of,
    is_mark,
    mark_name,
    moves_codes,
    only_reader,
    weight_layer,
    written_by,
)  # fmt: skip
from export.targets import SUM_LIMIT, TARGETS, Target, check_quantizer, weight_multiplier_of
from export.thresholds import with_threshold_bias
from export.ties import avoid_ties

# A channel that writes floats is reduced to its bias where 32 bits cannot hold both and the largest sum is at most so much:
NEGLIGIBLE_SHARE = 2.0**-20  # of its bias, where floats are written


def to_integers(model: LoweredModel, target: Target = TARGETS["ort-int8"]) -> LoweredModel:
    """Run all passes in place and return the canonical model for `target`.

    Raises ExportError naming what cannot run on integers.
    """
    once: list[Callable[[LoweredModel], bool]] = [
        gemms_from_matmuls,
        gemms_from_classifiers,
        fold_batch_norms,
        pools_from_means,
        plain_average_pools,
    ]
    for apply in once:
        apply(model)
    for apply in (hoist_marks, absorb_clips, hoist_marks):
        while apply(model):
            pass
    cut_weights_off(model)
    remove_dead_nodes(model)
    for quantizer in model.quantizers.values():
        check_quantizer(target, quantizer)
    avoid_ties(model, may_move=not target.keeps_scales)
    resolve_biases(model, target)
    if target.qdq:
        float_biases(model)
        positive_scales(model, target)
    return model


def fold_batch_norms(model: LoweredModel) -> bool:
    """BatchNorm after a quantized layer: y = (x·W + b - mean)·a + beta with a = gamma / sqrt(var + eps), in float64.

    The codes stay; a goes, sign included, into the layer's scale.
    """
    changed = False
    for node in list(model.skeleton.graph):
        source = node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
        layer = weight_layer(source, model) if source is not None else None
        if source is None or layer is None or only_reader(source.outputs[0]) is not node:
            continue
        gamma, beta, mean, variance = (np.asarray(constant(v), np.float64) for v in node.inputs[1:5])
        epsilon = node.attributes["epsilon"].as_float()
        a = gamma / np.sqrt(variance + epsilon)
        bias = layer.folded_bias - mean
        scale = (layer.scale.astype(np.float64) * a).astype(np.float32)
        model.layers[f"{layer.name}.weight"] = replace(
            layer, scale=scale, bias=bias * a + beta, bias_parameter=node.meta.get(BIAS_PARAMETER, "")
        )
        _bypass(node)
        changed = True
    return changed


def gemms_from_matmuls(model: LoweredModel) -> bool:
    """A linear layer on more than two axes, MatMul(x, Wᵀ) [+ b], becomes Reshape, Gemm, Reshape: only Gemm takes an integer
    bias, and reshaping codes is free."""
    changed = False
    for node in list(model.skeleton.graph):
        mark = _turned_weight(node)
        if mark is None or mark_name(mark) not in model.layers:  # the latter: a product of two activations
            continue
        _make_gemm(model, node, mark)
        changed = True
    return changed


def _turned_weight(node: ir.Node) -> ir.Node | None:
    """The mark whose transpose the MatMul `node` multiplies by."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    mark = transpose.inputs[0].producer()
    return mark if is_mark(mark) else None


def _make_gemm(model: LoweredModel, node: ir.Node, mark: ir.Node) -> None:
    graph, layer = model.skeleton.graph, model.layers[mark_name(mark)]
    width = layer.codes.shape[1]
    add = _added_constant(node, len(layer.scale))
    last = node if add is None else add
    name = last.outputs[0].name
    shape_in = _new_constant(graph, f"{name}/shape_in", np.array([-1, width], np.int64))
    shape_out = _new_constant(graph, f"{name}/shape_out", np.array(_open_shape(last, layer.name), np.int64))
    flat = ir.node("Reshape", [node.inputs[0], shape_in], name=f"{name}/flatten")
    flat.outputs[0].name, flat.outputs[0].shape = f"{name}/flat", ir.Shape([None, width])
    operands = [flat.outputs[0], mark.outputs[0]]
    if add is not None:
        bias = next(value for value in add.inputs if value is not None and constant(value) is not None)
        operands.append(bias)
        model.layers[mark_name(mark)] = replace(layer, bias=np.asarray(constant(bias), np.float64))
    elif layer.bias is not None:  # the graph computes it, and adds it after the product
        model.layers[mark_name(mark)] = replace(layer, bias=None, bias_parameter="")
    gemm = ir.node("Gemm", operands, attributes={"transB": 1}, name=layer.name)
    gemm.outputs[0].name = f"{name}/gemm"
    restored = ir.node("Reshape", [gemm.outputs[0], shape_out], name=f"{name}/restore")
    _replace(last, [flat, gemm, restored])
    if add is not None:
        graph.remove(node, safe=True)


def _open_shape(node: ir.Node, layer: str) -> list[int]:
    """Shape of the result with -1 for the batch, wherever that is. Raises ExportError for more than one open axis."""
    shape = node.outputs[0].shape
    if shape is None or sum(not isinstance(size, int) for size in shape) > 1:
        raise ExportError(f"layer {layer!r}: its output has several dynamic axes; only the batch may be dynamic")
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if -1 in sizes else [-1, *sizes[1:]]


def gemms_from_classifiers(model: LoweredModel) -> bool:
    """A 1x1 convolution on one pixel whose result the graph returns becomes Flatten, Gemm, Reshape: of the integer kernels
    only the Gemm's can write floats."""
    changed = False
    for node in list(model.skeleton.graph):
        layer = weight_layer(node, model) if node.op_type == "Conv" else None
        source = node.inputs[0]
        if layer is None or source is None or source.shape is None or list(source.shape)[2:] != [1, 1]:
            continue
        if layer.codes.shape[1:] != (source.shape[1], 1, 1) or not _is_returned(node.outputs[0]):
            continue
        name, graph = node.outputs[0].name, model.skeleton.graph
        mark = node.inputs[1]
        assert mark is not None
        shape = _new_constant(graph, f"{name}/shape_out", np.array([-1, len(layer.scale), 1, 1], np.int64))
        flat = ir.node("Flatten", [source], name=f"{name}/flatten")
        gemm = ir.node("Gemm", [flat.outputs[0], mark], attributes={"transB": 1}, name=layer.name)
        restored = ir.node("Reshape", [gemm.outputs[0], shape], name=f"{name}/restore")
        flat.outputs[0].name, gemm.outputs[0].name = f"{name}/flat", f"{name}/gemm"
        flat.outputs[0].shape = ir.Shape([None, layer.codes.shape[1]])
        model.layers[f"{layer.name}.weight"] = replace(layer, kind="linear", codes=layer.codes[:, :, 0, 0])
        _replace(node, [flat, gemm, restored])
        changed = True
    return changed


def _is_returned(value: ir.Value) -> bool:
    """Whether the graph returns `value`, seen through layout operations."""
    while not value.is_graph_output():
        reader = only_reader(value)
        if reader is None or reader.op_type not in LAYOUT_OPS:
            return False
        value = reader.outputs[0]
    return True


def _added_constant(node: ir.Node, width: int) -> ir.Node | None:
    """The Add of a constant vector of `width` that alone reads `node`'s result."""
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    sizes = [c.size for v in add.inputs if (c := constant(v)) is not None]
    return add if sizes == [width] else None


def _new_constant(graph: ir.Graph, name: str, value: NDArray[np.int64]) -> ir.Value:
    made = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    graph.initializers[name] = made
    return made


def pools_from_means(model: LoweredModel) -> bool:
    """ReduceMean over height and width is GlobalAveragePool, which has an integer kernel."""
    changed = False
    for node in list(model.skeleton.graph):
        if node.op_type != "ReduceMean" or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or len(node.inputs[0].shape) != 4 or {int(a) % 4 for a in axes.ravel()} != {2, 3}:
            continue
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=f"{node.outputs[0].name}/pool")
        new = [pool] if keeps else [pool, ir.node("Flatten", [pool.outputs[0]], name=f"{node.outputs[0].name}/flatten")]
        _replace(node, new)
        changed = True
    return changed


def plain_average_pools(model: LoweredModel) -> bool:
    """AveragePool without padding counts what is inside: the runtime's integer kernel, unlike its float one, divides a
    ceil-mode border window by the whole kernel when it is told to include padding."""
    changed = False
    for node in model.skeleton.graph:
        if node.op_type != "AveragePool" or "count_include_pad" not in node.attributes:
            continue
        if node.attributes["count_include_pad"].as_int() == 0:
            continue
        if "pads" not in node.attributes or not any(node.attributes["pads"].as_ints()):
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
            changed = True
        elif "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int() == 1:
            raise ExportError(
                f"node {node.name!r}: AveragePool with padding, ceil_mode and count_include_pad is not exact"
            )
    return changed


def cut_weights_off(model: LoweredModel) -> bool:
    """A marked weight is known by its codes; what computed it (weight standardization) is not in the file."""
    changed = False
    for node in model.skeleton.graph:
        if is_mark(node) and mark_name(node) in model.layers and node.inputs[0] is not None:
            node.replace_input_with(0, None)
            changed = True
    return changed


def remove_dead_nodes(model: LoweredModel) -> bool:
    """Drop what nothing reads, such as the transposes of weights that became Gemms."""
    changed = False
    for node in reversed(list(model.skeleton.graph)):
        if not any(list(v.uses()) or v.is_graph_output() for v in node.outputs):
            model.skeleton.graph.remove(node, safe=True)
            changed = True
    return changed


def hoist_marks(model: LoweredModel) -> bool:
    """Mark(Layout(x)) -> Layout(Mark(x)), so that the quantizer follows the integer kernel that computed x."""
    for mark in model.skeleton.graph:
        layout = mark.inputs[0].producer() if is_mark(mark) and mark.inputs[0] is not None else None
        if layout is None or layout.op_type not in LAYOUT_OPS or only_reader(layout.outputs[0]) is not mark:
            continue
        if mark_name(mark) not in model.quantizers or not _commutes(layout, model.quantizers.get(mark_name(mark))):
            continue
        source = layout.inputs[0]
        if source is None or source.producer() is None or only_reader(source) is not layout:
            continue
        ir.convenience.replace_all_uses_with(mark.outputs[0], layout.outputs[0])
        model.trained_at.setdefault(mark_name(mark), layout.outputs[0])
        mark.replace_input_with(0, source)
        layout.replace_input_with(0, mark.outputs[0])
        mark.outputs[0].shape = source.shape
        graph = model.skeleton.graph
        graph.remove(mark)
        graph.insert_before(layout, mark)
        return True
    return False


def _commutes(layout: ir.Node, quantizer: LoweredQuantizer | None) -> bool:
    """Whether quantizing before `layout` is the same: padding adds zeros, which are no one-bit code, and thresholds per
    channel stay with their channels through a max pool alone."""
    if layout.op_type == "Pad":
        fill = constant(layout.inputs[2]) if len(layout.inputs) > 2 else None
        if fill is not None and fill.any():
            return False
    if quantizer is None or not quantizer.is_binary:
        return True
    return layout.op_type == "MaxPool" or (layout.op_type != "Pad" and len(quantizer.thresholds) == 1)


def absorb_clips(model: LoweredModel) -> bool:
    """Mark(Relu(x)) and Mark(Clip(x)) -> Mark(x) with the clip on the quantizer's bounds."""
    changed = False
    for mark in list(model.skeleton.graph):
        clip = mark.inputs[0].producer() if is_mark(mark) and mark.inputs[0] is not None else None
        if clip is None or clip.op_type not in ("Relu", "Clip") or only_reader(clip.outputs[0]) is not mark:
            continue
        lowest, highest = _clip_bounds(clip)
        name = mark_name(mark)
        if lowest is None or highest is None or name not in model.quantizers:
            continue
        model.quantizers[name] = model.quantizers[name].clipped(lowest, highest)
        _bypass(clip)
        changed = True
    return changed


def _clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds: list[float | None] = []
    for index, absent in ((1, -np.inf), (2, np.inf)):
        bound = node.inputs[index] if len(node.inputs) > index else None
        value = constant(bound)
        if bound is None:
            bounds.append(absent)
        else:
            bounds.append(None if value is None else float(value.reshape(())))
    return bounds[0], bounds[1]


def resolve_biases(model: LoweredModel, target: Target) -> bool:
    """Biases as int32 in units of input scale times weight scale, as integer kernels add them. A net without activation
    quantizers (weight-only) computes in floating point on its weight codes; its biases stay."""
    reached: set[str] = set()
    for node in model.skeleton.graph:
        layer = weight_layer(node, model)
        if layer is None:
            continue
        reached.add(f"{layer.name}.weight")
        if not model.quantizers:
            continue
        grid = grid_of(node.inputs[0])
        if grid is None:
            raise ExportError(f"layer {layer.name!r}: {_why_no_codes(node.inputs[0])}, so no integer kernel can run it")
        if node.op_type == "Gemm":
            _check_gemm(node, layer)
        source, written = model.quantizers[grid], written_by(node, model)
        if written is not None and written.is_binary:
            layer = replace(layer, weight_multiplier=weight_multiplier_of(target, layer.bits, source))
            layer, model.quantizers[written.name] = with_threshold_bias(layer, source, written)
        else:
            layer = _with_bias_codes(layer, source, written, target)
            if silent := list(layer.dead_channels):
                model.notes.append(f"layer {layer.name!r}: in channels {silent} only the bias decides; only it is kept")
        model.layers[f"{layer.name}.weight"] = layer
        check_sums(layer, source)
    missing = [name for name in model.layers if name not in reached]
    if missing:
        raise ExportError(
            f"layer {missing[0].removesuffix('.weight')!r}: its weight reaches no Conv or Gemm in the export"
        )
    return True


def check_sums(layer: LoweredLayer, source: LoweredQuantizer) -> None:
    """Raises ExportError when a sum of the layer, bias included, may exceed the 32 bits that every kernel adds it in."""
    assert layer.bias_codes is not None
    largest = largest_sums(layer, source) * layer.weight_multiplier + np.abs(layer.bias_codes.astype(np.float64))
    if (largest > SUM_LIMIT).any():
        channel = int(largest.argmax())
        raise ExportError(
            f"layer {layer.name!r}: sums of output channel {channel} may reach {largest[channel]:,.0f}, which 32 bits cannot "
            "hold; use fewer bits or fewer input channels"
        )


def _why_no_codes(value: ir.Value | None) -> str:
    """Why `value`, which a layer reads, carries no codes."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in CODE_OPS:
        if node.op_type == "Pad" and not moves_codes(node):
            return f"its input is padded with {fill_of(node):g}, which is not a code (pad with 0)"
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return "its input is not quantized"


def float_biases(model: LoweredModel) -> bool:
    """Layers add their bias as it was trained, in floating point: plain QDQ files hold no integer biases."""
    changed = False
    for name, layer in model.layers.items():
        if layer.bias_codes is not None:
            model.layers[name] = replace(layer, bias_codes=None)
            changed = True
    return changed


def positive_scales(model: LoweredModel, target: Target) -> bool:
    """Channels whose scale a batch norm made negative get the opposite codes and the opposite scale, which is the same
    weight; where the norm made it 0, codes 0 and any scale.

    Raises ExportError where a code is -128: it has no opposite in int8, and ARM's kernels overflow with it.
    """
    changed = False
    for name, layer in model.layers.items():
        if (layer.codes == -128).any():
            channels = [int(c) for c in np.flatnonzero((layer.codes == -128).reshape(len(layer.codes), -1).any(1))]
            raise ExportError(
                f"layer {layer.name!r}: target {target.name} takes int8 weights from -127 to 127, and channels "
                f"{channels[:4]} hold code -128; train it with QuantSpec.of_weight(8), or export for an ort target"
            )
        negative, silent = layer.scale < 0, layer.scale == 0
        if not (negative | silent).any():
            continue
        codes, scale = layer.codes.copy(), np.abs(layer.scale)
        codes[negative] *= -1
        codes[silent], scale[silent] = 0, 1
        bits = max(layer.bits, 2) if silent.any() else layer.bits  # 0 is not a 1-bit code
        model.layers[name] = replace(layer, codes=codes, scale=scale, bits=bits)
        changed = True
    return changed


def _check_gemm(node: ir.Node, layer: LoweredLayer) -> None:
    get = {name: attribute.value for name, attribute in node.attributes.items()}
    if get.get("transB", 0) != 1 or get.get("transA", 0) or get.get("alpha", 1.0) != 1.0 or get.get("beta", 1.0) != 1.0:
        raise ExportError(f"layer {layer.name!r}: Gemm with {get} is not x·Wᵀ + b")


def _with_bias_codes(
    layer: LoweredLayer, source: LoweredQuantizer, written: LoweredQuantizer | None, target: Target
) -> LoweredLayer:
    """The layer with integer biases; its dead channels are those of which only the bias is kept.

    source: the quantizer it reads; written: the one that reads its results, None where they stay in floating point.
    Raises ExportError for a channel whose bias no int32 code can hold though its sums matter.
    """
    for weight_multiplier in (weight_multiplier_of(target, layer.bits, source), 1):
        layer = replace(layer, weight_multiplier=weight_multiplier, input_quantizer=source.name)
        unit = (source.scale * layer.stored_scale).astype(np.float64)  # in float32, as the runtime multiplies them
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = np.rint(layer.folded_bias / unit)
        out_of_range = ~(np.abs(codes) + largest_sums(layer, source) * weight_multiplier <= SUM_LIMIT)
        if not out_of_range.any():
            return replace(layer, bias_codes=codes.astype(np.int32))
        needed = out_of_range & ~_sums_are_negligible(layer, source, written)
        if not needed.any():
            return _with_biases_alone(layer, source, codes, out_of_range)
    check_sums(replace(layer, bias_codes=np.zeros(len(unit), np.int32)), source)  # whether the sums alone are too large
    channel = int(np.flatnonzero(needed)[0])
    raise ExportError(
        f"layer {layer.name!r}: the bias of output channel {channel} is {layer.folded_bias[channel]:g}, in units of "
        f"{unit[channel]:.3g}: 32 bits cannot hold both it and the sums it is added to; look at the batch norm after this "
        "layer (a gamma next to 0, or a bias out of all proportion)"
    )


def _sums_are_negligible(
    layer: LoweredLayer, source: LoweredQuantizer, written: LoweredQuantizer | None
) -> NDArray[np.bool_]:
    """bool (O,): channels whose largest possible sum decides no result, or whose result is clipped whatever the sum."""
    largest = largest_results(layer, source)
    bias = layer.folded_bias
    if written is None:
        return largest <= NEGLIGIBLE_SHARE * np.abs(bias)
    lowest, highest = (float(written.scale) * (code - written.zero_point) for code in (written.low, written.high))
    is_clipped = (bias - largest >= highest) | (bias + largest <= lowest)
    return is_clipped | (largest <= NEGLIGIBLE_CODES * float(written.scale))


def _with_biases_alone(
    layer: LoweredLayer, source: LoweredQuantizer, bias_codes: NDArray[np.float64], silent: NDArray[np.bool_]
) -> LoweredLayer:
    """The layer with weights 0 in its silent channels, in a unit that leaves their biases 20 bits of precision."""
    codes, scale, bias_codes = layer.codes.copy(), layer.scale.copy(), bias_codes.copy()
    channels = [int(c) for c in np.flatnonzero(silent)]
    bias, input_scale = layer.folded_bias[silent], float(source.scale)
    codes[silent] = 0
    scale[silent] = layer.weight_multiplier * np.maximum(np.abs(bias), 1e-6) / (input_scale * (1 << 20))
    bias_codes[silent] = np.rint(bias / (input_scale * scale[silent].astype(np.float64) / layer.weight_multiplier))
    bits = max(layer.bits, 2)  # 0 is not a 1-bit code
    silenced = replace(layer, codes=codes, scale=scale, bits=bits, dead_channels=tuple(channels))
    return replace(silenced, bias_codes=bias_codes.astype(np.int32))


def _bypass(node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    assert node.graph is not None
    last, old = new[-1].outputs[0], node.outputs[0]
    last.name, last.shape, last.type = old.name, old.shape, old.type
    node.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
