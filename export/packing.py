"""Low-bit codes in bytes: pack and unpack in NumPy, and the tables with which standard ONNX operators unpack.

A b-bit code is split into *planes* of 4, 2 and 1 bits, lowest bits first: 3 = 2 + 1, 5 = 4 + 1, 7 = 4 + 2 + 1. A plane
of p bits holds 8/p codes a byte, low bits first, padded with zeros at the end. Codes are two's complement of b bits;
1-bit codes are -1 and +1, stored as 0 and 1. Sizes are therefore b/8 bytes per code, plus less than a byte a plane.
"""

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Plane = NDArray[np.uint8]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, lowest bits first. Raises ValueError outside 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")
    if bits == 8:
        return (8,)
    return tuple(width for width in (4, 2, 1) if bits & width)


def pack(codes: Codes, bits: int) -> list[Plane]:
    """Planes of `codes` (int8, any shape, row-major), one uint8 vector each. Raises ValueError for a code outside b bits."""
    flat = codes.ravel().astype(np.int16)
    limit = 1 << (bits - 1)
    if bits == 1:
        if not np.isin(flat, (-1, 1)).all():
            raise ValueError("1-bit codes are -1 and +1")
        flat = (flat + 1) // 2
    elif flat.size and (flat.min() < -limit or flat.max() >= limit):
        raise ValueError(
            f"codes reach {flat.min()} to {flat.max()}, which {bits} bits cannot hold"
        )
    planes = []
    shift = 0
    for width in plane_widths(bits):
        part = (flat >> shift) & _mask(width)
        planes.append(_to_bytes(part.astype(np.uint8), width))
        shift += width
    return planes


def _mask(width: int) -> int:
    """The lowest `width` bits."""
    return (1 << width) - 1


def unpack(planes: list[Plane], bits: int, shape: tuple[int, ...]) -> Codes:
    """The int8 codes of the given shape that `pack` put into `planes`."""
    return (unpack_scaled(planes, bits, shape, 1)).astype(np.int8)


def unpack_scaled(
    planes: list[Plane], bits: int, shape: tuple[int, ...], factor: int
) -> NDArray[np.int8]:
    """codes · factor, decoded byte by byte through the same tables as in the file."""
    count = int(np.prod(shape))
    total = np.zeros(count, np.int8)
    for plane, table in zip(planes, tables(bits, factor), strict=True):
        total += table[plane].ravel()[:count]
    return total.reshape(shape)


def tables(bits: int, factor: int) -> list[Codes]:
    """Per plane: int8 (256, codes per byte), row v = the contributions of byte v to codes · factor, which their sum is.

    Raises ValueError where codes · factor do not fit int8.
    """
    if factor << max(bits - 1, 0) > 128:
        raise ValueError(f"codes of {bits} bits times {factor} do not fit int8")
    if bits == 1:
        return [((2 * _parts(1) - 1) * factor).astype(np.int8)]
    in_planes = []
    shift = 0
    for width in plane_widths(bits):
        parts = _parts(width)
        is_top = shift + width == bits
        if is_top:  # two's complement: its highest bit counts negatively
            parts = parts - ((parts >> (width - 1)) << width)
        in_planes.append(((parts << shift) * factor).astype(np.int8))
        shift += width
    return in_planes


def _parts(width: int) -> NDArray[np.int64]:
    """(256, 8 / width): the parts of `width` bits that every byte holds, low bits first."""
    shifts = width * np.arange(8 // width)
    return (np.arange(256)[:, None] >> shifts) & _mask(width)


def _to_bytes(values: Plane, width: int) -> Plane:
    """Numbers of `width` bits, 8 / width of them in a byte."""
    per_byte = 8 // width
    whole_bytes = -(-len(values) // per_byte)
    padded = np.zeros(whole_bytes * per_byte, np.uint8)
    padded[: len(values)] = values
    shifts = (width * np.arange(per_byte)).astype(np.uint8)
    shifted = padded.reshape(-1, per_byte) << shifts
    return np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8)
