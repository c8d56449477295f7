"""How a runtime computes one operation on codes, in NumPy: the integer definition, and every other arithmetic that is known.

The definition says how results become codes:

    conv, linear   q = clip(rint(fp32(acc + bias) · m) + z, low, high),   m = fp32(fp32(s_x · s_w) / s_y)
    add            q = clip(rint(fma(a, r_a, fma(b, r_b, c))), low, high), r = s / s_y, c = z_y - fma(r_a, z_a, r_b z_b)
    product        q = clip(rint(fp32(a · b · r) + z), low, high),        r = fp32(fp32(s_a · s_b) / s_y), a and b centred
    global pool    q = clip(rint(fp32(sum of centred codes) · fp32(s_x / (s_y · n))) + z, low, high)
    average pool   q = clip(rint((((x_1 + x_2) + x_3) + ...) / n / s_y + z)), x = fp32((q_x - z_x) · s_x), row by row
    one bit        q = 254 where acc + bias >= 0 (<= 0 where m < 0), or where a code reaches its threshold, else 0
    layer norm     q = clip(rint(fp32(d) · r · g + h) + z, low, high), edgeqat's kernels alone (export/norms.py);
                   d = n q - Σq, r = fp32(1 / sqrt(n Σq² - (Σq)² + e)) in float64, e = fp32(epsilon n² / s_x²),
                   g = fp32(gain / s_y), h = fp32(shift / s_y)
    softmax        q = clip(rint(fp32(e · fp32(fp32(1 / sum) / s_y))) + z, low, high), edgeqat's kernels alone
                   (export/softmax.py); `exponentials` and `sum_of_lanes` say e and sum, operation by operation in float32
    requantize     q = clip(rint(fp32((q_x - z_x) · s_x) / s_y) + z, low, high)

acc is the exact integer sum; all multipliers are float32; rint rounds half to even. `terms_of_sum`, `ratio_of_product`,
`multiplier_of_mean`, `terms_of_norm`, `softmax_codes` and `requantized` are what all that compute or write it share:
`export/reference.py` runs it on whole nets, `export/native_graph.py` writes it into files.

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
from typing import NamedTuple

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
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    total = product + np.asarray(z, np.float64)
    return total.astype(one)


def rounded_inside(x: Floats, zero_point: int, rounding: Round = half_even) -> Integers:
    """The zero point is added before rounding, in float32."""
    return rounding((x + one(zero_point)).astype(one)).astype(np.int64)


def rounded_outside(
    x: NDArray[np.floating], zero_point: int, rounding: Round = half_even
) -> Integers:
    """round(x) + zero point: x is rounded before the zero point is added."""
    return rounding(x).astype(np.int64) + zero_point


class TermsOfSum(NamedTuple):
    """What the definition of a sum computes with, float32: rint(fma(a, ratio_a, fma(b, ratio_b, constant)))."""

    ratio_a: np.float32
    ratio_b: np.float32
    constant: np.float32


def terms_of_sum(
    first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer
) -> TermsOfSum:
    """Ratios of the scales, and z_y - fma(ratio_a, z_a, ratio_b · z_b) as the runtime's x86 build has it."""
    ratio_a = one(first.scale / out.scale)
    ratio_b = one(second.scale / out.scale)
    product_b = one(ratio_b * one(second.zero_point))
    shift = one(fused(first.zero_point, ratio_a, product_b))
    return TermsOfSum(ratio_a, ratio_b, one(one(out.zero_point) - shift))


def ratio_of_product(
    first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer
) -> np.float32:
    """What the definition multiplies a product of centred codes with: fp32(fp32(s_a · s_b) / s_y)."""
    return one(one(first.scale * second.scale) / out.scale)


def multiplier_of_mean(
    source: LoweredQuantizer, count: int, out: LoweredQuantizer
) -> np.float32:
    """What the definition multiplies a sum of `count` centred codes with: fp32(s_x / fp32(s_y · n))."""
    return one(source.scale / one(out.scale * one(count)))


class TermsOfNorm(NamedTuple):
    """What the definition of a layer norm computes with, float32: epsilon for the integer variance, gain and shift (n,)."""

    epsilon: np.float32
    gain: Floats
    shift: Floats


def terms_of_norm(
    gain: Floats,
    shift: Floats,
    epsilon: float,
    source: LoweredQuantizer,
    out: LoweredQuantizer,
) -> TermsOfNorm:
    """The trained gain and shift in units of the output's scale, and epsilon in those of n² squared codes."""
    codes = len(gain) / float(source.scale)
    scale = float(out.scale)
    return TermsOfNorm(
        one(epsilon * codes * codes),
        (gain.astype(np.float64) / scale).astype(one),
        (shift.astype(np.float64) / scale).astype(one),
    )


