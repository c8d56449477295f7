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


def _highest_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    return np.full(shape, grid.high, np.uint8)


def _lowest_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    return np.full(shape, grid.low, np.uint8)


def _alternating_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    """Highest and lowest in turn, along every axis."""
    is_odd = np.indices(shape).sum(0) % 2 == 1
    return np.where(is_odd, grid.high, grid.low).astype(np.uint8)


def _random_codes(shape: tuple[int, ...], grid: LoweredQuantizer) -> Uint8:
    """Any code of the grid; of one bit only the two there are, between which thresholds are put."""
    generator = np.random.default_rng(0)
    if grid.is_binary:
        return generator.choice(np.array([grid.low, grid.high], np.uint8), shape)
    return generator.integers(grid.low, grid.high + 1, shape).astype(np.uint8)


PATTERNS: dict[str, Callable[[tuple[int, ...], LoweredQuantizer], Uint8]] = {
    "all-max": _highest_codes,
    "all-min": _lowest_codes,
    "alternating": _alternating_codes,
    "random": _random_codes,
}


def adversarial(
    model: LoweredModel, proto: onnx.ModelProto
) -> dict[str, dict[str, int]]:
    """Layer -> pattern -> wrong codes, for every convolution and linear that ends in a quantizer, cut out of the file and
    fed with extreme codes; layers and patterns without a wrong code are left out."""
    wrong: dict[str, dict[str, int]] = {}
    for node, name, target in _layers_with_targets(model):
        layer = model.layer(name)
        source = model.quantizers[layer.input_quantizer]
        shape = _shape_of_input(node)
        loaded = session.load(layer_model(proto, name, target.name, shape))
        for pattern, make in PATTERNS.items():
            codes = make(shape, source)
            given = Codes(torch.from_numpy(codes).float(), source)
            expected = quantize(accumulate(node, layer, given), target).numpy()
            computed = loaded.run(codes)[target.name]
            count = int((computed != expected).sum())
            if count:
                wrong.setdefault(name, {})[pattern] = count
    return wrong


def _shape_of_input(node: ir.Node) -> tuple[int, ...]:
    """With 2 for every axis of any length."""
    source = node.inputs[0]
    assert source is not None and source.shape is not None
    sizes = []
    for size in source.shape:
        sizes.append(size if isinstance(size, int) else 2)
    return tuple(sizes)


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
    producers: dict[str, onnx.NodeProto] = {}
    for node in proto.graph.node:
        for tensor in node.output:
            producers[tensor] = node
    layer_node = next(node for node in proto.graph.node if node.name == layer)
    if layer_node.op_type in KERNELS and layer_node.domain == DOMAIN:
        return layer_part(proto, layer_node, output, shape)
    dequantize = producers[layer_node.input[0]]
    entry = dequantize.input[0]
    needed: set[str] = set()
    pending = [output]
    while pending:
        tensor = pending.pop()
        if tensor in needed:
            continue
        needed.add(tensor)
        if tensor != entry and tensor in producers:
            pending += producers[tensor].input
    needed.discard(entry)
    nodes = [node for node in proto.graph.node if node.output[0] in needed]
    constants = [tensor for tensor in proto.graph.initializer if tensor.name in needed]
    helper = onnx.helper
    uint8 = onnx.TensorProto.UINT8
    source = helper.make_tensor_value_info(entry, uint8, ["batch", *shape[1:]])
    result = helper.make_tensor_value_info(output, uint8, None)
    graph = helper.make_graph(nodes, layer, [source], [result], constants)
    return helper.make_model(
        graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version
    )
