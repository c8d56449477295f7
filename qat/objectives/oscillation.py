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
        self.weights = tuple(weights)
        self.quantizers = tuple(quantizers)
        self.momentum = momentum
        self.freeze_above = freeze_above
        self.restart()

    def restart(self) -> None:
        """Forget what was seen, as when quantization begins or scales are set anew."""
        self.last: list[Tensor] = []
        self.direction: list[Tensor] = []
        self.frequency: list[Tensor] = []
        self.mean: list[Tensor] = []
        self.held: list[Tensor] = []
        for index, weight in enumerate(self.weights):
            codes = self._codes(index)
            self.last.append(codes)
            self.direction.append(torch.zeros_like(codes))
            self.frequency.append(torch.zeros(weight.shape, device=weight.device))
            self.mean.append(codes.float())
            self.held.append(torch.zeros_like(codes, dtype=torch.bool))

    @torch.no_grad()
    def update(self) -> float:
        """After an optimizer step; returns the share of weights whose code swung back in this step."""
        swung = 0
        total = 0
        for index in range(len(self.weights)):
            back = self._follow(index)
            swung += int(back.sum())
            total += back.numel()
        return swung / max(total, 1)

    def _follow(self, i: int) -> Tensor:
        """Note the codes that a weight has now; returns which of them swung back."""
        self._hold(i)
        now = self._codes(i)
        before = self.last[i]
        # int8: a difference of the codes would overflow
        moved = (now > before).to(torch.int8) - (now < before).to(torch.int8)
        swung_back = (moved * self.direction[i]) < 0
        self.direction[i] = torch.where(moved != 0, moved, self.direction[i])
        self.frequency[i].lerp_(swung_back.float(), self.momentum)
        self.mean[i].lerp_(now.float(), self.momentum)
        if self.freeze_above is not None:
            self.held[i] |= self.frequency[i] > self.freeze_above
            self._hold(i)
            held_codes = self.mean[i].round().to(torch.int8)
            now = torch.where(self.held[i], held_codes, now)
        self.last[i] = now
        return swung_back

    def _hold(self, i: int) -> None:
        """Put frozen weights to their point of the grid, whatever the optimizer did."""
        if self.freeze_above is None or not bool(self.held[i].any()):
            return
        weight = self.weights[i]
        scale = scale_over(self.quantizers[i], weight)
        points = self.mean[i].round() * scale
        weight.copy_(torch.where(self.held[i], points, weight))

    def _codes(self, i: int) -> Tensor:
        return self.quantizers[i].codes(self.weights[i]).to(torch.int8)

    def share_above(self, frequency: float = 0.005) -> float:
        """Share of weights that oscillate more often than `frequency` of the steps."""
        return _share([of_weight > frequency for of_weight in self.frequency])

    @property
    def frozen(self) -> float:
        """Share of the weights that are frozen."""
        return _share(self.held)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "last": list(self.last),
            "direction": list(self.direction),
            "frequency": list(self.frequency),
            "mean": list(self.mean),
            "held": list(self.held),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for key, values in state.items():
            moved = []
            for value, weight in zip(values, self.weights, strict=True):
                moved.append(value.to(weight.device))
            setattr(self, key, moved)


def _share(masks: Sequence[Tensor]) -> float:
    """Share of the elements of all `masks` that are true."""
    count = 0
    total = 0
    for mask in masks:
        count += int(mask.sum())
        total += mask.numel()
    return count / max(total, 1)


def damping(weights: Sequence[Tensor], quantizers: Sequence[LSQ]) -> Tensor:
    """Σ over all weights of (w̃ - clip(w))²; scalar with gradient to the latent weights inside their grid alone."""
    terms = []
    for weight, quantizer in zip(weights, quantizers, strict=True):
        spec = quantizer.spec
        scale = scale_over(quantizer, weight)
        point = quantizer.codes(weight) * scale
        inside = weight.clamp(spec.qmin * scale, spec.qmax * scale)
        terms.append((point - inside).square().sum())
    return torch.stack(terms).sum()


def scale_over(quantizer: LSQ, weight: Tensor) -> Tensor:
    """The quantizer's scale, detached, in a shape that broadcasts over `weight`."""
    axis = quantizer.spec.axis
    if axis is None:
        return quantizer.scale
    shape = [1] * weight.dim()
    shape[axis] = -1
    return quantizer.scale.view(shape)
