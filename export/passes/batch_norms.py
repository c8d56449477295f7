"""A batch norm after a quantized layer goes into the layer's scale and bias."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from export.lowered import BIAS_PARAMETER, LoweredLayer, LoweredModel
from export.passes.edit import bypass
from export.skeleton import constant, only_reader, weight_layer


def fold_batch_norms(model: LoweredModel) -> bool:
    """BatchNorm after a quantized layer: y = (x·W + b - mean)·a + beta with a = gamma / sqrt(var + eps), in float64.

    The codes stay; a goes, sign included, into the layer's scale.
    """
    changed = False
    for node in list(model.skeleton.graph):
        layer = _layer_before(node, model)
        if layer is None:
            continue
        gamma = np.asarray(constant(node.inputs[1]), np.float64)
        beta = np.asarray(constant(node.inputs[2]), np.float64)
        mean = np.asarray(constant(node.inputs[3]), np.float64)
        variance = np.asarray(constant(node.inputs[4]), np.float64)
        epsilon = node.attributes["epsilon"].as_float()
        a = gamma / np.sqrt(variance + epsilon)
        folded = replace(
            layer,
            scale=(layer.scale.astype(np.float64) * a).astype(np.float32),
            bias=(layer.folded_bias - mean) * a + beta,
            bias_parameter=node.meta.get(BIAS_PARAMETER, ""),
        )
        model.put_layer(folded)
        bypass(node)
        changed = True
    return changed


def _layer_before(node: ir.Node, model: LoweredModel) -> LoweredLayer | None:
    """The layer whose results the batch norm `node` alone reads."""
    if node.op_type != "BatchNormalization" or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    if source is None or only_reader(source.outputs[0]) is not node:
        return None
    return weight_layer(source, model)
