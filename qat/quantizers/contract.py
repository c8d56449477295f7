"""What every quantizer is, whatever its paper.

`forward(x)` fake-quantizes; `codes(x)` gives the integers; `forward(x) == (codes(x) - zero_point) * step` bit for bit.
`raw_step` is the parameter behind `step`, a positive number: step = max(|raw_step|, 1e-10).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec

SMALLEST_STEP = 1e-10


class Quantizer(nn.Module):
    """spec: the grid. name: where it sits in its model, for messages. observer: when set, sees x, which passes through."""

    zero_point = 0
    is_weight = False
    raw_step: nn.Parameter

    def __init__(self, spec: QuantSpec, name: str = "") -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self.initialized = False
        self.observer: Callable[[Tensor], None] | None = None

    @property
    def step(self) -> Tensor:
        """Positive steps, float32, shape () or (channels,), detached."""
        return positive_step(self.raw_step.detach())

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [spec.qmin, spec.qmax]; what export stores."""
        raise NotImplementedError(f"{type(self).__name__} defines no codes")


def along(step: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Steps (channels,) shaped to broadcast along `axis` of x; a step of the whole tensor as it is."""
    if axis is None:
        return step
    shape = [1] * x.dim()
    shape[axis] = -1
    return step.view(shape)


def positive_step(raw_step: Tensor) -> Tensor:
    return raw_step.abs().clamp_min(SMALLEST_STEP)


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (both zeros included), else -1, in x's dtype: two values, never the 0 of `torch.sign`."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
