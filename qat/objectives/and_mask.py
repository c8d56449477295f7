"""AND-mask: parameters move only where the source domains agree on the sign (Parascandolo et al., arXiv 2009.00329).

With g_d the gradient of domain d's loss, of D domains, and per element

    agreement  a = |Σ_d sign(g_d)| / D
    gradient   ∇ = m · mean_d g_d / share of m,   m = 1 where a >= τ, else 0

Survivors are scaled by one over the share of a parameter's elements that survive. In GAQAT's first author's earlier study it
acts on all parameters, quantizer scales included; it is the ancestor of disorder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from qat.objectives.contract import Closure, Gradients


def and_mask(
    closures: Sequence[Closure], parameters: Sequence[Parameter], threshold: float
) -> Gradients:
    """Fill `.grad` with the masked mean over domains. closures: one for each domain, run once each. threshold: τ in [0, 1].

    Raises ValueError for another threshold.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"AND-mask: threshold must lie in [0, 1], got {threshold}")
    losses: list[Tensor] = []
    of_domains: list[list[Tensor | None]] = []
    for closure in closures:
        for parameter in parameters:
            parameter.grad = None
        losses.append(closure())
        of_domains.append([parameter.grad for parameter in parameters])
    for parameter, gradients in zip(
        parameters, zip(*of_domains, strict=True), strict=True
    ):
        parameter.grad = agreed(gradients, threshold)
    return Gradients(torch.stack(losses).mean())


def agreed(gradients: Sequence[Tensor | None], threshold: float) -> Tensor | None:
    """The masked mean of one parameter's gradients, one of each domain, all of its shape; a missing one is 0."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return None
    stacked = torch.stack(present)
    signs = stacked.sign().sum(0).abs() / len(gradients)
    # The comparison must not hang on the rounding of k / D
    survives = signs >= threshold - torch.finfo(signs.dtype).eps
    share = survives.float().mean()
    mean = stacked.sum(0) / len(gradients)
    if not bool(survives.any()):
        return torch.zeros_like(mean)
    return mean * survives / share
