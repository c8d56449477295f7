"""What a sweep runs: a TOML file, or flags, as cells that are run folders.

out = "runs/grid"
methods = ["fp", "lsq", "gaqat"]     # quantized ones start from the cell of `start`
bits = [4, 3]                        # of the quantized methods
targets = ["sketch", "photo"]
seeds = [0, 1, 2]
presets = ["default", "long"]
draws = [0]                          # of hyper-parameters, as DomainBed draws them; 0: none drawn
rule = "training-domain"             # which of the draws the table has: also "oracle", "leave-one-domain-out"
domains = []                         # all of the data set, for "leave-one-domain-out": also cells without two of them
start = "fp"
start_preset = "default"             # of the cells that others start from; without it, each cell's own preset

[values]                             # flags of every cell that has them
data-root = "PACS"
steps = 2000

[method.fp]                          # flags of one method's cells
lr = 1e-3

[preset.long]                        # flags of one preset's cells
steps = 4000
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qat.domains.hyperparameters import hyperparameters
from qat.domains.selection import RULES
from qat.runs.given import read_config
from qat.runs.parts import RecipeError
from qat.runs.presets import PRESETS
from qat.runs.recipe import KNOWN, TRAINED, Recipe, with_entries
from qat.runs.recipe_checks import check

DEFAULT = "default"
START = "start"  # as a teacher: the cell that this one starts from
CROSS_VALIDATION = "leave-one-domain-out"
TABLES = ("values", "method", "preset", "slurm")
# Entry -> what it is a list of
LISTS: dict[str, type] = {
    "methods": str,
    "bits": int,
    "targets": str,
    "seeds": int,
    "presets": str,
    "draws": int,
    "domains": str,
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    name:   its folder's name within the sweep's.
    method, bits, target, seed, preset, draw: its place in the grid; bits is None in full precision.
    recipe: what is trained, its folders filled in.
    after:  name of the cell that it starts from, "" for none.
    also_left_out: the second domain that it leaves out, for cross-validation; "" for none. It is in no row then.
    """

    name: str
    method: str
    bits: int | None
    target: str
    seed: int
    preset: str
    recipe: Recipe
    after: str = ""
    draw: int = 0
    also_left_out: str = ""


