"""Weights that swing between two codes (Nagel et al., arXiv 2203.11086): telemetry, damping, freezing.

A weight oscillates in a step when its code changes against the direction of its last change. Its frequency is followed by
an exponential mean: f ← (1 - m) f + m · oscillated. Freezing holds a latent weight whose frequency passes a threshold at the
running mean of its codes, rounded; damping adds λ · Σ (w̃ - clip(w))², the pull of latent weights to their grid point.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Oscillation:
    """Follows the codes of weights. weights: latent parameters; codes, steps: how each is quantized now.

    momentum: m of the running means. freeze_above: frequency that freezes a weight, None for never.
    """

    def __init__(
        self,
        weights: Sequence[Parameter],
        codes: Sequence[Callable[[Tensor], Tensor]],
        steps: Sequence[Callable[[], Tensor]],
        *,
        momentum: float = 0.01,
        freeze_above: float | None = None,
    ) -> None:
        self.weights, self.codes, self.steps = tuple(weights), tuple(codes), tuple(steps)
        self.momentum, self.freeze_above = momentum, freeze_above
        self.last = [code(w).to(torch.int8) for code, w in zip(self.codes, self.weights, strict=True)]
        self.direction = [torch.zeros_like(c) for c in self.last]
        self.frequency = [torch.zeros(w.shape, device=w.device) for w in self.weights]
        self.mean = [c.float() for c in self.last]
        self.held = [torch.zeros_like(c, dtype=torch.bool) for c in self.last]

    @torch.no_grad()
    def update(self) -> float:
        """After an optimizer step; returns the share of weights whose code swung back in this step."""
        swung = total = 0
        for i, weight in enumerate(self.weights):
            if self.freeze_above is not None:
                self._hold(i)
            now = self.codes[i](weight).to(torch.int8)
            moved = (now - self.last[i]).sign()
            back = (moved * self.direction[i]) < 0
            self.direction[i] = torch.where(moved != 0, moved, self.direction[i])
            self.frequency[i].lerp_(back.float(), self.momentum)
            self.mean[i].lerp_(now.float(), self.momentum)
            self.last[i] = now
            if self.freeze_above is not None:
                self.held[i] |= self.frequency[i] > self.freeze_above
            swung, total = swung + int(back.sum()), total + back.numel()
        return swung / max(total, 1)

    def _hold(self, i: int) -> None:
        """Put frozen weights back to their point of the grid, whatever the optimizer did."""
        step = self.steps[i]().view(-1, *[1] * (self.weights[i].dim() - 1))
        self.weights[i].copy_(torch.where(self.held[i], self.mean[i].round() * step, self.weights[i]))

    def share_above(self, frequency: float = 0.005) -> float:
        """Share of weights that oscillate more often than `frequency` of the steps."""
        above = sum(int((f > frequency).sum()) for f in self.frequency)
        return above / max(sum(f.numel() for f in self.frequency), 1)

    @property
    def frozen(self) -> float:
        return sum(int(h.sum()) for h in self.held) / max(sum(h.numel() for h in self.held), 1)

    def state_dict(self) -> dict[str, Any]:
        return {k: list(getattr(self, k)) for k in ("last", "direction", "frequency", "mean", "held")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, values in state.items():
            setattr(self, key, [v.to(w.device) for v, w in zip(values, self.weights, strict=True)])


def damping(weights: Sequence[Tensor], quantizers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Σ over weights inside the clipping range of (w - ŵ)², ŵ held constant; scalar with gradient to the latent weights."""
    terms = []
    for weight, quantize in zip(weights, quantizers, strict=True):
        point = quantize(weight).detach()
        terms.append((weight - point).square().sum())
    return torch.stack(terms).sum()
