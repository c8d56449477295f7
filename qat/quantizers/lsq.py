"""Learned step size quantization: LSQ (Esser et al., ICLR 2020, arXiv 1902.08153; `docs/algorithms.md`, LSQ).

    v = x / s        codes = round(clip(v, -Qn, Qp))        x̂ = codes · s        (round half to even)

    dx̂/dx = 1 where -Qn < v < Qp, else 0
    dx̂/ds = round(v) - v where -Qn < v < Qp;  -Qn where v <= -Qn;  Qp where v >= Qp
    the scale's gradient is scaled by g = 1 / sqrt(N · Qp), N = elements that share the scale (weights) or features
    per sample that share it (activations)
    s0 = 2 · mean|x| / sqrt(Qp)

Clipping is decided on v, not on the rounded code. Scales stay positive by reflection: s = max(|raw|, 1e-10), where raw is
the parameter, so that no optimizer can turn a scale negative and nothing has to be projected after it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers import fused
from qat.quantizers.contract import (
    SMALLEST_SCALE,
    Quantizer,
    Start,
    along,
    positive_scale,
)
from qat.quantizers.power_of_two import power_of_two
from qat.quantizers.recompute import Origin
from qat.quantizers.spec import Grid, QuantSpec
from qat.quantizers.uniform import float_codes
from qat.words import Init


class FakeQuantizeLSQ(torch.autograd.Function):
    """x (any float dtype and shape), raw scale () or (channels of axis,) float32 -> x̂ of x's shape and dtype.

    Half precision is quantized in float32 and x̂ rounded once at the end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        raw_scale: Tensor,
        grid: Grid,
        gradient_scale: float,
        origin: Origin | None = None,
    ) -> Tensor:
        """origin: how x was made, if backward shall make it again."""
        ctx.save_for_backward(*((raw_scale,) if origin is not None else (raw_scale, x)))
        ctx.origin, ctx.grid, ctx.gradient_scale = origin, grid, gradient_scale
        return fused.quantize(x, raw_scale, grid)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the raw scale; None for the settings."""
        (upstream,), (raw_scale, *kept) = upstreams, ctx.saved_tensors
        x = kept[0] if kept else ctx.origin.compute()
        return (
            *fused.gradients(x, upstream, raw_scale, ctx.grid, ctx.gradient_scale),
            None,
            None,
            None,
        )


class LSQ(Quantizer):
    """LSQ quantizer of one tensor.

        x̂ = round(clip(x / s, -Qn, Qp)) · s

    with a learned scale s: dx̂/ds is round(v) - v for v = x / s within (-Qn, Qp), else the nearer bound, times
    1 / sqrt(N · Qp). Esser et al., ICLR 2020, arXiv 1902.08153.

    spec:     bits, sign and axis. An activation's sign may be None until `calibrate` sees data.
    channels: length of `spec.axis`; the scale has shape (channels,), else ().
    name:     where it sits in its model, for messages; `quantize_` sets it.

    `forward(x) == (codes(x) - zero_point) * scale` holds bit for bit in float32; the zero point of LSQ is 0. Where it stands
    in for an activation with an upper clip, x is first limited to that clip (`ceiling`).

    Raises ValueError for a grid of one bit, and for channels without an axis or the reverse.
    """

    # x above it counts as it: the upper clip of an activation that the quantizer stands in for
    ceiling = math.inf

    def __init__(
        self, spec: QuantSpec, channels: int | None = None, name: str = ""
    ) -> None:
        super().__init__(spec, name)
        if spec.bits == 1:
            raise ValueError(
                f"LSQ {name!r}: its grids have 2 to 8 bits; one bit takes a binary quantizer"
            )
        if (spec.axis is None) != (channels is None):
            raise ValueError(
                f"LSQ {name!r}: channels ({channels}) must be given exactly when spec.axis ({spec.axis}) is"
            )
        self.raw_scale = nn.Parameter(
            torch.full(() if channels is None else (channels,), float("nan"))
        )

    @property
    def scale(self) -> Tensor:
        """Positive scales, float32, shape () or (channels,), detached."""
        return positive_scale(self._own_scale().detach())

    def _own_scale(self) -> Tensor:
        return (
            power_of_two(self.raw_scale) if self.spec.power_of_two else self.raw_scale
        )

    @property
    def starts_from_data(self) -> bool:  # type: ignore[override]
        """True of activations; a weight's scale starts from the weight."""
        return not self.is_weight

    def start_for(self, values: Tensor, init: Init) -> Start:
        """By the paper, or by least squared error; of an activation the sign follows from `values`, too."""
        if self.is_weight:
            return Start(starting_scale(values, self.spec, init))
        # An activation that is zero so far (after a norm whose gamma starts at 0) may take either sign; as an unsigned one
        # its zeros would count as clipped, no gradient would pass, and the branch would never come to life.
        signed = bool(values.min() < 0) or not bool(values.any())
        return Start(starting_scale(values, self.spec.with_sign(signed), init), signed)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x̂ = s · round(clip(x / s)), of x's shape and dtype."""
        settings = (self.grid, self.gradient_scale(x))
        return self.run_function(
            FakeQuantizeLSQ, x, (self._own_scale(),), settings, fused.quantize
        )

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [spec.qmin, spec.qmax]. A file stores those of weights, and computes
        those of activations."""
        self.require_scale()
        return float_codes(
            x.detach(), along(self.scale, x, self.spec.axis), self.grid
        ).to(torch.int32)

    @property
    def grid(self) -> Grid:
        """Raises ValueError while the sign is undecided."""
        return Grid(self.spec.axis, self.spec.qmin, self.spec.qmax, self.ceiling)

    def clips_as_relu(self) -> bool:
        """Whether x and max(x, 0) have the same result and gradients here, now."""
        return self.spec.signed is False and self.initialized and self.observer is None

    def gradient_scale(self, x: Tensor) -> float:
        """g = 1 / sqrt(N · Qp). Weights (signed, given an axis or not) count all that share the scale; activations
        count features of one sample, so that the batch size does not change the scale's learning rate."""
        if self.spec.gradient_count == "numel":
            return float((max(x.numel(), 1) * self.spec.qmax) ** -0.5)
        shared = x.numel() // (1 if self.spec.axis is None else x.shape[self.spec.axis])
        count = shared if self.is_weight else shared // max(x.shape[0], 1)
        return float((max(count, 1) * self.spec.qmax) ** -0.5)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.spec}, {'scale set' if self.initialized else 'no scale yet'}"


