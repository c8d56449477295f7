"""Impossible values of a recipe, found before anything is built: one error that names the flag.

Three kinds: numbers outside their range, flags that exclude each other, and flags that would change nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qat.objectives.controls import CONTROLS
from qat.runs.ranges import flag
from qat.runs.recipe import (
    BiperRecipe,
    LsqRecipe,
    QtdogRecipe,
    Recipe,
    RecipeError,
    SagmRecipe,
    number_problem,
)


def check(recipe: Recipe) -> None:
    """Raise RecipeError naming the first flag that is impossible or would have no effect."""
    if problem := number_problem(recipe):
        raise RecipeError(problem)
    if recipe.epochs is None and recipe.steps < 1:
        raise RecipeError(
            "--steps must be at least 1, got 0; --epochs 0 measures the starting weights"
        )
    if recipe.accumulate > 1 and recipe.domain_loss == "groupdro":
        raise RecipeError(
            "--accumulate: groupdro weighs domains by the losses of a whole batch; raise --batch-size instead"
        )
    if recipe.epochs is not None and recipe.data == "domains":
        raise RecipeError(
            "--epochs: domains are drawn from without end, in equal shares; give --steps"
        )
    if (recipe.schedule == "refined") != (recipe.refine_from is not None):
        raise RecipeError("--schedule refined and --refine-from belong together")
    if isinstance(recipe, SagmRecipe):
        _check_sharpness(recipe)
    if isinstance(recipe, LsqRecipe):
        _check_grids(recipe)
    if isinstance(recipe, BiperRecipe):
        _check_binary(recipe)
    if isinstance(recipe, QtdogRecipe) and recipe.quant_start_step >= recipe.steps:
        raise RecipeError(
            f"--quant-start-step {recipe.quant_start_step}: must lie within --steps ({recipe.steps})"
        )
    _check_effects(recipe)


@dataclass(frozen=True)
class _Need:
    """A flag that changes something only where `holds`; `without` says what is missing."""

    field: str
    holds: Callable[[Any], bool]
    without: str


def _decides(recipe: Any) -> bool:
    return CONTROLS[recipe.control].decides


def _freezes(recipe: Any) -> bool:
    return CONTROLS[recipe.control].freezes


# Asked only of recipes that have the field, and only where its value is not the recipe's own default.
NEEDS = (
    _Need(
        "steps",
        lambda r: r.epochs is None,
        "with --epochs; add --epochs None to count in steps",
    ),
    _Need(
        "evaluate_every",
        lambda r: r.epochs is None,
        "with --epochs, after each of which is measured",
    ),
    _Need(
        "stage2_steps", lambda r: r.epochs is None, "with --epochs; use --stage2-epochs"
    ),
    _Need(
        "stage2_epochs",
        lambda r: r.epochs is not None,
        "without --epochs; use --stage2-steps",
    ),
    _Need(
        "per_class",
        lambda r: r.data_root is None,
        "with --data-root; it sizes the rendered images",
    ),
    _Need(
        "test_domain",
        lambda r: r.data == "domains" or r.test_domain == "test",
        "for CIFAR-10: it has its own",
    ),
    _Need("ema_decay", lambda r: r.averaging == "ema", "without --averaging ema"),
    _Need("clip_mode", lambda r: r.clip is not None, "without --clip"),
    _Need("distill_weight", lambda r: r.teacher is not None, "without --teacher"),
    _Need("weight_bits", lambda r: not r.activation_only, "with --activation-only"),
    _Need("activations", lambda r: not r.weight_only, "with --weight-only"),
    _Need(
        "oscillation",
        lambda r: not r.activation_only,
        "with --activation-only: no weight has codes",
    ),
    _Need(
        "damping",
        lambda r: not r.activation_only,
        "with --activation-only: no weight has codes",
    ),
    _Need(
        "freeze_oscillating",
        lambda r: not r.activation_only,
        "with --activation-only: no weight has codes",
    ),
    _Need("z", lambda r: r.threshold is None, "with --threshold, which decides"),
    _Need(
        "freeze_when",
        lambda r: not CONTROLS[r.control].above,
        "with the control above, which decides it",
    ),
    _Need("freeze_scales", _decides, "with this --control, which decides nothing"),
    _Need("start_step", _decides, "with this --control, which decides nothing"),
    _Need("rescale", _freezes, "with this --control, which freezes nothing"),
)

# What a 1-bit net has no place for: flags of LSQ that its layers would ignore, or apply to their shortcuts alone.
NOT_FOR_BINARY = (
    "rules",
    "activations",
    "activation_only",
    "weight_only",
    "power_of_two",
    "gradient_count",
    "damping",
    "freeze_oscillating",
)
SECOND_ALONE = ("stage2_epochs", "stage2_steps", "stage2_lr", "stage2_weight_decay")
PERIODIC_ALONE = ("frequency", "frequency_start", "learn_frequency", "reg_tau", *SECOND_ALONE)  # fmt: skip


def _check_effects(recipe: Recipe) -> None:
    default = type(recipe)()
    for need in NEEDS:
        if not hasattr(recipe, need.field) or getattr(recipe, need.field) == getattr(
            default, need.field
        ):
            continue
        if not need.holds(recipe):
            raise RecipeError(
                f"{flag(need.field)} has no effect {need.without}; leave it out"
            )


def _check_binary(recipe: BiperRecipe) -> None:
    if recipe.bits != 1 or recipe.weight_bits not in (None, 1):
        raise RecipeError(
            f"--bits {recipe.bits}: biper has one bit; the method lsq has more"
        )
    if recipe.edge_bits > 8 and recipe.edge_bits != 32:
        raise RecipeError(
            f"--edge-bits must be 2 to 8, or 32 for floating point, got {recipe.edge_bits}"
        )
    default = BiperRecipe()
    for field in NOT_FOR_BINARY:
        if getattr(recipe, field) != getattr(default, field):
            raise RecipeError(
                f"{flag(field)}: 1-bit layers do not have it; leave it out, or use the method lsq"
            )
    if recipe.init not in ("lsq", "mse"):
        raise RecipeError(
            f"--init {recipe.init} repairs layers of 2 bits and more; use lsq or mse, or the method lsq"
        )
    if recipe.binarizer != "biper":
        for field in PERIODIC_ALONE:
            if getattr(recipe, field) != getattr(default, field):
                raise RecipeError(
                    f"{flag(field)} has no effect with --binarizer {recipe.binarizer}, which has one stage and no sine; "
                    "leave it out"
                )
    if recipe.stage == 2 and recipe.binarizer == "biper" and recipe.init_from is None:
        raise RecipeError(
            "--stage 2 begins from a stage-1 run: name its folder with --init-from"
        )
    if recipe.stage == 2:
        for field in SECOND_ALONE:
            if getattr(recipe, field) != getattr(default, field):
                plain = flag(field.removeprefix("stage2_"))
                raise RecipeError(
                    f"{flag(field)} has no effect with --stage 2, a run by itself; use {plain}"
                )
    if recipe.frequency_start is not None and recipe.learn_frequency:
        raise RecipeError(
            "--frequency-start: a learned frequency has no schedule; leave one of the two out"
        )


def _check_grids(recipe: LsqRecipe) -> None:
    if recipe.weight_only and recipe.activation_only:
        raise RecipeError(
            "--weight-only and --activation-only exclude each other: nothing would be quantized"
        )
    if recipe.activations == "lsq-plus" and recipe.power_of_two:
        raise RecipeError("--power-of-two has no offsets; use --activations lsq")
    if recipe.init == "gptq" and recipe.activation_only:
        raise RecipeError(
            "--init gptq repairs weights; with --activation-only there are none to repair"
        )
    if isinstance(recipe, QtdogRecipe) and recipe.init in ("gptq", "bias-correction"):
        raise RecipeError(
            f"--init {recipe.init} repairs a net before training; qtdog quantizes it in the middle of it"
        )


def _check_sharpness(recipe: SagmRecipe) -> None:
    if recipe.mixed_precision == "fp16":
        raise RecipeError(
            "--mixed-precision fp16 scales the loss, and with it the perturbation; use bf16 or no"
        )
    if recipe.perturb == "quantized" and not isinstance(recipe, LsqRecipe):
        raise RecipeError(
            "--perturb quantized needs a quantized method, such as sagm-lsq"
        )
    if recipe.perturb == "quantized" and "weights" not in recipe.perturb_kinds:
        raise RecipeError(
            "--perturb quantized perturbs weights after their quantizers: add weights to --perturb-kinds"
        )
    if recipe.per_domain and recipe.domain_loss != "erm":
        raise RecipeError(
            f"--per-domain takes every domain's loss by itself, so --domain-loss {recipe.domain_loss} has nothing to "
            "compare; leave one of them out"
        )
    if recipe.per_domain and recipe.flatness == "gsam":
        raise RecipeError(
            "--per-domain mixes fixed shares of two branches, which gsam does not have; use sagm, sam or asam"
        )
