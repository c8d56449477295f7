"""The model that a recipe names: made, quantized by its rules, and loaded back from a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec
from qat.runs.recipe import BiperRecipe, LsqRecipe, Recipe, RecipeError, to_json
from qat.runs.run_folder import RunFolder, different_entries
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.batchnorm import fold_norms
from qat.surgery.binarize import Binarizer, hardtanh_for_relu_
from qat.surgery.layers import FLOAT, LayerSpec
from qat.surgery.rules import before, read_rules, with_options
from qat.surgery.swap import binary_rules, quantize_, uniform_rules
from qat.surgery.table import QuantizationTable

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
STREAM = QuantSpec(8)


@dataclass(frozen=True)
class Built:
    """A backbone made to a recipe; `table` is None in full precision."""

    model: nn.Module
    table: QuantizationTable | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def build(
    recipe: Recipe,
    classes: int,
    *,
    load_weights: bool = True,
    start: dict[str, Tensor] | None = None,
) -> Built:
    """The model a recipe names, quantized by its rules but not calibrated.

    load_weights: whether to load the recipe's own backbone weights.
    start:        state dict of a float model of the same backbone, loaded before quantization so that weight scales are
                  initialised from it.
    Raises ValueError naming the flag at fault.
    """
    model, config = create_backbone(
        recipe.backbone,
        classes,
        weights=recipe.weights if load_weights else None,
        pretrained=recipe.pretrained and load_weights,
        **({"pad_type": recipe.pad_type} if recipe.pad_type else {}),
        **({"drop_rate": recipe.dropout} if recipe.dropout else {}),
    )
    if start is not None:
        model.load_state_dict(start)
    mean, std = NORMALIZATIONS.get(recipe.normalization, (config.mean, config.std))
    table = None
    if isinstance(recipe, BiperRecipe):
        hardtanh_for_relu_(model)
    if isinstance(recipe, LsqRecipe):
        example = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
        stream = replace(
            STREAM,
            power_of_two=recipe.power_of_two,
            gradient_count=recipe.gradient_count,
        )
        if recipe.fold_norms:
            fold_norms(model, example)
        if recipe.init == "cle" and (load_weights or start is not None):
            from qat.surgery.brevitas_bridge import equalize_

            equalize_(model, example)
        rules = rules_of(recipe, model)
        table = quantize_(
            model,
            rules,
            example,
            stream=None if recipe.weight_only else stream,
            weight_init=recipe.scale_init,
        )
    return Built(model, table, mean, std)


def rules_of(recipe: LsqRecipe, model: nn.Module) -> list[tuple[str, LayerSpec]]:
    """The recipe's rules: those of its file first, then its flags'. Its options hold for all of them."""
    rules = _rules_of(recipe, model)
    return (
        rules
        if recipe.symmetric_weights
        else with_options(rules, weight={"symmetric": False}, source={})
    )


def _rules_of(recipe: LsqRecipe, model: nn.Module) -> list[tuple[str, LayerSpec]]:
    if isinstance(recipe, BiperRecipe):
        bits = recipe.edge_bits
        edge = (
            FLOAT
            if bits == 32
            else LayerSpec(QuantSpec.of_weight(bits), QuantSpec(bits))
        )
        binarizer = Binarizer(
            recipe.binarizer,
            recipe.stage,
            recipe.frequency,
            recipe.learn_frequency,
            recipe.alpha_init,
            standardize=recipe.standardize,
            learn_thresholds=recipe.learn_thresholds,
        )
        return binary_rules(
            model, first_and_last(model), edge=edge, binarizer=binarizer
        )
    rules = uniform_rules(
        recipe.weight_bits or recipe.bits,
        recipe.bits,
        first_and_last(model),
        recipe.edge_bits,
    )
    shared = {
        "power_of_two": recipe.power_of_two,
        "gradient_count": recipe.gradient_count,
    }
    plus = {"offset": True} if recipe.activations == "lsq-plus" else {}
    rules = with_options(rules, weight={}, source=plus)
    if recipe.rules is not None:
        rules = before(read_rules(recipe.rules), rules, model)
    rules = with_options(rules, weight=shared, source=shared)
    if recipe.weight_only:
        return [(name, replace(spec, input=None)) for name, spec in rules]
    if recipe.activation_only:
        return [(name, replace(spec, weight=None)) for name, spec in rules]
    return rules


def load_run(path: Path) -> tuple[RunFolder, Recipe, Built]:
    """The selected model of a finished run, in eval mode.

    Raises RecipeError when recipe.json is not the recipe that the checkpoint was trained with.
    """
    folder = RunFolder.open(path)
    recipe = folder.recipe()
    state = folder.load("checkpoint.pt")
    trained_with = state.get("recipe")  # checkpoints of earlier versions have none
    if trained_with is not None:
        different = different_entries(trained_with, to_json(recipe))
        if different:
            raise RecipeError(
                f"{folder / 'recipe.json'}: was changed after training, which had {different}"
            )
    built = build(recipe, len(state["classes"]), load_weights=False)
    load_state(built.model, state, folder / "checkpoint.pt")
    require_finite_state(built.model, folder / "checkpoint.pt")
    built.model.eval()
    return folder, recipe, built


def load_state(model: nn.Module, state: dict[str, Any], source: Path) -> None:
    """Load a checkpoint's model. Raises RecipeError naming `source` when it does not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise RecipeError(
            f"{source}: does not fit its recipe's model: {''.join(first).strip()}"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None


def require_finite_state(model: nn.Module, source: Path) -> None:
    """Raises RecipeError naming the first tensor of a trained model that holds nan or an infinity."""
    for name, value in model.state_dict().items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not bool(torch.isfinite(value).all())
        ):
            raise RecipeError(
                f"{source}: {name} holds values that are nan or infinite; the run did not end well"
            )
