"""Averages against NumPy means over a hand-made trajectory, SWAD's valley against algorithm 1 run over the whole list."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from qat.objectives.averaging import VALLEYS, Average, LossValley, PublishedValley, merge
from qat.surgery.batchnorm import restore_norm_statistics
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from tests.surgery.nets import TinyNet, with_random_norms

X = torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(0))


def net(value: float) -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def span(*values: float) -> Average:
    average = Average()
    for value in values:
        average.update(net(value))
    return average


def value_of(average: Average) -> float:
    return float(average.values["weight"][0, 0])


def test_plain_mean_and_ema_against_numpy() -> None:
    trajectory = np.random.default_rng(0).normal(size=40)
    plain, ema = span(*trajectory), Average(0.9)
    expected = trajectory[0]
    for index, value in enumerate(trajectory):
        ema.update(net(value))
        if index:
            rate = max(0.1, 1 / (index + 1))
            expected = (1 - rate) * expected + rate * value
    assert value_of(plain) == pytest.approx(trajectory.mean(), abs=1e-6)
    assert value_of(ema) == pytest.approx(expected, abs=1e-6)


def test_scales_are_averaged_as_positive_scales() -> None:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    quantize_(model, uniform_rules(4, 4, ("stem", "head")), X)
    calibrate(model, [X])
    average, scale = Average(), quantizers(model)["stem.weight"].raw_scale
    first = scale.detach().clone()
    for factor in (1.0, -3.0):  # the second crossed zero: the scale is 3 of the first, not their cancelled mean
        with torch.no_grad():
            scale.copy_(first * factor)
        average.update(model)
    average.copy_to(model)
    assert torch.allclose(quantizers(model)["stem.weight"].scale, 2 * first, rtol=1e-6)


def test_a_loaded_average_goes_on_as_it_would_have() -> None:
    whole, cut = Average(0.7), Average(0.7)
    for value in (1.0, 2.0, 5.0):
        whole.update(net(value))
        cut.update(net(value))
        again = Average(0.5)
        again.load_state_dict(cut.state_dict())
        cut = again
    assert value_of(whole) == value_of(cut) and cut.count == 3


def test_merging_means_is_the_mean_of_all_updates_and_leaves_the_other_alone() -> None:
    first, second = span(1.0, 2.0, 6.0), span(10.0)
    merge(first, second)
    assert value_of(first) == pytest.approx(4.75) and first.count == 4 and value_of(second) == 10.0


def algorithm_1(losses: list[float], converge: int, tolerance: int, ratio: float) -> tuple[int, int] | None:
    """First and last evaluation of the valley, from the whole list of losses: the paper's pseudocode, indices from 0."""
    for start in range(len(losses) - converge + 1):
        window = losses[start : start + converge]
        if losses[start] == min(window):
            break
    else:
        return None
    bound = ratio * sum(window) / converge
    for end in range(start + 1, len(losses) - tolerance + 1):
        if min(losses[end : end + tolerance]) > bound:
            return start, end - 1
    within = [i for i in range(start, len(losses)) if losses[i] <= bound]
    return start, within[-1]


@pytest.mark.parametrize("seed", range(12))
def test_the_valley_is_that_of_the_published_algorithm(seed: int) -> None:
    generator = np.random.default_rng(seed)
    converge, tolerance = int(generator.integers(2, 5)), int(generator.integers(2, 5))
    drift = np.abs(np.arange(24) - 9) ** 1.3 * generator.uniform(0.01, 0.12)
    losses = (1 + drift + generator.normal(size=24) * 0.08).tolist()
    valley, values = LossValley(converge, tolerance, 1.2), generator.normal(size=24)
    for loss, value in zip(losses, values, strict=True):
        valley.push(loss, span(value, value + 1))
        again = LossValley(converge, tolerance, 1.2)  # as if the run had been killed and resumed here
        again.load_state_dict(valley.state_dict())
        valley = again
    expected, found = algorithm_1(losses, converge, tolerance, 1.2), valley.result()
    if expected is None:
        assert found is None
        return
    assert found is not None
    chosen = values[expected[0] : expected[1] + 1]
    assert found.count == 2 * len(chosen) and value_of(found) == pytest.approx(chosen.mean() + 0.5, abs=1e-5)


