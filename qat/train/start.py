"""What a run starts from: another run's weights, calibrated quantizers, a teacher, a schedule."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.domains.splits import Split
from qat.quantizers.lsq import LSQ
from qat.runs.build import Built, load_run
from qat.runs.given import SHARED
from qat.runs.parts import Optimization, RecipeError
from qat.runs.ranges import flag
from qat.runs.recipe import Recipe
from qat.runs.records import classes_of
from qat.runs.run_folder import RunFolder
from qat.surgery.batchnorm import restore_norm_statistics
from qat.surgery.calibrate import CalibrationRow, calibrate, in_full_precision
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.train.loaders import some_images
from qat.train.processes import Processes

# Width of the median filter over recorded gradient norms, as a share of them
SMOOTH = 0.1


def start_state(recipe: Recipe, split: Split) -> dict[str, Tensor] | None:
    """State dict of the run named by --init-from, checked to be of the same model and split: a full-precision run, or for
    BiPer's stage 2 its stage 1."""
    if recipe.init_from is None:
        return None
    source = RunFolder.open(recipe.init_from)
    given = source.recipe()
    if takes_over(recipe):
        if (
            given.binarization is None
            or given.binarization.stage != 1
            or given.binarization.binarizer != "biper"
        ):
            raise RecipeError(
                f"--init-from {recipe.init_from}: is not a stage-1 run of biper; stage 2 starts from one"
            )
    elif given.quantization is not None:
        raise RecipeError(
            f"--init-from {recipe.init_from}: is a {given.method} run; start from a full-precision one"
        )
    _require_same(f"--init-from {recipe.init_from}", given, recipe, SHARED)
    state = source.load("checkpoint.pt")
    if tuple(state["classes"]) != tuple(split.classes):
        raise RecipeError(
            f"--init-from {recipe.init_from}: was trained on other classes: {', '.join(state['classes'])}"
        )
    return state["model"]


def _require_same(
    source: str, given: Recipe, recipe: Recipe, names: tuple[str, ...]
) -> None:
    """Raises RecipeError where the run of `source` had another value of one of `names` than `recipe`."""
    theirs, ours = given.entries(), recipe.entries()
    for name in names:
        if theirs[name] != ours[name]:
            raise RecipeError(
                f"{source}: was run with {flag(name)} {theirs[name]}, this run has {ours[name]}; use the same"
            )


def takes_over(recipe: Recipe) -> bool:
    """Whether the run begins from a quantized one, all its parameters taken over as they are: BiPer's stage 2."""
    return (
        recipe.binarization is not None
        and recipe.binarization.stage == 2
        and recipe.init_from is not None
    )


def teacher_of(recipe: Recipe, split: Split, built: Built) -> nn.Module | None:
    """The full-precision model of the run named by --teacher. Raises RecipeError when it cannot teach `built`."""
    path = None if recipe.distillation is None else recipe.distillation.teacher
    if path is None:
        return None
    folder, given, teacher = load_run(path)
    if given.quantization is not None:
        raise RecipeError(
            f"--teacher {path}: is a {given.method} run; distil from a full-precision one"
        )
    same = ("image_size", "test_domain", "also_left_out", "trial_seed", "holdout")
    _require_same(f"--teacher {path}", given, recipe, same)
    if (teacher.mean, teacher.std) != (built.mean, built.std):
        raise RecipeError(
            f"--teacher {path}: its images are normalised by other means and deviations; use the same "
            "--normalization"
        )
    if classes_of(folder) != tuple(split.classes):
        raise RecipeError(f"--teacher {path}: was trained on other classes")
    return teacher.model


def calibrated(
    recipe: Recipe, built: Built, split: Split, processes: Processes
) -> list[CalibrationRow]:
    """Set the activation quantizers from the first training batches, then repair the net as --init asks; for a binary net
    after its batch norms, which a float net's statistics do not fit."""
    quantization = recipe.quantization
    assert quantization is not None
    batches = list(some_images(split, recipe, built, quantization.calibration_batches))
    if recipe.binarization is not None:
        with in_full_precision(built.model):
            restore_norm_statistics(built.model, batches)
    share = batches[processes.rank :: processes.count]
    rows = calibrate(built.model, share, quantization.scale_init, batches=None)
    if quantization.input_scales == "one":
        _start_inputs_at_one(built.model)
    if quantization.init in ("gptq", "bias-correction"):
        from qat.surgery import brevitas_bridge

        repair = (
            brevitas_bridge.gptq_
            if quantization.init == "gptq"
            else brevitas_bridge.correct_biases_
        )
        repair(built.model, batches)
    return rows


def _start_inputs_at_one(model: nn.Module) -> None:
    """Set the scale of every layer's input to 1; sums between layers keep what calibration found."""
    for module in model.modules():
        if isinstance(module, (QuantConv2d, QuantLinear)) and isinstance(
            module.input_quantizer, LSQ
        ):
            torch.nn.init.ones_(module.input_quantizer.raw_scale)


def schedule_of(optimization: Optimization) -> Callable[[int], float]:
    """Learning-rate factor by step: a linear rise over the warm-up, then the schedule over the rest."""
    after = _after_warmup(
        optimization, max(optimization.steps - optimization.warmup, 1)
    )
    return lambda step: (
        (step + 1) / optimization.warmup
        if step < optimization.warmup
        else after(step - optimization.warmup)
    )


def _after_warmup(optimization: Optimization, steps: int) -> Callable[[int], float]:
    match optimization.schedule:
        case "cosine":
            return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        case "linear":
            return lambda step: max(1 - step / steps, 0.0)
        case "constant":
            return lambda step: 1.0
        case "refined":
            assert optimization.refine_from is not None
            power = 2 if is_sgd(optimization.optimizer) else 1
            factors = refined(_gradient_norms(optimization), steps, power)
            return lambda step: float(factors[min(step, len(factors) - 1)])


def is_sgd(optimizer: str) -> bool:
    """Whether a timm optimizer steps along the gradient itself, not along its sign or a normalised form of it."""
    return "sgd" in optimizer or optimizer.removeprefix("lookahead_") in (
        "momentum",
        "nesterov",
    )


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


def _gradient_norms(optimization: Optimization) -> NDArray[np.float64]:
    assert optimization.refine_from is not None
    entry = "gradient_norm" if is_sgd(optimization.optimizer) else "gradient_l1_norm"
    logged = []
    for line in RunFolder.open(optimization.refine_from).metrics():
        if entry in line:
            logged.append(line[entry])
    norms = np.array(logged, np.float64)
    if len(norms) < 2 or not ((norms > 0) & np.isfinite(norms)).all():
        raise RecipeError(
            f"--refine-from {optimization.refine_from}: its metrics.jsonl holds no usable {entry}, "
            "one positive number a step"
        )
    return norms
