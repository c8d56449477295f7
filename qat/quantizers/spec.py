"""What a quantizer is told: bits, sign and granularity (`docs/algorithms.md`, LSQ)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from qat.words import GradientCount


class Grid(NamedTuple):
    """What one quantization computes with: the axis of its scales (None: one scale), its smallest and largest code, and a
    ceiling above which x counts as the ceiling."""

    axis: int | None
    qmin: int
    qmax: int
    ceiling: float = float("inf")


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor.

    bits:   1 to 8; one bit is the code set {-1, +1}, 0 not among it, and always signed.
    signed: True for [-2^(b-1), 2^(b-1)-1], False for [0, 2^b-1], None while calibration data has yet to decide.
    axis:   None for one scale per tensor, or the axis whose slices each have their own scale.
    offset: LSQ+, codes around a learned zero point (activations).
    power_of_two: scales are powers of two.
    symmetric: the smallest code is left out, so that codes are ±(2^(b-1)-1).
    gradient_count: N of the scale's gradient scale, what shares the scale in one sample, or the whole tensor (as many
            published codes count).
    """

    bits: int
    signed: bool | None = None
    axis: int | None = None
    offset: bool = False
    power_of_two: bool = False
    symmetric: bool = False
    gradient_count: GradientCount = "per_sample"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"QuantSpec: bits must be 1 to 8, got {self.bits}")
        if self.symmetric and not (self.bits > 1 and self.signed):
            raise ValueError(
                "QuantSpec: symmetric codes are signed and have at least 2 bits"
            )
        if self.bits == 1:
            if self.signed is False:
                raise ValueError(
                    "QuantSpec: one-bit codes are -1 and +1, so signed must not be False"
                )
            object.__setattr__(self, "signed", True)

    @classmethod
    def of_weight(cls, bits: int, *, per_channel: bool = True) -> "QuantSpec":
        """The usual grid of weights: signed, a scale per output channel, and no code -128.

        ARM kernels flip inputs to [-128, 127] and add two products in 16 bits, where (-128)·(-128) twice overflows; runtimes
        and other toolkits leave that byte out for the same reason (docs/arithmetic.md). Grids of fewer bits keep all their
        codes, since a file holds them multiplied with less than what would reach -128.
        """
        return cls(
            bits, signed=True, axis=0 if per_channel else None, symmetric=bits == 8
        )

    @property
    def qmin(self) -> int:
        """Smallest code. Raises ValueError while the sign is undecided."""
        if not self._decided_sign():
            return 0
        return -(1 << (self.bits - 1)) + self.symmetric

    @property
    def qmax(self) -> int:
        """Largest code. Raises ValueError while the sign is undecided."""
        if self.bits == 1:
            return 1
        return (
            (1 << (self.bits - 1)) - 1 if self._decided_sign() else (1 << self.bits) - 1
        )

    def with_sign(self, signed: bool) -> "QuantSpec":
        """The same spec with its sign decided."""
        return replace(self, signed=signed)

    def _decided_sign(self) -> bool:
        if self.signed is None:
            raise ValueError(
                "QuantSpec: signed is not decided yet; calibrate(model, loader) decides it from data"
            )
        return self.signed

    def __str__(self) -> str:
        sign = {True: "s", False: "u", None: ""}[self.signed]
        marks = "+" * self.offset + "^" * self.power_of_two
        return f"{sign}{self.bits}{marks}" + (
            "" if self.axis is None else f"/axis{self.axis}"
        )
