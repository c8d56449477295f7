"""Softmaxes that write codes, which edgeqat's own kernels compute as `export/arithmetic.py` defines them."""

import onnx_ir as ir

from export.lowered import LoweredModel
from export.norms import only_quantized


def is_softmax_to_codes(node: ir.Node, model: LoweredModel) -> bool:
    """Whether `node` is a softmax over the last axis whose results quantizers alone read, and the target of `model` has a
    kernel for it."""
    if not model.exact_norms or node.domain != "" or node.op_type != "Softmax":
        return False
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) == 0:
        return False
    last = len(source.shape) - 1
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if axis not in (-1, last) or source.shape[last] == 0:
        return False
    return only_quantized(node.outputs[0], model)
