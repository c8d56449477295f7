"""What every quantizer is, whatever its paper.

`forward(x)` fake-quantizes; `codes(x)` gives the integers; `forward(x) == (codes(x) - zero_point) * step` bit for bit.
`raw_step` is the parameter behind `step`, a positive number: step = max(|raw_step|, 1e-10).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec

SMALLEST_STEP = 1e-10
# What of a spec decides which numbers the codes stand for; the sign is apart, since calibration may decide it.
GRID_FIELDS = ("bits", "axis", "offset", "power_of_two", "symmetric")


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

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict keeps besides tensors: the grid that the step was trained for."""
        grid = {field: getattr(self.spec, field) for field in GRID_FIELDS}
        return {"signed": self.spec.signed, "initialized": self.initialized, "grid": grid}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the state dict comes from a quantizer of another grid: its step means other numbers."""
        grid = state.get("grid")  # state dicts of earlier versions have none
        if grid is not None:
            self._require_same_grid(grid)
        self.initialized = state["initialized"]

    def _require_same_grid(self, grid: Mapping[str, Any]) -> None:
        different = [field for field in GRID_FIELDS if grid.get(field) != getattr(self.spec, field)]
        if different:
            theirs = ", ".join(f"{field} {grid.get(field)}" for field in different)
            ours = ", ".join(f"{field} {getattr(self.spec, field)}" for field in different)
            raise ValueError(
                f"quantizer {self.name!r}: the state dict was trained with {theirs}, this model has {ours}; quantize the "
                "model by the rules that it was trained with"
            )


def require_finite(x: Tensor, what: str) -> None:
    """Raises ValueError naming `what` when x holds nan or an infinity, from which no step can be taken."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad:,} of {x.numel():,} values are nan or infinite, so it gets no step; look for the first layer or "
            "image that is not finite"
        )


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
