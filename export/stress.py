"""Stress for a file: the runtime must compute the same codes whatever the level, the number of threads and the batch, and
the defined ones for adversarial codes through every layer.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export import session
from export.lowered import DOMAIN, LoweredModel, LoweredQuantizer
from export.native_file import KERNELS, code_outputs, layer_part
from export.reference import Codes, accumulate, quantize
from export.skeleton import is_mark, mark_name, only_reader, weight_layer

Uint8 = NDArray[np.uint8]


def settings_that_differ(proto: onnx.ModelProto, images: NDArray[np.float32], name: str = "") -> dict[str, int]:
    """Codes that differ from the default (ALL, one thread, one batch) at EXTENDED, with 2 threads, in batches of 1.

    name: what messages call `proto`.
    """
    names = quantizer_tensors(proto)
    instrumented = session.with_outputs(proto, names)
    default = session.load(instrumented, name=name).run(images)
    others: dict[str, Mapping[str, NDArray[np.generic]]] = {
        "EXTENDED": session.load(instrumented, level="EXTENDED", name=name).run(images),
        "2 threads": session.load(instrumented, threads=2, name=name).run(images),
        "batches of 1": _one_by_one(session.load(instrumented, name=name), images, default),
    }
    counts = {setting: sum(int((found[n] != default[n]).sum()) for n in names) for setting, found in others.items()}
    return {setting: count for setting, count in counts.items() if count}


# The runtime's optimisers that touch quantized graphs, by the names it knows them by.
OPTIMIZERS = (
    "ConstantFolding", "QDQPropagationTransformer", "EnsureUniqueDQForNodeUnit", "WeightBiasQuantization",
    "DoubleQDQPairsRemover", "QDQS8ToU8Transformer", "QDQSelectorActionTransformer", "QDQFinalCleanupTransformer",
    "ReluQuantFusion", "ClipQuantFusion", "ConvActivationFusion", "ConvAddActivationFusion", "ConvAddFusion", "ConvMulFusion",
    "ConvBNFusion", "MatMulAddFusion", "GemmActivationFusion", "MatMulActivationFusion", "GeluFusionL2", "BiasGeluFusion",
    "LayerNormFusion", "SkipLayerNormFusion", "MatMulIntegerToFloatFusion", "TransposeOptimizer", "NchwcTransformer",
    "NhwcTransformer", "Avx2WeightS8ToU8Transformer",
)  # fmt: skip


def culprit(differs: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """The optimisers that cause a difference, by bisection.

    differs: whether codes still differ with the given optimisers switched off. Returns the smallest group found whose
    absence mends it (one name, as a rule), or () where no set of named optimisers does.
    """
    if differs(OPTIMIZERS):
        return ()
    group: tuple[str, ...] = OPTIMIZERS
    while len(group) > 1:
        half = len(group) // 2
        for part in (group[:half], group[half:]):
            if not differs(part):
                group = part
                break
        else:
            return group
    return group


def quantizer_tensors(proto: onnx.ModelProto) -> list[str]:
    """Names of the uint8 tensors that quantizers write: what comes out of QuantizeLinear, behind its clip if it has one."""
    clipped = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "Clip"}
    written = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    return [clipped.get(name, name) for name in written] + [name for name, _, _ in code_outputs(proto)]


def _one_by_one(
    loaded: session.Session, images: NDArray[np.float32], whole: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """The outputs of `loaded` for one image at a time, put together as they lie in `whole`, those of all images at once."""
    runs = [loaded.run(images[i : i + 1]) for i in range(len(images))]
    return {name: _joined([run[name] for run in runs], whole[name].shape) for name in whole}


def _joined(parts: list[NDArray[np.generic]], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """`parts` side by side along the axis that grew to `shape`: the batch is not first everywhere, as in MViT's attention."""
    grown = [axis for axis, (part, all_) in enumerate(zip(parts[0].shape, shape, strict=True)) if part != all_]
    return np.concatenate(parts, axis=grown[0]) if grown else parts[0]


PATTERNS: dict[str, Callable[[tuple[int, ...], LoweredQuantizer], Uint8]] = {
    "all-max": lambda shape, grid: np.full(shape, grid.high, np.uint8),
    "all-min": lambda shape, grid: np.full(shape, grid.low, np.uint8),
    "alternating": lambda shape, grid: np.where(np.indices(shape).sum(0) % 2, grid.high, grid.low).astype(np.uint8),
    "random": lambda shape, grid: _random_codes(shape, grid),
}


def _random_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    """Any code of the grid; of one bit only the two there are, between which thresholds are put."""
    generator = np.random.default_rng(0)
    if grid.is_binary:
        return generator.choice(np.array([grid.low, grid.high], np.uint8), shape)
    return generator.integers(grid.low, grid.high + 1, shape).astype(np.uint8)


def adversarial(model: LoweredModel, proto: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Layer -> pattern -> wrong codes, for every convolution and linear that ends in a quantizer, cut out of the file and
    fed with extreme codes; layers and patterns without a wrong code are left out."""
    wrong: dict[str, dict[str, int]] = {}
    for node, name, target in _layers_with_targets(model):
        layer = model.layers[f"{name}.weight"]
        source = model.quantizers[layer.input_quantizer]
        assert node.inputs[0] is not None and node.inputs[0].shape is not None
        shape = tuple(d if isinstance(d, int) else 2 for d in node.inputs[0].shape)
        loaded = session.load(layer_model(proto, name, target.name, shape))
        for pattern, make in PATTERNS.items():
            codes = make(shape, source)
            expected = quantize(accumulate(node, layer, Codes(torch.from_numpy(codes).float(), source)), target)
            found = loaded.run(codes)[target.name]
            if count := int((found != expected.numpy()).sum()):
                wrong.setdefault(name, {})[pattern] = count
    return wrong


def _layers_with_targets(model: LoweredModel) -> Iterator[tuple[ir.Node, str, LoweredQuantizer]]:
    for node in model.skeleton.graph:
        layer = weight_layer(node, model)
        reader = only_reader(node.outputs[0]) if layer is not None else None
        if layer is not None and reader is not None and is_mark(reader):
            yield node, layer.name, model.quantizers[mark_name(reader)]


def layer_model(proto: onnx.ModelProto, layer: str, output: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The part of `proto` from the codes that `layer` reads to the codes `output`, as a model with uint8 input `codes`."""
    producers = {o: node for node in proto.graph.node for o in node.output}
    node = next(n for n in proto.graph.node if n.name == layer)
    if node.op_type in KERNELS and node.domain == DOMAIN:
        return layer_part(proto, node, output, shape)
    dequantize = producers[node.input[0]]
    entry = dequantize.input[0]
    kept: dict[str, onnx.NodeProto] = {}
    pending = [output]
    while pending:
        tensor = pending.pop()
        if tensor != entry and tensor in producers and tensor not in kept:
            kept[tensor] = producers[tensor]
            pending += list(producers[tensor].input)
    used = {i for n in kept.values() for i in n.input}
    nodes = [n for n in proto.graph.node if n.output[0] in kept]
    graph = onnx.helper.make_graph(
        nodes, layer,
        [onnx.helper.make_tensor_value_info(entry, onnx.TensorProto.UINT8, ["batch", *shape[1:]])],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None)],
        [t for t in proto.graph.initializer if t.name in used],
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
