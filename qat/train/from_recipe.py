"""The parts of a recipe's training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.conflict import combine
from qat.objectives.contract import Gradients, Objective, erm
from qat.objectives.controls import CONTROLS
from qat.objectives.distillation import Distillation
from qat.objectives.domain_aware import LOSSES, head_features
from qat.objectives.oscillation import Oscillation, damping
from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer
from qat.objectives.sharpness import Perturbation, asam, gsam, mixed, sagm, sam
from qat.quantizers.biper import periodic_regulariser
from qat.quantizers.contract import Quantizer
from qat.runs.recipe import BiperRecipe, GaqatRecipe, LsqRecipe, Recipe, SagmRecipe
from qat.surgery.backbones import first_and_last
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
    teacher: nn.Module | None = None,
    schedule: Schedule | None = None,
) -> TrainingStep:
    """The step that `recipe` describes. model: what is run; own: the model itself; teacher: distils into it."""
    parameters: list[Parameter] = [
        p for group in optimizer.param_groups for p in group["params"]
    ]
    step = TrainingStep(
        model,
        own,
        optimizer,
        precision,
        objective=objective_of(recipe, own, parameters),
        loss=LOSSES[recipe.domain_loss](domains),
        domains=domains,
        accumulate=recipe.accumulate,
        memory_format=torch.channels_last
        if recipe.channels_last
        else torch.contiguous_format,
        clip=recipe.clip,
        clip_mode=recipe.clip_mode,
        schedule=schedule,
    )
    head = own.get_submodule(first_and_last(own)[-1])
    if recipe.domain_loss != "erm":
        step.features, _ = head_features(own, head)
    if recipe.clip_mode == "agc":
        step.leave_unclipped(list(head.parameters()))
    if isinstance(recipe, SagmRecipe):
        step.per_domain = recipe.per_domain
        step.freezer = freezer_of(recipe, own)
    if isinstance(recipe, GaqatRecipe) and step.freezer is not None:
        step.combine = _combination(recipe, own, step.freezer)
    if isinstance(recipe, LsqRecipe):
        _add_quantization(step, recipe, teacher)
    if (
        isinstance(recipe, BiperRecipe)
        and recipe.frequency_start is not None
        and recipe.stage == 1
    ):
        step.before = _frequency_mover(recipe, own, recipe.frequency_start)
    return step


def _add_quantization(
    step: TrainingStep, recipe: LsqRecipe, teacher: nn.Module | None
) -> None:
    """Distillation, penalties and the record of oscillating weights, as far as the recipe has them."""
    penalties: list[Callable[[], Tensor]] = []
    if teacher is not None:
        step.distillation = Distillation(teacher.to(step.device), recipe.distill_weight)
    if recipe.damping:
        penalties.append(partial(_damping, step.own, recipe.damping))
    if isinstance(recipe, BiperRecipe) and recipe.reg_tau:
        penalties.append(partial(_regulariser, step.own, recipe.reg_tau))
    step.penalties = penalties
    if recipe.oscillation or recipe.freeze_oscillating is not None:
        weights, grids = zip(*quantized_weights(step.own), strict=True)
        step.oscillation = Oscillation(
            weights, grids, freeze_above=recipe.freeze_oscillating
        )


def _damping(model: nn.Module, weight: float) -> Tensor:
    """Pulls latent weights towards their codes; 0 while quantization has yet to begin."""
    if paused(model):
        return torch.zeros((), device=next(model.parameters()).device)
    return weight * damping(*zip(*quantized_weights(model), strict=True))


def _regulariser(model: nn.Module, weight: float) -> Tensor:
    return weight * periodic_regulariser(periodic_weights(model))


def _frequency_mover(
    recipe: BiperRecipe, model: nn.Module, start: float
) -> Callable[[int], None]:
    """Moves the frequency of every periodic weight evenly from `start` to the recipe's own over the run."""

    def move(taken: int) -> None:
        reached = min((taken + 1) / recipe.steps, 1.0)
        for quantizer, _ in periodic_weights(model):
            quantizer.set_frequency(start + reached * (recipe.frequency - start))

    return move


def _combination(
    recipe: GaqatRecipe, model: nn.Module, freezer: ScaleFreezer
) -> Callable[[Gradients, list[Parameter], int], None] | None:
    """What a control does that freezes nothing: it makes the two branches one (`qat/objectives/controls.py`)."""
    how = CONTROLS[recipe.control].combined

    def alternate(
        gradients: Gradients, parameters: list[Parameter], taken: int
    ) -> None:
        window = taken // freezer.rule.window
        mixed(gradients, parameters, TASK_ALONE if window % 2 == 0 else SMOOTH_ALONE)

    def by_groups(
        gradients: Gradients, parameters: list[Parameter], taken: int
    ) -> None:
        combine(gradients, parameters, scale_groups(model, recipe.per_channel), how)

    if how == "alternate":
        return alternate
    return by_groups if how else None


def objective_of(
    recipe: Recipe, model: nn.Module, parameters: list[Parameter]
) -> Objective:
    """The objective a recipe names, its options filled in."""
    if not isinstance(recipe, SagmRecipe):
        return erm
    kinds = parameter_kinds(model)
    after_quantizer = (
        [(q, w) for w, q in quantized_weights(model)]
        if recipe.perturb == "quantized"
        else []
    )
    where = Perturbation(
        [kinds[id(p)] in recipe.perturb_kinds for p in parameters], after_quantizer
    )
    options = {"alpha": recipe.alpha} if recipe.flatness in WITH_ALPHA else {}
    return partial(FLATNESS[recipe.flatness], rho=recipe.rho, where=where, **options)


def freezer_of(recipe: SagmRecipe, model: nn.Module) -> ScaleFreezer | None:
    """Follows every quantizer's scale; freezes by the recipe's rule, or nothing where it has none. None where none are."""
    found = quantizers(model)
    if not found:
        return None
    rule = FreezeRule(policy="never")
    if isinstance(recipe, GaqatRecipe):
        control = CONTROLS[recipe.control]
        rule = FreezeRule(
            window=recipe.window,
            threshold=recipe.threshold,
            weight_threshold=recipe.weight_threshold,
            z=recipe.z,
            when="above" if control.above else recipe.freeze_when,
            branch=control.branch,
            policy=control.policy,
            per_channel=recipe.per_channel,
            targets=recipe.freeze_scales,
            start=recipe.start_step,
            rescale=recipe.rescale,
        )
    return ScaleFreezer(
        list(found),
        [q.raw_scale for q in found.values()],
        [q.is_weight for q in found.values()],
        rule,
        recipe.seed,
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
