"""Scales without ties: every known arithmetic gives the same codes, shown by a slower and simpler enumeration."""

import dataclasses
import math
import struct
from fractions import Fraction
from itertools import product

import numpy as np
import onnx_ir as ir
import pytest

from export import arithmetic, ties
from export.lowered import LoweredModel, LoweredQuantizer


def grid(scale: float, bits: int = 8, signed: bool = False) -> LoweredQuantizer:
    return LoweredQuantizer.in_storage("q", scale, bits, signed)


# --- the second enumeration: exact fractions and one rounding at a time, from the descriptions in docs/arithmetic.md ---


def f32(x: Fraction) -> Fraction:
    """The float32 nearest to x, ties to even, without any float arithmetic on the way."""
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(x)))
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    return round(x / ulp) * ulp  # Python rounds fractions half to even


def away(x: Fraction) -> int:
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def clipped(code: int, out: LoweredQuantizer) -> int:
    return min(max(code, out.low), out.high)


def codes_of_sum(a: int, b: int, first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer) -> set[int]:
    """What five implementations make of the storage codes a and b."""
    sa, sb, sy = (Fraction(float(g.scale)) for g in (first, second, out))
    za, zb, zy = first.zero_point, second.zero_point, out.zero_point
    ra, rb = f32(sa / sy), f32(sb / sy)
    constant = f32(zy - f32(f32(ra * za) + f32(rb * zb)))
    avx2 = round(f32(a * ra + f32(b * rb + constant)))
    sse2 = round(f32(f32(constant + f32(a * ra)) + f32(b * rb)))
    shift = 21 - math.floor(math.log2(max(ra, rb)))
    ma, mb = (round(f32(r * 2**shift)) for r in (ra, rb))
    neon = away(Fraction((a - za) * ma + (b - zb) * mb, 2**shift)) + zy
    real = f32(f32((a - za) * sa) + f32((b - zb) * sb))
    generic = round(f32(f32(real / sy) + zy))
    floats = round(f32(real / sy)) + zy
    return {clipped(code, out) for code in (avx2, sse2, neon, generic, floats)}


def codes_of_mean(total: int, count: int, source: LoweredQuantizer, out: LoweredQuantizer) -> set[int]:
    """total: sum of centred codes."""
    multiplier = f32(Fraction(float(source.scale)) / f32(Fraction(float(out.scale)) * count))
    x86 = round(f32(total * multiplier)) + out.zero_point
    arm = away(total * multiplier) + out.zero_point
    return {clipped(code, out) for code in (x86, arm)}


def codes_of_product(
    a: int, b: int, first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer
) -> set[int]:
    sa, sb, sy = (Fraction(float(g.scale)) for g in (first, second, out))
    x, y = a - first.zero_point, b - second.zero_point
    ratio = f32(f32(sa * sb) / sy)
    simd = round(f32(f32(x * y * ratio) + out.zero_point))
    contracted = round(f32(x * y * ratio + out.zero_point))
    generic = round(f32(f32(f32(f32(x * sa) * f32(y * sb)) / sy) + out.zero_point))
    return {clipped(code, out) for code in (simd, contracted, generic)}


def storage_codes(g: LoweredQuantizer) -> range:
    return range(g.low, g.high + 1)


SUMS = [
    (grid(0.5, 5), grid(0.25, 5), grid(0.5, 5)),
    (grid(0.5, 5, signed=True), grid(1.0, 4), grid(2.0, 6, signed=True)),
    (grid(0.031, 5), grid(0.0417, 5, signed=True), grid(0.0623, 6)),
]


@pytest.mark.parametrize(("first", "second", "out"), SUMS)
def test_sums_have_one_result_by_the_second_enumeration_too(
    first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer
) -> None:
    operation = ties.pair("sum", first, second, arithmetic.sums, np.add)
    moved, remaining = ties.nearest_without_ties(out, operation.ties)
    assert remaining == 0 and operation.inputs == len(storage_codes(first)) * len(storage_codes(second))
    pairs = list(product(storage_codes(first), storage_codes(second)))
    assert all(len(codes_of_sum(a, b, first, second, moved)) == 1 for a, b in pairs)


