"""Relatives of freezing: two ways to combine conflicting gradients g_t (task) and g_p (perturbed) of a group of scales.

    project   PCGrad (Yu et al., arXiv 2001.06782): where <g_t, g_p> < 0, each loses its part along the other, then w_t, w_p
    min_norm  MGDA of two (Désidéri 2012): λ g_t + (1 - λ) g_p of least norm, λ = clip(<g_p - g_t, g_p>/‖g_t - g_p‖², 0, 1)

A group is one scale's channels, or all scales of a layer. Two opposed scalars cancel to exactly 0, as if both
were frozen: Adam would blow a rounding error up to a whole step.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from qat.objectives.contract import Gradients

Combine = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]


def project(
    task: Tensor, perturbed: Tensor, branch_weights: tuple[float, float]
) -> Tensor:
    """Flat gradients of one group -> combined gradient of the same shape."""
    dot = task @ perturbed
    if dot >= 0:
        return branch_weights[0] * task + branch_weights[1] * perturbed
    if task.numel() == 1:
        return torch.zeros_like(task)
    first = task - dot / (perturbed @ perturbed).clamp_min(1e-30) * perturbed
    second = perturbed - dot / (task @ task).clamp_min(1e-30) * task
    return branch_weights[0] * first + branch_weights[1] * second


def min_norm(
    task: Tensor, perturbed: Tensor, branch_weights: tuple[float, float]
) -> Tensor:
    """Flat gradients of one group -> their convex combination of least norm; `branch_weights` plays no part."""
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
    task_of = _by_parameter(parameters, gradients.task)
    perturbed_of = _by_parameter(parameters, gradients.perturbed)
    for group in groups:
        scales = [scale for scale in group if scale.grad is not None]
        if not scales:
            continue
        task = _flat(scales, task_of)
        perturbed = _flat(scales, perturbed_of)
        combined = COMBINE[how](task, perturbed, gradients.branch_weights)
        parts = combined.split([scale.numel() for scale in scales])
        for scale, part in zip(scales, parts, strict=True):
            assert scale.grad is not None
            scale.grad.copy_(part.view_as(scale))


def _by_parameter(
    parameters: Sequence[Parameter], gradients: Sequence[Tensor | None]
) -> dict[int, Tensor | None]:
    """id of each parameter -> its gradient."""
    by_parameter: dict[int, Tensor | None] = {}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        by_parameter[id(parameter)] = gradient
    return by_parameter


def _flat(
    scales: Sequence[Parameter], gradient_of: Mapping[int, Tensor | None]
) -> Tensor:
    """The gradients of `scales` in one vector, 0 where one got none."""
    parts = []
    for scale in scales:
        gradient = gradient_of[id(scale)]
        if gradient is None:
            gradient = torch.zeros_like(scale)
        parts.append(gradient.flatten())
    return torch.cat(parts)