@dataclass(frozen=True)
class Sweep:
    """A grid, as a file or flags describe it; every combination is a cell."""

    source: Path
    out: Path
    methods: tuple[str, ...] = ("fp", "lsq")
    bits: tuple[int, ...] = (4,)
    targets: tuple[str, ...] = ("sketch",)
    seeds: tuple[int, ...] = (0,)
    presets: tuple[str, ...] = (DEFAULT,)
    draws: tuple[int, ...] = (0,)
    rule: str = "training-domain"
    domains: tuple[str, ...] = ()
    start: str = "fp"
    start_preset: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    method: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: dict[str, dict[str, Any]] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)

    def values_of(self, preset: str) -> dict[str, Any]:
        """Flags of a preset: the file's own table, or one of `qat/runs/presets.py`."""
        return self.preset.get(preset, PRESETS.get(preset, {}))

    def cells(self) -> list[Cell]:
        """Every cell, those that others start from first. Raises RecipeError naming the file and the entry at fault."""
        by_name: dict[str, Cell] = {}
        left_out = self._left_out()
        places = itertools.product(self.presets, self.seeds, left_out)
        for preset, seed, domains in places:
            cells: list[Cell] = []
            if self._is_started():
                of_start = self.start_preset or preset
                cells += self._of(self.start, domains, seed, of_start)
            for method, draw in itertools.product(self.methods, self.draws):
                cells += self._of(method, domains, seed, preset, draw)
            for cell in cells:
                by_name.setdefault(cell.name, cell)
        return list(by_name.values())

    def _left_out(self) -> list[tuple[str, ...]]:
        """What the cells leave out: each target, and for cross-validation each pair of it and another domain."""
        left_out: list[tuple[str, ...]] = [(target,) for target in self.targets]
        if self.rule != CROSS_VALIDATION:
            return left_out
        for pair in itertools.combinations(self.domains, 2):
            if set(pair) & set(self.targets):
                left_out.append(pair)
        return left_out

    def _is_started(self) -> bool:
        """Whether any method starts from another one's run."""
        return any(KNOWN[method].quantization is not None for method in self.methods)

    def _of(
        self,
        method: str,
        left_out: tuple[str, ...],
        seed: int,
        preset: str,
        draw: int = 0,
    ) -> list[Cell]:
        """The cells of one method at one place of the grid, one for each number of bits."""
        target = left_out[0]
        also_left_out = left_out[1] if len(left_out) == 2 else ""
        has_bits = KNOWN[method].grids is not None
        after = ""
        if KNOWN[method].quantization is not None:
            of_start = self.start_preset or preset
            after = cell_name(self.start, None, left_out, seed, of_start)
        cells = []
        for bits in self.bits if has_bits else (None,):
            name = cell_name(method, bits, left_out, seed, preset, draw)
            placed: dict[str, Any] = {"test_domain": target, "seed": seed}
            if also_left_out:
                placed["also_left_out"] = also_left_out
            if bits is not None:
                placed["bits"] = bits
            placed |= self._drawn(method, seed, draw)
            recipe = self._recipe(method, preset, placed)
            recipe = recipe.changed(out=self.out / name)
            if after:
                recipe = recipe.changed(init_from=self.out / after)
            if recipe.entries().get("teacher") == Path(START):
                recipe = recipe.changed(teacher=self.out / after)
            cell = Cell(
                name,
                method,
                bits,
                target,
                seed,
                preset,
                recipe,
                after,
                draw,
                also_left_out,
            )
            cells.append(cell)
        return cells

    def _drawn(self, method: str, seed: int, draw: int) -> dict[str, Any]:
        """Hyper-parameters of draw `draw` that the method has; its own for draw 0."""
        if draw == 0:
            return {}
        is_flat = KNOWN[method].sharpness is not None
        algorithm: Literal["erm", "sagm"] = "sagm" if is_flat else "erm"
        drawn = hyperparameters(draw, algorithm=algorithm, trial_seed=seed)
        return _known_of(KNOWN[method], drawn)

    def _recipe(self, method: str, preset: str, placed: dict[str, Any]) -> Recipe:
        """placed: the values that a cell's place in the grid decides."""
        recipe = TRAINED[method]
        # Of what all cells share, each takes what it has; what names a method must fit
        values = _known_of(recipe, self.values)
        values |= _known_of(recipe, self.values_of(preset))
        values |= self.method.get(method, {})
        recipe = with_entries(recipe, values | placed, self.source)
        try:
            check(recipe.changed(image_size=recipe.model.image_size or 224))
        except RecipeError as error:
            raise RecipeError(f"{self.source}: {method}: {error}") from None
        return recipe


