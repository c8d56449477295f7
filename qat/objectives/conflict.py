"""Relatives of freezing: two ways to combine conflicting gradients g_t (task) and g_p (perturbed) of a group of scales.

    project   PCGrad (Yu et al., arXiv 2001.06782): where <g_t, g_p> < 0, each loses its part along the other, then w_t, w_p
    min_norm  MGDA of two (Désidéri 2012): λ g_t + (1 - λ) g_p of least norm, λ = clip(<g_p - g_t, g_p>/‖g_t - g_p‖², 0, 1)

A group is one scale's channels, or all scales of a layer. Of two opposed scalars exactly nothing is left, as if
both were frozen: Adam would blow a rounding error up to a whole step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from qat.objectives.contract import Gradients

Combine = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]


def project(task: Tensor, perturbed: Tensor, mix: tuple[float, float]) -> Tensor:
    """Flat gradients of one group -> combined gradient of the same shape."""
    dot = task @ perturbed
    if dot >= 0:
        return mix[0] * task + mix[1] * perturbed
    if task.numel() == 1:
        return torch.zeros_like(task)
    first = task - dot / (perturbed @ perturbed).clamp_min(1e-30) * perturbed
    second = perturbed - dot / (task @ task).clamp_min(1e-30) * task
    return mix[0] * first + mix[1] * second


def min_norm(task: Tensor, perturbed: Tensor, mix: tuple[float, float]) -> Tensor:
    """Flat gradients of one group -> their convex combination of least norm; `mix` plays no part."""
    if task.numel() == 1 and task @ perturbed < 0:
        return torch.zeros_like(task)
    apart = perturbed - task
    share = ((apart @ perturbed) / (apart @ apart).clamp_min(1e-30)).clamp(0, 1)
    return share * task + (1 - share) * perturbed


COMBINE: dict[str, Combine] = {"project": project, "min-norm": min_norm}


def combine(
    gradients: Gradients,
    parameters: Sequence[Parameter],
    groups: Sequence[Sequence[Parameter]],
    how: str,
) -> None:
    """Fill `.grad` of the scales in `groups` with their combined branches; the other parameters keep theirs."""
    place = {id(p): i for i, p in enumerate(parameters)}
    for group in groups:
        chosen = [(p, place[id(p)]) for p in group if p.grad is not None]
        branches = [
            torch.cat([_or_zero(branch[i], p).flatten() for p, i in chosen])
            for branch in (gradients.task, gradients.perturbed)
            if chosen
        ]
        if not branches:
            continue
        combined = COMBINE[how](branches[0], branches[1], gradients.mix)
        for (parameter, _), part in zip(
            chosen, combined.split([p.numel() for p, _ in chosen]), strict=True
        ):
            assert parameter.grad is not None
            parameter.grad.copy_(part.view_as(parameter))


def _or_zero(gradient: Tensor | None, parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient
