"""What a run folder's JSON files hold, checked before it is used: every fault names the file and the entry.

A shape is TEXT, WHOLE, NUMBER or FLAG; a dict of shapes by name; `[shape]` for a list; `Each(shape)` for an object with any
names; `Maybe(shape)` for an entry that may be null or missing.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from edgeqat.files import read_json
from qat.runs.parts import RecipeError
from qat.runs.run_folder import RunFolder

TEXT, WHOLE, NUMBER, FLAG = "text", "a whole number", "a number", "true or false"


class Each(NamedTuple):
    """A JSON array whose entries all have `shape`."""

    shape: "Shape"


class Maybe(NamedTuple):
    """A value of `shape`, or null."""

    shape: "Shape"


Shape: TypeAlias = str | dict[str, Any] | list[Any] | Each | Maybe

RESULTS: Shape = {
    "selection": TEXT,
    "selected_step": WHOLE,
    "steps": Maybe(WHOLE),  # absent from runs of before 2026-11-28
    "train_seconds": NUMBER,
    "images_per_second": NUMBER,
    "test_domain": TEXT,
    "source_validation": Each(NUMBER),
    "target": NUMBER,
    "also_left_out": Maybe(NUMBER),
    "classes": Maybe([TEXT]),
    "settled": Maybe(
        {
            "reason": Maybe(TEXT),
            "biases": Maybe(WHOLE),
            "shifts": Maybe(Each(NUMBER)),
            "left": Maybe(Each(TEXT)),
            "source_validation_before": Maybe(Each(NUMBER)),
        }
    ),
    "made": Maybe(
        {
            "date": TEXT,
            "commit": Maybe(TEXT),
            "versions": Each(TEXT),
            "processor": TEXT,
        }
    ),
}
RECIPE: Shape = {
    "backbone": TEXT,
    "method": TEXT,
    "steps": WHOLE,
    "seed": WHOLE,
    "trial_seed": WHOLE,
}
LATENCIES: Shape = [
    {
        "name": TEXT,
        "size": WHOLE,
        "median_ms": NUMBER,
        "p95_ms": NUMBER,
        "speedup": NUMBER,
    }
]
CERTIFICATE: Shape = {
    "passed": FLAG,
    "file": TEXT,
    "runtime": TEXT,
    "images": WHOLE,
    "layers": WHOLE,
    "weight_codes": WHOLE,
    "integer_kernels": WHOLE,
    "stored": Each(TEXT),
    "said": Maybe(Each(TEXT)),
    "levels": [{"level": TEXT, "codes": WHOLE, "mismatches": Each(WHOLE)}],
    "accuracy": Each(NUMBER),
    "fidelity": Maybe(
        {
            "codes": WHOLE,
            "at_ties": WHOLE,
            "same": WHOLE,
            "answers": WHOLE,
            "on_integers": WHOLE,
            "unexplained": Each(WHOLE),
            "in_float": Each(WHOLE),
            "biases": Each(TEXT),
        }
    ),
    "notes": [TEXT],
}


def results_of(folder: RunFolder) -> dict[str, Any]:
    """results.json of a run. Raises RecipeError naming the entry that is missing or of the wrong kind."""
    path = folder / "results.json"
    results = folder.results()
    require(results, RESULTS, path)
    if not results["source_validation"]:
        raise RecipeError(
            f"{path}: entry source_validation is empty; the run has no source domains"
        )
    settled = results.get("settled")
    if settled and settled.get("reason") is None:
        for name in ("biases", "shifts", "left", "source_validation_before"):
            if settled.get(name) is None:
                raise RecipeError(f"{path}: entry settled.{name} is missing")
        if not settled["source_validation_before"]:
            raise RecipeError(
                f"{path}: entry settled.source_validation_before is empty"
            )
    return results


def classes_of(folder: RunFolder) -> tuple[str, ...]:
    """Names of a run's classes, in order. Raises RecipeError where results.json does not say."""
    results = folder.results()
    require(results, {"classes": [TEXT]}, folder / "results.json")
    return tuple(results["classes"])


def optional(folder: RunFolder, name: str, shape: Shape) -> Any:
    """A JSON file that a run may have, None where it has not. Raises RecipeError where it is not of `shape`."""
    path = folder / name
    if not path.exists():
        return None
    value = read_json(path)
    require(value, shape, path)
    return value


def metrics_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl that have what the pictures draw. Raises RecipeError naming the line and the entry."""
    path = folder / "metrics.jsonl"
    entries = folder.metrics()
    first: Mapping[str, float] | None = None
    for number, entry in enumerate(entries, 1):
        place = f"line {number}: "
        require(entry, {"step": WHOLE, "scales": Maybe(Each(NUMBER))}, path, place)
        for name in ("loss", "source_mean"):
            value = entry.get(name, 0.0)
            # A loss may be NaN
            if not isinstance(value, float) and not _is_whole(value):
                raise _wrong(path, f"{place}entry {name}", value, NUMBER)
        scales = entry.get("scales") or None
        if scales is None:
            continue
        first = scales if first is None else first
        missing = [name for name in first if name not in scales]
        if missing:
            raise RecipeError(f"{path}: {place}entry scales.{missing[0]} is missing")
        for name, value in scales.items():
            if value <= 0:
                raise _wrong(
                    path, f"{place}entry scales.{name}", value, "a positive number"
                )
    return entries


def require(
    value: Any, shape: Shape, path: Path, place: str = "", entry: str = ""
) -> None:
    """Raises RecipeError where `value` is not of `shape`. path: the file; place: where in it; entry: the name so far."""
    where = f"{place}entry {entry}" if entry else f"{place}the whole"
    inner = f"{entry}." if entry else ""
    if isinstance(shape, Maybe):
        if value is not None:
            require(value, shape.shape, path, place, entry)
    elif isinstance(shape, Each):
        if not isinstance(value, dict):
            raise _wrong(path, where, value, "an object")
        for name, part in value.items():
            require(part, shape.shape, path, place, f"{inner}{name}")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _wrong(path, where, value, "an object")
        for name, wanted in shape.items():
            if name not in value and not isinstance(wanted, Maybe):
                raise RecipeError(f"{path}: {place}entry {inner}{name} is missing")
            require(value.get(name), wanted, path, place, f"{inner}{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _wrong(path, where, value, "a list")
        for index, part in enumerate(value):
            require(part, shape[0], path, place, f"{entry}[{index}]")
    elif not _IS[shape](value):
        raise _wrong(path, where, value, shape)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_IS = {
    TEXT: lambda value: isinstance(value, str),
    WHOLE: _is_whole,
    NUMBER: _is_number,
    FLAG: lambda value: isinstance(value, bool),
}


def _wrong(path: Path, where: str, value: Any, wanted: str) -> RecipeError:
    found = json.dumps(value)
    short = found if len(found) <= 60 else f"{found[:60]}…"
    return RecipeError(
        f"{path}: {where} is {short}, expected {wanted}; was the file changed by hand?"
    )
