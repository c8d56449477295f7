"""Impossible values of a recipe, found before anything is built: one error that names the flag.

Each part checks itself (`qat/runs/parts.py`). Here is what parts exclude in each other, and flags that would change nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qat.objectives.controls import CONTROLS
from qat.runs.parts import Oscillation, RecipeError
from qat.runs.ranges import flag
from qat.runs.recipe import KNOWN, Recipe

SMALLEST_SIDE = 8


def check(recipe: Recipe) -> None:
    """Raise RecipeError naming the first flag that is impossible or would have no effect."""
    for part in recipe.parts.values():
        part.check()
    size = recipe.model.image_size
    if size < SMALLEST_SIDE:
        raise RecipeError(f"--image-size must be at least {SMALLEST_SIDE}, got {size}")
    if recipe.optimization.epochs is not None and recipe.images.data == "domains":
        raise RecipeError(
            "--epochs: domains are drawn from without end, in equal shares; give --steps"
        )
    if recipe.optimization.and_mask is not None:
        _check_and_mask(recipe)
    _check_sharpness(recipe)
    _check_edges(recipe)
    _check_repairs(recipe)
    _check_beginning(recipe)
    _check_weights(recipe)
    _check_effects(recipe)


Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Need:
    """A flag that changes something only where `holds` of all values; `without` says what is missing."""

    field: str
    holds: Callable[[Values], bool]
    without: str


def _decides(values: Values) -> bool:
    return CONTROLS[values["control"]].decides


def _freezes(values: Values) -> bool:
    return CONTROLS[values["control"]].freezes


# Asked only of recipes that have the field, and only where its value is not the recipe's own default.
NEEDS = (
    _Need(
        "steps",
        lambda v: v["epochs"] is None,
        "with --epochs; add --epochs None to count in steps",
    ),
    _Need(
        "evaluate_every",
        lambda v: v["epochs"] is None,
        "with --epochs, after each of which is measured",
    ),
    _Need(
        "stage2_steps",
        lambda v: v["epochs"] is None,
        "with --epochs; use --stage2-epochs",
    ),
    _Need(
        "stage2_epochs",
        lambda v: v["epochs"] is not None,
        "without --epochs; use --stage2-steps",
    ),
    _Need(
        "per_class",
        lambda v: v["data_root"] is None,
        "with --data-root; it sizes the rendered images",
    ),
    _Need(
        "test_domain",
        lambda v: v["data"] in ("domains", "auto") or v["test_domain"] == "test",
        "for CIFAR-10: it has its own",
    ),
    _Need(
        "also_left_out",
        lambda v: v["data"] in ("domains", "auto") and v["official_lists"] is None,
        "but for domains that are split as DomainBed draws",
    ),
    _Need("ema_decay", lambda v: v["averaging"] == "ema", "without --averaging ema"),
    _Need("published_deviation", lambda v: v["standardize"], "with --no-standardize"),
    _Need(
        "balanced",
        lambda v: v["epochs"] is None,
        "with --epochs, in which every image counts once; give --steps",
    ),
    _Need(
        "holdout",
        lambda v: v["official_lists"] is None,
        "with --official-lists, which hold out images",
    ),
    _Need("clip_mode", lambda v: v["clip"] is not None, "without --clip"),
    _Need("distill_weight", lambda v: v["teacher"] is not None, "without --teacher"),
    _Need(
        "weight_bits", lambda v: not v.get("activation_only"), "with --activation-only"
    ),
    _Need("activations", lambda v: not v["weight_only"], "with --weight-only"),
    _Need("edges", lambda v: not v["weight_only"], "with --weight-only"),
    _Need(
        "edge_bits",
        lambda v: v.get("edges") != "image",
        "with --edges image, which leaves those layers in floating point",
    ),
    _Need(
        "input_scales",
        lambda v: not v.get("weight_only"),
        "with --weight-only",
    ),
    _Need(
        "oscillation",
        lambda v: not v.get("activation_only"),
        "with --activation-only: no weight has codes",
    ),
    _Need(
        "damping",
        lambda v: not v.get("activation_only"),
        "with --activation-only: no weight has codes",
    ),
    _Need(
        "freeze_oscillating",
        lambda v: not v.get("activation_only"),
        "with --activation-only: no weight has codes",
    ),
    _Need("z", lambda v: v["threshold"] is None, "with --threshold, which decides"),
    _Need(
        "freeze_when",
        lambda v: not CONTROLS[v["control"]].above,
        "with the control above, which decides it",
    ),
    _Need("freeze_scales", _decides, "with this --control, which decides nothing"),
    _Need("start_step", _decides, "with this --control, which decides nothing"),
    _Need("rescale", _freezes, "with this --control, which freezes nothing"),
)


def _check_effects(recipe: Recipe) -> None:
    values, default = recipe.entries(), KNOWN[recipe.method].entries()
    for need in NEEDS:
        if need.field not in values or values[need.field] == default[need.field]:
            continue
        if not need.holds(values):
            raise RecipeError(
                f"{flag(need.field)} has no effect {need.without}; leave it out"
            )


def _check_and_mask(recipe: Recipe) -> None:
    if recipe.sharpness is not None:
        raise RecipeError(
            f"--and-mask: {recipe.method} has an objective of its own; use the method fp or lsq"
        )
    loss = recipe.optimization.domain_loss
    if loss != "erm":
        raise RecipeError(
            f"--and-mask takes every domain's loss by itself, so --domain-loss {loss} has nothing to compare"
        )


def _check_sharpness(recipe: Recipe) -> None:
    sharpness, optimization = recipe.sharpness, recipe.optimization
    if sharpness is None:
        return
    if optimization.mixed_precision == "fp16":
        raise RecipeError(
            "--mixed-precision fp16 scales the loss, and with it the perturbation; use bf16 or no"
        )
    if sharpness.perturb == "quantized" and recipe.quantization is None:
        raise RecipeError(
            "--perturb quantized needs a quantized method, such as sagm-lsq"
        )
    if sharpness.per_domain and optimization.domain_loss != "erm":
        raise RecipeError(
            f"--per-domain takes every domain's loss by itself, so --domain-loss {optimization.domain_loss} has nothing "
            "to compare; leave one of them out"
        )


def _check_edges(recipe: Recipe) -> None:
    if recipe.quantization is None or recipe.quantization.edge_bits <= 8:
        return
    bits = recipe.quantization.edge_bits
    if recipe.binarization is None:
        raise RecipeError(f"--edge-bits must be at least 2 and at most 8, got {bits}")
    if bits != 32:
        raise RecipeError(
            f"--edge-bits must be 2 to 8, or 32 for floating point, got {bits}"
        )


def _check_weights(recipe: Recipe) -> None:
    """Latent weights of one bit have no grid that they could be pulled to or swing on."""
    if recipe.binarization is None or recipe.oscillation is None:
        return
    default = Oscillation()
    for name in ("damping", "freeze_oscillating"):
        if getattr(recipe.oscillation, name) != getattr(default, name):
            raise RecipeError(
                f"{flag(name)}: 1-bit layers do not have it; leave it out, or use the method lsq"
            )


def _check_repairs(recipe: Recipe) -> None:
    """Of --init: a repair of the net before training needs weights on grids, and a net quantized from the beginning."""
    if recipe.quantization is None:
        return
    init = recipe.quantization.init
    if recipe.binarization is not None and init not in ("lsq", "mse"):
        raise RecipeError(
            f"--init {init} repairs layers of 2 bits and more; use lsq or mse, or the method lsq"
        )
    if recipe.grids is not None and recipe.grids.activation_only and init == "gptq":
        raise RecipeError(
            "--init gptq repairs weights; with --activation-only there are none to repair"
        )
    if recipe.delay is not None and init in ("gptq", "bias-correction"):
        raise RecipeError(
            f"--init {init} repairs a net before training; qtdog quantizes it in the middle of it"
        )


def _check_beginning(recipe: Recipe) -> None:
    """Of the step or the stage at which quantization begins."""
    steps = recipe.optimization.steps
    if recipe.delay is not None and recipe.delay.quant_start_step >= steps:
        raise RecipeError(
            f"--quant-start-step {recipe.delay.quant_start_step}: must lie within --steps ({steps})"
        )
    binarization = recipe.binarization
    if binarization is None or binarization.stage == 1:
        return
    if binarization.binarizer == "biper" and recipe.init_from is None:
        raise RecipeError(
            "--stage 2 begins from a stage-1 run: name its folder with --init-from"
        )
