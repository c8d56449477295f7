"""What every quantizer is and does, whatever its paper.

`forward(x)` fake-quantizes; `codes(x)` gives integers; `forward(x) == (codes(x) - zero_point) * scale` bit for bit in float32
and wider; half precision is this rounded once. BiPer's stage 1 has no codes yet and cannot be exported.
`raw_scale` is the trained parameter of `scale`, a positive number: scale = max(|raw_scale|, 1e-10), or the power of two next
to it where the spec asks for one.

A paper's file says how x is fake-quantized (`fake_quantize`), which codes that are (`codes`) and where to start from
(`start_for`). Here is what a training system asks of all: passing through while somebody observes or all is switched off,
refusing to run without a scale, beginning, state dicts, `torch.compile` and activations that backward makes again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.recompute import (
    Quantize,
    is_checkpointed,
    origin_of,
    remember,
    under_compile,
)
from qat.quantizers.spec import Grid, QuantSpec
from qat.words import EARLIER_NAME, Init

SMALLEST_SCALE = 1e-10
# What of a spec decides which numbers the codes stand for; the sign is apart, since calibration may decide it.
GRID_FIELDS = ("bits", "axis", "offset", "power_of_two", "symmetric")
NONE = -1  # in a state dict


@dataclass(frozen=True)
class Start:
    """Where a quantizer starts from: its scales (of `Quantizer.scale`'s shape), the sign of its codes where data decides it
    (else None), and the offset () of a grid that has one."""

    scale: Tensor
    signed: bool | None = None
    offset: Tensor | None = None


class Quantizer(nn.Module):
    """spec: the grid. name: where it sits in its model, for messages. observer: when set, sees x, which passes through."""

    zero_point = 0
    is_weight = False
    # Whether it has no scale until `calibrate` has shown it what it will quantize
    starts_from_data = False
    raw_scale: nn.Parameter

    def __init__(self, spec: QuantSpec, name: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.initialized = False
        self.observer: Callable[[Tensor], None] | None = None

    @property
    def scale(self) -> Tensor:
        """Positive scales, float32, shape () or (channels,), detached."""
        return positive_scale(self.raw_scale.detach())

    @property
    def grid(self) -> Grid:
        """The codes that x̂ is rounded and clipped to. Raises ValueError while the sign is undecided."""
        return Grid(self.spec.axis, self.spec.qmin, self.spec.qmax)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, in [spec.qmin, spec.qmax]. A file stores those of weights, and computes
        those of activations."""
        raise NotImplementedError(f"{type(self).__name__} defines no codes")

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x̂ of x's shape and dtype, differentiable in x and the quantizer's parameters."""
        raise NotImplementedError(f"{type(self).__name__} defines no fake quantization")

    def start_for(self, values: Tensor, init: Init) -> Start:
        """Where to start from with the weight, or the sampled activations, `values`; changes nothing.

        init: "lsq", the paper's 2 · mean|x| / sqrt(Qp), or "mse", the least squared error, where the quantizer has both.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say where to start from"
        )

    def initialize(
        self, scale: Tensor, signed: bool | None = None, offset: Tensor | None = None
    ) -> None:
        """Set the scales (positive, of the shape of `self.scale`), the sign where the spec left it open, and the offset () of
        a quantizer that has one. Raises ValueError naming the quantizer."""
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(
                f"quantizer {self.name!r}: scales must be positive and finite, got {scale.min():g}"
            )
        if self.spec.signed is None and signed is None:
            raise ValueError(
                f"quantizer {self.name!r}: pass signed=, its spec leaves the sign open"
            )
        if offset is not None:
            raise ValueError(f"quantizer {self.name!r}: its grid has no offset")
        if signed is not None:
            self.spec = self.spec.with_sign(signed)
        self.raw_scale.data.copy_(scale)
        self.initialized = True

    def begin(self, values: Tensor, init: Init = "lsq") -> None:
        """Initialize from a weight or from sampled activations. Raises ValueError for what is not finite."""
        kind = "weight of quantizer" if self.is_weight else "input of quantizer"
        require_finite(values, f"{kind} {self.name!r}")
        start = self.start_for(values, init)
        self.initialize(start.scale, start.signed, start.offset)

    def forward(self, x: Tensor) -> Tensor:
        """x̂; x itself while it is observed. Raises RuntimeError while no scale has been set."""
        if self.observer is not None:
            self.observer(x.detach())
            return x
        self.require_scale()
        # Such as a mask that activations are multiplied by
        if not x.is_floating_point():
            x = x.float()
        return self.fake_quantize(x)

    def require_scale(self) -> None:
        """Raises RuntimeError naming the quantizer while nobody has set its scale."""
        if not self.initialized:
            raise RuntimeError(
                f"quantizer {self.name or type(self).__name__!r} has no scale yet: run calibrate(model, loader) or load a "
                "checkpoint before using the model"
            )

    def run_function(
        self,
        function: type[torch.autograd.Function],
        x: Tensor,
        parameters: tuple[Tensor, ...],
        settings: tuple[Any, ...],
        quantize: Quantize,
    ) -> Tensor:
        """`function.apply(x, *parameters, *settings, origin)`, so that autograd need not keep both x and x̂.

        origin: how x was made, None where it has to be kept. `quantize(x, parameters[0], self.grid)` is x̂, too.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return under_compile(
                lambda *tensors: function.apply(*tensors, *settings, None),
                x,
                *parameters,
            )
        # A mode that watches the model need not see every stride we ask for
        with torch._C.DisableTorchFunction():
            # All is computed again anyway; an origin would keep x alive as long as x̂
            if is_checkpointed():
                return function.apply(x, *parameters, *settings, None)
            out: Tensor = function.apply(x, *parameters, *settings, origin_of(x))
            remember(out, x, parameters[0], self.grid, quantize)
        return out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if f"{prefix}{EARLIER_NAME}" in state_dict:
            state_dict[f"{prefix}raw_scale"] = state_dict.pop(f"{prefix}{EARLIER_NAME}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def get_extra_state(self) -> Tensor:
        """What a state dict keeps besides parameters: sign, whether a scale is set, and the grid that it was trained for.

        One number each, int64, -1 for None; a tensor, because safetensors and others save nothing else.
        """
        values = [self.spec.signed, self.initialized]
        for field in GRID_FIELDS:
            values.append(getattr(self.spec, field))
        return torch.tensor([NONE if value is None else int(value) for value in values])

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take over sign and initialization; a dict is what earlier versions saved.

        Raises ValueError when the state dict comes from a quantizer of another grid: its scale means other numbers.
        """
        read = _read_state(state) if isinstance(state, Tensor) else state
        grid = read.get("grid")  # the first versions saved none
        if grid is not None:
            self._require_same_grid(grid)
        self.initialized = read["initialized"]
        if read["signed"] is not None:
            self.spec = self.spec.with_sign(read["signed"])

    def _require_same_grid(self, grid: Mapping[str, Any]) -> None:
        theirs = []
        ours = []
        for field in GRID_FIELDS:
            own = getattr(self.spec, field)
            if grid.get(field) != own:
                theirs.append(f"{field} {grid.get(field)}")
                ours.append(f"{field} {own}")
        if ours:
            raise ValueError(
                f"quantizer {self.name!r}: the state dict was trained with {', '.join(theirs)}, this model has "
                f"{', '.join(ours)}; quantize the model by the rules that it was trained with"
            )