def normalized(codes: Integers, terms: TermsOfNorm, out: LoweredQuantizer) -> Integers:
    """The definition's results for rows of codes (..., n), with or without their zero point, before the clip."""
    count = codes.shape[-1]
    total = codes.sum(-1, keepdims=True)
    centred = count * codes - total
    variance = count * (codes * codes).sum(-1, keepdims=True) - total * total
    root = np.sqrt(variance.astype(np.float64) + np.float64(terms.epsilon))
    reciprocal = (1 / root).astype(one)
    scaled = centred.astype(one) * reciprocal * terms.gain + terms.shift
    return rounded_outside(scaled, out.zero_point)


LOG2_E = one(1.44269504)
# ln 2 in two parts, the first of so few bits that its products with integers are exact
LN2_HIGH = one(0.693359375)
LN2_LOW = one(-2.12194440e-4)
# (e^r - 1 - r) / r² for |r| <= ln(2) / 2, the highest power first
EXPONENTIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
LOWEST_EXPONENT = one(-86)  # e to the power of it is a normal float32
LANES = 8


def exponentials(x: Floats) -> Floats:
    """float32 (..., n): e^(x - largest x of the row), every operation rounded once."""
    distances = x - x.max(-1, keepdims=True)
    t = np.where(distances > LOWEST_EXPONENT, distances, LOWEST_EXPONENT)
    power = np.rint(t * LOG2_E)
    r = (t - power * LN2_HIGH) - power * LN2_LOW
    polynomial = np.full_like(r, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        polynomial = polynomial * r + one(coefficient)
    mantissa = (polynomial * (r * r) + r) + one(1)
    return np.ldexp(mantissa, power.astype(np.int32)).astype(one)


def sum_of_lanes(x: Floats) -> Floats:
    """float32 (..., 1): sums of rows, element i added to lane i modulo 8, then the lanes to each other."""
    missing = -x.shape[-1] % LANES
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    parts = padded.reshape(*x.shape[:-1], -1, LANES)
    lanes = np.zeros_like(parts[..., 0, :])
    for index in range(parts.shape[-2]):
        lanes = lanes + parts[..., index, :]
    halves = lanes[..., :4] + lanes[..., 4:]
    quarters = halves[..., :2] + halves[..., 2:]
    return quarters[..., :1] + quarters[..., 1:]


def softmax_codes(x: Floats, out: LoweredQuantizer) -> Integers:
    """The definition's results for rows of floats (..., n) that a softmax writes on `out`, before the clip."""
    weights = exponentials(x)
    factor = (one(1) / sum_of_lanes(weights)) / out.scale
    return rounded_outside(weights * factor, out.zero_point)


def requantized(
    centred: Integers, source: LoweredQuantizer, out: LoweredQuantizer
) -> Integers:
    """The definition's results for centred codes of `source` that are written on `out`, before the clip."""
    real = centred.astype(one) * source.scale
    return rounded_outside(real / out.scale, out.zero_point)


def sums(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """(name, results) of a·s_a + b·s_b on the grid `out`. The first is the integer definition."""
    yield from _sums_of_stored_codes(a, b, first, second, out)
    yield from _sums_in_fixed_point(a, b, first, second, out)
    yield from _sums_of_reals(a, b, first, second, out)
    yield from _sums_of_ratios(a, b, first, second, out)


def _sums_of_stored_codes(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """x86 and edgeqat's kernels: codes with their zero points, all that is constant added first."""
    codes_a = a + first.zero_point
    codes_b = b + second.zero_point
    ratio_a, ratio_b, _ = terms_of_sum(first, second, out)
    product_a = codes_a.astype(one) * ratio_a
    product_b = codes_b.astype(one) * ratio_b
    for kind, constant in _constants_of_sums(first, second, out):
        # x86 with FMA: b first
        b_first = fused(codes_a, ratio_a, fused(codes_b, ratio_b, constant))
        yield f"fused, b first, {kind}", half_even(b_first).astype(np.int64)
        a_first = fused(codes_b, ratio_b, fused(codes_a, ratio_a, constant))
        yield f"fused, a first, {kind}", half_even(a_first).astype(np.int64)
        # SSE2: a first
        a_first = (constant + product_a) + product_b
        yield f"unfused, a first, {kind}", half_even(a_first).astype(np.int64)
        b_first = (constant + product_b) + product_a
        yield f"unfused, b first, {kind}", half_even(b_first).astype(np.int64)


def _sums_of_reals(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """Both tensors dequantized, added, and divided by the output's scale."""
    real_a = a.astype(one) * first.scale
    real_b = b.astype(one) * second.scale
    yield from _quotients("unfused", real_a + real_b, out)
    yield from _quotients("fused a", fused(a, first.scale, real_b), out)
    yield from _quotients("fused b", fused(b, second.scale, real_a), out)


def _sums_of_ratios(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """Centred codes times the ratios of the scales."""
    ratio_a, ratio_b, _ = terms_of_sum(first, second, out)
    scaled_a = a.astype(one) * ratio_a
    scaled_b = b.astype(one) * ratio_b
    yield from _roundings("ratios", scaled_a + scaled_b, out)
    yield from _roundings("ratios, fused a", fused(a, ratio_a, scaled_b), out)
    yield from _roundings("ratios, fused b", fused(b, ratio_b, scaled_a), out)


def _constants_of_sums(
    first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer
) -> Iterator[tuple[str, np.float32]]:
    """z_y - (ratio_a · z_a + ratio_b · z_b), as compilers with and without contraction may compute it."""
    ratio_a, ratio_b, constant = terms_of_sum(first, second, out)
    yield "constant fused", constant
    if first.zero_point == 0 and second.zero_point == 0:
        return
    zero_point = one(out.zero_point)
    product_a = one(ratio_a * one(first.zero_point))
    product_b = one(ratio_b * one(second.zero_point))
    yield "constant unfused", one(zero_point - one(product_a + product_b))
    fused_otherwise = one(fused(second.zero_point, ratio_b, product_a))
    yield "constant fused otherwise", one(zero_point - fused_otherwise)


def _sums_in_fixed_point(
    a: Integers,
    b: Integers,
    first: LoweredQuantizer,
    second: LoweredQuantizer,
    out: LoweredQuantizer,
) -> Results:
    """ARM: multipliers of 22 bits, the zero point added after a shift that rounds half away from zero.

    Nothing where ARM computes in float32 too.
    """
    ratio_a, ratio_b, _ = terms_of_sum(first, second, out)
    smaller = min(ratio_a, ratio_b)
    larger = max(ratio_a, ratio_b)
    smallest, largest = FIXED_POINT_RATIOS
    if smaller < smallest or larger >= largest:
        return
    exponent = int(np.frexp(larger)[1]) - 1
    shift = FIXED_POINT_BITS - exponent
    if shift not in FIXED_POINT_SHIFTS:
        return
    power = one(2.0**shift)
    multiplier_a = int(np.rint(one(ratio_a) * power))
    multiplier_b = int(np.rint(one(ratio_b) * power))
    total = a * multiplier_a + b * multiplier_b
    yield "fixed point", _shifted(total, shift) + out.zero_point


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
    ratio = ratio_of_product(first, second, out)
    scaled = (a * b).astype(one) * ratio
    yield "unfused", rounded_inside(scaled, out.zero_point)
    in_one_rounding = fused(a * b, ratio, one(out.zero_point))
    yield "fused", half_even(in_one_rounding).astype(np.int64)
    yield from _roundings("ratio", scaled, out)
    real_a = a.astype(one) * first.scale
    real_b = b.astype(one) * second.scale
    yield from _quotients("reals", real_a * real_b, out)


def requantizations(
    a: Integers, first: LoweredQuantizer, out: LoweredQuantizer
) -> Results:
    """(name, results) of a·s_a on the grid `out`. The first is the integer definition."""
    yield "quotient", requantized(a, first, out)
    real = a.astype(one) * first.scale
    yield from _quotients("real", real, out)
    ratio = one(first.scale / out.scale)
    yield from _roundings("ratio", a.astype(one) * ratio, out)


def global_means(
    total: Integers, count: int, first: LoweredQuantizer, out: LoweredQuantizer
) -> Results:
    """(name, results) of total·s_a / count on the grid `out`, `total` a sum of centred codes. The first is the definition."""
    multiplier = multiplier_of_mean(first, count, out)
    scaled = total.astype(one) * multiplier
    yield "float32", rounded_outside(scaled, out.zero_point)
    yield from _roundings("multiplier", scaled, out)
    # In ARM's sources, though no version that was tried computes so.
    mantissa, exponent = np.frexp(multiplier)
    shift = MANTISSA_BITS - int(exponent)
    product = total * int(mantissa * (1 << MANTISSA_BITS))
    yield "fixed point", _shifted(product, shift) + out.zero_point
    mean = (total.astype(one) * first.scale) / one(count)
    yield from _quotients("mean", mean, out)


def _quotients(name: str, real: Floats, out: LoweredQuantizer) -> Results:
    yield from _roundings(f"{name}, quotient", real / out.scale, out)
    yield from _roundings(f"{name}, reciprocal", real * one(one(1) / out.scale), out)


def _roundings(name: str, scaled: Floats, out: LoweredQuantizer) -> Results:
    for rounding in (half_even, half_away):
        inside = rounded_inside(scaled, out.zero_point, rounding)
        yield f"{name}, zero point inside, {rounding.__name__}", inside
        outside = rounded_outside(scaled, out.zero_point, rounding)
        yield f"{name}, zero point outside, {rounding.__name__}", outside


def disagreements(results: Results, out: LoweredQuantizer) -> int:
    """How many inputs get another code from one of `results` than from the first, after the clip to the codes of `out`."""
    _, definition = next(results)
    expected = definition.clip(out.low, out.high)
    differing = np.zeros(expected.shape, bool)
    for _, found in results:
        differing |= found.clip(out.low, out.high) != expected
    return int(differing.sum())
