"""How runtimes compute one operation on codes, in NumPy: every arithmetic that is known of any of them.

The ONNX Runtime builds for x86, 64-bit ARM and WebAssembly give the same integer sums for a layer and requantize them
alike, but they differ in sums, products, requantizations and pools of codes: in the order of additions, in whether a
multiplication and an addition round once (fused) or twice, in whether the zero point is added before or after rounding, in
how ties are rounded, and in whether they compute in float32 or in fixed point. docs/arithmetic.md has the table.

An arithmetic gives the rounded result with the zero point, before it is clipped to the codes of the output. It is written
for comparing, not for speed: `export/ties.py` moves scales until all of them agree.

    a, b      centred codes (code minus zero point), int64
    s, z      scale (float32) and zero point of an input; s_y, z_y of the output
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from export.lowered import LoweredQuantizer

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Round = Callable[[NDArray[np.floating]], NDArray[np.floating]]
Results = Iterator[tuple[str, Integers]]

one = np.float32
MANTISSA_BITS = 24
FIXED_POINT_BITS = 21  # of the larger multiplier of ARM's sums
# Outside of which ARM computes sums in float32 too
FIXED_POINT_RATIOS = (2.0**-14, 2.0**8)
FIXED_POINT_SHIFTS = range(13, 32)


def half_even(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Rounding to the nearest integer, ties to even."""
    return np.rint(x)


