"""Steps that are powers of two, for hardware that shifts: s = 2^round(log2 |raw|), straight through the rounding.

forward   s = 2^round(log2 |raw|), |raw| at least 1e-10        backward   dL/d raw = sgn(raw) · dL/ds
"""

from typing import Any

import torch
from torch import Tensor


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw_step: Tensor) -> Tensor:
        ctx.save_for_backward(raw_step)
        return torch.exp2(torch.round(torch.log2(raw_step.abs().clamp_min(1e-10))))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (raw_step,) = ctx.saved_tensors
        return gradients[0] * torch.where(raw_step < 0, -1.0, 1.0)


def power_of_two(raw_step: Tensor) -> Tensor:
    """The nearest power of two (in the logarithm) of each |raw step|, float32, of the same shape."""
    return _PowerOfTwo.apply(raw_step)
