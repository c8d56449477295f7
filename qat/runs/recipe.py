"""Recipes: all parts that a run has. Command lines are made from them, run folders record them."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qat.objectives.controls import CONTROLS
from qat.runs import earlier
from qat.runs.parts import (
    Averaging,
    Binarization,
    Delay,
    Distillation,
    Freezing,
    Grids,
    Images,
    Model,
    Optimization,
    Oscillation,
    Part,
    Quantization,
    RecipeError,
    Sharpness,
    Tracking,
)


@dataclass(frozen=True)
class Recipe:
    """What a run does. Of the parts that may be absent, those that are there make its method; an absent one has no flags."""

    images: Images = field(default_factory=Images)
    """Where the images are, how they are split and augmented."""
    model: Model = field(default_factory=Model)
    """The backbone, its starting weights and what it takes."""
    optimization: Optimization = field(default_factory=Optimization)
    """How the parameters move."""
    averaging: Averaging = field(default_factory=Averaging)
    """Average of the weights."""
    tracking: Tracking = field(default_factory=Tracking)
    """What is measured and kept."""
    sharpness: Sharpness | None = None
    """An objective of two passes that seeks flat minima."""
    quantization: Quantization | None = None
    """Where a quantized net starts from, and how its scales learn."""
    grids: Grids | None = None
    """Bits and grids of layers of 2 bits and more."""
    binarization: Binarization | None = None
    """1-bit weights and activations."""
    distillation: Distillation | None = None
    """A full-precision teacher."""
    oscillation: Oscillation | None = None
    """Weights that swing between two codes."""
    freezing: Freezing | None = None
    """Which scales lose a branch of their gradient, and for how long."""
    delay: Delay | None = None
    """When the quantizers begin."""

    @property
    def method(self) -> str:
        """The word that names this recipe, a key of METHODS or "biper"."""
        if self.binarization is not None:
            return "biper"
        if self.delay is not None:
            return "qtdog"
        if self.freezing is not None:
            control = self.freezing.control
            return "gaqat" if control == "gaqat" else f"gaqat-{control}"
        if self.quantization is not None:
            return "lsq" if self.sharpness is None else "sagm-lsq"
        return "fp" if self.sharpness is None else "sagm"

    @property
    def precision(self) -> str:
        """Bits of weights and activations as papers write them: W4A4, W7, A8, W1A1; empty in full precision."""
        if self.binarization is not None:
            return "W1A1"
        if self.grids is None:
            return ""
        weights = f"W{self.grids.weight_bits or self.grids.bits}"
        activations = f"A{self.grids.bits}"
        if self.grids.weight_only:
            return weights
        if self.grids.activation_only:
            return activations
        return weights + activations

    @property
    def init_from(self) -> Path | None:
        """The run folder that a quantized run starts from."""
        return None if self.quantization is None else self.quantization.init_from

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    def entries(self) -> dict[str, Any]:
        """Every value by its flag's name, whichever part it belongs to."""
        values: dict[str, Any] = {}
        for part in self.parts.values():
            values |= vars(part)
        return values

    def changed(self, **values: Any) -> "Recipe":
        """This recipe with other `values`, by flag name. Raises TypeError for a name that none of its parts has."""
        unknown = values.keys() - self.entries().keys()
        if unknown:
            raise TypeError(f"{self.method} has no {', '.join(sorted(unknown))}")
        parts: dict[str, Any] = {}
        for name, part in self.parts.items():
            own = {key: value for key, value in values.items() if key in vars(part)}
            parts[name] = dataclasses.replace(part, **own)
        return dataclasses.replace(self, **parts)

    def changed_where_known(self, values: dict[str, Any]) -> "Recipe":
        """This recipe with those of `values` that its parts have."""
        known = self.entries()
        return self.changed(**{k: v for k, v in values.items() if k in known})


def _quantized(**parts: Any) -> Recipe:
    """A recipe of layers of 2 bits and more, started from full precision, hence at half the learning rate."""
    return Recipe(
        optimization=Optimization(lr=5e-4),
        quantization=Quantization(),
        grids=Grids(),
        distillation=Distillation(),
        oscillation=Oscillation(),
        **parts,
    )


def _qtdog() -> Recipe:
    return _quantized(delay=Delay()).changed(
        bits=7, edge_bits=7, weight_only=True, init="lsq"
    )


def _biper() -> Recipe:
    """The published commands for CIFAR-10 with ResNet-18."""
    return Recipe(
        model=Model(backbone="bireal_cifar_resnet18"),
        optimization=Optimization(
            batch_size=256,
            optimizer="momentum",
            lr=0.021,
            weight_decay=0.0016,
            warmup=5,
            epochs=600,
        ),
        quantization=Quantization(),
        binarization=Binarization(),
        distillation=Distillation(),
        oscillation=Oscillation(),
    )