def test_ties_of_powers_of_two_are_seen_by_both_enumerations() -> None:
    first, second, out = SUMS[0]
    pairs = list(product(storage_codes(first), storage_codes(second)))
    differing = sum(len(codes_of_sum(a, b, first, second, out)) > 1 for a, b in pairs)
    found = ties.pair("sum", first, second, arithmetic.sums, np.add).ties(out)
    assert found >= differing > 100  # ours knows more arithmetics
    moved, _ = ties.nearest_without_ties(out, ties.pair("sum", first, second, arithmetic.sums, np.add).ties)
    assert 0 < abs(moved.moved_ppm) <= 50
    assert float(moved.scale) / float(out.scale) - 1 == pytest.approx(moved.moved_ppm * 1e-6, abs=1e-7)


def test_arms_fixed_point_is_among_the_arithmetics() -> None:
    """Scales at which some pairs are told apart by its 22 bits alone: found by search, judged by the second enumeration."""
    first, second, out = grid(0.079), grid(0.0313, signed=True), grid(0.3638, signed=True)
    pairs = [(a, b) for a, b in product(range(256), range(256)) if near_a_tie(a, b, first, second, out)]
    differing = sum(len(codes_of_sum(a, b, first, second, out)) > 1 for a, b in pairs)
    assert differing > 0
    operation = ties.pair("sum", first, second, arithmetic.sums, np.add)
    without = [
        results
        for results in arithmetic.sums(*all_pairs(first, second), first, second, out)
        if results[0] != "fixed point"
    ]
    assert operation.ties(out) >= differing
    assert operation.ties(out) > arithmetic.disagreements(iter(without), out)
    moved, remaining = ties.nearest_without_ties(out, operation.ties)
    assert remaining == 0
    assert all(len(codes_of_sum(a, b, first, second, moved)) == 1 for a, b in pairs)


def near_a_tie(a: int, b: int, first: LoweredQuantizer, second: LoweredQuantizer, out: LoweredQuantizer) -> bool:
    real = (a - first.zero_point) * float(first.scale) + (b - second.zero_point) * float(second.scale)
    scaled = real / float(out.scale)
    return abs(scaled - math.floor(scaled) - 0.5) < 2e-3


def all_pairs(first: LoweredQuantizer, second: LoweredQuantizer) -> tuple[np.ndarray, np.ndarray]:
    codes = [np.arange(g.low, g.high + 1) - g.zero_point for g in (first, second)]
    a, b = np.meshgrid(*codes, indexing="ij")
    return a.ravel(), b.ravel()


def test_products_and_global_pools_have_one_result_by_the_second_enumeration_too() -> None:
    first, second, out = grid(0.5, 5, signed=True), grid(0.25, 4), grid(0.25, 6, signed=True)
    operation = ties.pair("product", first, second, arithmetic.products, np.multiply)
    moved, remaining = ties.nearest_without_ties(out, operation.ties)
    assert remaining == 0 and moved.moved_ppm
    assert all(
        len(codes_of_product(a, b, first, second, moved)) == 1
        for a, b in product(storage_codes(first), storage_codes(second))
    )
    source, count = grid(0.25, 6, signed=True), 8
    pool = ties.global_pool(source, count)
    totals = range(-32 * count, 31 * count + 1)
    assert pool.inputs == len(totals) and any(len(codes_of_mean(t, count, source, source)) > 1 for t in totals)
    moved, remaining = ties.nearest_without_ties(source, pool.ties)
    assert remaining == 0 and moved.moved_ppm
    assert all(len(codes_of_mean(t, count, source, moved)) == 1 for t in totals)


