"""AND-mask against a loop over elements."""

import pytest
import torch
from torch.nn import Parameter

from qat.objectives.and_mask import agreed, and_mask


def by_loop(gradients: list[list[float]], threshold: float) -> list[float]:
    """gradients: of each domain, one number for each element."""
    domains, elements = len(gradients), len(gradients[0])
    kept = []
    for element in range(elements):
        signs = sum((g[element] > 0) - (g[element] < 0) for g in gradients)
        kept.append(abs(signs) / domains >= threshold - 1e-9)
    share = sum(kept) / elements
    means = [sum(g[element] for g in gradients) / domains for element in range(elements)]
    return [mean / share if is_kept else 0.0 for mean, is_kept in zip(means, kept, strict=True)]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1 / 3, 0.5, 0.7, 1.0])
def test_survivors_agree_and_are_scaled_by_their_share(threshold: float) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 40, generator=draw)
    gradients[1, 5] = 0
    found = agreed(list(gradients), threshold)
    assert found is not None
    assert torch.allclose(found, torch.tensor(by_loop(gradients.tolist(), threshold)), atol=1e-6)


def test_nothing_survives_and_nothing_has_a_gradient() -> None:
    opposed = [torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])]
    assert agreed(opposed, 0.5).tolist() == [0, 0]
    assert agreed([None, None], 0.5) is None
    assert agreed([torch.ones(2), None], 0.6).tolist() == [0, 0]  # one domain of two


def test_each_domain_is_run_once_and_the_loss_is_their_mean() -> None:
    weight = Parameter(torch.tensor([1.0, 1.0]))
    runs = []

    def closure(target: torch.Tensor):  # type: ignore[no-untyped-def]
        def run() -> torch.Tensor:
            runs.append(target)
            loss = ((weight - target) ** 2).sum()
            loss.backward()
            return loss.detach()

        return run

    seen = and_mask([closure(torch.tensor([0.0, 0.0])), closure(torch.tensor([0.0, 2.0]))], [weight], 1.0)
    assert len(runs) == 2 and seen.loss == 2.0  # losses 2 and 2
    assert weight.grad.tolist() == [4.0, 0.0]  # means 2 and 0; half survives
    with pytest.raises(ValueError, match="must lie in"):
        and_mask([], [weight], 1.5)