def half_away(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """In float64, where adding a half to a float32 is exact."""
    wide = np.asarray(x, np.float64)
    return np.copysign(np.floor(np.abs(wide) + 0.5), wide)


def fused(
    x: NDArray[np.generic] | int, y: np.float32 | Floats, z: np.float32 | Floats
) -> Floats:
    """x · y + z, rounded once. A product of an integer of few bits and a float32 is exact in float64."""
    return (
        np.asarray(x, np.float64) * np.asarray(y, np.float64)
        + np.asarray(z, np.float64)
    ).astype(one)


def rounded_inside(x: Floats, zero_point: int, rounding: Round = half_even) -> Integers:
    """The zero point is added before rounding, in float32."""
    return rounding((x + one(zero_point)).astype(one)).astype(np.int64)


def rounded_outside(
    x: NDArray[np.floating], zero_point: int, rounding: Round = half_even
) -> Integers:
    """round(x) + zero point: x is rounded before the zero point is added."""
    return rounding(x).astype(np.int64) + zero_point


def sums(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """(name, results) of a·s_a + b·s_b on the grid `out`. The first is the integer definition (export/reference.py)."""
    ratio_a, ratio_b = one(first.scale / out.scale), one(second.scale / out.scale)
    codes_a, codes_b = a + first.zero_point, b + second.zero_point
    for kind, constant in _constants_of_sums(ratio_a, ratio_b, first, second, out):
        # x86 with FMA, edgeqat's kernels: codes with their zero points, all that is constant added first.
        b_first = fused(codes_a, ratio_a, fused(codes_b, ratio_b, constant))
        a_first = fused(codes_b, ratio_b, fused(codes_a, ratio_a, constant))
        yield f"fused, b first, {kind}", half_even(b_first).astype(np.int64)
        yield f"fused, a first, {kind}", half_even(a_first).astype(np.int64)
        products = (codes_a.astype(one) * ratio_a, codes_b.astype(one) * ratio_b)
        # SSE2: a first
        for name, (x, y) in {"a first": products, "b first": products[::-1]}.items():
            yield (
                f"unfused, {name}, {kind}",
                half_even((constant + x) + y).astype(np.int64),
            )
    if (in_fixed_point := _fixed_point_sum(a, b, ratio_a, ratio_b, out)) is not None:
        yield "fixed point", in_fixed_point
    real_a, real_b = a.astype(one) * first.scale, b.astype(one) * second.scale
    reals = {
        "unfused": real_a + real_b,
        "fused a": fused(a, first.scale, real_b),
        "fused b": fused(b, second.scale, real_a),
    }
    for name, real in reals.items():
        yield from _quotients(name, real, out)
    for name, scaled in {
        "ratios": a.astype(one) * ratio_a + b.astype(one) * ratio_b,
        "ratios, fused a": fused(a, ratio_a, b.astype(one) * ratio_b),
        "ratios, fused b": fused(b, ratio_b, a.astype(one) * ratio_a),
    }.items():
        yield from _roundings(name, scaled, out)


def _constants_of_sums(
    ratio_a: np.float32,
    ratio_b: np.float32,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Iterator[tuple[str, np.float32]]:
    """z_y - (ratio_a · z_a + ratio_b · z_b), as compilers with and without contraction may compute it."""
    z_a, z_b, z_y = one(first.zero_point), one(second.zero_point), one(out.zero_point)
    yield "constant fused", constant_of_sum(ratio_a, ratio_b, first, second, out)
    if not (first.zero_point or second.zero_point):
        return
    yield "constant unfused", one(z_y - one(ratio_a * z_a + ratio_b * z_b))
    yield (
        "constant fused otherwise",
        one(z_y - one(fused(second.zero_point, ratio_b, one(ratio_a * z_a)))),
    )


def constant_of_sum(
    ratio_a: np.float32,
    ratio_b: np.float32,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> np.float32:
    """The definition's: z_y - fma(ratio_a, z_a, ratio_b · z_b), as the runtime's x86 build has it."""
    product = one(ratio_b * one(second.zero_point))
    return one(one(out.zero_point) - one(fused(first.zero_point, ratio_a, product)))


def _fixed_point_sum(
    a: Integers,
    b: Integers,
    ratio_a: np.float32,
    ratio_b: np.float32,
    out: LoweredQuantizer,
) -> Integers | None:
    """ARM: multipliers of 22 bits, the zero point added after a shift that rounds half away from zero.

    None where ARM computes in float32 too.
    """
    smallest, largest = FIXED_POINT_RATIOS
    exponent = int(np.frexp(max(ratio_a, ratio_b))[1]) - 1
    shift = FIXED_POINT_BITS - exponent
    if (
        min(ratio_a, ratio_b) < smallest
        or max(ratio_a, ratio_b) >= largest
        or shift not in FIXED_POINT_SHIFTS
    ):
        return None
    multiplier_a, multiplier_b = (
        int(np.rint(one(ratio) * one(2.0**shift))) for ratio in (ratio_a, ratio_b)
    )
    return _shifted(a * multiplier_a + b * multiplier_b, shift) + out.zero_point


def _shifted(x: Integers, shift: int) -> Integers:
    """x / 2^shift, rounded half away from zero."""
    magnitude = (np.abs(x) + (1 << (shift - 1))) >> shift
    return np.where(x < 0, -magnitude, magnitude)


def products(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """(name, results) of (a·s_a) · (b·s_b) on the grid `out`. The first is the integer definition."""
    ratio = one(one(first.scale * second.scale) / out.scale)
    scaled = (a * b).astype(one) * ratio
    yield "unfused", rounded_inside(scaled, out.zero_point)
    yield "fused", half_even(fused(a * b, ratio, one(out.zero_point))).astype(np.int64)
    yield from _roundings("ratio", scaled, out)
    real = (a.astype(one) * first.scale) * (b.astype(one) * second.scale)
    yield from _quotients("reals", real, out)


def requantizations(
    a: Integers, first: LoweredQuantizer, out: LoweredQuantizer
) -> Results:
    """(name, results) of a·s_a on the grid `out`. The first is the integer definition."""
    real = a.astype(one) * first.scale
    yield "quotient", rounded_outside(real / out.scale, out.zero_point)
    yield from _quotients("real", real, out)
    yield from _roundings("ratio", a.astype(one) * one(first.scale / out.scale), out)


def global_means(
    total: Integers, count: int, first: LoweredQuantizer, out: LoweredQuantizer
) -> Results:
    """(name, results) of total·s_a / count on the grid `out`, `total` a sum of centred codes. The first is the definition."""
    multiplier = one(first.scale / one(out.scale * one(count)))
    scaled = total.astype(one) * multiplier
    yield "float32", rounded_outside(scaled, out.zero_point)
    yield from _roundings("multiplier", scaled, out)
    mantissa, exponent = np.frexp(multiplier)
    shift = MANTISSA_BITS - int(exponent)
    # In ARM's sources, though no version that was tried computes so.
    yield (
        "fixed point",
        _shifted(total * int(mantissa * (1 << MANTISSA_BITS)), shift) + out.zero_point,
    )
    yield from _quotients("mean", (total.astype(one) * first.scale) / one(count), out)


def _quotients(name: str, real: Floats, out: LoweredQuantizer) -> Results:
    yield from _roundings(f"{name}, quotient", real / out.scale, out)
    yield from _roundings(f"{name}, reciprocal", real * one(one(1) / out.scale), out)


def _roundings(name: str, scaled: Floats, out: LoweredQuantizer) -> Results:
    for rounding in (half_even, half_away):
        yield (
            f"{name}, zero point inside, {rounding.__name__}",
            rounded_inside(scaled, out.zero_point, rounding),
        )
        yield (
            f"{name}, zero point outside, {rounding.__name__}",
            rounded_outside(scaled, out.zero_point, rounding),
        )


def disagreements(results: Results, out: LoweredQuantizer) -> int:
    """How many inputs get another code from one of `results` than from the first, after the clip to the codes of `out`."""
    _, definition = next(results)
    expected = definition.clip(out.low, out.high)
    differing = np.zeros(expected.shape, bool)
    for _, found in results:
        differing |= found.clip(out.low, out.high) != expected
    return int(differing.sum())
