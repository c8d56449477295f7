"""Two small nets whose gradients are written out in NumPy, float64."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import Parameter

from qat.quantizers.lsq import LSQ
from qat.quantizers.spec import QuantSpec

Array = NDArray[np.float64]


class TwoLayers(nn.Module):
    """logits = tanh(x A) B, float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = np.random.default_rng(seed).normal
        self.a = Parameter(torch.from_numpy(draw(size=(5, 7))))
        self.b = Parameter(torch.from_numpy(draw(size=(7, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) @ self.b


def two_layer_gradients(a: Array, b: Array, x: Array, labels: Array) -> tuple[float, Array, Array]:
    """(mean cross entropy, its gradients by A and B), by hand."""
    hidden = np.tanh(x @ a)
    logits = hidden @ b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(x))
    error = p.copy()
    error[rows, labels] -= 1
    error /= len(x)
    return -np.log(p[rows, labels]).mean(), x.T @ ((error @ b.T) * (1 - hidden**2)), hidden.T @ error


class OneScale(nn.Module):
    """y = w2 · Q(w1 x), one 3-bit signed LSQ scale between two weights; loss ½ mean (y - t)²."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = Parameter(torch.tensor(0.8)), Parameter(torch.tensor(1.3))
        self.quantizer = LSQ(QuantSpec(3, signed=True), name="middle")
        self.quantizer.initialize(torch.tensor(0.37))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2 * self.quantizer(self.w1 * x)


def one_scale_gradients(w1: float, w2: float, s: float, x: Array, t: Array, gradient_scale: float) -> Array:
    """Gradients of ½ mean (y - t)² by (w1, w2, s), LSQ's equations written out."""
    v = w1 * x / s
    code = np.rint(np.clip(v, -4, 3))
    inside = (v > -4) & (v < 3)
    by_y = (w2 * code * s - t) / len(x)
    by_scale = np.where(inside, code - v, np.clip(v, -4, 3))
    return np.array([
        (by_y * w2 * inside * x).sum(), (by_y * code * s).sum(), (by_y * w2 * by_scale).sum() * gradient_scale
    ])  # fmt: skip


@dataclass
class Problem:
    """A model, its parameters, and a closure over one batch."""

    model: nn.Module
    x: Tensor
    target: Tensor

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.model.parameters())

    def closure(self) -> Tensor:
        out = self.model(self.x)
        if self.target.is_floating_point():
            loss = 0.5 * (out - self.target).square().mean()
        else:
            loss = F.cross_entropy(out, self.target)
        loss.backward()
        return loss.detach()


def two_layers(seed: int = 0) -> Problem:
    draw = np.random.default_rng(seed + 100)
    x, labels = draw.normal(size=(11, 5)), draw.integers(0, 3, 11)
    return Problem(TwoLayers(seed), torch.from_numpy(x), torch.from_numpy(labels))


def one_scale() -> Problem:
    draw = np.random.default_rng(3)
    return Problem(
        OneScale(), torch.from_numpy(draw.normal(size=13)).float(), torch.from_numpy(draw.normal(size=13)).float()
    )