class LSQWeight(LSQ):
    """LSQ of a weight: signed, its scale initialised from the weight at once (per channel where spec.axis is set)."""

    is_weight = True

    def __init__(
        self, spec: QuantSpec, weight: Tensor, name: str = "", init: Init = "lsq"
    ) -> None:
        if spec.signed is not True:
            raise ValueError(
                f"weight quantizer {name!r}: weights are signed, got spec {spec}"
            )
        super().__init__(
            spec, None if spec.axis is None else weight.shape[spec.axis], name
        )
        self.begin(weight.detach(), init)


def starting_scale(x: Tensor, spec: QuantSpec, init: Init) -> Tensor:
    """Scales to start from, float32, shape () or (channels,): the paper's ("lsq") or least squared error ("mse")."""
    return initial_scale(x, spec) if init == "lsq" else least_squares_scale(x, spec)


def initial_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """LSQ's s0 = 2 · mean|x| / sqrt(Qp), float32, shape () or (channels,); an all-zero slice gets scale 1."""
    dims = [d for d in range(x.dim()) if d != spec.axis]
    magnitude = x.abs().float().mean(dim=dims)
    return torch.where(magnitude > 0, 2 * magnitude / spec.qmax**0.5, 1.0).clamp_min(
        SMALLEST_SCALE
    )


def least_squares_scale(x: Tensor, spec: QuantSpec, candidates: int = 100) -> Tensor:
    """The scale, of `candidates` up to the one that clips nothing, with the least mean squared error, per scale of `spec`.

    The paper's s0 makes a 2-bit grid well and wastes an 8-bit one: uniform weights reach code 11 of 127.
    """
    rows = (
        x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)
    ).float()
    reach = torch.maximum(rows.amax(1) / spec.qmax, rows.amin(1) / min(spec.qmin, -1))
    reach = torch.where(reach > 0, reach, 1.0)[:, None]
    best, least = reach, torch.full_like(reach, float("inf"))
    for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
        scale = reach * fraction
        error = (
            ((rows / scale).clamp_(spec.qmin, spec.qmax).round_() * scale - rows)
            .square_()
            .mean(1, keepdim=True)
        )
        best, least = (
            torch.where(error < least, scale, best),
            torch.minimum(error, least),
        )
    return best.squeeze(1).squeeze(0) if spec.axis is None else best.squeeze(1)