def _read_state(state: Tensor) -> dict[str, Any]:
    """What `Quantizer.get_extra_state` packed."""
    numbers = state.tolist()
    signed, initialized, bits, axis, offset, power_of_two, symmetric = numbers
    return {
        "signed": None if signed == NONE else bool(signed),
        "initialized": bool(initialized),
        "grid": {
            "bits": bits,
            "axis": None if axis == NONE else axis,
            "offset": bool(offset),
            "power_of_two": bool(power_of_two),
            "symmetric": bool(symmetric),
        },
    }


def require_finite(x: Tensor, what: str) -> None:
    """Raises ValueError naming `what` when x holds nan or an infinity, from which no scale can be taken."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad:,} of {x.numel():,} values are nan or infinite, so it gets no scale; look for the first layer or "
            "image that is not finite"
        )


def along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Scales (channels,) shaped to broadcast along `axis` of x; a scale of the whole tensor as it is."""
    if axis is None:
        return scale
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.view(shape)


def positive_scale(raw_scale: Tensor) -> Tensor:
    """max(|raw_scale|, 1e-10), of the same shape."""
    return raw_scale.abs().clamp_min(SMALLEST_SCALE)


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (both zeros included), else -1, in x's dtype: two values, never the 0 of `torch.sign`."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
