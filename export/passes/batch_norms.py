"""A batch norm after a quantized layer goes into the layer's scale and bias."""

from dataclasses import replace

import numpy as np

from export.lowered import BIAS_PARAMETER, LoweredModel
from export.passes.edit import bypass
from export.skeleton import constant, only_reader, weight_layer


def fold_batch_norms(model: LoweredModel) -> bool:
    """BatchNorm after a quantized layer: y = (x·W + b - mean)·a + beta with a = gamma / sqrt(var + eps), in float64.

    The codes stay; a goes, sign included, into the layer's scale.
    """
    changed = False
    for node in list(model.skeleton.graph):
        source = (
            node.inputs[0].producer()
            if node.op_type == "BatchNormalization" and node.inputs[0]
            else None
        )
        layer = weight_layer(source, model) if source is not None else None
        if (
            source is None
            or layer is None
            or only_reader(source.outputs[0]) is not node
        ):
            continue
        gamma, beta, mean, variance = (
            np.asarray(constant(v), np.float64) for v in node.inputs[1:5]
        )
        epsilon = node.attributes["epsilon"].as_float()
        a = gamma / np.sqrt(variance + epsilon)
        bias = layer.folded_bias - mean
        scale = (layer.scale.astype(np.float64) * a).astype(np.float32)
        folded = replace(
            layer,
            scale=scale,
            bias=bias * a + beta,
            bias_parameter=node.meta.get(BIAS_PARAMETER, ""),
        )
        model.put_layer(folded)
        bypass(node)
        changed = True
    return changed
