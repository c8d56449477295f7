"""LSQ+ : asymmetric activations with a learned offset (Bhalgat et al., arXiv 2004.09576; `docs/algorithms.md`, LSQ+).

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
from qat.quantizers.contract import Start, positive_scale
from qat.quantizers.lsq import LSQ
from qat.quantizers.recompute import Origin
from qat.quantizers.spec import Grid, QuantSpec
from qat.words import Init


class FakeQuantizeLSQPlus(torch.autograd.Function):
    """x (any float dtype and shape), raw scale (), offset () float32 -> x̂ of x's shape and dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        raw_scale: Tensor,
        offset: Tensor,
        top: int,
        gradient_scale: float,
        origin: Origin | None = None,
    ) -> Tensor:
        """origin: how x was made, if backward shall make it again."""
        ctx.save_for_backward(raw_scale, offset, *(() if origin is not None else (x,)))
        ctx.origin, ctx.top, ctx.gradient_scale = origin, top, gradient_scale
        return fused.quantize(x, raw_scale, shifted(raw_scale, offset, top))

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of the raw scale and of the offset; None for the settings."""
        (upstream,), (raw_scale, offset, *kept) = upstreams, ctx.saved_tensors
        x = kept[0] if kept else ctx.origin.compute()
        gradient_scale, zero = (
            ctx.gradient_scale,
            zero_point_of(raw_scale, offset, ctx.top),
        )
        by_x, by_scale = fused.gradients(
            x, upstream, raw_scale, shifted(raw_scale, offset, ctx.top), gradient_scale
        )
        # What was clipped: each such element moves with β, and with s by its code, which is the grid's edge plus z.
        by_offset = (
            upstream.sum(dtype=torch.float64) - by_x.sum(dtype=torch.float64)
        ).float() * gradient_scale
        by_scale = by_scale + torch.where(raw_scale < 0, -zero, zero) * by_offset
        return by_x, by_scale, by_offset, None, None, None


def zero_point_of(raw_scale: Tensor, offset: Tensor, top: int) -> Tensor:
    """z as a float32 tensor ()."""
    return torch.round(-offset / positive_scale(raw_scale)).clamp(0, top)


def shifted(raw_scale: Tensor, offset: Tensor, top: int) -> Grid:
    """The grid around the zero point; of tensors while PyTorch compiles, which could not follow a number."""
    zero = zero_point_of(raw_scale, offset, top)
    if torch.compiler.is_compiling():
        return Grid(None, -zero, top - zero)  # type: ignore[arg-type]
    return Grid(None, -int(zero), top - int(zero))


class LSQPlus(LSQ):
    """LSQ+ quantizer of an activation: unsigned codes in [0, p], p = 2^b - 1, a learned scale s and a learned offset β.

        z = clip(round(-β / s), 0, p)        x̂ = (clip(round(x / s) + z, 0, p) - z) · s

    Bhalgat et al., CVPR Workshops 2020, arXiv 2004.09576.

    `forward(x) == (codes(x) - zero_point) * scale` holds bit for bit, with an integer zero point in [0, p]. Raises
    ValueError for a spec with an axis or scales that are powers of two.
    """

    def __init__(self, spec: QuantSpec, name: str = "") -> None:
        if spec.axis is not None or spec.power_of_two:
            raise ValueError(
                f"LSQ+ {name!r}: activations have one scale and do not support power_of_two; got {spec}"
            )
        super().__init__(spec.with_sign(False), name=name)
        self.offset = nn.Parameter(torch.zeros(()))

    @property
    def zero_point(self) -> int:  # type: ignore[override]
        """The code of 0.0, round(-β / s) clipped to the grid."""
        return int(
            zero_point_of(self.raw_scale.detach(), self.offset.detach(), self.spec.qmax)
        )

    @property
    def grid(self) -> Grid:
        """The grid around the zero point."""
        return shifted(self.raw_scale.detach(), self.offset.detach(), self.spec.qmax)

    def start_for(self, values: Tensor, init: Init) -> Start:
        """Scale and offset of least squared error, whatever `init` says."""
        scale, offset = least_squares_range(values, self.spec)
        return Start(scale, offset=offset)

    def initialize(
        self, scale: Tensor, signed: bool | None = None, offset: Tensor | None = None
    ) -> None:
        """Set scale and offset (); the codes are unsigned whatever the data's sign."""
        super().initialize(scale, False)
        self.offset.data.copy_(torch.zeros(()) if offset is None else offset)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x̂ = s · (round(clip(x / s + z)) - z), of x's shape and dtype."""
        parameters, settings = (
            (self.raw_scale, self.offset),
            (self.spec.qmax, self.gradient_scale(x)),
        )
        return self.run_function(
            FakeQuantizeLSQPlus, x, parameters, settings, fused.quantize
        )

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [0, 2^b - 1]."""
        return super().codes(x) + self.zero_point

    def clips_as_relu(self) -> bool:
        """Never: negative numbers have codes of their own."""
        return False  # what lies below 0 has codes of its own


def least_squares_range(
    x: Tensor, spec: QuantSpec, candidates: int = 24
) -> tuple[Tensor, Tensor]:
    """(scale, offset) of the grid with the least mean squared error on samples x, of `candidates`² shares of x's range.

    The range always holds 0. Shapes ().
    """
    low, high = x.float().min().clamp_max(0.0), x.float().max().clamp_min(0.0)
    if not bool(high > low):
        return torch.ones(()), torch.zeros(())
    shares, best = (
        torch.linspace(1 / candidates, 1, candidates),
        (float("inf"), torch.ones(()), torch.zeros(())),
    )
    for below in shares.tolist() if bool(low < 0) else [1.0]:
        for above in shares.tolist() if bool(high > 0) else [1.0]:
            scale = (high * above - low * below) / spec.qmax
            zero = torch.round(-low * below / scale)
            codes = (x / scale).round_().clamp_(-zero, spec.qmax - zero)
            error = float((codes * scale - x).square_().mean())
            if error < best[0]:
                best = error, scale, -zero * scale
    return best[1], best[2]
