"""LSQ on CUDA: one Triton kernel forward, one backward (equations: `lsq.py`; chosen by `fused.py`).

A tensor is seen as outer x channels x inner elements in the order they lie in memory, as in `lsq_kernel.cpp`, and covered by
tiles of C channels x R positions (a position is a pair of outer and inner). Rounding is PyTorch's, operation by operation:
IEEE division, clamp, round half to even, multiplication, all float32; bfloat16 is widened on the way in and rounded on the
way out. Sums for the scale are float32 within a tile and float64 over tiles, in an order that depends on the shape alone.

With TRITON_INTERPRET=1 set before the first import the kernels run on CPU tensors: how they are tested without a GPU.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.quantizers.spec import Grid

# The kernels bear no type annotations but `constexpr`: Triton's compiler (not its interpreter) looks them up as globals.

TILE = 1024  # elements of one program
# A fused multiply-add would round differently from PyTorch
OPTIONS = {"enable_fp_fusion": False}
# Channels of a tile where they are innermost in memory: whole lines of it
COALESCED = 128
SMALLEST_SCALE = tl.constexpr(1e-10)
# 1.5 · 2^23: a float32 of up to 2^22 added to it is rounded to an integer, half to even
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _positions(positions, channels, inner, C: tl.constexpr, R: tl.constexpr):
    """(channel numbers C, their mask, offsets in memory C_R, their mask) of this program's tile."""
    channel = tl.program_id(1) * C + tl.arange(0, C)
    position = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    block = (position // inner) * channels * inner + position % inner
    offsets = block[None, :] + channel[:, None].to(tl.int64) * inner
    known = channel < channels
    return channel, known, offsets, known[:, None] & (position < positions)[None, :]


@triton.jit
def _scales(raw_scales, channel, known):
    size = tl.abs(tl.load(raw_scales + channel, mask=known, other=1.0))
    return tl.where(size < SMALLEST_SCALE, SMALLEST_SCALE, size)[:, None]


@triton.jit
def _code(v, low, high):
    """round(clip(v)); NaN stays NaN, and -0.3 becomes -0."""
    v = tl.where(v < low, low, v)
    v = tl.where(v > high, high, v)
    rounded = (v + ROUNDER) - ROUNDER
    return tl.where(rounded == 0.0, v * 0.0, rounded)


@triton.jit
def _narrow(value, like):
    """float32 in the element type of `like`. bfloat16 is rounded by its bits, half to even: the interpreter's cast cuts."""
    if like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(
            tl.float32, bitcast=True
        )
        value = tl.where(value == value, rounded, value)
    return value.to(like.dtype.element_ty)


@triton.jit
def _forward(
    x,
    raw_scales,
    out,
    positions,
    channels,
    inner,
    low,
    high,
    ceiling,
    C: tl.constexpr,
    R: tl.constexpr,
):
    channel, known, at, mask = _positions(positions, channels, inner, C, R)
    scale = _scales(raw_scales, channel, known)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(value > ceiling, ceiling, value)
    tl.store(
        out + at,
        _narrow(_code(tl.div_rn(value, scale), low, high) * scale, out),
        mask=mask,
    )


@triton.jit
def _backward(
    x,
    upstream,
    raw_scales,
    gradient,
    partial,
    positions,
    channels,
    inner,
    low,
    high,
    ceiling,
    C: tl.constexpr,
    R: tl.constexpr,
):
    channel, known, at, mask = _positions(positions, channels, inner, C, R)
    scale = _scales(raw_scales, channel, known)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(upstream + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.div_rn(tl.where(value > ceiling, ceiling, value), scale)
    inside = (v > low) & (v < high)
    passes = tl.where(inside & (value < ceiling), 1.0, 0.0)
    tl.store(gradient + at, _narrow(up * passes, gradient), mask=mask)
    by_scale = (_code(v, low, high) - tl.where(inside, v, 0.0)) * up
    reflected = tl.load(raw_scales + channel, mask=known, other=1.0) < 0
    sums = tl.sum(tl.where(mask, by_scale, 0.0), axis=1) * tl.where(
        reflected, -1.0, 1.0
    )
    tl.store(
        partial + tl.program_id(0).to(tl.int64) * channels + channel, sums, mask=known
    )


def forward(
    x: Tensor, raw_scale: Tensor, out: Tensor, layout: tuple[int, int, int], grid: Grid
) -> None:
    """Fill `out`, which lies in memory as x does, with x̂. layout: (outer, channels, inner) of both."""
    if x.numel():
        launch, sizes = _tiles(layout)
        with torch.cuda.device_of(x):
            _forward[launch](
                x, raw_scale, out, *sizes[:3], *_bounds(grid), *sizes[3:], **OPTIONS
            )


def backward(
    x: Tensor,
    upstream: Tensor,
    raw_scale: Tensor,
    gradient: Tensor,
    layout: tuple[int, int, int],
    grid: Grid,
    gradient_scale: float,
) -> Tensor:
    """Fill `gradient` with dL/dx; x, upstream and gradient lie in memory alike. Returns dL/d raw_scale."""
    if not x.numel():
        return torch.zeros_like(raw_scale)
    launch, sizes = _tiles(layout)
    partial = raw_scale.new_empty(launch[0], layout[1])
    with torch.cuda.device_of(x):
        _backward[launch](
            x,
            upstream,
            raw_scale,
            gradient,
            partial,
            *sizes[:3],
            *_bounds(grid),
            *sizes[3:],
            **OPTIONS,
        )
    total = partial.sum(0, dtype=torch.float64).mul_(gradient_scale)
    return total.to(raw_scale.dtype).view(raw_scale.shape)


def _bounds(grid: Grid) -> tuple[float, float, float]:
    return float(grid.qmin), float(grid.qmax), float(grid.ceiling)


# Of as many shapes: on a GPU the training step of a small net is as long as Python takes to launch it
@lru_cache(maxsize=4096)
def _tiles(
    layout: tuple[int, int, int],
) -> tuple[tuple[int, int], tuple[int, int, int, int, int]]:
    """(programs along positions and channels), (positions, channels, inner, C, R); C and R are powers of two."""
    outer, channels, inner = layout
    # Computed here: as a product of two int32 it might overflow in the kernel
    positions = outer * inner
    if inner == 1 and channels > 1:
        c = min(_power_of_two_from(channels), COALESCED)
        r = TILE // c
    else:
        r = min(_power_of_two_from(positions), TILE)
        c = min(_power_of_two_from(channels), TILE // r)
    return (-(-positions // r), -(-channels // c)), (positions, channels, inner, c, r)


def _power_of_two_from(count: int) -> int:
    """The smallest power of two >= count. Triton's own takes many times as long, since kernels call it, too."""
    return 1 << (count - 1).bit_length()
