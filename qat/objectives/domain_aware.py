"""Losses that know which domain an image came from. Each is (logits N_K, features N_F, labels N, domains N) -> scalar.

    erm        mean cross entropy
    groupdro   Sagawa et al., arXiv 1911.08731: Σ_d q_d L_d with q_d ∝ q_d · exp(η L_d), kept between steps
    coral      Sun & Saenko, arXiv 1607.01719, as DomainBed has it: ERM + γ · mean over pairs of domains of
               mean (μ_i - μ_j)² + mean (C_i - C_j)², μ the domain's mean feature, C its covariance
    hessian    Hemati et al., arXiv 2308.11778: ERM + a Σ_d ‖g_d - ḡ‖² + b Σ_d ‖H_d g_d - mean‖² on the classifier head

`per_domain` is an objective rather than a loss: SAGM's two gradients of every domain for itself, averaged (flat regions per
domain, after arXiv 2211.13723).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.contract import Closure, Gradients, Objective, Replay
from qat.objectives.sharpness import mixed

DomainLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def erm_loss(
    logits: Tensor, features: Tensor, labels: Tensor, domains: Tensor
) -> Tensor:
    """Mean cross entropy of a batch; features and domains are not used."""
    return F.cross_entropy(logits, labels)


def smoothed_loss(smoothing: float) -> DomainLoss:
    """Mean cross entropy with labels of which a share, `smoothing`, is spread evenly over all classes (arXiv 1512.00567)."""

    def loss(
        logits: Tensor, features: Tensor, labels: Tensor, domains: Tensor
    ) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return loss


class GroupDRO:
    """Worst-case weights over `count` domains. eta: step of the exponentiated ascent (DomainBed: 0.01)."""

    def __init__(self, count: int, eta: float = 0.01) -> None:
        self.weights = torch.full((count,), 1 / count)
        self.eta = eta
        self.pending: Tensor | None = None

    def __call__(
        self, logits: Tensor, features: Tensor, labels: Tensor, domains: Tensor
    ) -> Tensor:
        """Σ_d q_d L_d, a scalar, of logits N_K, labels N and domains N; features are not used."""
        losses = domain_losses(logits, labels, domains, len(self.weights))
        if self.pending is None:
            growth = (self.eta * losses.detach()).exp()
            weights = self.weights.to(losses.device) * growth
            self.pending = (weights / weights.sum()).cpu()
        return (self.pending.to(losses.device) * losses).sum()

    def advance(self) -> None:
        """End the step. Until then the weights of its first pass hold, so that a second pass descends the same function."""
        if self.pending is not None:
            self.weights = self.pending
            self.pending = None


def coral(gamma: float = 1.0) -> DomainLoss:
    """Cross entropy + γ · mean over pairs of domains of the squared distances of their features' means and covariances."""

    def loss(
        logits: Tensor, features: Tensor, labels: Tensor, domains: Tensor
    ) -> Tensor:
        moments = []
        for domain in domains.unique():
            own = features[domains == domain]
            mean = own.mean(0)
            centred = own - mean
            covariance = centred.T @ centred / max(len(own) - 1, 1)
            moments.append((mean, covariance))
        distances = []
        for (mean, covariance), (other_mean, other_covariance) in combinations(
            moments, 2
        ):
            of_means = (mean - other_mean).square().mean()
            of_covariances = (covariance - other_covariance).square().mean()
            distances.append(of_means + of_covariances)
        penalty = features.new_zeros(())
        if distances:
            penalty = torch.stack(distances).mean()
        return F.cross_entropy(logits, labels) + gamma * penalty

    return loss


def hessian_alignment(a: float = 1e-3, b: float = 1e-4) -> DomainLoss:
    """Aligns head gradients and Hessian-gradient products over domains. For softmax cross entropy on logits z = W f + b the
    head's gradient is Σ (p - y) fᵀ/n, and its Hessian times a direction V is Σ J_p(V f) fᵀ/n with J_p u = p∘u - p(p·u): no
    double backward is needed, so quantizers do not matter. f is what the head reads before its own input quantizer."""

    def loss(
        logits: Tensor, features: Tensor, labels: Tensor, domains: Tensor
    ) -> Tensor:
        # The bias as a weight
        inputs = torch.cat([features, features.new_ones(len(features), 1)], 1)
        probabilities = logits.softmax(1)
        errors = probabilities - F.one_hot(labels, logits.shape[1])
        gradients = []
        products = []
        for domain in domains.unique():
            is_own = domains == domain
            f = inputs[is_own]
            p = probabilities[is_own]
            gradient = errors[is_own].T @ f / len(f)
            u = f @ gradient.T
            change = p * u - p * (p * u).sum(1, keepdim=True)  # J_p u
            gradients.append(gradient)
            products.append(change.T @ f / len(f))
        loss = F.cross_entropy(logits, labels)
        loss = loss + a * _spread(gradients)
        return loss + b * _spread(products)

    return loss


def _spread(tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors))
    return (stacked - stacked.mean(0)).square().sum()


def domain_losses(
    logits: Tensor, labels: Tensor, domains: Tensor, count: int
) -> Tensor:
    """Mean cross entropy of each domain, shape (count,); 0 for a domain without images."""
    each = F.cross_entropy(logits, labels, reduction="none")
    domains = domains.to(each.device)
    sums = each.new_zeros(count).index_add(0, domains, each)
    images = torch.bincount(domains, minlength=count)
    return sums / images.clamp_min(1)


LOSSES: dict[str, Callable[[int], DomainLoss]] = {
    "erm": lambda domains: erm_loss,
    "groupdro": lambda domains: GroupDRO(domains),
    "coral": lambda domains: coral(),
    "hessian": lambda domains: hessian_alignment(),
}


def per_domain(
    objective: Objective, replays: Callable[[], Replay] = lambda: nullcontext
) -> Callable[[Sequence[Closure], Sequence[Parameter]], Gradients]:
    """`objective` (two branches) on each domain's own closure: both branches are averaged over the domains, then mixed.

    Every domain is perturbed along its own gradient, so that each finds a flat region; two passes a domain. `replays()`
    is made before each domain's first pass: its second pass repeats the random numbers of its own first.
    """

    def run(closures: Sequence[Closure], parameters: Sequence[Parameter]) -> Gradients:
        seen = [objective(closure, parameters, replays()) for closure in closures]
        loss = torch.stack([one.loss for one in seen]).mean()
        task = _means([one.task for one in seen])
        perturbed = _means([one.perturbed for one in seen])
        return mixed(
            Gradients(loss, task, perturbed), parameters, seen[0].branch_weights
        )

    return run


def _means(of_domains: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Mean gradient of each parameter over the domains; a domain that gave none counts as 0, None where none did."""
    means: list[Tensor | None] = []
    for gradients in zip(*of_domains, strict=True):
        present = [gradient for gradient in gradients if gradient is not None]
        if present:
            means.append(torch.stack(present).sum(0) / len(gradients))
        else:
            means.append(None)
    return means


def head_features(
    model: nn.Module, head: nn.Module
) -> tuple[list[Tensor], torch.utils.hooks.RemovableHandle]:
    """A list that holds, after each forward pass, what `head` read (N_F float); remove the handle when done."""
    features: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[:] = [inputs[0].flatten(1)]

    return features, head.register_forward_pre_hook(keep)
