"""The C++ kernels against the plain PyTorch formula bit for bit, and against float64 NumPy."""

import itertools
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.quantizers import fused, native
from qat.quantizers.contract import along
from qat.quantizers.lsq import LSQ, FakeQuantizeLSQ
from qat.quantizers.spec import Grid, QuantSpec
from tests.narrow import gradient
from tests.nearness import ROUNDING, assert_near
from tests.quantizers.test_lsq import difficult

pytestmark = pytest.mark.skipif(fused._kernels() is None, reason="no C++ compiler here")

DTYPES = [torch.float32, torch.bfloat16]
GRIDS = [(-8, 7), (0, 15), (-2, 1), (0, 255)]
# shape, axis, memory: per tensor and per channel, rows and runs, longer than one task, prime sizes, one channel, empty.
LAYOUTS = [
    ((3, 7, 5, 11), None, "contiguous"), ((3, 7, 5, 11), 1, "contiguous"), ((3, 7, 5, 11), 1, "channels_last"),
    ((13, 5, 3, 3), 0, "contiguous"), ((13, 5, 3, 3), 0, "channels_last"), ((2, 37, 31, 29), None, "channels_last"),
    ((2, 37, 31, 29), 1, "channels_last"), ((2, 37, 31, 29), 1, "contiguous"), ((5, 40_009), 0, "contiguous"),
    ((40_009, 5), 1, "contiguous"), ((1, 9), 0, "contiguous"), ((0, 4, 3), 1, "contiguous"), ((), None, "contiguous"),
    ((6, 8, 10), None, "sliced"), ((6, 8, 10), 2, "sliced"), ((6, 8, 10), 0, "transposed"), ((6, 8, 10), 1, "expanded"),
]  # fmt: skip


def given(shape: tuple[int, ...], memory: str, dtype: torch.dtype, scale: float, grid: tuple[int, int]) -> Tensor:
    """Edges, ties and zeros first, random values after, and tiny, huge and denormal ones strewn in."""
    rng = np.random.default_rng(len(shape) + sum(shape))
    values = rng.normal(0, 0.7 * grid[1] * scale, int(np.prod(shape))).astype(np.float32)
    edges = difficult(np.float32(scale), *grid)
    values[: edges.size] = edges[: values.size]
    values[60::97] = np.resize(np.array([1e-42, -1e-42, 1e30, -1e30, 0.0, -0.0], np.float32), values[60::97].size)
    x = torch.from_numpy(values.reshape(shape)).to(dtype)
    match memory:
        case "channels_last":
            return x.to(memory_format=torch.channels_last)
        case "sliced":
            return torch.cat([x, x], -1)[..., : shape[-1]]
        case "transposed":
            return x.transpose(0, 2).contiguous().transpose(0, 2)
        case "expanded":
            return x[:, :1].expand(shape)
        case _:
            return x


def scales_for(shape: tuple[int, ...], axis: int | None, scale: float) -> Tensor:
    if axis is None:
        return torch.tensor(scale)
    return (
        torch.linspace(0.6, 1.7, shape[axis]) * scale * (-1.0) ** torch.arange(shape[axis])
    )  # raw scales may be negative


def plain(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(fused, "available", lambda x, raw_scale: False)
        return both_ways(*arguments)  # type: ignore[arg-type]


def both_ways(
    x: Tensor, raw_scale: Tensor, axis: int | None, grid: tuple[int, int], upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, dL/dx, dL/d raw scale)"""
    x, raw_scale = x.detach().requires_grad_(), raw_scale.clone().requires_grad_()
    out = FakeQuantizeLSQ.apply(x, raw_scale, Grid(axis, *grid), 0.37)
    return out.detach(), *torch.autograd.grad(out, (x, raw_scale), upstream)


def bits(x: Tensor) -> Tensor:
    """Integers that tell -0 from 0 and compare NaN with NaN."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize(("shape", "axis", "memory"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_fused_and_plain_agree(
    shape: tuple[int, ...], axis: int | None, memory: str, dtype: torch.dtype, grid: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, raw_scale = given(shape, memory, dtype, 0.0437, grid), scales_for(shape, axis, 0.0437)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert fused.available(x, raw_scale)
    out, dx, ds = both_ways(x, raw_scale, axis, grid, upstream)
    expected, expected_dx, _ = plain(monkeypatch, x, raw_scale, axis, grid, upstream)
    assert out.dtype == dtype and out.shape == x.shape and dx.dtype == dtype and ds.shape == raw_scale.shape
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(dx), bits(expected_dx))
    # The sum: against float64, of the float32 terms; 512 terms are added in float32 before float64 takes over, hence
    # at most 32 + 16 roundings of half an ulp each.
    terms, size = exact_terms(x, raw_scale, axis, grid, upstream)
    assert bool(((ds.double() - terms).abs() <= 48 * 2**-24 * size + 2**-23 * terms.abs()).all())


