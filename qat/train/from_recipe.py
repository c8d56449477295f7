"""The parts of a recipe's training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.and_mask import and_mask
from qat.objectives.conflict import combine
from qat.objectives.contract import Gradients, Objective, erm
from qat.objectives.controls import CONTROLS
from qat.objectives.distillation import Distillation
from qat.objectives.domain_aware import (
    LOSSES,
    head_features,
    per_domain,
    smoothed_loss,
)
from qat.objectives.oscillation import Oscillation, damping
from qat.objectives.replay import replay_of
from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer
from qat.objectives.sharpness import Perturbation, asam, gsam, mixed, sagm, sam
from qat.quantizers.biper import periodic_regulariser
from qat.quantizers.contract import Quantizer
from qat.runs.parts import Binarization, Freezing, Sharpness
from qat.runs.parts import Oscillation as OscillationPart
from qat.runs.recipe import Recipe
from qat.surgery.backbones import Mixup, first_and_last
from qat.surgery.binarize import periodic_weights
from qat.surgery.calibrate import paused
from qat.surgery.swap import quantized_weights, quantizers
from qat.train.step import Precision, Schedule, TrainingStep

FLATNESS: dict[str, Callable[..., Gradients]] = {
    "sagm": sagm,
    "sam": sam,
    "asam": asam,
    "gsam": gsam,
}
WITH_ALPHA = {"sagm", "gsam"}
TASK_ALONE, SMOOTH_ALONE = (1.0, 0.0), (0.0, 1.0)


def training_step(
    recipe: Recipe,
    model: nn.Module,
    own: nn.Module,
    optimizer: Any,
    precision: Precision,
    *,
    domains: int,
    classes: int = 0,
    teacher: nn.Module | None = None,
    schedule: Schedule | None = None,
) -> TrainingStep:
    """The step that `recipe` describes. model: what is run; own: the model itself; classes: how many the images have, which
    mixup asks for; teacher: the model that this one learns from."""
    optimization = recipe.optimization
    parameters: list[Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    step = TrainingStep(
        model,
        own,
        optimizer,
        precision,
        objective=objective_of(recipe.sharpness, own, parameters),
        loss=LOSSES[optimization.domain_loss](domains),
        domain_count=domains,
        accumulate=optimization.accumulate,
        clip=optimization.clip,
        clip_mode=optimization.clip_mode,
        schedule=schedule,
    )
    if recipe.model.channels_last:
        step.memory_format = torch.channels_last
    if optimization.label_smoothing:
        step.loss = smoothed_loss(optimization.label_smoothing)
    if optimization.mixup:
        step.mixup = Mixup(optimization.mixup, classes, optimization.seed)
    head = own.get_submodule(first_and_last(own)[-1])
    if optimization.domain_loss != "erm":
        step.features, _ = head_features(own, head)
    if optimization.clip_mode == "agc":
        step.leave_unclipped(list(head.parameters()))
    if optimization.and_mask is not None:
        step.over_domains = partial(and_mask, threshold=optimization.and_mask)
    if recipe.sharpness is not None:
        _add_two_passes(step, recipe, recipe.sharpness)
    if recipe.distillation is not None and teacher is not None:
        step.distillation = Distillation(
            teacher.to(step.device), recipe.distillation.distill_weight
        )
    if recipe.oscillation is not None:
        step.oscillation = _oscillation(recipe.oscillation, own)
    step.penalties = _penalties(recipe, own)
    binarization = recipe.binarization
    if binarization is not None and binarization.stage == 1:
        step.before = _frequency_mover(binarization, own, optimization.steps)
    return step


def _add_two_passes(step: TrainingStep, recipe: Recipe, sharpness: Sharpness) -> None:
    """Add what two passes need: their domains apart, and the record, freezing and mixing of their gradients."""
    if sharpness.per_domain:
        replays = partial(replay_of, step.unwrapped, step.device)
        step.over_domains = per_domain(step.objective, replays)
    step.freezer = freezer_of(recipe.freezing, step.unwrapped, recipe.optimization.seed)
    if recipe.freezing is not None and step.freezer is not None:
        step.combine = _combination(recipe.freezing, step.unwrapped, step.freezer)


def _oscillation(part: OscillationPart, model: nn.Module) -> Oscillation | None:
    """The record of oscillating weights, where it is asked for or freezes them."""
    if not part.oscillation and part.freeze_oscillating is None:
        return None
    weights, grids = zip(*quantized_weights(model), strict=True)
    return Oscillation(weights, grids, freeze_above=part.freeze_oscillating)


def _penalties(recipe: Recipe, model: nn.Module) -> list[Callable[[], Tensor]]:
    """What is added to the loss, computed from the weights alone."""
    penalties: list[Callable[[], Tensor]] = []
    if recipe.oscillation is not None and recipe.oscillation.damping:
        penalties.append(partial(_damping, model, recipe.oscillation.damping))
    if recipe.binarization is not None and recipe.binarization.reg_tau:
        penalties.append(partial(_regulariser, model, recipe.binarization.reg_tau))
    return penalties


def _damping(model: nn.Module, weight: float) -> Tensor:
    """Pulls latent weights towards their codes; 0 while quantization has yet to begin."""
    if paused(model):
        return torch.zeros((), device=next(model.parameters()).device)
    return weight * damping(*zip(*quantized_weights(model), strict=True))


def _regulariser(model: nn.Module, weight: float) -> Tensor:
    return weight * periodic_regulariser(periodic_weights(model))


def _frequency_mover(
    binarization: Binarization, model: nn.Module, steps: int
) -> Callable[[int], None] | None:
    """Moves the frequency of every periodic weight evenly from its start to its end over `steps`; None where it stays."""
    if binarization.frequency_start is None:
        return None
    start, end = binarization.frequency_start, binarization.frequency

    def move(taken: int) -> None:
        reached = min((taken + 1) / steps, 1.0)
        for quantizer, _ in periodic_weights(model):
            quantizer.set_frequency(start + reached * (end - start))

    return move


def _combination(
    freezing: Freezing, model: nn.Module, freezer: ScaleFreezer
) -> Callable[[Gradients, list[Parameter], int], None] | None:
    """What a control does that freezes nothing: it makes the two branches one (`qat/objectives/controls.py`)."""
    how = CONTROLS[freezing.control].combined

    def alternate(
        gradients: Gradients, parameters: list[Parameter], taken: int
    ) -> None:
        window = taken // freezer.rule.window
        mixed(gradients, parameters, TASK_ALONE if window % 2 == 0 else SMOOTH_ALONE)

    def by_groups(
        gradients: Gradients, parameters: list[Parameter], taken: int
    ) -> None:
        groups = scale_groups(model, freezing.per_channel)
        combine(gradients, parameters, groups, how)

    if how == "alternate":
        return alternate
    return by_groups if how else None


def objective_of(
    sharpness: Sharpness | None, model: nn.Module, parameters: list[Parameter]
) -> Objective:
    """The objective of two passes that `sharpness` names, its options filled in; without it, empirical risk."""
    if sharpness is None:
        return erm
    kinds = parameter_kinds(model)
    is_perturbed = [kinds[id(p)] in sharpness.perturb_kinds for p in parameters]
    after_quantizer = []
    if sharpness.perturb == "quantized":
        after_quantizer = [(q, w) for w, q in quantized_weights(model)]
    where = Perturbation(is_perturbed, after_quantizer)
    objective = partial(FLATNESS[sharpness.flatness], rho=sharpness.rho, where=where)
    if sharpness.flatness in WITH_ALPHA:
        return partial(objective, alpha=sharpness.alpha)
    return objective


def freezer_of(
    freezing: Freezing | None, model: nn.Module, seed: int
) -> ScaleFreezer | None:
    """Follows every quantizer's scale; freezes by the rule of `freezing`, or nothing without it. Returns None for a model
    without quantizers."""
    by_name = quantizers(model)
    if not by_name:
        return None
    rule = FreezeRule(policy="never") if freezing is None else rule_of(freezing)
    return ScaleFreezer(
        names=list(by_name),
        scales=[quantizer.raw_scale for quantizer in by_name.values()],
        is_weight=[quantizer.is_weight for quantizer in by_name.values()],
        rule=rule,
        seed=seed,
    )


def rule_of(freezing: Freezing) -> FreezeRule:
    """When a scale freezes, as flags and the control's row say."""
    control = CONTROLS[freezing.control]
    return FreezeRule(
        window=freezing.window,
        threshold=freezing.threshold,
        weight_threshold=freezing.weight_threshold,
        z=freezing.z,
        when="above" if control.above else freezing.freeze_when,
        branch=control.branch,
        policy=control.policy,
        per_channel=freezing.per_channel,
        targets=freezing.freeze_scales,
        start=freezing.start_step,
        rescale=freezing.rescale,
    )


def parameter_kinds(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> "weights", "norms", "biases" or "scales"."""
    kinds: dict[int, str] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantizer):
                kinds[id(parameter)] = "scales"
            elif name.endswith("bias") and not is_norm(module):
                kinds[id(parameter)] = "biases"
            else:
                kinds[id(parameter)] = "norms" if is_norm(module) else "weights"
    return kinds


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes over channels or batch."""
    return isinstance(
        module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    )


def scale_groups(model: nn.Module, each: bool = False) -> list[list[Parameter]]:
    """Scales of each layer (weight and input) together and every stream quantizer by itself; or `each` by itself."""
    groups: dict[str, list[Parameter]] = {}
    for name, quantizer in quantizers(model).items():
        layer = name if each or "#" in name else name.rpartition(".")[0]
        groups.setdefault(layer, []).append(quantizer.raw_scale)
    return list(groups.values())
