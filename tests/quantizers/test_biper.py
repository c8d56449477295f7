"""BiPer and the baseline binarizers against NumPy transcriptions in float64, with zeros and boundaries among the values."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qat.quantizers.binary import BinaryWeight, SignWeight
from qat.quantizers.biper import (
    PeriodicWeight,
    best_scale,
    periodic_regulariser,
    quantization_error,
)
from qat.quantizers.lsq import LSQ
from qat.quantizers.recu import RectifiedWeight
from qat.quantizers.spec import QuantSpec
from tests.narrow import gradient
from tests.nearness import ROUNDING, assert_near

BIT = QuantSpec(1, axis=0)
FREQUENCY = 20.0
# cos and sin of float32 phases up to about 30 radians: the phase itself is rounded by 2^-20 at most.
PHASE_ERROR = 3e-6


def weight(seed: int = 0, shape: tuple[int, ...] = (5, 3, 3, 7)) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    w.view(-1)[:3] = torch.tensor([0.0, -0.0, math.pi / FREQUENCY])
    return w


def laplace(b: float, count: int = 400_000) -> NDArray[np.float64]:
    """Midpoints of equal shares of Laplace(0, b), by its inverse distribution function."""
    p = (np.arange(count) + 0.5) / count
    return -b * np.sign(p - 0.5) * np.log1p(-2 * np.abs(p - 0.5))


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_those_of_the_sine_in_both_stages(stage: Literal[1, 2]) -> None:
    w = weight().requires_grad_()
    quantizer = PeriodicWeight(BIT, w.detach(), frequency=FREQUENCY, stage=stage)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    out = quantizer(w)
    out.backward(upstream)
    phase, alpha = FREQUENCY * w.detach().double().numpy(), quantizer.scale.double().numpy().reshape(-1, 1, 1, 1)
    expected = upstream.double().numpy() * alpha * FREQUENCY * np.cos(phase)
    assert (
        np.abs(w.grad.double().numpy() - expected).max()
        <= PHASE_ERROR * FREQUENCY * float(upstream.abs().max()) * alpha.max()
    )
    wave = np.sin(phase) if stage == 1 else np.where(np.sin(np.float32(FREQUENCY) * w.detach().numpy()) >= 0, 1.0, -1.0)
    assert np.abs(out.detach().double().numpy() - alpha * wave).max() <= PHASE_ERROR
    terms = upstream.double().numpy() * wave
    sizes = np.abs(terms).sum((1, 2, 3))
    # Sums of 63 floats, each off by the phase's error before it is added.
    assert_near(quantizer.raw_scale.grad, terms.sum((1, 2, 3)), 63 * ROUNDING + PHASE_ERROR, of=sizes.max())


def test_the_square_wave_has_period_two_pi_over_the_frequency() -> None:
    w = weight(2)
    period = 2 * math.pi / FREQUENCY
    quantizer = PeriodicWeight(BIT, w, frequency=FREQUENCY)
    clear = (FREQUENCY * w.double()).sin().abs() > 1e-4  # rounding w + period moves the phase by less
    codes = quantizer.codes(w)
    for shift, factor in ((period, 1), (-3 * period, 1), (period / 2, -1)):
        assert torch.equal(quantizer.codes(w + shift)[clear], factor * codes[clear])
    assert clear.float().mean() > 0.9


@pytest.mark.parametrize("cls", [PeriodicWeight, SignWeight, RectifiedWeight])
def test_codes_are_two_values_whatever_the_input_and_the_contract_holds(cls: type[BinaryWeight]) -> None:
    for w in (weight(3), torch.zeros(4, 6, 3, 3), -torch.zeros(4, 6, 3, 3)):
        quantizer = cls(BIT, w)
        codes = quantizer.codes(w)
        assert codes.dtype == torch.int32 and set(codes.unique().tolist()) <= {-1, 1}
        scale = quantizer.scale.view(-1, 1, 1, 1)
        assert torch.equal(quantizer(w), (codes - quantizer.zero_point) * scale)
    assert set(cls(BIT, weight(3)).codes(weight(3)).unique().tolist()) == {-1, 1}


def test_zero_weights_become_plus_one() -> None:
    assert (SignWeight(BIT, weight()).codes(torch.tensor([[0.0, -0.0, -1e-30]])).tolist()) == [[1, 1, -1]]
    assert PeriodicWeight(BIT, weight()).codes(torch.tensor([[0.0, -0.0]])).tolist() == [[1, 1]]


@pytest.mark.parametrize("a", [0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0])
def test_quantization_error_is_that_of_laplacian_weights(a: float) -> None:
    wave = np.abs(np.sin(FREQUENCY * laplace(a / FREQUENCY)))
    # 400,000 midpoints integrate |sin|, kinks and the cut-off tail included, to a few 1e-6
    assert abs(best_scale(a) - wave.mean()) < 2e-5
    assert abs(quantization_error(a) - wave.var()) < 2e-5


def test_quantization_error_has_the_stated_maximum_and_limit() -> None:
    grid = np.linspace(0.2, 3, 2801)
    errors = [quantization_error(a) for a in grid]
    assert abs(grid[int(np.argmax(errors))] - 0.955) < 2e-3 and abs(max(errors) - 0.10283) < 1e-5
    assert abs(quantization_error(1e4) - (0.5 - 4 / math.pi**2)) < 1e-6


def test_regulariser_is_the_mean_squared_sine_summed_over_layers() -> None:
    layers = [(PeriodicWeight(BIT, w, frequency=f), w) for w, f in ((weight(4), 7.0), (weight(5), 20.0))]
    expected = sum(float(np.square(np.sin(float(q.frequency) * w.double().numpy())).mean()) for q, w in layers)
    assert abs(float(periodic_regulariser(layers)) - expected) < 1e-5


def test_a_learned_frequency_gets_its_gradient_and_a_scheduled_one_moves() -> None:
    w = weight(6)
    quantizer = PeriodicWeight(BIT, w, frequency=3.0, stage=1, learn_frequency=True)
    quantizer(w).sum().backward()
    alpha, x = quantizer.scale.double().numpy().reshape(-1, 1, 1, 1), w.double().numpy()
    assert abs(float(gradient(quantizer.frequency)) - (alpha * x * np.cos(3.0 * x)).sum()) < 1e-3
    scheduled = PeriodicWeight(BIT, w, frequency=3.0)
    scheduled.set_frequency(20.0)
    assert torch.equal(scheduled.codes(w), PeriodicWeight(BIT, w, frequency=20.0).codes(w))
    assert not [n for n, _ in scheduled.named_parameters() if n != "raw_scale"]


def test_recu_standardises_and_clamps_to_quantiles() -> None:
    w = weight(7)
    found = RectifiedWeight(BIT, w, tau=0.9).before_sign(w).double().numpy().ravel()
    rows = w.double().numpy().reshape(len(w), -1)
    centred = ((rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-5)).ravel()
    ordered = np.sort(centred)
    drop = int((1 - 0.9) * (len(ordered) - 1))
    expected = np.clip(centred, ordered[drop], ordered[-1 - drop])
    assert np.abs(found - expected).max() < 1e-5  # float32 against float64
    assert (expected != centred).any()


def test_specs_of_one_bit_are_signed_and_have_their_own_quantizers() -> None:
    assert (QuantSpec(1).qmin, QuantSpec(1).qmax, QuantSpec(1).signed) == (-1, 1, True)
    with pytest.raises(ValueError, match="signed must not be False"):
        QuantSpec(1, signed=False)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        LSQ(QuantSpec(1))
    with pytest.raises(ValueError, match="has 1 bit"):
        SignWeight(QuantSpec(2, signed=True), weight())
    with pytest.raises(ValueError, match="frequency must be positive"):
        PeriodicWeight(BIT, weight(), frequency=0.0)
