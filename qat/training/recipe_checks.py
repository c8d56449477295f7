"""Impossible values of a recipe, found before anything is built: one error that names the flag."""

from qat.training.recipe import BiperRecipe, LsqRecipe, QtdogRecipe, Recipe, RecipeError, SagmRecipe


def check(recipe: Recipe) -> None:
    """Raise RecipeError naming the flag of the first impossible value."""
    positive = ["image_size", "batch_size", "accumulate", "evaluate_every", "lr", "per_class"]
    for name in positive + (["steps"] if recipe.epochs is None else []):
        if getattr(recipe, name) <= 0:
            raise RecipeError(f"--{name.replace('_', '-')} must be positive, got {getattr(recipe, name)}")
    if recipe.accumulate > 1 and recipe.domain_loss == "groupdro":
        raise RecipeError(
            "--accumulate: groupdro weighs domains by the losses of a whole batch; raise --batch-size instead"
        )
    for name in ("holdout", "ema_decay"):
        if not 0 < getattr(recipe, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {getattr(recipe, name)}")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"--dropout must lie in [0, 1), got {recipe.dropout}")
    if recipe.clip is not None and recipe.clip <= 0:
        raise RecipeError(f"--clip must be positive, got {recipe.clip}; leave it out not to clip")
    for name in ("epochs", "warmup"):
        if (getattr(recipe, name) or 0) < 0:
            raise RecipeError(f"--{name} must not be negative, got {getattr(recipe, name)}")
    if recipe.epochs is not None and recipe.data == "domains":
        raise RecipeError("--epochs: domains are drawn from without end, in equal shares; give --steps")
    if (recipe.schedule == "refined") != (recipe.refine_from is not None):
        raise RecipeError("--schedule refined and --refine-from belong together")
    if isinstance(recipe, SagmRecipe):
        _check_sharpness(recipe)
    if isinstance(recipe, LsqRecipe):
        _check_lsq(recipe)
        _check_grids(recipe)
    if isinstance(recipe, BiperRecipe):
        _check_binary(recipe)
    if isinstance(recipe, QtdogRecipe) and not 0 < recipe.quant_start_step < recipe.steps:
        raise RecipeError(f"--quant-start-step {recipe.quant_start_step}: must lie within --steps ({recipe.steps})")


def _check_lsq(recipe: LsqRecipe) -> None:
    for name in () if isinstance(recipe, BiperRecipe) else ("bits", "weight_bits", "edge_bits"):
        value = getattr(recipe, name)
        if value is not None and not 2 <= value <= 8:
            raise RecipeError(f"--{name.replace('_', '-')} must be 2 to 8, got {value}")
    if not 0 <= recipe.distill_weight <= 1:
        raise RecipeError(f"--distill-weight must lie in [0, 1], got {recipe.distill_weight}")
    if recipe.damping < 0:
        raise RecipeError(f"--damping must not be negative, got {recipe.damping}")
    if recipe.freeze_oscillating is not None and not 0 < recipe.freeze_oscillating < 1:
        raise RecipeError(f"--freeze-oscillating must lie between 0 and 1, got {recipe.freeze_oscillating}")


def _check_binary(recipe: BiperRecipe) -> None:
    if recipe.bits != 1 or recipe.weight_bits not in (None, 1):
        raise RecipeError(f"--bits {recipe.bits}: biper has one bit; the method lsq has more")
    if not (2 <= recipe.edge_bits <= 8 or recipe.edge_bits == 32):
        raise RecipeError(f"--edge-bits must be 2 to 8, or 32 for floating point, got {recipe.edge_bits}")
    for name in ("frequency", "stage2_lr", "stage2_epochs", "stage2_steps"):
        if getattr(recipe, name) <= 0:
            raise RecipeError(f"--{name.replace('_', '-')} must be positive, got {getattr(recipe, name)}")
    if recipe.frequency_start is not None and (recipe.frequency_start <= 0 or recipe.learn_frequency):
        raise RecipeError("--frequency-start must be positive, and a learned frequency has no schedule")
    if recipe.stage == 2 and recipe.binarizer == "biper" and recipe.init_from is None:
        raise RecipeError("--stage 2 begins from a stage-1 run: name its folder with --init-from")


def _check_grids(recipe: LsqRecipe) -> None:
    if recipe.weight_only and recipe.activation_only:
        raise RecipeError("--weight-only and --activation-only exclude each other: nothing would be quantized")
    if recipe.activations == "lsq-plus" and recipe.power_of_two:
        raise RecipeError("--power-of-two has no offsets; use --activations lsq")
    if recipe.init == "gptq" and recipe.activation_only:
        raise RecipeError("--init gptq repairs weights; with --activation-only there are none to repair")
    if isinstance(recipe, QtdogRecipe) and recipe.init in ("gptq", "bias-correction"):
        raise RecipeError(f"--init {recipe.init} repairs a net before training; qtdog quantizes it in the middle of it")
    if recipe.norm_batches < 0:
        raise RecipeError(f"--norm-batches must not be negative, got {recipe.norm_batches}")


def _check_sharpness(recipe: SagmRecipe) -> None:
    if recipe.rho < 0 or recipe.alpha < 0:
        raise RecipeError(f"--rho and --alpha must not be negative, got {recipe.rho} and {recipe.alpha}")
    if recipe.mixed_precision == "fp16":
        raise RecipeError("--mixed-precision fp16 scales the loss, and with it the perturbation; use bf16 or no")
    if recipe.perturb == "quantized" and not isinstance(recipe, LsqRecipe):
        raise RecipeError("--perturb quantized needs a quantized method, such as sagm-lsq")
    if recipe.perturb == "quantized" and "weights" not in recipe.perturb_kinds:
        raise RecipeError(
            "--perturb quantized perturbs weights behind their quantizers: add weights to --perturb-kinds"
        )
    if recipe.per_domain and recipe.domain_loss != "erm":
        raise RecipeError(
            f"--per-domain takes every domain's loss by itself, so --domain-loss {recipe.domain_loss} has nothing to "
            "compare; leave one of them out"
        )
    if recipe.per_domain and recipe.flatness == "gsam":
        raise RecipeError(
            "--per-domain mixes fixed shares of two streams, which gsam does not have; use sagm, sam or asam"
        )