def test_requantization_to_twice_the_scale_is_all_ties_until_it_is_moved() -> None:
    source, out = grid(0.5, 8), grid(1.0, 8)
    operation = ties.requantization(source)
    # 1, 5, 9, … lie at ties where half to even and half away differ.
    assert operation.ties(out) == 64
    moved, remaining = ties.nearest_without_ties(out, operation.ties)
    assert remaining == 0 and moved.moved_ppm
    ratio = Fraction(float(source.scale)) / Fraction(float(moved.scale))
    for code in range(256):
        by_quotient = f32(f32(code * Fraction(float(source.scale))) / Fraction(float(moved.scale)))
        by_ratio = f32(code * f32(ratio))
        assert len({round(by_quotient), away(by_quotient), round(by_ratio), away(code * ratio)}) == 1


def test_near_ties_are_never_missed_by_looking_only_near_them() -> None:
    """All pairs under every arithmetic, without the shortcut."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        first, second = grid(rng.uniform(0.01, 0.1)), grid(rng.uniform(0.01, 0.1), signed=True)
        out = grid(float(first.scale + second.scale) * rng.uniform(0.4, 1.2), signed=True)
        a, b = (x.ravel() for x in np.meshgrid(np.arange(256), np.arange(-128, 128), indexing="ij"))
        whole = arithmetic.disagreements(arithmetic.sums(a, b, first, second, out), out)
        assert ties.pair("sum", first, second, arithmetic.sums, np.add).ties(out) == whole


def test_a_grid_that_no_scale_near_by_saves_keeps_the_fewest_ties_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties, "FARTHEST", 3)
    counts = {0: 9, 1: 7, -1: 8, 2: 4, -2: 6, 3: 5, -3: 4}
    moved, remaining = ties.nearest_without_ties(grid(0.1), lambda g: counts[g.moved_ppm])
    assert (moved.moved_ppm, remaining) == (2, 4)


def sigmoid_net(scale: float, out_scale: float) -> LoweredModel:
    """codes -> x · sigmoid(x) -> codes."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    marks = [ir.node("Mark", [x], attributes={"name": "in"}, domain="edgeqat")]
    gate = ir.node("Sigmoid", [marks[0].outputs[0]])
    silu = ir.node("Mul", [marks[0].outputs[0], gate.outputs[0]])
    marks.append(ir.node("Mark", [silu.outputs[0]], attributes={"name": "out"}, domain="edgeqat"))
    graph = ir.Graph([x], [marks[1].outputs[0]], nodes=[marks[0], gate, silu, marks[1]], opset_imports={"": 20})
    grids = {"in": grid(scale, signed=True), "out": grid(out_scale, signed=True)}
    return LoweredModel(
        ir.Model(graph, ir_version=10), {}, {n: dataclasses.replace(g, name=n) for n, g in grids.items()}
    )


def test_functions_of_one_code_keep_clear_of_ties() -> None:
    scale = 0.05
    planted = 5 * scale / (1 + math.exp(-5 * scale)) / 2.5  # code 5 gives 2.5 to the last bit
    model = sigmoid_net(scale, planted)
    assert ties.avoid_ties(model)
    (tried,) = model.tried
    assert (tried.quantizer, tried.kind, tried.inputs, tried.remaining) == ("out", "function", 256, 0) and tried.ppm
    out = model.quantizers["out"]
    for code in range(-128, 128):
        real = code * float(np.float32(scale))
        value = real / (1 + math.exp(-real)) / float(out.scale)
        distance = abs(value - math.floor(value) - 0.5)
        reachable = -128 < math.floor(value) + 0.5 < 127
        assert not reachable or distance > 5e-7 * max(abs(real), 1e-6) / float(out.scale)
    assert ties.float_quantizers(model) == []


def test_float32_of_fractions_is_numpys() -> None:
    rng = np.random.default_rng(1)
    for x in rng.normal(size=200):
        assert struct.pack("f", x) == struct.pack("f", float(f32(Fraction(x))))
