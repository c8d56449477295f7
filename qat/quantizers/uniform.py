"""The plain PyTorch formulas of a uniform grid with a learned scale; `lsq.py` has the equations, `fused.py` the kernels."""

import math

import torch
from torch import Tensor

from qat.quantizers.contract import along, positive_scale
from qat.quantizers.spec import Grid


def quantize(x: Tensor, raw_scale: Tensor, grid: Grid) -> Tensor:
    """x̂ of x's dtype; not differentiable."""
    scale = along(positive_scale(raw_scale), x, grid.axis)
    return float_codes(x, scale, grid).mul_(scale).to(x.dtype)


def gradients(
    x: Tensor, upstream: Tensor, raw_scale: Tensor, grid: Grid, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/d raw_scale) from upstream = dL/dx̂ of x's shape."""
    scale = along(positive_scale(raw_scale), x, grid.axis)
    v = _capped(widened(x), grid) / scale
    inside = (v > grid.qmin) & (v < grid.qmax)
    # Outside, the clipped code alone is the derivative; on the upper edge round(v) - v would be 0 instead of Qp.
    per_element = (
        v.clamp(grid.qmin, grid.qmax)
        .round_()
        .sub_(v.masked_fill_(~inside, 0))
        .mul_(upstream)
    )
    scale_gradient = (
        per_element.sum_to_size(scale.shape).view(raw_scale.shape) * gradient_scale
    )
    if grid.ceiling != math.inf:
        inside &= x < grid.ceiling
    return upstream * inside, scale_gradient.to(raw_scale.dtype) * torch.where(
        raw_scale < 0, -1.0, 1.0
    )


def float_codes(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Codes of x in its own float type, at least float32."""
    return (_capped(widened(x), grid) / scale).clamp_(grid.qmin, grid.qmax).round_()


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is half precision: a code is decided in float32, whatever x comes in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _capped(x: Tensor, grid: Grid) -> Tensor:
    return x if grid.ceiling == math.inf else x.clamp_max(grid.ceiling)
