"""What a run starts from: another run's weights, calibrated quantizers, a teacher, a schedule."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.domains.splits import Split
from qat.runs.build import Built, load_run
from qat.runs.recipe import BiperRecipe, LsqRecipe, Recipe, RecipeError
from qat.runs.records import classes_of
from qat.runs.run_folder import RunFolder
from qat.surgery.batchnorm import restore_norm_statistics
from qat.surgery.calibrate import CalibrationRow, calibrate, in_full_precision
from qat.train.loaders import some_images

SAME = (
    "backbone",
    "image_size",
    "test_domain",
    "pad_type",
    "normalization",
    "trial_seed",
    "holdout",
)
# Width of the median filter over recorded gradient norms, as a share of them
SMOOTH = 0.1


def start_state(recipe: Recipe, split: Split) -> dict[str, Tensor] | None:
    """State dict of the run named by --init-from, checked to be of the same model and split: a full-precision run, or for
    BiPer's stage 2 its stage 1."""
    if not isinstance(recipe, LsqRecipe) or recipe.init_from is None:
        return None
    source = RunFolder.open(recipe.init_from)
    given = source.recipe()
    if takes_over(recipe):
        if (
            not isinstance(given, BiperRecipe)
            or given.stage != 1
            or given.binarizer != "biper"
        ):
            raise RecipeError(
                f"--init-from {recipe.init_from}: is not a stage-1 run of biper; stage 2 starts from one"
            )
    elif isinstance(given, LsqRecipe):
        raise RecipeError(
            f"--init-from {recipe.init_from}: is a {given.method} run; start from a full-precision one"
        )
    for name in SAME:
        if getattr(given, name) != getattr(recipe, name):
            raise RecipeError(
                f"--init-from {recipe.init_from}: was run with --{name.replace('_', '-')} {getattr(given, name)}, this run "
                f"has {getattr(recipe, name)}; use the same"
            )
    state = source.load("checkpoint.pt")
    if tuple(state["classes"]) != tuple(split.classes):
        raise RecipeError(
            f"--init-from {recipe.init_from}: was trained on other classes: {', '.join(state['classes'])}"
        )
    return state["model"]


def takes_over(recipe: Recipe) -> bool:
    """Whether the run begins from a quantized one, all its parameters taken over as they are: BiPer's stage 2."""
    return (
        isinstance(recipe, BiperRecipe)
        and recipe.stage == 2
        and recipe.init_from is not None
    )


def teacher_of(recipe: Recipe, split: Split, built: Built) -> nn.Module | None:
    """The full-precision model of the run named by --teacher. Raises RecipeError when it cannot teach `built`."""
    if not isinstance(recipe, LsqRecipe) or recipe.teacher is None:
        return None
    folder, given, teacher = load_run(recipe.teacher)
    if isinstance(given, LsqRecipe):
        raise RecipeError(
            f"--teacher {recipe.teacher}: is a {given.method} run; distil from a full-precision one"
        )
    for name in ("image_size", "test_domain", "trial_seed", "holdout"):
        if getattr(given, name) != getattr(recipe, name):
            raise RecipeError(
                f"--teacher {recipe.teacher}: was run with --{name.replace('_', '-')} {getattr(given, name)}, this run has "
                f"{getattr(recipe, name)}; use the same"
            )
    if (teacher.mean, teacher.std) != (built.mean, built.std):
        raise RecipeError(
            f"--teacher {recipe.teacher}: its images are normalised by other means and deviations; use the same "
            "--normalization"
        )
    if classes_of(folder) != tuple(split.classes):
        raise RecipeError(f"--teacher {recipe.teacher}: was trained on other classes")
    return teacher.model


def calibrated(recipe: LsqRecipe, built: Built, split: Split) -> list[CalibrationRow]:
    """Set the activation quantizers from the first training batches, then repair the net as --init asks; for a binary net
    after its batch norms, which a float net's statistics do not fit."""
    batches = list(some_images(split, recipe, built, recipe.calibration_batches))
    if isinstance(recipe, BiperRecipe):
        with in_full_precision(built.model):
            restore_norm_statistics(built.model, batches)
    rows = calibrate(built.model, batches, recipe.scale_init, batches=None)
    if recipe.init in ("gptq", "bias-correction"):
        from qat.surgery import brevitas_bridge

        repair = (
            brevitas_bridge.gptq_
            if recipe.init == "gptq"
            else brevitas_bridge.correct_biases_
        )
        repair(built.model, batches)
    return rows


def schedule_of(recipe: Recipe) -> Callable[[int], float]:
    """Learning-rate factor by step: a linear rise over the warm-up, then the schedule over the rest."""
    after = _after_warmup(recipe, max(recipe.steps - recipe.warmup, 1))
    return lambda step: (
        (step + 1) / recipe.warmup
        if step < recipe.warmup
        else after(step - recipe.warmup)
    )


def _after_warmup(recipe: Recipe, steps: int) -> Callable[[int], float]:
    match recipe.schedule:
        case "cosine":
            return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        case "linear":
            return lambda step: max(1 - step / steps, 0.0)
        case "constant":
            return lambda step: 1.0
        case "refined":
            assert recipe.refine_from is not None
            power = 2 if is_sgd(recipe.optimizer) else 1
            factors = refined(_gradient_norms(recipe), steps, power)
            return lambda step: float(factors[min(step, len(factors) - 1)])


def is_sgd(optimizer: str) -> bool:
    """Whether a timm optimizer steps along the gradient itself, not along its sign or a normalised form of it."""
    return "sgd" in optimizer or optimizer.removeprefix("lookahead_") == "momentum"


def refined(norms: NDArray[np.float64], steps: int, power: int) -> NDArray[np.float64]:
    """Learning-rate factors (steps,) from the gradient norms of an earlier run (arXiv 2310.07831, algorithm 1):

    η_t ∝ w_t · Σ_{p>t} w_p, at most 1, with w_t = ‖g_t‖₂⁻² (SGD: power 2) or ‖g_t‖₁⁻¹ (Adam and its kin: power 1), on
    median-filtered norms; the filter's window is padded with the first norm before the run and by reflection after it.
    """
    half = int(SMOOTH * len(norms)) // 2
    padded = np.pad(np.pad(norms, (half, 0), mode="edge"), (0, half), mode="reflect")
    smooth = np.array(
        [np.median(padded[i : i + 2 * half + 1]) for i in range(len(norms))]
    )
    weights = np.interp(
        np.linspace(0, 1, steps), np.linspace(0, 1, len(norms)), smooth
    ) ** -float(power)
    later = np.append(np.cumsum(weights[::-1])[::-1][1:], 0.0)
    rates = weights * later
    return rates / rates.max()


def _gradient_norms(recipe: Recipe) -> NDArray[np.float64]:
    assert recipe.refine_from is not None
    entry = "gradient_norm" if is_sgd(recipe.optimizer) else "gradient_l1_norm"
    found = [
        e[entry] for e in RunFolder.open(recipe.refine_from).metrics() if entry in e
    ]
    norms = np.array(found, np.float64)
    if len(norms) < 2 or not ((norms > 0) & np.isfinite(norms)).all():
        raise RecipeError(
            f"--refine-from {recipe.refine_from}: its metrics.jsonl holds no usable {entry} (one positive number a step)"
        )
    return norms


def as_saved(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, object]:
    """What a checkpoint keeps besides the model: optimizer, schedule, state of the random numbers."""
    return {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
