"""Weights that swing between two codes (Nagel et al., arXiv 2203.11086): telemetry, damping, freezing.

A weight oscillates in a step when its code changes against the direction of its last change. Its frequency and its mean
code are followed by exponential means:

    f ← (1 - m) f + m · oscillated          k̄ ← (1 - m) k̄ + m · code

Freezing holds a latent weight whose f passes a threshold at round(k̄) · s, whatever becomes of its scale s. Damping adds
λ · Σ (w̃ - clip(w))², w̃ the fake-quantized weight held constant: a pull to the grid point, none outside the grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qat.quantizers.lsq import LSQ


class Oscillation:
    """Follows the codes of latent `weights`, each quantized by the quantizer at its place.

    momentum: m of the running means. freeze_above: frequency that freezes a weight, None for never.
    """

    def __init__(
        self,
        weights: Sequence[Parameter],
        quantizers: Sequence[LSQ],
        *,
        momentum: float = 0.01,
        freeze_above: float | None = None,
    ) -> None:
        self.weights, self.quantizers = tuple(weights), tuple(quantizers)
        self.momentum, self.freeze_above = momentum, freeze_above
        self.restart()

    def restart(self) -> None:
        """Forget what was seen, as when quantization begins or scales are set anew."""
        self.last = [self._codes(i) for i in range(len(self.weights))]
        self.direction = [torch.zeros_like(c) for c in self.last]
        self.frequency = [torch.zeros(w.shape, device=w.device) for w in self.weights]
        self.mean = [c.float() for c in self.last]
        self.held = [torch.zeros_like(c, dtype=torch.bool) for c in self.last]

    @torch.no_grad()
    def update(self) -> float:
        """After an optimizer step; returns the share of weights whose code swung back in this step."""
        swung = total = 0
        for i in range(len(self.weights)):
            self._hold(i)
            now = self._codes(i)
            # int8: a difference would overflow
            moved = (now > self.last[i]).to(torch.int8) - (now < self.last[i]).to(
                torch.int8
            )
            back = (moved * self.direction[i]) < 0
            self.direction[i] = torch.where(moved != 0, moved, self.direction[i])
            self.frequency[i].lerp_(back.float(), self.momentum)
            self.mean[i].lerp_(now.float(), self.momentum)
            if self.freeze_above is not None:
                self.held[i] |= self.frequency[i] > self.freeze_above
                self._hold(i)
                now = torch.where(
                    self.held[i], self.mean[i].round().to(torch.int8), now
                )
            self.last[i] = now
            swung, total = swung + int(back.sum()), total + back.numel()
        return swung / max(total, 1)

    def _hold(self, i: int) -> None:
        """Put frozen weights to their point of the grid, whatever the optimizer did."""
        if self.freeze_above is not None and bool(self.held[i].any()):
            weight, scale = self.weights[i], spread(self.quantizers[i], self.weights[i])
            weight.copy_(
                torch.where(self.held[i], self.mean[i].round() * scale, weight)
            )

    def _codes(self, i: int) -> Tensor:
        return self.quantizers[i].codes(self.weights[i]).to(torch.int8)

    def share_above(self, frequency: float = 0.005) -> float:
        """Share of weights that oscillate more often than `frequency` of the steps."""
        above = sum(int((f > frequency).sum()) for f in self.frequency)
        return above / max(sum(f.numel() for f in self.frequency), 1)

    @property
    def frozen(self) -> float:
        """Share of the weights that are frozen."""
        return sum(int(h.sum()) for h in self.held) / max(
            sum(h.numel() for h in self.held), 1
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            k: list(getattr(self, k))
            for k in ("last", "direction", "frequency", "mean", "held")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for key, values in state.items():
            setattr(
                self,
                key,
                [v.to(w.device) for v, w in zip(values, self.weights, strict=True)],
            )


def damping(weights: Sequence[Tensor], quantizers: Sequence[LSQ]) -> Tensor:
    """Σ over all weights of (w̃ - clip(w))²; scalar with gradient to the latent weights inside their grid alone."""
    terms = []
    for weight, quantizer in zip(weights, quantizers, strict=True):
        scale = spread(quantizer, weight)
        point = quantizer.codes(weight) * scale
        inside = weight.clamp(quantizer.spec.qmin * scale, quantizer.spec.qmax * scale)
        terms.append((point - inside).square().sum())
    return torch.stack(terms).sum()


def spread(quantizer: LSQ, weight: Tensor) -> Tensor:
    """The quantizer's scale, detached, in a shape that broadcasts over `weight`."""
    if quantizer.spec.axis is None:
        return quantizer.scale
    return quantizer.scale.view(
        [-1 if d == quantizer.spec.axis else 1 for d in range(weight.dim())]
    )
