"""LSQ+ and power-of-two scales against NumPy, element by element."""

import numpy as np
import pytest
import torch

from qat.quantizers import fused, lsq_plus
from qat.quantizers.lsq import LSQ, LSQWeight
from qat.quantizers.lsq_plus import LSQPlus, least_squares_range
from qat.quantizers.power_of_two import power_of_two
from qat.quantizers.spec import QuantSpec
from tests.narrow import gradient
from tests.quantizers.test_lsq import difficult

SCALE, OFFSET = 0.0437, -0.1213  # z = round(2.776) = 3 at 4 bits


def made(bits: int, scale: float = SCALE, offset: float = OFFSET) -> LSQPlus:
    quantizer = LSQPlus(QuantSpec(bits, offset=True), name="x")
    quantizer.initialize(torch.tensor(scale), offset=torch.tensor(offset))
    return quantizer


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [OFFSET, 0.0, 0.7, -9.0])  # between, none, and clipped to either end
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_forward_and_gradients_match_the_paper(
    bits: int, offset: float, fast: bool, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(fused, "available", lambda x, raw_scale: False)
    quantizer, top, scale = made(bits, offset=offset), (1 << bits) - 1, np.float32(SCALE)
    quantizer.raw_scale.data *= sign  # a scale that crossed zero
    zero = int(np.clip(np.rint(-np.float32(offset) / scale), 0, top))
    values = difficult(scale, -zero, top - zero)
    x = torch.tensor(values[None], requires_grad=True)
    upstream = np.random.default_rng(1).normal(size=values.size).astype(np.float32)
    out = quantizer(x)
    out.backward(torch.from_numpy(upstream[None]))
    v = values / scale
    codes = np.clip(np.rint(v) + zero, 0, top)
    inside = (v > -zero) & (v < top - zero)
    by_scale = np.where(inside, np.rint(v) - v.astype(np.float64), np.where(v <= -zero, 0, top))
    g = 1 / np.sqrt(values.size * top)
    assert quantizer.zero_point == zero
    assert np.array_equal(quantizer.codes(x).numpy()[0], codes)
    assert np.array_equal(out.detach().numpy()[0], (codes - zero).astype(np.float32) * scale)
    assert torch.equal(out, (quantizer.codes(x) - quantizer.zero_point) * quantizer.scale)
    assert np.array_equal(x.grad.numpy()[0], upstream * inside)
    # float32 sums of 113 terms of size up to top, and z times the clipped ones taken apart and together again
    bound = 2e-6 * (top + zero) * np.abs(upstream).sum() * g
    assert abs(float(gradient(quantizer.raw_scale)) - sign * (by_scale * upstream).sum() * g) <= bound
    assert abs(float(gradient(quantizer.offset)) - (~inside * upstream).sum() * g) <= bound


def test_zero_is_always_a_code_and_the_zero_point_follows_the_offset() -> None:
    quantizer = made(4)
    assert float(quantizer(torch.zeros(1, 1)).detach()) == 0.0
    quantizer.offset.data.fill_(-0.25)
    assert quantizer.zero_point == round(0.25 / SCALE) == 6


def test_offset_and_scale_learn() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 50).mul_(0.5).add_(0.3)
    quantizer = made(3, scale=0.05, offset=0.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    before = float((quantizer(x) - x).detach().square().mean())
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert quantizer.zero_point > 0
    assert float((quantizer(x) - x).detach().square().mean()) < 0.2 * before


def test_least_squares_range_is_near_the_best_of_a_fine_search() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.4
    spec = QuantSpec(3, signed=False, offset=True)

    def error(scale: float, zero: int) -> float:
        codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, 7) - zero
        return float(((codes * scale - x.numpy()) ** 2).mean())

    best = min(error(scale, zero) for scale in np.linspace(0.02, 2, 400) for zero in range(8))
    scale, offset = least_squares_range(x, spec)
    assert error(float(scale), round(-float(offset) / float(scale))) <= 1.02 * best
    assert offset < 0


def test_a_constant_input_still_gets_a_step() -> None:
    assert least_squares_range(torch.zeros(5), QuantSpec(4, signed=False)) == (torch.ones(()), torch.zeros(()))


def test_lsq_plus_passes_no_relu_over_and_refuses_what_it_cannot_do() -> None:
    assert not made(4).clips_as_relu()
    for spec in (QuantSpec(4, offset=True, axis=1), QuantSpec(4, offset=True, power_of_two=True)):
        with pytest.raises(ValueError, match="x"):
            LSQPlus(spec, name="x")


def test_the_graph_of_lsq_plus_has_the_eager_values() -> None:
    quantizer = made(4)
    x = torch.from_numpy(difficult(np.float32(SCALE), -3, 12))[None]
    program = torch.export.export(quantizer, (x,), strict=False)
    assert torch.equal(program.module()(x), quantizer(x))


def test_scales_are_powers_of_two_and_learn_through_the_rounding() -> None:
    raw = torch.tensor([0.3, -0.3, 1.0, 0.7071, 0.7072, 3e-12], requires_grad=True)
    rounded = power_of_two(raw)
    assert rounded.tolist()[:5] == [0.25, 0.25, 1.0, 0.5, 1.0]
    rounded.sum().backward()
    assert raw.grad.tolist() == [1, -1, 1, 1, 1, 1]
    weight = torch.randn(5, 3, 3, 3)
    quantizer = LSQWeight(QuantSpec(4, signed=True, axis=0, power_of_two=True), weight)
    exponents = np.log2(quantizer.scale.numpy())
    assert np.array_equal(exponents, np.rint(exponents))
    shape = (5, 1, 1, 1)
    assert torch.equal(quantizer(weight), quantizer.codes(weight) * quantizer.scale.view(shape))
    quantizer(weight).square().sum().backward()
    reference = LSQWeight(QuantSpec(4, signed=True, axis=0), weight)
    reference.initialize(quantizer.scale)
    reference(weight).square().sum().backward()
    assert torch.equal(gradient(quantizer.raw_scale), gradient(reference.raw_scale))


def test_gradient_scale_may_count_the_whole_tensor() -> None:
    x = torch.ones(8, 3, 5, 5)
    assert LSQ(QuantSpec(4, signed=False, gradient_count="numel")).gradient_scale(x) == pytest.approx(
        (600 * 15) ** -0.5
    )
    weight = LSQWeight(QuantSpec(4, signed=True, axis=0, gradient_count="numel"), x)
    assert weight.gradient_scale(x) == pytest.approx((600 * 7) ** -0.5)
    assert lsq_plus.LSQPlus(QuantSpec(4, gradient_count="numel")).gradient_scale(x) == pytest.approx((600 * 15) ** -0.5)