def published(losses: list[float], converge: int, tolerance: int, ratio: float) -> list[int]:
    """The evaluations that the public code averages with equal weights, from 0; one that counts twice is there twice."""
    counted: list[int] = []
    recent, window = deque[int](maxlen=converge), deque[int](maxlen=tolerance)
    start, bound = -1, 0.0
    for now, _ in enumerate(losses):
        recent.append(now)
        window.append(now)
        if start < 0:
            if len(recent) == converge and np.argmin([losses[i] for i in recent]) == 0:
                start = recent[0]
                bound = float(np.mean([losses[i] for i in recent])) * ratio
                if tolerance < converge:
                    counted += list(recent)[1 : 1 + converge - tolerance]
                if tolerance > converge:
                    queue = list(window)[: tolerance - converge + 1]
                    cut = 0
                    for place in reversed(range(len(queue))):
                        if losses[queue[place]] > bound:
                            cut = place + 1
                            break
                    counted += queue[cut + 1 :]
            continue
        if window[0] < start:
            continue
        if min(losses[i] for i in window) > bound:
            return counted or [start]
        counted.append(window[0])
    if start < 0:
        return [len(losses) - 1]
    window.popleft()
    while window and min(losses[i] for i in window) <= bound:
        counted.append(window.popleft())
    return counted or [start]


@pytest.mark.parametrize("seed", range(24))
def test_the_published_valley_averages_what_the_public_code_does(seed: int) -> None:
    generator = np.random.default_rng(seed)
    converge, tolerance = int(generator.integers(2, 5)), int(generator.integers(1, 7))
    drift = np.abs(np.arange(24) - 9) ** 1.3 * generator.uniform(0.01, 0.12)
    losses = (1 + drift + generator.normal(size=24) * generator.choice([0.08, 0.5])).tolist()
    valley, values = PublishedValley(converge, tolerance, 1.2), generator.normal(size=24)
    for now, (loss, value) in enumerate(zip(losses, values, strict=True), 1):
        valley.push(loss, span(*[value] * int(generator.integers(1, 4))))
        again = PublishedValley(converge, tolerance, 1.2)
        again.load_state_dict(valley.state_dict())
        valley = again
        found, expected = valley.result(), published(losses[:now], converge, tolerance, 1.2)
        assert found is not None and value_of(found) == pytest.approx(values[expected].mean(), abs=1e-5)


def test_the_two_valleys_differ_as_documented() -> None:
    losses = [1.1, 1.05, 1.02, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 9.0]
    found = {name: kind() for name, kind in VALLEYS.items()}
    for value, loss in enumerate(losses):
        for valley in found.values():
            valley.push(loss, span(value))
    paper, public = found["swad"].result(), found["swad-published"].result()
    assert paper is not None and value_of(paper) == pytest.approx(np.mean([3, 4, 5, 6, 7, 8]))
    # 1 and 2 lie before the beginning, which counts twice
    assert public is not None and value_of(public) == pytest.approx(np.mean([1, 2, 3, 3, 4, 5, 6, 7, 8]))


def test_a_published_valley_without_a_beginning_is_the_last_span() -> None:
    valley = PublishedValley()
    assert valley.result() is None
    for loss, value in [(3.0, 1.0), (2.0, 5.0), (1.0, 7.0)]:
        valley.push(loss, span(value, value + 1))
    found = valley.result()
    assert found is not None and value_of(found) == 7.5


def test_evaluations_that_end_the_valley_are_not_averaged() -> None:
    valley = LossValley(converge=2, tolerance=3, ratio=1.3)
    for loss, value in [(1.0, 1.0), (1.1, 2.0), (1.2, 3.0), (9.0, 50.0), (9.0, 60.0), (9.0, 70.0), (0.1, 80.0)]:
        valley.push(loss, span(value))
    found = valley.result()
    assert valley.ended and found is not None and value_of(found) == 2.0 and found.count == 3


def test_norm_statistics_are_the_mean_over_batches_under_the_averaged_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5)).train()
    batches = [X, X * 2 + 1]
    with torch.no_grad():
        outputs = [model[0](b).double().numpy() for b in batches]
    restore_norm_statistics(model, batches)
    mean = np.mean([o.mean((0, 2, 3)) for o in outputs], 0)
    variance = np.mean([o.transpose(1, 0, 2, 3).reshape(2, -1).var(1, ddof=1) for o in outputs], 0)
    assert np.allclose(model[1].get_buffer("running_mean"), mean, atol=1e-6)
    assert np.allclose(model[1].get_buffer("running_var"), variance, atol=1e-5)
    assert model[1].momentum == 0.3 and model[2].training


def test_a_failing_pass_restores_statistics_momentum_and_every_modules_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    model[2].eval()  # a frozen batch norm stays frozen
    model[1].running_mean.fill_(7)
    for batches in ([X, torch.zeros(1, 5, 4, 4)], []):
        with pytest.raises((RuntimeError, ValueError)):
            restore_norm_statistics(model, batches)
        assert model[1].running_mean.tolist() == [7, 7] and model[1].momentum == 0.1
        assert model.training and model[1].training and not model[2].training


def test_bad_decay_and_an_empty_average_raise() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Average(1.0)
    with pytest.raises(RuntimeError, match="nothing was averaged"):
        Average().copy_to(net(0))
