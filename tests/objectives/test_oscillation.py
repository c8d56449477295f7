"""Oscillation against hand-made code sequences and a loop over single weights; damping against NumPy."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from qat.objectives.oscillation import Oscillation, damping, scale_over
from qat.quantizers.lsq import LSQWeight
from qat.quantizers.spec import QuantSpec
from tests.narrow import gradient


def quantized(
    shape: tuple[int, ...], bits: int = 4, axis: int | None = 0, scale: float = 0.5
) -> tuple[Parameter, LSQWeight]:
    weight = Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    quantizer = LSQWeight(QuantSpec(bits, signed=True, axis=axis), weight)
    scales = torch.tensor(scale) if axis is None else scale * torch.arange(1, shape[axis] + 1)
    quantizer.initialize(scales.float())
    return weight, quantizer


def play(sequence: list[list[int]], bits: int = 8, **options: float) -> tuple[Oscillation, list[float], Parameter]:
    """Codes of a few weights over time -> what `update` returned after each; the scale is 0.5."""
    weight, quantizer = quantized((1, len(sequence[0])), bits)
    with torch.no_grad():
        weight.copy_(0.5 * torch.tensor([sequence[0]]))
    follower, shares = Oscillation([weight], [quantizer], **options), []
    for codes in sequence[1:]:
        with torch.no_grad():
            weight.copy_(0.5 * torch.tensor([codes]))
        shares.append(follower.update())
    return follower, shares, weight


def test_only_a_change_against_the_last_change_is_an_oscillation() -> None:
    #          up, up, down: 1        up, stay, down: 1      down, down, down       still
    columns = [[0, 1, 2, 1, 1], [0, 1, 1, 0, 1], [3, 2, 1, 0, -1], [5, 5, 5, 5, 5]]
    _, shares, _ = play(np.array(columns).T.tolist())
    assert shares == [0, 0, 2 / 4, 1 / 4]


def test_jumps_across_the_8_bit_grid_keep_their_direction() -> None:
    _, shares, _ = play([[-120], [120], [-120], [-128], [127]])
    assert shares == [0, 1, 0, 1]


def test_frequency_and_mean_against_a_loop_over_single_weights() -> None:
    generator = np.random.default_rng(0)
    sequence = generator.integers(-8, 8, size=(60, 7))
    follower, _, _ = play(sequence.tolist(), momentum=0.1)
    for column in range(7):
        frequency, mean, direction, last = 0.0, float(sequence[0, column]), 0, sequence[0, column]
        for code in sequence[1:, column]:
            moved = int(np.sign(code - last))
            frequency = 0.9 * frequency + 0.1 * (moved * direction < 0)
            mean, direction, last = 0.9 * mean + 0.1 * code, moved or direction, code
        assert float(follower.frequency[0][0, column]) == pytest.approx(frequency, abs=1e-5)
        assert float(follower.mean[0][0, column]) == pytest.approx(mean, abs=1e-4)
    assert follower.share_above(0.3) == pytest.approx((follower.frequency[0] > 0.3).float().mean().item())


@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 3, 3), 0), ((3, 2, 3, 3), None), ((3, 5), 0), ((3, 5), None)])
def test_a_swinging_weight_is_held_at_its_mean_code_whatever_optimizer_and_scale_do(
    shape: tuple[int, ...], axis: int | None
) -> None:
    weight, quantizer = quantized(shape, axis=axis)
    place = (2, *[1] * (len(shape) - 1))
    follower = Oscillation([weight], [quantizer], momentum=0.3, freeze_above=0.4)
    others = weight.detach().clone()
    scale = quantizer.scale if axis is None else quantizer.scale[2]
    for code in (1, 2, 1, 2, 1, 2):  # swings between 1 and 2, more often at 2 in the mean
        with torch.no_grad():
            weight[place] = code * scale
        follower.update()
        if follower.frozen:
            break
    held = round(float(follower.mean[0][place]))
    assert follower.frozen == pytest.approx(1 / weight.numel()) and held in (1, 2)
    assert float(weight[place].detach()) == pytest.approx(held * float(scale), rel=1e-6)  # in the very step it froze in
    with torch.no_grad():
        weight[place] = 100.0  # the optimizer pushes on, and the scale grows
        quantizer.raw_scale.mul_(1.7)
    assert follower.update() == 0
    assert float(weight[place].detach()) == pytest.approx(held * 1.7 * float(scale), rel=1e-6)
    assert int(quantizer.codes(weight)[place]) == held
    others[place] = weight[place].detach()
    assert torch.equal(weight.detach(), others)  # nothing else moved


def test_telemetry_alone_moves_no_weight() -> None:
    _, shares, weight = play([[0], [1], [0], [1], [0]], momentum=0.9)
    assert shares[1:] == [1, 1, 1] and weight.item() == 0


def test_state_survives_and_restart_forgets() -> None:
    first, _, _ = play([[0, 4], [1, 4], [0, 4], [1, 4]], momentum=0.5, freeze_above=0.3)
    second, _, _ = play([[1, 4]], momentum=0.5, freeze_above=0.3)
    second.load_state_dict(first.state_dict())
    assert first.update() == second.update() and torch.equal(first.frequency[0], second.frequency[0])
    assert second.frozen == 0.5
    second.restart()
    assert second.frozen == 0 and not second.frequency[0].any()


@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 3, 3), 0), ((3, 5), 0), ((3, 5), None)])
def test_damping_against_numpy_pulls_to_the_grid_inside_and_not_outside(
    shape: tuple[int, ...], axis: int | None
) -> None:
    weight, quantizer = quantized(shape, bits=3, axis=axis, scale=0.2)
    value = damping([weight, weight], [quantizer, quantizer])
    value.backward()
    w, s = weight.detach().double().numpy(), scale_over(quantizer, weight).double().numpy()
    point = np.clip(np.rint(w / s), -4, 3) * s
    inside = (w > -4 * s) & (w < 3 * s)
    assert 0 < inside.mean() < 1
    assert value.item() == pytest.approx(2 * ((w - point)[inside] ** 2).sum(), rel=1e-5)
    assert np.allclose(gradient(weight), 4 * (w - point) * inside, atol=1e-5)
    assert quantizer.raw_scale.grad is None
