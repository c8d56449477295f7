"""BiPer: binary weights through a periodic function (Vargas et al., CVPR 2024, arXiv 2404.01278; `docs/algorithms.md`).

    stage 1   ŵ = α · sin(ω₀w)             dŵ/dw = α · ω₀ · cos(ω₀w)
    stage 2   ŵ = α · sign(sin(ω₀w))       dŵ/dw = α · ω₀ · cos(ω₀w), the sign passing gradients unchanged

The square wave has period 2π/ω₀, so a weight has many decision boundaries near and none is ever far away. sign(0) = +1. ω₀
may be scheduled (`set_frequency`) or learned (dŵ/dω₀ = α · w · cos(ω₀w)).

Quantization error for w ~ Laplace(0, b), a = ω₀b, best scale γ* = E|sin(ω₀w)| = a/(1+a²) · coth(π/2a):

    QE(a) = E(γ* - |sin|)² = 2a²/(1+4a²) - γ*²                 rises with a to 0.1028 at 0.955, then sinks to 0.0947
    L1(a) = E||sin| - 1| = 1 - γ*                              what the published script plots; falls with a to 0.363

The published CIFAR recipe adds τ · Σ mean sin²(ω₀w) to the loss, which *pulls |sin| towards 0*, the decision boundary,
and so raises the very error the frequency is chosen to lower; it is an option, off by default.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.quantizers.binary import BinaryWeight
from qat.quantizers.spec import QuantSpec

Stage = Literal[1, 2]


class PeriodicWeight(BinaryWeight):
    """BiPer's weight quantizer: ŵ = α · sin(ω₀ w) in stage 1, α · sign(sin(ω₀ w)) in stage 2.

    The contract with `codes` holds in stage 2. Vargas et al., CVPR 2024, arXiv 2404.01278.

    frequency: ω₀ at the start, a float32 buffer, or a parameter when `learn_frequency`.
    """

    def __init__(
        self,
        spec: QuantSpec,
        weight: Tensor,
        name: str = "",
        *,
        frequency: float = 20.0,
        stage: Stage = 2,
        learn_frequency: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(spec, weight, name, **options)
        if frequency <= 0:
            raise ValueError(
                f"weight quantizer {name!r}: the frequency must be positive, got {frequency}"
            )
        self.stage: Stage = stage
        start = torch.tensor(float(frequency))
        if learn_frequency:
            self.frequency: Tensor = nn.Parameter(start)
        else:
            self.register_buffer("frequency", start)
        self.begin(weight.detach())

    def before_sign(self, weight: Tensor) -> Tensor:
        """sin(ω₀w), of the weight's shape."""
        return torch.sin(self.frequency * weight)

    def relaxed(self, u: Tensor) -> Tensor:
        """u itself in stage 1, whose weights are real; its sign in stage 2."""
        return u if self.stage == 1 else super().relaxed(u)

    @torch.no_grad()
    def set_frequency(self, frequency: float) -> None:
        """Put ω₀ where a schedule wants it; α is left alone."""
        self.frequency.fill_(frequency)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.spec}, frequency {float(self.frequency.detach()):g}, stage {self.stage}"


def periodic_regulariser(pairs: Iterable[tuple[PeriodicWeight, Tensor]]) -> Tensor:
    """Σ over layers of mean(½ - ½cos(2ω₀w)) = Σ mean sin²(ω₀w), a differentiable scalar; off by default, see above."""
    return torch.stack(
        [(0.5 - 0.5 * torch.cos(2 * q.frequency * w)).mean() for q, w in pairs]
    ).sum()


def best_scale(a: float) -> float:
    """γ* = E|sin(ω₀w)| for w ~ Laplace(0, b), a = ω₀b > 0."""
    return a / (1 + a * a) / math.tanh(math.pi / (2 * a))


def quantization_error(a: float) -> float:
    """Mean squared error of γ*·sign(sin(ω₀w)) against sin(ω₀w) for w ~ Laplace(0, b), a = ω₀b > 0."""
    return 2 * a * a / (1 + 4 * a * a) - best_scale(a) ** 2
