"""The plain PyTorch formulas of a uniform grid with a learned step; `lsq.py` has the equations, `fused.py` the kernels."""

import math

import torch
from torch import Tensor

from qat.quantizers.contract import along, positive_step
from qat.quantizers.spec import Grid


def quantize(x: Tensor, raw_step: Tensor, grid: Grid) -> Tensor:
    """x̂ of x's dtype; not differentiable."""
    step = along(positive_step(raw_step), x, grid.axis)
    return rounded(x, step, grid).mul_(step).to(x.dtype)


def gradients(
    x: Tensor, upstream: Tensor, raw_step: Tensor, grid: Grid, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/d raw_step) from upstream = dL/dx̂ of x's shape."""
    step = along(positive_step(raw_step), x, grid.axis)
    v = _capped(widened(x), grid) / step
    inside = (v > grid.qmin) & (v < grid.qmax)
    # Outside, the clipped code alone is the derivative; on the upper edge round(v) - v would be 0 instead of Qp.
    per_element = v.clamp(grid.qmin, grid.qmax).round_().sub_(v.masked_fill_(~inside, 0)).mul_(upstream)
    step_gradient = per_element.sum_to_size(step.shape).view(raw_step.shape) * gradient_scale
    if grid.ceiling != math.inf:
        inside &= x < grid.ceiling
    return upstream * inside, step_gradient.to(raw_step.dtype) * torch.where(raw_step < 0, -1.0, 1.0)


def rounded(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Codes of x in its own float type, at least float32."""
    return (_capped(widened(x), grid) / step).clamp_(grid.qmin, grid.qmax).round_()


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is half precision: a code is decided in float32, whatever x comes in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _capped(x: Tensor, grid: Grid) -> Tensor:
    return x if grid.ceiling == math.inf else x.clamp_max(grid.ceiling)