def _known_of(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that the recipe has flags for."""
    known = recipe.entries()
    return {name: value for name, value in values.items() if name in known}


def cell_name(
    method: str,
    bits: int | None,
    left_out: tuple[str, ...],
    seed: int,
    preset: str,
    draw: int = 0,
) -> str:
    """Name of a cell's folder."""
    parts = [method, "" if bits is None else f"{bits}bit", "+".join(left_out)]
    parts.append(f"s{seed}")
    parts.append("" if preset == DEFAULT else preset)
    parts.append("" if draw == 0 else f"draw{draw}")
    return "-".join(part for part in parts if part)


def read_sweep(path: Path, **flags: Any) -> Sweep:
    """The sweep of a TOML, YAML or JSON file; `flags` that are not None replace its entries.

    Raises RecipeError naming the file and the entry at fault.
    """
    values = {key.replace("-", "_"): v for key, v in read_config(path).items()}
    values |= {key: value for key, value in flags.items() if value is not None}
    known = {entry.name for entry in dataclasses.fields(Sweep)} - {"source"}
    unknown = values.keys() - known
    if unknown:
        raise RecipeError(f"{path}: unknown entries {', '.join(sorted(unknown))}")
    for name in TABLES:
        is_nested = name in ("method", "preset")
        values[name] = _table(path, name, values.get(name, {}), nested=is_nested)
    for name in ("out", "start", "start_preset", "rule"):
        if not isinstance(values.get(name, ""), (str, Path)):
            raise RecipeError(f"{path}: {name} must be a word, got {values[name]!r}")
    for name, kind in LISTS.items():
        if name in values:
            values[name] = _list(path, name, values[name], kind)
    out = Path(values.pop("out", path.with_suffix("")))
    sweep = Sweep(path, out, **values)
    _require_known(sweep)
    return sweep


def _table(path: Path, name: str, value: Any, *, nested: bool) -> dict[str, Any]:
    """A table of flags, or a table of such tables; flags under their names in Python."""
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {name} must be a table, [{name}]")
    table = {}
    for key, inner in value.items():
        if nested:
            table[key] = _table(path, f"{name}.{key}", inner, nested=False)
        else:
            table[key.replace("-", "_")] = inner
    return table


def _list(path: Path, name: str, value: Any, kind: type) -> tuple[Any, ...]:
    fits = isinstance(value, (list, tuple)) and len(value) > 0
    if not fits or any(type(item) is not kind for item in value):
        word = "words" if kind is str else "whole numbers"
        raise RecipeError(f"{path}: {name} must be a list of {word}, got {value!r}")
    if len(set(value)) < len(value):
        raise RecipeError(f"{path}: {name} names something twice: {value!r}")
    return tuple(value)


def _require_known(sweep: Sweep) -> None:
    """Raises RecipeError naming the first method, preset or flag that there is not."""
    for method in (*sweep.methods, sweep.start, *sweep.method):
        if method not in KNOWN:
            raise RecipeError(
                f"{sweep.source}: unknown method {method!r}; known: {', '.join(KNOWN)}"
            )
    if sweep.rule not in RULES:
        raise RecipeError(
            f"{sweep.source}: unknown rule {sweep.rule!r}; known: {', '.join(RULES)}"
        )
    if sweep.rule == CROSS_VALIDATION:
        _require_cross_validation(sweep)
    if min(sweep.draws) < 0:
        raise RecipeError(
            f"{sweep.source}: draws are 0 or more, got {min(sweep.draws)}"
        )
    if KNOWN[sweep.start].quantization is not None:
        raise RecipeError(
            f"{sweep.source}: start must be a method of full precision (fp, sagm), got {sweep.start!r}"
        )
    for preset in (*sweep.presets, sweep.start_preset or DEFAULT):
        if preset not in (DEFAULT, *sweep.preset, *PRESETS):
            raise RecipeError(f"{sweep.source}: has no table [preset.{preset}]")
    known: set[str] = set()
    for method in (*sweep.methods, sweep.start):
        known.update(KNOWN[method].entries())
    for name, table in (("values", sweep.values), *sweep.preset.items()):
        unknown = table.keys() - known
        if unknown:
            raise RecipeError(
                f"{sweep.source}: [{name}]: none of its methods has {', '.join(sorted(unknown))}"
            )


def _require_cross_validation(sweep: Sweep) -> None:
    """Raises RecipeError where cross-validation lacks domains, or the steps that its runs can be compared at."""
    missing = [target for target in sweep.targets if target not in sweep.domains]
    if missing or len(sweep.domains) < 3:
        raise RecipeError(
            f"{sweep.source}: rule {CROSS_VALIDATION!r} leaves out every pair of a target and another domain: name all "
            f"domains of the data set, three or more, in `domains`; got {', '.join(sweep.domains) or 'none'}"
        )
    for cell in sweep.cells():
        if cell.recipe.tracking.select != "last":
            raise RecipeError(
                f'{sweep.source}: rule {CROSS_VALIDATION!r} compares runs at one step: set select = "last" in [values]'
            )