def _gaqat(control: Any) -> Recipe:
    return _quantized(sharpness=Sharpness(), freezing=Freezing(control=control))


# Leave one domain out (DomainBed; `docs/algorithms.md`, DomainBed protocol), by method.
METHODS: dict[str, Recipe] = {
    "fp": Recipe(),
    "sagm": Recipe(sharpness=Sharpness()),
    "lsq": _quantized(),
    "sagm-lsq": _quantized(sharpness=Sharpness()),
    "qtdog": _qtdog(),
    **{recipe.method: recipe for recipe in map(_gaqat, CONTROLS)},
}
KNOWN: dict[str, Recipe] = METHODS | {"biper": _biper()}
# What `qat train` begins with: any folder of images, at the backbone's own size.
TRAINED: dict[str, Recipe] = {
    method: recipe.changed(data="auto", image_size=0)
    for method, recipe in KNOWN.items()
}

# What a command line says about a method.
DESCRIPTIONS = {
    "fp": "Full precision.",
    "sagm": "Full precision towards flat minima: SAGM (arXiv 2303.10353) or a relative.",
    "lsq": "LSQ quantization-aware training (arXiv 1902.08153), best started from a full-precision run.",
    "sagm-lsq": "SAGM on a quantized net: every scale gets the task's and the smoothing gradient, none is frozen.",
    "qtdog": "QT-DoG (arXiv 2410.06020): full precision until a step, then weights alone on a 7-bit grid; the classifier is "
    "quantized too, which the published code leaves in floating point.",
    "gaqat": "GAQAT (arXiv 2412.05551): a scale is frozen for a task gradient that has settled, and released when it stirs.",
    "biper": "1-bit weights and activations: BiPer (arXiv 2404.01278) in two stages, or a baseline binarizer in one.",
}


def described(method: str) -> str:
    """One sentence about `method`, a key of KNOWN."""
    name, _, control = method.partition("-")
    if name == "gaqat" and control:
        return f"GAQAT's control {control!r} (`qat/objectives/controls.py`)."
    return DESCRIPTIONS[method]


def recipe_of(method: str, **values: Any) -> Recipe:
    """The recipe of `method` with other `values` than its defaults, by flag name.

    Raises RecipeError for a method that is not known, TypeError for a value that it does not have.
    """
    if method not in KNOWN:
        raise RecipeError(f"unknown method {method!r}; known: {', '.join(KNOWN)}")
    return KNOWN[method].changed(**values)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The same as plain data, for a JSON file or a checkpoint: one entry for each flag."""
    values: dict[str, Any] = {"method": recipe.method}
    for name, value in recipe.entries().items():
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[name] = value
    return values


def from_json(values: Any, source: Path) -> Recipe:
    """The recipe recorded in a run folder. Raises RecipeError when `source` holds something else."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"{source}: holds no recipe, which has one entry for each flag"
        )
    method = values.get("method", "")
    known = KNOWN.get(method) if isinstance(method, str) else None
    if known is None:
        raise RecipeError(
            f"{source}: unknown method {method!r}; known: {', '.join(KNOWN)}"
        )
    entries = earlier.recipe_entries(values)
    entries.pop("method")
    return with_entries(known, entries, source)


def with_entries(recipe: Recipe, values: dict[str, Any], source: Path) -> Recipe:
    """`recipe` with `values` that were read from the file `source`, by flag name.

    Raises RecipeError naming the first entry that is unknown, of another type or out of its range.
    """
    hints: dict[str, Any] = {}
    for part in recipe.parts.values():
        hints |= get_type_hints(type(part))
    if unknown := values.keys() - hints.keys():
        raise RecipeError(
            f"{source}: unknown entries {', '.join(sorted(unknown))}; was it written by a newer version?"
        )
    given = {}
    for name, value in values.items():
        given[name] = _value(value, hints[name], name, source)
    changed = recipe.changed(**given)
    for part in changed.parts.values():
        try:
            Part.check(part)
        except RecipeError as error:
            raise RecipeError(f"{source}: {error}") from None
    return changed


def _value(value: Any, hint: Any, name: str, source: Path) -> Any:
    """`value` of a JSON file as a field of type `hint` has it. Raises RecipeError naming the entry."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        is_word = get_origin(option) is Literal and type(value) in (str, int)
        if is_word and value in get_args(option):
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and type(value) in (int, float):
            return value
        if option in (bool, int, str) and type(value) is option:
            return value
        # Checkpoints, unlike JSON, keep tuples; some were written with them
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            kind = get_args(option)[0]
            return tuple(_value(item, kind, name, source) for item in value)
    raise RecipeError(f"{source}: entry {name!r} cannot be {json.dumps(value)[:60]}")
