"""Packing against a loop over single bits, and the file's own unpacking operators against both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.packing import pack, plane_widths, tables, unpack, unpack_scaled


def random_codes(bits: int, count: int, seed: int) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    if bits == 1:
        return rng.choice(np.array([-1, 1], np.int8), count)
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), count).astype(np.int8)


def bit_loop(planes: list[NDArray[np.uint8]], bits: int, count: int) -> list[int]:
    """Read code after code, bit after bit."""
    codes = []
    for index in range(count):
        value, shift = 0, 0
        for plane, width in zip(planes, plane_widths(bits), strict=True):
            for bit in range(width):
                position = index * width + bit
                value |= ((int(plane[position // 8]) >> (position % 8)) & 1) << (shift + bit)
            shift += width
        codes.append(2 * value - 1 if bits == 1 else value - (1 << bits) * (value >> (bits - 1)))
    return codes


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 67), seed=st.integers(0, 999))
def test_pack_and_unpack_agree_with_a_bit_loop(bits: int, count: int, seed: int) -> None:
    codes = random_codes(bits, count, seed)
    planes = pack(codes, bits)
    assert bit_loop(planes, bits, count) == codes.tolist()
    assert np.array_equal(unpack(planes, bits, (count,)), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_scaled_unpacking_is_multiplication(bits: int) -> None:
    codes = random_codes(bits, 101, bits)
    factor = 1 << (8 - bits) if bits > 1 else 64
    assert np.array_equal(unpack_scaled(pack(codes, bits), bits, (101,), factor), codes.astype(int) * factor)


@pytest.mark.parametrize("bits", range(1, 9))
def test_size_is_the_bits(bits: int) -> None:
    assert sum(p.size for p in pack(random_codes(bits, 4096, 0), bits)) == 4096 * bits // 8


@pytest.mark.parametrize("bits", range(2, 8))
def test_table_contributions_share_no_bits(bits: int) -> None:
    used = [np.bitwise_or.reduce(t.ravel()) for t in tables(bits, 1)[:-1]]
    assert sum(int(u).bit_count() for u in used) == int(np.bitwise_or.reduce(used) if used else 0).bit_count()


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8, which 4 bits cannot hold"):
        pack(np.array([0, 8], np.int8), 4)
    with pytest.raises(ValueError, match=r"-1 and \+1"):
        pack(np.array([0, 1], np.int8), 1)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        plane_widths(9)
