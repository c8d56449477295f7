"""LSQ against a NumPy transcription of the paper's equations, at every bit width, with values on edges and ties."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qat.quantizers.lsq import LSQ, LSQWeight, initial_scale
from qat.quantizers.spec import QuantSpec
from tests.narrow import gradient
from tests.nearness import ROUNDING, assert_near

BITS = range(2, 9)
SCALE = 0.0437


def paper_lsq(
    x: NDArray[np.float32], scale: np.float32, qmin: int, qmax: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """(x_hat, d x_hat/d x, d x_hat/d scale) element by element, as §3.1 writes them."""
    x_hat, dx, ds = (np.zeros(x.shape) for _ in range(3))
    for i, value in np.ndenumerate(x):
        v = np.float32(value / scale)
        code = np.rint(min(max(float(v), qmin), qmax))
        x_hat[i] = np.float32(np.float32(code) * scale)
        if v <= qmin:
            ds[i] = qmin
        elif v >= qmax:
            ds[i] = qmax
        else:
            dx[i], ds[i] = 1, np.rint(v) - np.float64(v)
    return x_hat.astype(np.float32), dx, ds


def difficult(scale: np.float32, qmin: int, qmax: int) -> NDArray[np.float32]:
    """Random values, both clip edges exactly and their neighbours, ties, zeros, far outside. Length is prime."""
    rng = np.random.default_rng(0)
    edges = np.array([qmin, qmax, qmin - 0.5, qmax + 0.5, qmin + 0.5, qmax - 0.5, 0.5, 1.5, -0.5, 0.0, -0.0, 1e4, -1e4])
    on_grid = np.float32(edges) * scale
    around = np.concatenate([np.nextafter(on_grid, np.float32(9)), np.nextafter(on_grid, np.float32(-9))])
    spread = rng.normal(0, 0.7 * qmax, 113 - 3 * len(edges)) * scale
    return np.concatenate([on_grid, around, spread]).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_forward_and_gradients_match_the_paper(bits: int, signed: bool) -> None:
    spec = QuantSpec(bits, signed=signed)
    quantizer = LSQ(spec)
    quantizer.initialize(torch.tensor(SCALE), signed)
    scale = np.float32(SCALE)
    values = difficult(scale, spec.qmin, spec.qmax)
    x = torch.tensor(values.reshape(1, -1), requires_grad=True)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    out = quantizer(x)
    out.backward(torch.from_numpy(upstream))
    x_hat, dx, ds = paper_lsq(values, scale, spec.qmin, spec.qmax)
    assert np.array_equal(out.detach().numpy().ravel(), x_hat)
    assert np.array_equal(x.grad.numpy().ravel(), (dx * upstream.ravel()).astype(np.float32))
    g = 1 / np.sqrt(values.size * spec.qmax)
    expected = (ds * upstream.ravel()).sum() * g
    # float32 sum of 113 terms of size up to qmax: a few ulps of the largest
    assert abs(float(gradient(quantizer.raw_scale)) - expected) <= 1e-6 * spec.qmax * np.abs(upstream).sum() * g


@pytest.mark.parametrize("bits", BITS)
def test_per_channel_gradients_match_the_paper(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.normal(size=(5, 3, 7, 2)).astype(np.float32)
    quantizer = LSQWeight(QuantSpec(bits, signed=True, axis=0), torch.from_numpy(weight))
    x = torch.tensor(weight, requires_grad=True)
    upstream = rng.normal(size=weight.shape).astype(np.float32)
    out = quantizer(x)
    out.backward(torch.from_numpy(upstream))
    for channel in range(5):
        scale = np.float32(quantizer.scale[channel])
        x_hat, dx, ds = paper_lsq(weight[channel], scale, quantizer.spec.qmin, quantizer.spec.qmax)
        assert np.array_equal(out.detach().numpy()[channel], x_hat)
        assert np.array_equal(x.grad.numpy()[channel], (dx * upstream[channel]).astype(np.float32))
        terms = ds * upstream[channel] / np.sqrt(42 * quantizer.spec.qmax)
        # A float32 sum of 42 terms of mixed signs; each code is off by a rounding of a number up to qmax.
        size = quantizer.spec.qmax * np.abs(upstream[channel]).sum() / np.sqrt(42 * quantizer.spec.qmax)
        assert_near(gradient(quantizer.raw_scale)[channel], terms.sum(), 42 * ROUNDING, of=size)


def test_worked_examples_of_the_paper() -> None:
    quantizer = LSQ(QuantSpec(4, signed=True))
    quantizer.initialize(torch.tensor(1.0), True)
    for value, derivative in ((1.49, -0.49), (1.51, 0.49)):
        quantizer.raw_scale.grad = None
        quantizer(torch.tensor([[value]])).sum().backward()
        scale = 1 / np.sqrt(1 * 7)
        assert float(gradient(quantizer.raw_scale)) == pytest.approx(derivative * scale, rel=1e-5)


@pytest.mark.parametrize(("bits", "scale"), [(4, 4.92e-4), (2, 1.30e-3)])
def test_gradient_scale_of_a_3x3x256x256_weight(bits: int, scale: float) -> None:
    weight = torch.ones(256, 256, 3, 3)
    assert LSQWeight(QuantSpec(bits, signed=True), weight).gradient_scale(weight) == pytest.approx(scale, rel=2e-3)


def test_gradient_scale_of_an_activation_does_not_depend_on_the_batch() -> None:
    quantizer = LSQ(QuantSpec(4, signed=False))
    assert quantizer.gradient_scale(torch.ones(2, 3, 5, 5)) == quantizer.gradient_scale(torch.ones(16, 3, 5, 5))
    assert quantizer.gradient_scale(torch.ones(2, 3, 5, 5)) == pytest.approx(1 / np.sqrt(75 * 15))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    per_channel=st.booleans(),
    scale=st.floats(1e-6, 1e3, allow_nan=False),
    seed=st.integers(0, 2**16),
)
def test_contract_forward_is_codes_times_scale_bit_for_bit(
    bits: int, signed: bool, per_channel: bool, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 7, generator=generator) * scale * 2**bits
    spec = QuantSpec(bits, signed=signed, axis=1 if per_channel else None)
    quantizer = LSQ(spec, 5 if per_channel else None)
    quantizer.initialize(
        torch.full((5,), scale) * torch.rand(5, generator=generator).add(0.1) if per_channel else torch.tensor(scale),
        signed,
    )
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= spec.qmin and int(codes.max()) <= spec.qmax
    shape = (1, 5, 1) if per_channel else ()
    assert torch.equal(quantizer(x).detach(), (codes - quantizer.zero_point) * quantizer.scale.view(shape))


def test_uninitialised_quantizer_raises_and_names_itself() -> None:
    quantizer = LSQ(QuantSpec(4), name="blocks.3.conv.input")
    with pytest.raises(RuntimeError, match=r"blocks\.3\.conv\.input.*calibrate"):
        quantizer(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer.codes(torch.ones(1, 2))


def test_scale_stays_positive_when_the_optimizer_crosses_zero() -> None:
    quantizer = LSQ(QuantSpec(4, signed=True))
    quantizer.initialize(torch.tensor(0.01), True)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    x = torch.linspace(-1, 1, 101)[None]
    for _ in range(50):
        optimizer.zero_grad()
        quantizer(x).sum().backward()
        optimizer.step()
        assert float(quantizer.scale) > 0
        assert torch.isfinite(quantizer(x)).all()


def test_reflected_scale_moves_the_way_its_gradient_says() -> None:
    gradients = []
    for raw in (0.3, -0.3):
        quantizer = LSQ(QuantSpec(4, signed=True))
        quantizer.initialize(torch.tensor(1.0), True)
        quantizer.raw_scale.data.fill_(raw)
        quantizer(torch.tensor([[0.4, 5.0]])).sum().backward()
        gradients.append(float(gradient(quantizer.raw_scale)))
    assert gradients[0] == -gradients[1] != 0


def test_initial_scale_is_the_papers_per_channel_and_survives_dead_channels() -> None:
    weight = torch.randn(4, 3, 3, 3)
    weight[2] = 0
    scale = initial_scale(weight, QuantSpec(3, signed=True, axis=0))
    expected = [2 * np.abs(w).mean() / np.sqrt(3) for w in weight.numpy()]
    assert scale[[0, 1, 3]].numpy() == pytest.approx(np.array(expected)[[0, 1, 3]], rel=1e-6)
    assert float(scale[2]) == 1.0


def test_state_dict_carries_scale_and_sign() -> None:
    source = LSQ(QuantSpec(4), name="a")
    source.initialize(torch.tensor(0.25), signed=True)
    target = LSQ(QuantSpec(4), name="b")
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    x = torch.randn(2, 9)
    assert target.spec.signed is True
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("bits", [9, 0])
def test_bits_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        QuantSpec(bits)


def test_one_bit_is_no_grid_of_lsq() -> None:
    with pytest.raises(ValueError, match="one bit takes a binary quantizer"):
        LSQ(QuantSpec(1, signed=True), name="a")


def test_weights_of_8_bits_have_no_code_minus_128() -> None:
    spec = QuantSpec.of_weight(8)
    assert (spec.qmin, spec.qmax) == (-127, 127)
    assert (QuantSpec.of_weight(4).qmin, QuantSpec.of_weight(4).qmax) == (-8, 7)
