"""Learned step size quantization: LSQ (Esser et al., ICLR 2020, arXiv 1902.08153; `specs/algorithms.md` §3.1).

    v = x / s        codes = round(clip(v, -Qn, Qp))        x̂ = codes · s        (round half to even)

    dx̂/dx = 1 where -Qn < v < Qp, else 0
    dx̂/ds = round(v) - v where -Qn < v < Qp;  -Qn where v <= -Qn;  Qp where v >= Qp
    the step's gradient is scaled by g = 1 / sqrt(N · Qp), N = elements that share the step (weights) or features
    per sample that share it (activations)
    s0 = 2 · mean|x| / sqrt(Qp)

Clipping is decided on v, not on the rounded code. Steps stay positive by reflection: s = max(|raw|, 1e-10), where raw is
the parameter, so that no optimizer can turn a step negative and nothing has to be projected after it.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.quantizers.contract import SMALLEST_STEP, Quantizer, positive_step
from qat.quantizers.spec import QuantSpec

Init = Literal["lsq", "mse"]


class FakeQuantizeLSQ(torch.autograd.Function):
    """x (any shape), raw step broadcastable to x, both float32 or wider -> x̂ of x's shape and dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw_step: Tensor, qmin: int, qmax: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, raw_step)
        ctx.qmin, ctx.qmax, ctx.gradient_scale = qmin, qmax, gradient_scale
        step = positive_step(raw_step)
        return (x / step).clamp_(qmin, qmax).round_().mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (upstream,) = gradients
        x, raw_step = ctx.saved_tensors
        v = x / positive_step(raw_step)
        inside = (v > ctx.qmin) & (v < ctx.qmax)
        # Outside, the clipped code alone is the derivative; on the upper edge round(v) - v would be 0 instead of Qp.
        per_element = v.clamp(ctx.qmin, ctx.qmax).round_().sub_(v.mul_(inside)).mul_(upstream)
        step_gradient = per_element.sum_to_size(raw_step.shape) * ctx.gradient_scale
        return upstream * inside, step_gradient * torch.where(raw_step < 0, -1.0, 1.0), None, None, None


class LSQ(Quantizer):
    """LSQ quantizer of one tensor.

    spec:     bits, sign and axis. An activation's sign may be None until `calibrate` sees data.
    channels: length of `spec.axis`; the step has shape (channels,), else ().
    name:     where it sits in its model, for messages; `quantize_` sets it.

    `forward(x) == (codes(x) - zero_point) * step` holds bit for bit; the zero point of LSQ is 0.
    """

    def __init__(self, spec: QuantSpec, channels: int | None = None, name: str = "") -> None:
        super().__init__(spec, name)
        if spec.bits == 1:
            raise ValueError(f"LSQ {name!r}: its grids have 2 to 8 bits; one bit takes a binary quantizer")
        if (spec.axis is None) != (channels is None):
            raise ValueError(
                f"LSQ {name!r}: channels ({channels}) must be given exactly when spec.axis ({spec.axis}) is"
            )
        self.raw_step = nn.Parameter(torch.full(() if channels is None else (channels,), float("nan")))

    def initialize(self, step: Tensor, signed: bool | None = None) -> None:
        """Set the step (positive, shape of `self.step`), and the sign where the spec left it open."""
        if not bool((torch.isfinite(step) & (step > 0)).all()):
            raise ValueError(f"quantizer {self.name!r}: steps must be positive and finite, got {step.min():g}")
        if self.spec.signed is None or signed is not None:
            if signed is None:
                raise ValueError(f"quantizer {self.name!r}: pass signed=, its spec leaves the sign open")
            self.spec = self.spec.with_sign(signed)
        self.raw_step.data.copy_(step)
        self.initialized = True

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x. Raises RuntimeError while no step has been set."""
        if self.observer is not None:
            self.observer(x.detach())
            return x
        self._require_step()
        return FakeQuantizeLSQ.apply(
            x, self._broadcast(self.raw_step, x), self.spec.qmin, self.spec.qmax, self.gradient_scale(x)
        )

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [spec.qmin, spec.qmax]; what export stores."""
        self._require_step()
        v = x.detach() / self._broadcast(self.step, x)
        return v.clamp_(self.spec.qmin, self.spec.qmax).round_().to(torch.int32)

    def gradient_scale(self, x: Tensor) -> float:
        """g = 1 / sqrt(N · Qp). Weights (signed, given an axis or not) count all that share the step; activations
        count features of one sample, so that the batch size does not change the step's learning rate."""
        shared = x.numel() // (1 if self.spec.axis is None else x.shape[self.spec.axis])
        count = shared if self.is_weight else shared // x.shape[0]
        return float((max(count, 1) * self.spec.qmax) ** -0.5)

    def _require_step(self) -> None:
        if not self.initialized:
            raise RuntimeError(
                f"quantizer {self.name or type(self).__name__!r} has no step yet: run calibrate(model, loader) or load a "
                "checkpoint before using the model"
            )

    def get_extra_state(self) -> dict[str, Any]:
        return {"signed": self.spec.signed, "initialized": self.initialized}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["signed"] is not None:
            self.spec = self.spec.with_sign(state["signed"])
        self.initialized = state["initialized"]

    def extra_repr(self) -> str:
        return f"{self.spec}, {'step set' if self.initialized else 'no step yet'}"


class LSQWeight(LSQ):
    """LSQ of a weight: signed, its step initialised from the weight at once (per channel where spec.axis is set)."""

    is_weight = True

    def __init__(self, spec: QuantSpec, weight: Tensor, name: str = "", init: Init = "lsq") -> None:
        if spec.signed is not True:
            raise ValueError(f"weight quantizer {name!r}: weights are signed, got spec {spec}")
        super().__init__(spec, None if spec.axis is None else weight.shape[spec.axis], name)
        self.initialize(starting_step(weight.detach(), spec, init))


def starting_step(x: Tensor, spec: QuantSpec, init: Init) -> Tensor:
    """Steps to start from, float32, shape () or (channels,): the paper's ("lsq") or least squared error ("mse")."""
    return initial_step(x, spec) if init == "lsq" else least_squares_step(x, spec)


def initial_step(x: Tensor, spec: QuantSpec) -> Tensor:
    """LSQ's s0 = 2 · mean|x| / sqrt(Qp), float32, shape () or (channels,); an all-zero slice gets step 1."""
    dims = [d for d in range(x.dim()) if d != spec.axis]
    magnitude = x.abs().float().mean(dim=dims)
    return torch.where(magnitude > 0, 2 * magnitude / spec.qmax**0.5, 1.0).clamp_min(SMALLEST_STEP)


def least_squares_step(x: Tensor, spec: QuantSpec, candidates: int = 100) -> Tensor:
    """The step, of `candidates` up to the one that clips nothing, with the least mean squared error, per step of `spec`.

    The paper's s0 makes a 2-bit grid well and wastes an 8-bit one: uniform weights reach code 11 of 127.
    """
    rows = (x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)).float()
    reach = torch.maximum(rows.amax(1) / spec.qmax, rows.amin(1) / min(spec.qmin, -1))
    reach = torch.where(reach > 0, reach, 1.0)[:, None]
    best, least = reach, torch.full_like(reach, float("inf"))
    for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
        step = reach * fraction
        error = ((rows / step).clamp_(spec.qmin, spec.qmax).round_() * step - rows).square_().mean(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best.squeeze(1).squeeze(0) if spec.axis is None else best.squeeze(1)
