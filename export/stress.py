"""Stress for a file: the runtime must compute the defined codes for adversarial codes through every layer; and which of its
optimisers is to blame where it does not.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export import session
from export.lowered import DOMAIN, LoweredModel, LoweredQuantizer
from export.native_file import KERNELS, layer_part
from export.reference import Codes, accumulate, quantize
from export.skeleton import is_mark, mark_name, only_reader, weight_layer

Uint8 = NDArray[np.uint8]


# The runtime's optimisers that touch quantized graphs, by the names it knows them by.
OPTIMIZERS = (
    "ConstantFolding",
    "QDQPropagationTransformer",
    "EnsureUniqueDQForNodeUnit",
    "WeightBiasQuantization",
    "DoubleQDQPairsRemover",
    "QDQS8ToU8Transformer",
    "QDQSelectorActionTransformer",
    "QDQFinalCleanupTransformer",
    "ReluQuantFusion",
    "ClipQuantFusion",
    "ConvActivationFusion",
    "ConvAddActivationFusion",
    "ConvAddFusion",
    "ConvMulFusion",
    "ConvBNFusion",
    "MatMulAddFusion",
    "GemmActivationFusion",
    "MatMulActivationFusion",
    "GeluFusionL2",
    "BiasGeluFusion",
    "LayerNormFusion",
    "SkipLayerNormFusion",
    "MatMulIntegerToFloatFusion",
    "TransposeOptimizer",
    "NchwcTransformer",
    "NhwcTransformer",
    "Avx2WeightS8ToU8Transformer",
)


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


PATTERNS: dict[str, Callable[[tuple[int, ...], LoweredQuantizer], Uint8]] = {
    "all-max": lambda shape, grid: np.full(shape, grid.high, np.uint8),
    "all-min": lambda shape, grid: np.full(shape, grid.low, np.uint8),
    "alternating": lambda shape, grid: np.where(
        np.indices(shape).sum(0) % 2, grid.high, grid.low
    ).astype(np.uint8),
    "random": lambda shape, grid: _random_codes(shape, grid),
}


def _random_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    """Any code of the grid; of one bit only the two there are, between which thresholds are put."""
    generator = np.random.default_rng(0)
    if grid.is_binary:
        return generator.choice(np.array([grid.low, grid.high], np.uint8), shape)
    return generator.integers(grid.low, grid.high + 1, shape).astype(np.uint8)


def adversarial(
    model: LoweredModel, proto: onnx.ModelProto
) -> dict[str, dict[str, int]]:
    """Layer -> pattern -> wrong codes, for every convolution and linear that ends in a quantizer, cut out of the file and
    fed with extreme codes; layers and patterns without a wrong code are left out."""
    wrong: dict[str, dict[str, int]] = {}
    for node, name, target in _layers_with_targets(model):
        layer = model.layer(name)
        source = model.quantizers[layer.input_quantizer]
        assert node.inputs[0] is not None and node.inputs[0].shape is not None
        shape = tuple(d if isinstance(d, int) else 2 for d in node.inputs[0].shape)
        loaded = session.load(layer_model(proto, name, target.name, shape))
        for pattern, make in PATTERNS.items():
            codes = make(shape, source)
            expected = quantize(
                accumulate(node, layer, Codes(torch.from_numpy(codes).float(), source)),
                target,
            )
            found = loaded.run(codes)[target.name]
            if count := int((found != expected.numpy()).sum()):
                wrong.setdefault(name, {})[pattern] = count
    return wrong


def _layers_with_targets(
    model: LoweredModel,
) -> Iterator[tuple[ir.Node, str, LoweredQuantizer]]:
    for node in model.skeleton.graph:
        layer = weight_layer(node, model)
        reader = only_reader(node.outputs[0]) if layer is not None else None
        if layer is not None and reader is not None and is_mark(reader):
            yield node, layer.name, model.quantizers[mark_name(reader)]


def layer_model(
    proto: onnx.ModelProto, layer: str, output: str, shape: tuple[int, ...]
) -> onnx.ModelProto:
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
        nodes,
        layer,
        [
            onnx.helper.make_tensor_value_info(
                entry, onnx.TensorProto.UINT8, ["batch", *shape[1:]]
            )
        ],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None)],
        [t for t in proto.graph.initializer if t.name in used],
    )
    return onnx.helper.make_model(
        graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version
    )
