"""The run folder: what is written where, atomically, and how a trained model is loaded back.

recipe.json      the resolved recipe                 results.json     final accuracies
checkpoint.pt    the selected model                  last.pt          everything to resume from
metrics.jsonl    one JSON object per log entry       samples.npz      real images for certificates and latency
model.onnx, certificate.json, report.html            written by `qat export`, `qat certify`, `qat report`
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.batchnorm import fold_norms
from qat.surgery.binarize import Binarizer, hardtanh_for_relu_
from qat.surgery.layers import FLOAT, LayerSpec
from qat.surgery.rules import before, read_rules, with_options
from qat.surgery.swap import QuantizationTable, binary_rules, quantize_, uniform_rules
from qat.training.recipe import BiperRecipe, LsqRecipe, Recipe, RecipeError, from_json, read_json, to_json

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


KINDS = ("predicted", "label")
STREAM = QuantSpec(8)


@dataclass(frozen=True)
class Samples:
    """Images as the model sees them (N_3_H_W float32, normalised), labels int64, and the domain of each."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    domains: NDArray[np.str_]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, recipe: Recipe) -> "RunFolder":
        """A new folder for `recipe` (its `out`, or a free default). Raises RecipeError when `out` holds a run."""
        if recipe.out is not None:
            if (recipe.out / "recipe.json").exists() and not recipe.resume:
                raise RecipeError(f"--out {recipe.out}: holds a run already; choose another folder, or --resume it")
            if recipe.resume and not (recipe.out / "last.pt").exists():
                raise RecipeError(f"--resume: {recipe.out} holds no interrupted run (no last.pt)")
            path = recipe.out
        elif recipe.resume:
            raise RecipeError("--resume needs --out, the folder of the interrupted run")
        else:
            path = default_folder(recipe)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        if isinstance(recipe, LsqRecipe) and recipe.rules is not None:
            kept = path / f"rules{recipe.rules.suffix}"  # the folder is complete without the file it was made from
            if not kept.exists():
                write_text(kept, recipe.rules.read_text())
        write_json(path / "recipe.json", to_json(recipe))
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        if not path.is_dir():
            raise RecipeError(f"{path}: no such run folder")
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def recipe(self) -> Recipe:
        recipe = from_json(read_json(self / "recipe.json"), self / "recipe.json")
        if isinstance(recipe, LsqRecipe) and recipe.rules is not None:
            return replace(recipe, rules=self / f"rules{recipe.rules.suffix}")
        return recipe

    def results(self) -> dict[str, Any]:
        return read_json(self / "results.json")

    def metrics(self) -> list[dict[str, Any]]:
        path = self / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, name: str, state: dict[str, Any]) -> None:
        write_atomically(self / name, lambda p: torch.save(state, p))

    def load(self, name: str) -> dict[str, Any]:
        """A checkpoint. Raises RecipeError when it is missing or damaged."""
        try:
            return torch.load(self / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RecipeError(f"{self / name}: no such file; did the run finish?") from None
        except Exception as error:
            raise RecipeError(f"{self / name}: not a readable checkpoint ({error})") from error

    def write_predictions(self, predictions: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
        """Per domain: predicted classes and labels of the images its accuracy was measured on, in a fixed order."""
        arrays = {
            f"{domain}/{kind}": a for domain, both in predictions.items() for kind, a in zip(KINDS, both, strict=True)
        }

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        write_atomically(self / "predictions.npz", write)

    def predictions(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        try:
            with np.load(self / "predictions.npz") as stored:
                domains = dict.fromkeys(name.rsplit("/", 1)[0] for name in stored.files)
                return {d: (stored[f"{d}/predicted"], stored[f"{d}/label"]) for d in domains}
        except FileNotFoundError:
            raise RecipeError(f"{self / 'predictions.npz'}: no such file; did the run finish?") from None

    def write_samples(self, samples: Samples) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, images=samples.images, labels=samples.labels, domains=samples.domains)

        write_atomically(self / "samples.npz", write)

    def samples(self) -> Samples:
        try:
            with np.load(self / "samples.npz") as stored:
                return Samples(stored["images"], stored["labels"], stored["domains"])
        except FileNotFoundError:
            raise RecipeError(f"{self / 'samples.npz'}: no such file; did the run finish?") from None


@dataclass(frozen=True)
class Built:
    """A backbone made to a recipe; `table` is None in full precision."""

    model: nn.Module
    table: QuantizationTable | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def build(recipe: Recipe, classes: int, *, load_weights: bool = True, start: dict[str, Tensor] | None = None) -> Built:
    """The model a recipe names, quantized by its rules but not calibrated.

    load_weights: whether to load the recipe's own backbone weights.
    start:        state dict of a float model of the same backbone, loaded before quantization so that weight steps are
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
        stream = replace(STREAM, power_of_two=recipe.power_of_two, gradient_count=recipe.gradient_count)
        if recipe.fold_norms:
            fold_norms(model, example)
        if recipe.init == "cle" and (load_weights or start is not None):
            from qat.surgery.brevitas_bridge import equalize_

            equalize_(model, example)
        rules = rules_of(recipe, model)
        table = quantize_(
            model, rules, example, stream=None if recipe.weight_only else stream, weight_init=recipe.step_init
        )
    return Built(model, table, mean, std)


def rules_of(recipe: LsqRecipe, model: nn.Module) -> list[tuple[str, LayerSpec]]:
    """The recipe's rules: those of its file first, then its flags'. Its options hold for all of them."""
    rules = _rules_of(recipe, model)
    return rules if recipe.symmetric_weights else with_options(rules, weight={"symmetric": False}, source={})


def _rules_of(recipe: LsqRecipe, model: nn.Module) -> list[tuple[str, LayerSpec]]:
    if isinstance(recipe, BiperRecipe):
        bits = recipe.edge_bits
        edge = FLOAT if bits == 32 else LayerSpec(QuantSpec.of_weight(bits), QuantSpec(bits))
        binarizer = Binarizer(
            recipe.binarizer, recipe.stage, recipe.frequency, recipe.learn_frequency, recipe.alpha_init,
            standardize=recipe.standardize, learn_thresholds=recipe.learn_thresholds,
        )  # fmt: skip
        return binary_rules(model, first_and_last(model), edge=edge, binarizer=binarizer)
    rules = uniform_rules(recipe.weight_bits or recipe.bits, recipe.bits, first_and_last(model), recipe.edge_bits)
    shared = {"power_of_two": recipe.power_of_two, "gradient_count": recipe.gradient_count}
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
    """The selected model of a finished run, in eval mode."""
    folder = RunFolder.open(path)
    recipe = folder.recipe()
    state = folder.load("checkpoint.pt")
    built = build(recipe, len(state["classes"]), load_weights=False)
    load_state(built.model, state, folder / "checkpoint.pt")
    built.model.eval()
    return folder, recipe, built


def load_state(model: nn.Module, state: dict[str, Any], source: Path) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise RecipeError(f"{source}: does not fit its recipe's model: {''.join(first).strip()}") from None


def default_folder(recipe: Recipe) -> Path:
    """runs/<method>-…, numbered when it exists."""
    return _free(Path("runs") / _default_name(recipe))


def _default_name(recipe: Recipe) -> str:
    bits = f"-w{recipe.weight_bits or recipe.bits}" if isinstance(recipe, LsqRecipe) else ""
    bits += f"a{recipe.bits}" if isinstance(recipe, LsqRecipe) and not recipe.weight_only else ""
    return f"{recipe.method}{bits}-{recipe.test_domain}-{recipe.backbone}-s{recipe.seed}"


def _free(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))]
    return next(c for c in candidates if not (c / "recipe.json").exists())
