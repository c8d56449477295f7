"""Triton's kernels against the plain formula. `python -m tests.quantizers.interpreted` runs them in Triton's interpreter, on
the CPU; it must be told so before the kernels are first imported, hence a process of its own (see test_triton.py)."""

import itertools
import math
import os
from typing import Any

import torch
from torch import Tensor

from qat.quantizers import fused, uniform
from qat.quantizers.contract import along, positive_scale
from qat.quantizers.spec import Grid
from tests.nearness import ROUNDING, assert_near
from tests.quantizers.test_fused import DTYPES, GRIDS, LAYOUTS, bits, exact_terms, given, scales_for

SCALE = 0.0437
MANY, TOO_MANY = 10_000, 100_000  # elements; the interpreter is slow


def check(x: Tensor, raw_scale: Tensor, grid: Grid, upstream: Tensor) -> None:
    """Forward and dL/dx bit for bit, dL/d raw scale to the rounding of its sums. All on the device of the kernels."""
    from qat.quantizers import lsq_triton

    out, gradient = torch.empty_like(x), torch.empty_like(x)
    x_dense, upstream_dense = fused._dense(x, out), fused._dense(upstream, out)
    layout = fused._layout(x_dense, grid.axis)
    lsq_triton.forward(x_dense, raw_scale, out, layout, grid)
    by_scale = lsq_triton.backward(x_dense, upstream_dense, raw_scale, gradient, layout, grid, 0.37)
    scale = along(positive_scale(raw_scale), x, grid.axis)
    expected = uniform.float_codes(x, scale, grid).mul_(scale).to(x.dtype)
    by_x, by_scale_plain = uniform.gradients(x, upstream, raw_scale, grid, 0.37)
    assert torch.equal(bits(out), bits(expected)) and torch.equal(bits(gradient), bits(by_x))
    assert by_scale.shape == raw_scale.shape and by_scale.dtype == torch.float32
    if grid.ceiling == math.inf:
        terms, sizes = exact_terms(x.cpu(), raw_scale.cpu(), grid.axis, (grid.qmin, grid.qmax), upstream.cpu())
        # A tile sums at most 1024 float32 terms, however it pairs them, each of them rounded before.
        assert bool(((by_scale.cpu().double() - terms).abs() <= 1026 * 2**-24 * sizes + 2**-23 * terms.abs()).all())
    else:
        size = 0.37 * max(-grid.qmin, grid.qmax) * float(upstream.abs().sum())
        assert_near(by_scale, by_scale_plain, x.numel() * ROUNDING, of=size)  # signs mixed, in another order


def cases() -> list[tuple[Any, torch.dtype, tuple[int, int]]]:
    """Layouts, types and grids: all of the small layouts, and larger ones once."""
    small = [layout for layout in LAYOUTS if math.prod(layout[0]) < MANY]
    larger = [layout for layout in LAYOUTS if MANY <= math.prod(layout[0]) < TOO_MANY]
    return [*itertools.product(small, DTYPES, GRIDS), *((layout, torch.float32, (-8, 7)) for layout in larger)]


def run(device: str) -> int:
    """Check on "cpu", under the interpreter, or "cuda"; returns how many cases were checked."""
    from qat.quantizers import lsq_triton

    checked = 0
    for (shape, axis, memory), dtype, (low, high) in cases():
        checked += 1
        x = given(shape, memory, dtype, SCALE, (low, high)).to(device)
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        check(x, scales_for(shape, axis, SCALE).to(device), Grid(axis, low, high), upstream)
    x = torch.tensor([[0.3, -0.3, 0.59, 0.6, 0.61, 7.0, -1.0]], device=device)
    check(x, torch.tensor(0.1, device=device), Grid(None, 0, 15, 0.6), torch.arange(1.0, 8.0, device=device)[None])
    for tie in (257 / 256, 259 / 256):  # code 1 times scale lies halfway between two bfloat16 numbers
        ones, upstream = (torch.ones(1, 3, dtype=torch.bfloat16, device=device) for _ in range(2))
        check(ones, torch.tensor(tie, device=device), Grid(None, -8, 7), upstream)
    odd = torch.tensor([[math.nan, 1.0], [2.0, math.inf], [-math.inf, 0.3]], device=device)
    for raw_scale in (torch.tensor(0.5), torch.tensor(0.0), torch.tensor(-1e-12)):
        out = torch.empty_like(odd)
        lsq_triton.forward(odd, raw_scale.to(device), out, (1, 1, 6), Grid(None, -8, 7))
        scale = positive_scale(raw_scale.to(device))
        expected = uniform.float_codes(odd, scale, Grid(None, -8, 7)).mul_(scale)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num())
    return checked


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    print(run("cpu"), "cases agree")
