"""Layer norms that read codes and write codes, which edgeqat's own kernels compute as `export/arithmetic.py` defines them."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowered import LoweredModel, LoweredQuantizer
from export.skeleton import constant, is_mark, mark_name, quantizer_of

# Of a row: its sums then fit 32 bits, and centred codes a float32 (export/kernels/norms.hpp)
MOST_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm over the last axis of n codes.

    source: the value that carries the codes it reads. grid: theirs. gain, shift: float32 (n,), as trained.
    """

    source: ir.Value
    grid: LoweredQuantizer
    gain: NDArray[np.float32]
    shift: NDArray[np.float32]
    epsilon: float


def norm_on_codes(node: ir.Node, model: LoweredModel) -> LayerNorm | None:
    """What `node` computes, if it is a layer norm of codes over their last axis whose results quantizers alone read, and if
    the target of `model` has a kernel for it."""
    if not model.exact_norms or node.domain != "":
        return None
    if node.op_type != "LayerNormalization" or len(node.outputs) != 1:
        return None
    source = node.inputs[0]
    grid = model.quantizers.get(quantizer_of(source) or "")
    gain = constant(node.inputs[1])
    if source is None or grid is None or grid.is_binary or gain is None:
        return None
    has_shift = len(node.inputs) > 2 and node.inputs[2] is not None
    shift = constant(node.inputs[2]) if has_shift else np.zeros_like(gain)
    rank = len(source.shape) if source.shape is not None else 0
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if shift is None or gain.ndim != 1 or axis not in (-1, rank - 1):
        return None
    if gain.size > MOST_ELEMENTS or shift.shape != gain.shape:
        return None
    if not only_quantized(node.outputs[0], model):
        return None
    epsilon = 1e-5  # the operator's own
    if "epsilon" in node.attributes:
        epsilon = node.attributes["epsilon"].as_float()
    if epsilon <= 0:
        return None
    return LayerNorm(
        source, grid, gain.astype(np.float32), shift.astype(np.float32), epsilon
    )


def only_quantized(value: ir.Value, model: LoweredModel) -> bool:
    """Whether nothing but quantizers of more than one bit reads `value`."""
    if value.is_graph_output():
        return False
    for use in value.uses():
        if not is_mark(use.node):
            return False
        quantizer = model.quantizers.get(mark_name(use.node))
        if quantizer is None or quantizer.is_binary:
            return False
    return True