def exact_terms(
    x: Tensor, raw_scale: Tensor, axis: int | None, grid: tuple[int, int], upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/d raw scale in float64, the sum of its terms' sizes), by the paper's three cases."""
    scale = along(raw_scale.abs(), x, axis).numpy()
    v = (x.float().numpy() / scale).astype(np.float32)
    low, high = grid
    inside = np.rint(v) - v.astype(np.float64)
    derivative = np.where(v <= low, low, np.where(v >= high, high, inside))
    terms = derivative * upstream.double().numpy() * 0.37
    others = tuple(d for d in range(x.dim()) if d != axis)
    sign = np.where(raw_scale.numpy() < 0, -1.0, 1.0)
    return torch.from_numpy(np.asarray(terms.sum(others) * sign)), torch.from_numpy(np.asarray(abs(terms).sum(others)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_nan_and_infinity_as_in_the_plain_formula(
    dtype: torch.dtype, axis: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor([[float("nan"), 1.0], [2.0, float("inf")], [-float("inf"), 0.3]], dtype=dtype)
    raw_scale = torch.tensor(0.5) if axis is None else torch.tensor([0.5, -0.25])
    upstream = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.5, float("inf")]], dtype=dtype)
    found = both_ways(x, raw_scale, axis, (-8, 7), upstream)
    for ours, theirs in zip(found, plain(monkeypatch, x, raw_scale, axis, (-8, 7), upstream), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert not plain(monkeypatch, x[1:], raw_scale, axis, (-8, 7), upstream[:2])[2].isnan().any()  # infinity is clipped


@pytest.mark.parametrize("raw", [0.0, 1e-12, -1e-12, 1e-38])
def test_the_smallest_scale(raw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.0, -0.0, 3e-10, -1e-10, 4e-11, 1.0]])
    given = (x, torch.tensor(raw), None, (-8, 7), torch.arange(6.0)[None])
    (out, dx, ds), (expected, expected_dx, expected_ds) = both_ways(*given), plain(monkeypatch, *given)
    assert torch.equal(bits(out), bits(expected)) and torch.equal(bits(dx), bits(expected_dx))
    size = 8 * float(torch.arange(6.0).sum())
    assert_near(ds, expected_ds, 4 * ROUNDING, of=size)  # six terms, added in another order


def test_equal_terms_do_not_drift() -> None:
    x, upstream = torch.full((1, 1 << 16), 99.0), torch.full((1, 1 << 16), 0.11)
    for axis in (None, 0):
        sum_of_terms = fused.backward(x, upstream, scales_for(x.shape, axis, 0.1).abs(), Grid(axis, 0, 15), 1.0)[1]
        expected = float(np.float32(0.11) * np.float32(15)) * (1 << 16)
        # 32 equal terms of a lane lose at most 5 halves of an ulp (their sums double 5 times) plus a little; drift loses 100s
        assert float(sum_of_terms) == pytest.approx(expected, rel=16 * 2**-24)


@pytest.mark.parametrize(("scale", "rounded"), [(257 / 256, 1.0), (259 / 256, 1.015625)])
def test_bfloat16_results_round_ties_to_even(scale: float, rounded: float) -> None:
    x = torch.ones(1, 3, dtype=torch.bfloat16)  # code 1 times scale lies halfway between two bfloat16 numbers
    assert fused.forward(x, torch.tensor(scale), Grid(None, -8, 7)).tolist() == [[rounded] * 3]


def test_threads_do_not_change_a_bit() -> None:
    x, upstream = (torch.randn(7, 129, 31, 37, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    before, found = torch.get_num_threads(), []
    try:
        for threads, axis in itertools.product((1, 3), (None, 1)):
            torch.set_num_threads(threads)
            found.append(both_ways(x, scales_for(x.shape, axis, 0.1), axis, (-8, 7), upstream))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_backward_keeps_the_input_and_the_scale_alone() -> None:
    quantizer = LSQ(QuantSpec(4))
    quantizer.initialize(torch.tensor(0.1), signed=False)
    x, kept = torch.randn(2, 3, 5, 7, requires_grad=True), list[Tensor]()

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        quantizer(x)
    assert {saved.data_ptr() for saved in kept} == {x.data_ptr(), quantizer.raw_scale.data_ptr()}


def test_queries_cut_out_of_one_tensor_come_out_ready_for_a_product() -> None:
    qkv = torch.randn(2, 5, 3, 4, 7).permute(2, 0, 3, 1, 4)  # 3 x batch x heads x tokens x width
    assert not qkv[0].is_contiguous() and fused.forward(qkv[0], torch.tensor(0.1), Grid(None, -8, 7)).is_contiguous()
    image = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    for x in (image, image[:, :3]):  # a convolution wants its order kept
        out = fused.forward(x, torch.tensor(0.1), Grid(None, -8, 7))
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_the_whole_graph_compiles_and_agrees() -> None:
    quantizer = LSQ(QuantSpec(4))
    quantizer.initialize(torch.tensor(0.0437), signed=False)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = torch.from_numpy(difficult(np.float32(0.0437), 0, 15))[None].requires_grad_()
    results = []
    for run in (quantizer, compiled):
        quantizer.raw_scale.grad = x.grad = None
        out = run(x)
        (out * torch.arange(113.0)).sum().backward()
        results.append((out.detach(), gradient(x), gradient(quantizer.raw_scale)))
    (out, dx, ds), (out_compiled, dx_compiled, ds_compiled) = results
    assert torch.equal(bits(out), bits(out_compiled)) and torch.equal(bits(dx), bits(dx_compiled))
    size = quantizer.spec.qmax * quantizer.gradient_scale(x) * float(torch.arange(113.0).sum())
    assert_near(ds, ds_compiled, 113 * ROUNDING, of=size)  # float32 sums of 113 terms in another order


def test_other_dtypes_and_second_derivatives_take_the_plain_formula() -> None:
    for dtype in (torch.float64, torch.float16):
        x = torch.randn(2, 9, dtype=dtype)
        assert not fused.available(x, torch.tensor(0.1))
        assert FakeQuantizeLSQ.apply(x, torch.tensor(0.1), Grid(None, -8, 7), 1.0).dtype == dtype
    x = torch.randn(2, 9, requires_grad=True)
    out = FakeQuantizeLSQ.apply(x, torch.tensor(0.5), Grid(None, -8, 7), 1.0)
    (gradient,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(second, 2.0 * ((x / 0.5 > -8) & (x / 0.5 < 7)))


def test_half_precision_decides_codes_in_float32() -> None:
    x = torch.randn(4, 999).to(torch.bfloat16)
    quantizer = LSQ(QuantSpec(8, signed=True))
    quantizer.initialize(torch.tensor(0.0137), signed=True)
    codes = np.rint(np.clip(x.float().numpy() / np.float32(0.0137), -128, 127))
    assert np.array_equal(quantizer.codes(x).numpy(), codes)
    assert torch.equal(quantizer(x), (torch.from_numpy(codes) * quantizer.scale).to(torch.bfloat16))


def test_without_a_compiler_there_is_one_note_and_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = fused.SOURCE
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="edgeqat"):
        assert native.library.__wrapped__(source) is None
    assert "no C++ compiler" in caplog.text
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING, logger="edgeqat"):
        assert native.library.__wrapped__(source) is None
    assert "could not be built" in caplog.text and "false --version failed" in caplog.text


def test_a_broken_source_is_reported_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.cpp").write_text("int main( {")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="edgeqat"):
        assert native.library.__wrapped__(tmp_path / "broken.cpp") is None
    assert "error" in caplog.text
    assert not list((tmp_path / "edgeqat").iterdir())
