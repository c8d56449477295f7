"""A second pass sees the first one's masks and moves no batch norm statistics; what is restored is what was there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from qat.objectives.replay import fixed_norm_statistics, replay_of, shared_norm_momentum
from qat.objectives.sharpness import sagm
from tests.narrow import present

CPU = torch.device("cpu")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)) + 1
LABELS = torch.randint(3, (16,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Dropout, stochastic depth (timm's) and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.head = nn.BatchNorm1d(6, momentum=0.2), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.path = nn.Dropout(0.5), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(self.drop(x + self.path(self.inner(x))))


def fresh() -> Net:
    torch.manual_seed(2)
    return Net().train()


def test_the_second_pass_draws_the_masks_of_the_first_and_the_third_new_ones() -> None:
    model = fresh()
    masks: list[Tensor] = []
    for module in (model.drop, model.path):
        module.register_forward_hook(lambda _, __, y: masks.append(y != 0))
    replay = replay_of(model, CPU)
    model(X)
    with replay():
        model(X)
    model(X)
    path, drop = masks[0::2], masks[1::2]
    assert torch.equal(path[0], path[1]) and torch.equal(drop[0], drop[1])
    assert not torch.equal(path[0], path[2]) and not torch.equal(drop[0], drop[2])
    assert path[0].any() and not path[0].all()


def test_the_generator_goes_on_as_if_nothing_had_happened_also_after_an_error() -> None:
    model = fresh()
    torch.manual_seed(5)
    torch.rand(3)
    expected = torch.rand(4)
    torch.manual_seed(5)
    replay = replay_of(model, CPU)
    torch.rand(3)
    with pytest.raises(KeyError), replay():
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.rand(4), expected)


def test_sagm_moves_batch_norm_statistics_once_a_step_against_numpy() -> None:
    model = fresh()

    def closure() -> Tensor:
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss.detach()

    mean, variance = np.zeros(6), np.ones(6)
    for step in range(1, 4):
        sagm(closure, list(model.parameters()), replay_of(model, CPU), rho=0.5)
        mean = 0.8 * mean + 0.2 * X.double().numpy().mean(0)
        variance = 0.8 * variance + 0.2 * X.double().numpy().var(0, ddof=1)
        assert model.norm.num_batches_tracked == step
        assert np.allclose(present(model.norm.running_mean), mean, atol=1e-6)
        assert np.allclose(present(model.norm.running_var), variance, atol=1e-5)


def test_without_the_replay_both_would_differ() -> None:
    """What the contexts are for: sagm's bare second pass counts a batch again and draws another mask."""
    model = fresh()
    model(X)
    model(X)
    assert model.norm.num_batches_tracked == 2


def test_statistics_are_restored_after_an_error_and_batches_normalise_by_themselves_meanwhile() -> None:
    model = fresh()
    before = model.norm.running_mean.clone()
    with pytest.raises(KeyError), fixed_norm_statistics(model):
        normalised = model.norm(X * 3 + 5)
        raise KeyError
    assert torch.equal(present(model.norm.running_mean), before) and model.norm.num_batches_tracked == 0
    assert torch.allclose(normalised.mean(0), torch.zeros(6), atol=1e-5)


def test_one_pass_a_domain_forgets_as_much_as_one_pass_for_all() -> None:
    model = fresh()
    model.norm.running_mean.fill_(100.0)
    with shared_norm_momentum(model, 3):
        for _ in range(3):
            model.norm(torch.cat([X, -X]))  # mean 0
    assert torch.allclose(present(model.norm.running_mean), torch.full((6,), 80.0), atol=1e-4)  # momentum 0.2, once
    assert model.norm.momentum == 0.2
