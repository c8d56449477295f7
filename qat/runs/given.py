"""Defaults that a command line takes from elsewhere: a preset (--preset), a file (--config), the run that it goes on with
(--resume --out), and the one that it starts from (--init-from), in this order.

All are read before the flags, so that a flag that is given always wins, and `--help` shows what holds without it.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeqat.files import read_json, read_text, reason_of
from qat.runs.parts import RecipeError
from qat.runs.presets import preset
from qat.runs.recipe import Recipe, from_json, with_entries

# What a run must share with the one it starts from: images, their split, and how the backbone sees them
SHARED = (
    "backbone",
    "image_size",
    "test_domain",
    "also_left_out",
    "pad_type",
    "normalization",
    "trial_seed",
    "holdout",
)
# Of a run that is not told what images it has: those of the run it starts from
IMAGES = ("data", "data_root", "per_class", "augmentation")
# Of a recipe.json, what belongs to that run alone
OF_ONE_RUN = ("out", "resume")
PRESET, CONFIG, INIT_FROM = "--preset", "--config", "--init-from"


def with_files(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """`recipe` with the values of the preset and the files that a command line names, and the words without the two flags.

    Raises RecipeError or FileError naming the file at fault.
    """
    rest = list(words)
    named = _value_of(PRESET, rest)
    if named is not None:
        recipe = recipe.changed_where_known(preset(named))
        rest = _without(PRESET, rest)
    config = _value_of(CONFIG, rest)
    if config is not None:
        recipe = _with_config(recipe, Path(config))
        rest = _without(CONFIG, rest)
    out = _value_of("--out", rest)
    if "--resume" in rest and out is not None:
        recipe = _with_begun(recipe, Path(out))
    start = _value_of(INIT_FROM, rest)
    if start is None and recipe.init_from is not None:
        start = str(recipe.init_from)
    asks_for_help = "--help" in rest or "-h" in rest
    if start is not None and recipe.quantization is not None and not asks_for_help:
        recipe = _with_start(recipe, Path(start))
    return recipe, rest


def _value_of(name: str, words: Sequence[str]) -> str | None:
    """What follows flag `name`, as --name VALUE or --name=VALUE; the last one counts."""
    found = None
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def _without(name: str, words: Sequence[str]) -> list[str]:
    rest: list[str] = []
    skipping = False
    for word in words:
        if skipping:
            skipping = False
        elif word == name:
            skipping = True
        elif not word.startswith(f"{name}="):
            rest.append(word)
    return rest


def _with_config(recipe: Recipe, path: Path) -> Recipe:
    values = _flat(recipe, read_config(path), path)
    method = values.pop("method", recipe.method)
    if method != recipe.method:
        raise RecipeError(
            f"{CONFIG} {path}: is of the method {method!r}, the command line says {recipe.method!r}"
        )
    if path.name == "recipe.json":
        values = {name: v for name, v in values.items() if name not in OF_ONE_RUN}
    return with_entries(recipe, values, path)


def _flat(recipe: Recipe, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Entries by flag name. A file may have tables that are named as the parts of a recipe are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        found = value if isinstance(value, dict) else {name: value}
        if isinstance(value, dict) and name not in recipe.parts:
            raise RecipeError(
                f"{CONFIG} {path}: {recipe.method} has no part {name!r}; it has {', '.join(recipe.parts)}"
            )
        twice = flat.keys() & found.keys()
        if twice:
            raise RecipeError(f"{CONFIG} {path}: gives {min(twice)} twice")
        flat |= {key.replace("-", "_"): entry for key, entry in found.items()}
    return flat


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a TOML, YAML or JSON file. Raises RecipeError, or FileError where it cannot be read."""
    kind = path.suffix.lower()
    if kind == ".json":
        values = read_json(path)
    elif kind == ".toml":
        values = _parsed(path, tomllib.loads)
    elif kind in (".yaml", ".yml"):
        import yaml

        values = _parsed(path, yaml.safe_load)
    else:
        raise RecipeError(
            f"{CONFIG} {path}: must end in .toml, .yaml, .yml or .json, as what it holds does"
        )
    if not isinstance(values, dict):
        raise RecipeError(f"{CONFIG} {path}: holds no entries, name = value")
    return values


def _parsed(path: Path, parse: Any) -> Any:
    text = read_text(path)
    try:
        return parse(text)
    except Exception as error:
        raise RecipeError(
            f"{CONFIG} {path}: cannot be read ({reason_of(error)})"
        ) from error


def _with_begun(recipe: Recipe, run: Path) -> Recipe:
    """What the run in `run` was begun with, where it is of the same method; else `recipe`, which will be refused."""
    file = run / "recipe.json"
    if not file.is_file():
        return recipe
    begun = from_json(read_json(file), file)
    same = begun.parts.keys() == recipe.parts.keys()
    return begun.changed(out=None, resume=False) if same else recipe


def _with_start(recipe: Recipe, run: Path) -> Recipe:
    """`recipe` with what it must share with `run`. Raises RecipeError where there is no such folder."""
    file = run / "recipe.json"
    if not run.exists():
        raise RecipeError(
            f"{INIT_FROM} {run}: no such run folder; train that run first, or name another"
        )
    if not file.is_file():
        return recipe  # said when the run begins
    source = from_json(read_json(file), file).entries()
    names = (*SHARED, *IMAGES) if recipe.images.data == "auto" else SHARED
    return recipe.changed(**{name: source[name] for name in names})
