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
NONE = -1  # in a state dict


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

    def get_extra_state(self) -> Tensor:
        """What a state dict keeps besides parameters: sign, whether a step is set, and the grid that it was trained for.

        One number each, int64, -1 for None; a tensor, because safetensors and others save nothing else.
        """
        values = [self.spec.signed, self.initialized, *(getattr(self.spec, field) for field in GRID_FIELDS)]
        return torch.tensor([NONE if value is None else int(value) for value in values])

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take over sign and initialization; a dict is what earlier versions saved.

        Raises ValueError when the state dict comes from a quantizer of another grid: its step means other numbers.
        """
        read = _read_state(state) if isinstance(state, Tensor) else state
        grid = read.get("grid")  # the first versions saved none
        if grid is not None:
            self._require_same_grid(grid)
        self.initialized = read["initialized"]
        if read["signed"] is not None:
            self.spec = self.spec.with_sign(read["signed"])

    def _require_same_grid(self, grid: Mapping[str, Any]) -> None:
        different = [field for field in GRID_FIELDS if grid.get(field) != getattr(self.spec, field)]
        if different:
            theirs = ", ".join(f"{field} {grid.get(field)}" for field in different)
            ours = ", ".join(f"{field} {getattr(self.spec, field)}" for field in different)
            raise ValueError(
                f"quantizer {self.name!r}: the state dict was trained with {theirs}, this model has {ours}; quantize the "
                "model by the rules that it was trained with"
            )


def _read_state(state: Tensor) -> dict[str, Any]:
    signed, initialized, bits, axis, *flags = state.tolist()
    names = ("offset", "power_of_two", "symmetric")
    grid = {"bits": bits, "axis": None if axis == NONE else axis} | dict(zip(names, map(bool, flags), strict=True))
    return {"signed": None if signed == NONE else bool(signed), "initialized": bool(initialized), "grid": grid}


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
