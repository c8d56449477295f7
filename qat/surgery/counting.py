"""Multiplications of one tensor operation, counted from its operands' shapes: what `quantize_` accounts for."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

WEIGHTED = {"conv1d", "conv2d", "conv3d"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
# Sums of products over an axis: what a matrix unit or an integer kernel computes.
CONTRACTIONS = WEIGHTED | TRANSPOSED | {
    "linear", "matmul", "mm", "mv", "dot", "baddbmm", "addmm", "addbmm", "addmv", "einsum", "scaled_dot_product_attention",
    "bilinear", "tensordot", "inner",
}  # fmt: skip
# Sums, comparisons, and what only moves or picks numbers.
WITHOUT = {
    "flatten", "reshape", "view", "permute", "transpose", "contiguous", "max_pool2d", "dropout", "getitem", "squeeze",
    "unsqueeze", "chunk", "split", "unbind", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad", "clone", "detach",
    "add", "sub", "cat", "stack", "clip", "neg", "sum", "mean", "max", "amax", "min", "amin", "roll", "expand", "expand_as",
    "repeat", "where", "index_select", "index_put", "gather", "to", "float", "type", "type_as", "abs", "swapaxes", "movedim",
    "reshape_as", "view_as", "masked_fill", "unflatten", "unfold", "fold", "t", "flip", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "zeros_like", "ones_like", "setitem", "copy", "narrow", "threshold", "set", "split_with_sizes",
    "repeat_interleave", "nearest", "tensor_split", "alias", "fill", "swapdims", "real", "imag", "view_as_real",
    "view_as_complex",
}  # fmt: skip
PER_ELEMENT = {
    "layer_norm": 2,
    "group_norm": 2,
    "rms_norm": 2,
    "instance_norm": 2,
    "hardswish": 2,
    "gelu": 2,
}


def multiplications(
    kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
) -> int:
    """How many multiplications (or divisions, or exponentials and their like) the operation `kind` makes to give `out`.

    A product with a sum counts once, as multiply-accumulates are counted. Elementwise operations count one an element,
    norms, GELU and HardSwish two; sums, comparisons and layout none.
    """
    weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
    if kind in WEIGHTED and isinstance(weight, Tensor):
        return out.numel() * weight[0].numel()
    if kind in TRANSPOSED and isinstance(weight, Tensor):
        return args[0].numel() * weight[0].numel()
    if kind == "linear" and isinstance(weight, Tensor):
        return out.numel() * weight.shape[-1]
    if kind == "matmul":
        return out.numel() * args[0].shape[-1]
    if kind in ("baddbmm", "addmm"):
        return out.numel() * args[1].shape[-1]
    if kind in ("mv", "dot", "vdot"):
        return int(args[0].numel())
    if kind == "addmv":
        return int(args[1].numel())
    if kind == "einsum":
        return _einsum(args)
    return 0 if kind in WITHOUT else out.numel() * PER_ELEMENT.get(kind, 1)


def _einsum(args: tuple[Any, ...]) -> int:
    """Product of the sizes of all labels; 0 where the equation leaves axes to broadcasting or is not a string."""
    equation, *rest = args
    operands = (
        rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    )
    if not isinstance(equation, str) or "." in equation:
        return 0
    sizes: dict[str, int] = {}
    for labels, operand in zip(
        equation.replace(" ", "").split("->")[0].split(","), operands, strict=True
    ):
        sizes |= dict(zip(labels, operand.shape, strict=True))
    return math.prod(sizes.values())
