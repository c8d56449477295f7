"""The model that a recipe names: made, quantized by its rules, and loaded back from a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec
from qat.runs.parts import Binarization, Grids, RecipeError
from qat.runs.recipe import Recipe, from_json, to_json
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
        recipe.model.backbone,
        classes,
        weights=recipe.model.weights if load_weights else None,
        pretrained=recipe.model.pretrained and load_weights,
        **({"pad_type": recipe.model.pad_type} if recipe.model.pad_type else {}),
        **({"drop_rate": recipe.model.dropout} if recipe.model.dropout else {}),
    )
    if start is not None:
        model.load_state_dict(start)
    mean, std = NORMALIZATIONS.get(
        recipe.model.normalization, (config.mean, config.std)
    )
    table = None
    if recipe.binarization is not None:
        hardtanh_for_relu_(model)
    if recipe.quantization is not None:
        example = torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size)
        if recipe.quantization.fold_norms:
            fold_norms(model, example)
        has_weights = load_weights or start is not None
        if recipe.quantization.init == "cle" and has_weights:
            from qat.surgery.brevitas_bridge import equalize_

            equalize_(model, example)
        table = quantize_(
            model,
            rules_of(recipe, model),
            example,
            stream=stream_of(recipe.grids),
            weight_init=recipe.quantization.scale_init,
        )
    return Built(model, table, mean, std)


def stream_of(grids: Grids | None) -> QuantSpec | None:
    """What quantizes sums and other tensors between layers; None where weights alone are quantized."""
    if grids is None:
        return STREAM
    if grids.weight_only:
        return None
    return replace(
        STREAM,
        power_of_two=grids.power_of_two,
        gradient_count=grids.gradient_count,
    )


def rules_of(recipe: Recipe, model: nn.Module) -> list[tuple[str, LayerSpec]]:
    """The rules of a quantized `recipe`: those of its file first, then its flags'. Its options hold for all of them."""
    quantization = recipe.quantization
    assert quantization is not None
    if recipe.binarization is not None:
        rules = _binary_rules(recipe.binarization, quantization.edge_bits, model)
    else:
        assert recipe.grids is not None
        rules = _grid_rules(recipe.grids, quantization.edge_bits, model)
    if quantization.tables:
        rules = [(name, replace(spec, table=True)) for name, spec in rules]
    if quantization.symmetric_weights:
        return rules
    return with_options(rules, weight={"symmetric": False}, source={})


def _binary_rules(
    binarization: Binarization, edge_bits: int, model: nn.Module
) -> list[tuple[str, LayerSpec]]:
    edge = FLOAT
    if edge_bits != 32:
        edge = LayerSpec(QuantSpec.of_weight(edge_bits), QuantSpec(edge_bits))
    binarizer = Binarizer(
        binarization.binarizer,
        binarization.stage,
        binarization.frequency,
        binarization.learn_frequency,
        binarization.alpha_init,
        standardize=binarization.standardize,
        published_deviation=binarization.published_deviation,
        learn_thresholds=binarization.learn_thresholds,
    )
    return binary_rules(model, first_and_last(model), edge=edge, binarizer=binarizer)


def _grid_rules(
    grids: Grids, edge_bits: int, model: nn.Module
) -> list[tuple[str, LayerSpec]]:
    edges = first_and_last(model)
    rules = uniform_rules(grids.weight_bits or grids.bits, grids.bits, edges, edge_bits)
    if grids.edges == "image":
        rules = _with_float_edges(rules, edges, grids.bits)
    offset = {"offset": True} if grids.activations == "lsq-plus" else {}
    rules = with_options(rules, weight={}, source=offset)
    if grids.rules is not None:
        rules = before(read_rules(grids.rules), rules, model)
    shared = {
        "power_of_two": grids.power_of_two,
        "gradient_count": grids.gradient_count,
    }
    rules = with_options(rules, weight=shared, source=shared)
    if grids.weight_only:
        return [(name, replace(spec, input=None)) for name, spec in rules]
    if grids.activation_only:
        return [(name, replace(spec, weight=None)) for name, spec in rules]
    return rules


def _with_float_edges(
    rules: list[tuple[str, LayerSpec]], edges: tuple[str, ...], bits: int
) -> list[tuple[str, LayerSpec]]:
    """`rules` with the layers of `edges` in floating point, but for the image that the first of them reads."""
    image = LayerSpec(weight=None, input=QuantSpec(bits))
    float_edges = [(edges[0], image), *((name, FLOAT) for name in edges[1:])]
    return float_edges + [rule for rule in rules if rule[0] not in edges]


def load_run(path: Path) -> tuple[RunFolder, Recipe, Built]:
    """The selected model of a finished run, in eval mode.

    Raises RecipeError when recipe.json is not the recipe that the checkpoint was trained with.
    """
    folder = RunFolder.open(path)
    recipe = folder.recipe()
    state = folder.load("checkpoint.pt")
    trained_with = state.get("recipe")  # checkpoints of earlier versions have none
    if trained_with is not None:
        # Entries that came after it have the values it was trained with by default
        trained = from_json(trained_with, folder / "checkpoint.pt")
        different = different_entries(to_json(trained), to_json(recipe))
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
