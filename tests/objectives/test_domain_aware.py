"""Domain-aware losses against NumPy, and against autograd's double backward where there is a Hessian."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.objectives.domain_aware import GroupDRO, coral, domain_losses, head_features, hessian_alignment, per_domain
from qat.objectives.replay import replay_of
from qat.objectives.sharpness import asam, sagm
from tests.narrow import gradient

G = torch.Generator().manual_seed(1)
N, K, FEATURES = 13, 4, 3
DOMAINS = torch.tensor([2, 0, 0, 1, 2, 1, 1, 0, 2, 1, 0, 2, 2])
LABELS = torch.randint(K, (N,), generator=G)
LOGITS, X = torch.randn(N, K, generator=G), torch.randn(N, FEATURES, generator=G)


def of(domain: int) -> Tensor:
    return DOMAINS.eq(domain)


def cross_entropies() -> np.ndarray:
    z = LOGITS.double().numpy()
    return np.log(np.exp(z).sum(1)) - z[np.arange(N), LABELS]


def test_group_dro_against_numpy_over_three_steps_of_two_passes() -> None:
    loss, q, ce = GroupDRO(4, eta=0.5), np.full(4, 0.25), cross_entropies()
    means = np.array([ce[DOMAINS.numpy() == d].mean() if d < 3 else 0.0 for d in range(4)])  # domain 3 has no image
    for _ in range(3):
        q = q * np.exp(0.5 * means)
        q /= q.sum()
        assert float(loss(LOGITS, X, LABELS, DOMAINS)) == pytest.approx(q @ means, abs=1e-5)
        # the second pass descends the same mixture, whatever its own losses are
        second = loss(2 * LOGITS, X, LABELS, DOMAINS)
        mixture = torch.tensor(q, dtype=torch.float32) @ domain_losses(2 * LOGITS, LABELS, DOMAINS, 4)
        assert float(second) == pytest.approx(float(mixture), abs=1e-5)
        loss.advance()
    assert np.allclose(loss.weights, q, atol=1e-6)
    assert means.argmax() == loss.weights.argmax()


def test_coral_against_numpy() -> None:
    groups = [X.double().numpy()[DOMAINS.numpy() == d] for d in range(3)]
    apart = [
        ((a.mean(0) - b.mean(0)) ** 2).mean() + ((np.cov(a.T) - np.cov(b.T)) ** 2).mean()
        for a, b in combinations(groups, 2)
    ]
    found = float(coral(0.7)(LOGITS, X, LABELS, DOMAINS))
    assert found == pytest.approx(cross_entropies().mean() + 0.7 * np.mean(apart), abs=1e-5)
    alone = coral(0.7)(LOGITS, X, LABELS, torch.zeros_like(DOMAINS))
    assert float(alone) == pytest.approx(cross_entropies().mean(), abs=1e-6)


def by_double_backward(head: nn.Linear, features: Tensor, a: float, b: float) -> Tensor:
    """The definition: gradients of the head's parameters per domain, and Hessian times gradient by differentiating twice."""
    gradients, products = [], []
    for d in range(3):
        own = of(d)
        loss = F.cross_entropy(head(features[own]), LABELS[own])
        found = torch.autograd.grad(loss, list(head.parameters()), create_graph=True)
        # H g = ∂(g · v)/∂θ with v = g as a constant direction, whose value still depends on θ afterwards
        directions = [g.clone() for g in found]
        dot = sum((g * v.detach()).sum() for g, v in zip(found, directions, strict=True))
        assert isinstance(dot, Tensor)
        product = torch.autograd.grad(dot, list(head.parameters()), create_graph=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
        products.append(torch.cat([p.flatten() for p in product]))

    def spread(rows: list[Tensor]) -> Tensor:
        stacked = torch.stack(rows)
        return sum(((row - stacked.mean(0)) ** 2).sum() for row in stacked)

    return F.cross_entropy(head(features), LABELS) + a * spread(gradients) + b * spread(products)


def test_hessian_alignment_is_the_double_backward_of_the_definition() -> None:
    torch.manual_seed(3)
    head, features = nn.Linear(FEATURES, K).double(), X.double().requires_grad_()
    found = hessian_alignment(0.3, 5.0)(head(features), features, LABELS, DOMAINS)
    expected = by_double_backward(head, features, 0.3, 5.0)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert found.item() > F.cross_entropy(head(features), LABELS).item() + 0.05  # both terms weigh in
    # The gradient part alone has an exact second derivative by autograd; b's direction is a constant there, not here.
    gradient_part = hessian_alignment(0.3, 0.0)(head(features), features, LABELS, DOMAINS)
    for parameter in (*head.parameters(), features):
        ours = torch.autograd.grad(gradient_part, parameter, retain_graph=True)[0]
        theirs = torch.autograd.grad(by_double_backward(head, features, 0.3, 0.0), parameter)[0]
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_gradient_of_the_hessian_product_against_finite_differences() -> None:
    torch.manual_seed(4)
    head, features = nn.Linear(FEATURES, K).double(), X.double()

    def value(weight: Tensor) -> Tensor:
        return hessian_alignment(0.0, 5.0)(features @ weight.T + head.bias, features, LABELS, DOMAINS)

    assert torch.autograd.gradcheck(value, (head.weight.detach().requires_grad_(),), atol=1e-7)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, FEATURES), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, K)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.first(x))))


