"""Projection and min-norm against what defines them: orthogonality, and the least norm over a fine grid of mixtures."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from qat.objectives.conflict import COMBINE, combine, min_norm, project
from qat.objectives.contract import Gradients
from tests.narrow import gradient
from tests.nearness import assert_near

MIX = (0.5, 0.5)


def pair(seed: int, opposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(6, generator=generator).double(), torch.randn(6, generator=generator).double()
    return a, (-b if (a @ b < 0) != opposed else b)


@pytest.mark.parametrize("seed", range(4))
def test_projection_takes_out_of_each_what_opposes_the_other(seed: int) -> None:
    a, b = pair(seed, opposed=True)
    only_a, only_b = project(a, b, (1.0, 0.0)), project(a, b, (0.0, 1.0))
    assert abs(only_a @ b) < 1e-12 and abs(only_b @ a) < 1e-12  # nothing along the other is left
    basis = np.linalg.lstsq(b.numpy()[:, None], (a - only_a).numpy(), rcond=None)
    assert np.allclose(b.numpy() * basis[0], (a - only_a).numpy())  # and nothing else was taken
    assert torch.allclose(project(a, b, (0.3, 0.7)), 0.3 * only_a + 0.7 * only_b)
    a, b = pair(seed, opposed=False)
    assert_near(project(a, b, (0.3, 0.7)), 0.3 * a + 0.7 * b, 4 * 2.0**-53)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("opposed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_min_norm_is_the_shortest_convex_combination(seed: int, opposed: bool, scale: float) -> None:
    a, b = pair(seed, opposed)
    b = b * scale
    shares = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    mixtures = shares * a + (1 - shares) * b
    best = mixtures[mixtures.norm(dim=1).argmin()]
    found = min_norm(a, b, MIX)
    assert found.norm() <= best.norm() + 1e-12 and torch.allclose(found, best, atol=2e-3)


@pytest.mark.parametrize("how", COMBINE)
def test_of_two_opposed_scalars_exactly_nothing_is_left(how: str) -> None:
    for seed in range(50):
        values = torch.rand(2, generator=torch.Generator().manual_seed(seed)) + 0.1
        assert float(COMBINE[how](values[:1], -values[1:], MIX)) == 0


def test_equal_and_absent_gradients_do_not_divide_by_zero() -> None:
    a = torch.tensor([1.0, -2.0])
    assert torch.equal(min_norm(a, a, MIX), a) and not project(torch.zeros(2), torch.zeros(2), MIX).any()


def test_combine_joins_a_group_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    scales = [Parameter(torch.ones(())), Parameter(torch.ones(3)), Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    task = [torch.tensor(1.0), torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 1]), None]
    perturbed = [torch.tensor(-1.0), torch.tensor([2.0, 1, 0]), torch.tensor([-1.0, 0]), torch.tensor([4.0, 4])]
    for parameter in scales:
        parameter.grad = torch.full_like(parameter, 9.0)
    groups = [scales[:2], scales[2:3]]
    combine(Gradients(torch.zeros(()), task, perturbed, MIX), scales, groups, "project")
    # together the first two agree (dot = -1 + 2), alone the first would have been opposed
    assert scales[0].grad.item() == 0 and torch.equal(gradient(scales[1]), torch.tensor([1.5, 0.5, 0]))
    # [1,1] against [-1,0]: dot -1; task loses -1/1 of [-1,0] -> [0,1]; perturbed loses -1/2 of [1,1] -> [-.5,.5]
    assert torch.allclose(gradient(scales[2]), torch.tensor([-0.25, 0.75]))
    assert torch.equal(gradient(scales[3]), torch.full((2,), 9.0))
