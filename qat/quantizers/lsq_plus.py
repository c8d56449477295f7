"""LSQ+ : asymmetric activations with a learned offset (Bhalgat et al., arXiv 2004.09576; `specs/algorithms.md` §3.2).

    z = clip(round(-β / s), 0, p)      codes = clip(round(x / s) + z, 0, p)      x̂ = (codes - z) · s,   p = 2^b - 1

    dx̂/dx = 1 where 0 < x/s + z < p, else 0
    dx̂/ds = round(x/s) - x/s inside;  0 below, p above
    dx̂/dβ = 0 inside;  1 where clipped

The paper's x̂ = s · x̄ + β has a real offset; ONNX has integer zero points. Here the rounded zero point is trained with, so
that export changes nothing: gradients are the paper's, straight through the rounding of -β/s. Both gradients are scaled by
LSQ's g. (s, β) start at the least squared error over calibration data, the paper's cure for run-to-run variance.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers import fused
from qat.quantizers.lsq import LSQ, gradients, positive_step, quantize, widened
from qat.quantizers.recompute import origin_of, remember, under_compile
from qat.quantizers.spec import Grid, QuantSpec


class FakeQuantizeLSQPlus(torch.autograd.Function):
    """x (any float dtype and shape), raw step (), offset () float32 -> x̂ of x's shape and dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw_step: Tensor, offset: Tensor, top: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, raw_step, offset)
        ctx.top, ctx.gradient_scale = top, gradient_scale
        if fused.available(x, raw_step):
            return fused.forward(x, raw_step, shifted(raw_step, offset, top))
        step, zero = positive_step(raw_step), zero_point_of(raw_step, offset, top)
        return (widened(x) / step).clamp(-zero, top - zero).round_().mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,), (x, raw_step, offset) = upstreams, ctx.saved_tensors
        scale, zero = ctx.gradient_scale, zero_point_of(raw_step, offset, ctx.top)
        if fused.available(x, raw_step) and not torch.is_grad_enabled():
            by_x, by_step = fused.backward(x, upstream, raw_step, shifted(raw_step, offset, ctx.top), scale)
        else:
            grid = Grid(None, -zero, ctx.top - zero)  # type: ignore[arg-type]  # tensors, which torch.compile can trace
            by_x, by_step = gradients(x, upstream, raw_step, grid, scale)
        # What was clipped: each such element moves with β, and with s by its code, which is the grid's edge plus z.
        by_offset = (upstream.sum(dtype=torch.float64) - by_x.sum(dtype=torch.float64)).float() * scale
        return by_x, by_step + torch.where(raw_step < 0, -zero, zero) * by_offset, by_offset, None, None


def zero_point_of(raw_step: Tensor, offset: Tensor, top: int) -> Tensor:
    """z as a float32 tensor ()."""
    return torch.round(-offset / positive_step(raw_step)).clamp(0, top)


def shifted(raw_step: Tensor, offset: Tensor, top: int) -> Grid:
    zero = int(zero_point_of(raw_step, offset, top))
    return Grid(None, -zero, top - zero)


class LSQPlus(LSQ):
    """LSQ+ quantizer of an activation: unsigned codes in [0, 2^b - 1], a learned step and a learned offset.

    `forward(x) == (codes(x) - zero_point) * step` holds bit for bit, with an integer zero point in [0, 2^b - 1].
    """

    def __init__(self, spec: QuantSpec, name: str = "") -> None:
        if spec.axis is not None or spec.power_of_two:
            raise ValueError(f"LSQ+ {name!r}: activations have one step, and it is no power of two; got {spec}")
        super().__init__(spec.with_sign(False), name=name)
        self.offset = nn.Parameter(torch.zeros(()))

    @property
    def zero_point(self) -> int:  # type: ignore[override]
        return int(zero_point_of(self.raw_step.detach(), self.offset.detach(), self.spec.qmax))

    @property
    def grid(self) -> Grid:
        """The grid around the zero point."""
        return shifted(self.raw_step.detach(), self.offset.detach(), self.spec.qmax)

    def initialize(self, step: Tensor, signed: bool | None = None, offset: Tensor | None = None) -> None:
        """Set step and offset (); the codes are unsigned whatever the data's sign."""
        super().initialize(step, False)
        self.offset.data.copy_(torch.zeros(()) if offset is None else offset)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x. Raises RuntimeError while no step has been set."""
        if self.observer is not None:
            self.observer(x.detach())
            return x
        self._require_step()
        tensors, settings = (x, self.raw_step, self.offset), (self.spec.qmax, self.gradient_scale(x))
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return under_compile(lambda *tensors: FakeQuantizeLSQPlus.apply(*tensors, *settings), *tensors)
        with torch._C.DisableTorchFunction():
            out = FakeQuantizeLSQPlus.apply(*tensors, *settings)
            if origin_of(x) is None:
                remember(out, x, self.raw_step, self.grid, quantize)
        return out

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [0, 2^b - 1]."""
        return super().codes(x) + self.zero_point

    def clips_as_relu(self) -> bool:
        return False  # what lies below 0 has codes of its own


def least_squares_range(x: Tensor, spec: QuantSpec, candidates: int = 24) -> tuple[Tensor, Tensor]:
    """(step, offset) of the grid with the least mean squared error on samples x, of `candidates`² shares of x's range.

    The range always holds 0. Shapes ().
    """
    low, high = x.float().min().clamp_max(0.0), x.float().max().clamp_min(0.0)
    if not bool(high > low):
        return torch.ones(()), torch.zeros(())
    shares, best = torch.linspace(1 / candidates, 1, candidates), (float("inf"), torch.ones(()), torch.zeros(()))
    for below in shares.tolist() if bool(low < 0) else [1.0]:
        for above in shares.tolist() if bool(high > 0) else [1.0]:
            step = (high * above - low * below) / spec.qmax
            zero = torch.round(-low * below / step)
            codes = (x / step).round_().clamp_(-zero, spec.qmax - zero)
            error = float((codes * step - x).square_().mean())
            if error < best[0]:
                best = error, step, -zero * step
    return best[1], best[2]