def test_head_features_are_what_the_head_reads_in_this_pass() -> None:
    model = Net().eval()
    kept, handle = head_features(model, model.head)
    for scale in (1, 2):
        x = torch.randn(3, 5, generator=G) * scale
        model(x)
        assert torch.equal(kept[0], model.norm(model.first(x)))
    handle.remove()
    model(torch.zeros(3, 5))
    assert kept[0].any()


@pytest.mark.parametrize("objective", [sagm, asam])
def test_per_domain_is_the_mean_of_each_domains_own_two_branches(objective) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    model, x = Net().double().eval(), torch.randn(N, 5, generator=G).double()
    parameters = list(model.parameters())

    def closure_of(own: Tensor):  # type: ignore[no-untyped-def]
        def closure() -> Tensor:
            loss = F.cross_entropy(model(x[own]), LABELS[own])
            loss.backward()
            return loss.detach()

        return closure

    closures = [closure_of(of(d)) for d in range(3)]
    alone = []
    for closure in closures:
        objective(closure, parameters)
        alone.append([p.grad.clone() for p in parameters])
    seen = per_domain(objective)(closures, parameters)
    for index, parameter in enumerate(parameters):
        mean = sum(a[index] for a in alone) / 3
        assert isinstance(mean, Tensor) and torch.allclose(gradient(parameter), mean, atol=1e-12)
    losses = [F.cross_entropy(model(x[of(d)]), LABELS[of(d)]).item() for d in range(3)]
    assert float(seen.loss) == pytest.approx(np.mean(losses))


def test_each_domains_second_pass_repeats_its_own_dropout_mask() -> None:
    torch.manual_seed(6)
    model, x = Net(), torch.randn(N, 5, generator=G)
    masks: list[Tensor] = []
    model.drop.register_forward_hook(lambda _, __, y: masks.append(y != 0))

    def closure_of(own: Tensor):  # type: ignore[no-untyped-def]
        def closure() -> Tensor:
            loss = F.cross_entropy(model(x[own]), LABELS[own])
            loss.backward()
            return loss.detach()

        return closure

    replays = lambda: replay_of(model, torch.device("cpu"))  # noqa: E731
    per_domain(sagm, replays)([closure_of(of(d)) for d in range(3)], list(model.parameters()))
    firsts, seconds = masks[::2], masks[1::2]
    assert all(torch.equal(a, b) for a, b in zip(firsts, seconds, strict=True))
    assert not torch.equal(firsts[0][:4], firsts[2][:4])
