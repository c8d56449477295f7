"""Scales that are powers of two, for hardware that shifts: s = 2^round(log2 |raw|), straight through the rounding.

forward   s = 2^round(log2 |raw|), |raw| at least 1e-10        backward   dL/d raw = sgn(raw) · dL/ds
"""

from typing import Any

import torch
from torch import Tensor


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw_scale: Tensor) -> Tensor:
        ctx.save_for_backward(raw_scale)
        return torch.exp2(torch.round(torch.log2(raw_scale.abs().clamp_min(1e-10))))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (raw_scale,) = ctx.saved_tensors
        return gradients[0] * torch.where(raw_scale < 0, -1.0, 1.0)


def power_of_two(raw_scale: Tensor) -> Tensor:
    """The nearest power of two (in the logarithm) of each |raw scale|, float32, of the same shape."""
    return _PowerOfTwo.apply(raw_scale)
