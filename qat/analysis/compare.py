"""The accuracy gate: a run, or the file that ships, against its full-precision baseline, image by image.

Both were measured on the same images, so the drop is judged on pairs: a paired bootstrap over images asks whether a drop
beyond `max_drop` points is real (one-sided, level alpha), and McNemar's exact test says whether the two differ at all. A
noisy half point does not fail a build; a real one does.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeqat.files import FileError, read_json, write_text
from edgeqat.terminal import printable
from qat.runs.parts import RecipeError
from qat.runs.records import TEXT, WHOLE, Each, Maybe, Shape, require
from qat.runs.run_folder import RunFolder

RESAMPLES = 4000
# Predicted classes and labels, (N,) each
Answers = tuple[NDArray[np.int64], NDArray[np.int64]]
Predictions = Mapping[str, Answers]


@dataclass(frozen=True)
class Row:
    """One group of images. Accuracies and `drop` in percent; `beyond`: bootstrap probability that the drop does not exceed
    the allowance; `mcnemar`: two-sided p-value that both are equally often right; `gated`: whether it may fail the gate."""

    name: str
    images: int
    baseline: float
    run: float
    beyond: float
    mcnemar: float
    failed: bool
    gated: bool

    @property
    def drop(self) -> float:
        """Accuracy of the baseline minus that of the run, as a share."""
        return self.baseline - self.run


@dataclass(frozen=True)
class Comparison:
    """Rows per domain, the source domains together and the target; any of the last two may fail the gate."""

    rows: tuple[Row, ...]
    max_drop: float
    alpha: float

    @property
    def gated(self) -> tuple[Row, ...]:
        """The rows that may fail: the source domains together, and the target."""
        return tuple(row for row in self.rows if row.gated)

    @property
    def passed(self) -> bool:
        """Whether no row dropped by more than was allowed."""
        return not any(row.failed for row in self.rows)

    def __str__(self) -> str:
        names = [printable(row.name) for row in self.rows]
        width = max(map(len, names))
        lines = [
            f"{'accuracy, %':<{width}}  baseline      run   change  images  p(drop <= {self.max_drop:g})"
        ]
        for name, row in zip(names, self.rows, strict=True):
            verdict = "  FAILED" if row.failed else ""
            lines.append(
                f"{name:<{width}}  {row.baseline:>8.2f} {row.run:>8.2f} {-row.drop:>+8.2f} {row.images:>7} "
                f"{row.beyond:>12.3f}{verdict}"
            )
        return "\n".join([*lines, self._verdict(printable)])

    def markdown(self) -> str:
        """A table for a pull request."""
        lines = [
            "| accuracy, % | baseline | run | change | images | |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for row in self.rows:
            mark = "**failed**" if row.failed else ""
            name = markdown_text(row.name)
            lines.append(
                f"| {name} | {row.baseline:.2f} | {row.run:.2f} | {-row.drop:+.2f} | {row.images} | {mark} |"
            )
        return "\n".join([*lines, "", self._verdict(markdown_text)])

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        return asdict(self) | {"passed": self.passed}

    def _verdict(self, shown: Callable[[str], str]) -> str:
        failed = ", ".join(shown(row.name) for row in self.rows if row.failed)
        outcome = f"failed: {failed} lost more" if failed else "passed"
        return f"allowed drop {self.max_drop:g} points, alpha {self.alpha:g}: {outcome}"


SOURCES = "source domains"
COMPARED: Shape = {"test_domain": TEXT, "classes": Maybe([TEXT])}  # of results.json
BASELINE: Shape = {
    "target": TEXT,
    "domains": Each([[WHOLE]]),
    "classes": Maybe([TEXT]),
    "recipe": Maybe({}),
}
# What means something in GitHub's Markdown or in HTML; an underscore only at a word's edge.
MARKUP = re.compile(r"[\\`*{}\[\]<>&|~#@!$^\"'=:/.]|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(text: str) -> str:
    """`text` as Markdown that shows it within a line or a table's cell: no link, picture, code, cell or HTML begins in it."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(text))


@dataclass(frozen=True)
class Measured:
    """What was measured of a run, a stored baseline or a file.

    predictions: per domain, predicted classes and labels. target: the held-out domain. classes: their names in order, None
    where an older baseline file does not say. recipe: that of the run, as its recipe.json has it, so that a file can be
    measured on the same images; None where that is not known.
    """

    predictions: Predictions
    target: str
    classes: tuple[str, ...] | None
    recipe: dict[str, Any] | None


def compare_runs(
    baseline: Path, run: Path, max_drop: float, alpha: float = 0.05
) -> Comparison:
    """Compare two finished runs, or a run with a stored baseline file (`write_baseline`).

    Raises RecipeError when they were not measured on the same images and classes, or for an impossible allowance.
    """
    first = load_measured(baseline)
    second = load_measured(run)
    names = (str(baseline), str(run))
    return compare_measured(first, second, max_drop, alpha, names)


def compare_measured(
    first: Measured,
    second: Measured,
    max_drop: float,
    alpha: float,
    names: tuple[str, str],
) -> Comparison:
    """Compare what was measured of the baseline, `first`, and of what is judged. names: of both, for messages."""
    if first.target != second.target:
        raise RecipeError(
            f"{names[0]} was tested on {first.target}, {names[1]} on {second.target}; compare like with like"
        )
    require_same_classes(first.classes, second.classes, *names)
    both = " and ".join(names)
    return compare_predictions(
        first.predictions, second.predictions, first.target, max_drop, alpha, both
    )


def require_same_classes(
    first: Sequence[str] | None,
    second: Sequence[str] | None,
    first_name: str,
    second_name: str,
) -> None:
    """Raises RecipeError when both name their classes and the names or their order differ: the same number would then mean
    another class."""
    if first is None or second is None or list(first) == list(second):
        return
    for place, (one, other) in enumerate(zip_longest(first, second)):
        if one != other:
            here = repr(one or "nothing")
            there = repr(other or "nothing")
            raise RecipeError(
                f"{first_name} and {second_name} have other classes: number {place} is {here} in one and {there} in the "
                "other; train both on the same folders, in the same order"
            )


def compare_predictions(
    first: Predictions,
    second: Predictions,
    target: str,
    max_drop: float,
    alpha: float = 0.05,
    names: str = "the two",
) -> Comparison:
    """Compare per-image predictions by domain; `target` names the held-out one."""
    if max_drop < 0 or not 0 < alpha < 1:
        raise RecipeError(
            f"--max-drop must not be negative and --alpha lie in (0, 1), got {max_drop} and {alpha}"
        )
    if first.keys() != second.keys():
        raise RecipeError(
            f"{names} have different domains: {', '.join(first)} and {', '.join(second)}; compare like with like"
        )
    rows = []
    firsts_right = []
    seconds_right = []
    for domain in first:
        if domain == target:
            continue
        one, other = _right(first[domain], second[domain], domain, names)
        rows.append(_row(domain, one, other, max_drop, alpha, gate=False))
        firsts_right.append(one)
        seconds_right.append(other)
    if rows:
        one = np.concatenate(firsts_right)
        other = np.concatenate(seconds_right)
        rows.append(_row(SOURCES, one, other, max_drop, alpha, gate=True))
    if target in first:
        one, other = _right(first[target], second[target], target, names)
        name = f"{target} (target)"
        rows.append(_row(name, one, other, max_drop, alpha, gate=True))
    return Comparison(tuple(rows), max_drop, alpha)


def _right(
    first: Answers, second: Answers, domain: str, names: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) each: which images of `domain` both get right. Raises RecipeError where they did not see the same images."""
    for predicted, labels in (first, second):
        if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
            raise RecipeError(
                f"{names}: {domain} has {predicted.size} predictions for {labels.size} images; measure it again"
            )
    first_predicted, labels = first
    second_predicted, second_labels = second
    if not np.array_equal(labels, second_labels):
        raise RecipeError(
            f"{names} were measured on different images of {domain}; use the same data, split and seed"
        )
    return first_predicted == labels, second_predicted == labels


def write_baseline(run: Path, file: Path) -> None:
    """Store a run's per-image predictions, its classes and its recipe as one JSON file that a repository can keep."""
    measured = load_measured(run)
    domains = {}
    for domain, (predicted, labels) in measured.predictions.items():
        domains[domain] = [predicted.tolist(), labels.tolist()]
    value = {
        "target": measured.target,
        "classes": measured.classes,
        "recipe": measured.recipe,
        "domains": domains,
    }
    write_text(file, json.dumps(value, separators=(",", ":")) + "\n")


def load_measured(path: Path) -> Measured:
    """What was measured of a run folder, or is in a stored baseline file.

    Raises RecipeError naming the file and what is wrong with it.
    """
    if path.is_dir() or path.suffix != ".json":
        return _measured_run(RunFolder.open(path))
    try:
        value = read_json(path)
    except FileError as error:
        raise RecipeError(f"{path}: not a stored baseline ({error})") from None
    try:
        require(value, BASELINE, path)
    except RecipeError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise RecipeError(f"{path}: not a stored baseline ({reason})") from None
    domains = {}
    for domain, both in value["domains"].items():
        if len(both) != 2:
            raise RecipeError(
                f"{path}: entry domains.{domain} has {len(both)} lists, expected predictions and labels"
            )
        domains[domain] = (np.array(both[0], np.int64), np.array(both[1], np.int64))
    return Measured(domains, value["target"], _classes(value), value.get("recipe"))


def _measured_run(folder: RunFolder) -> Measured:
    results = folder.results()
    require(results, COMPARED, folder / "results.json")
    recipe = None
    if (folder / "recipe.json").exists():
        recipe = read_json(folder / "recipe.json")
    target = results["test_domain"]
    return Measured(folder.predictions(), target, _classes(results), recipe)


def _classes(value: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = value.get("classes")
    return None if names is None else tuple(names)


def _row(
    name: str,
    baseline: NDArray[np.bool_],
    run: NDArray[np.bool_],
    max_drop: float,
    alpha: float,
    *,
    gate: bool,
) -> Row:
    """baseline, run: (N,), which images each gets right. gate: whether this row may fail."""
    lost = int((baseline & ~run).sum())
    won = int((~baseline & run).sum())
    within = _within_allowance(lost, won, len(run), max_drop)
    return Row(
        name=name,
        images=len(run),
        baseline=100 * baseline.mean(),
        run=100 * run.mean(),
        beyond=within,
        mcnemar=mcnemar(lost, won),
        failed=gate and within < alpha,
        gated=gate,
    )


def _within_allowance(lost: int, won: int, images: int, max_drop: float) -> float:
    """Bootstrap probability that the drop is at most `max_drop` points. Only three kinds of pairs exist, so resampling
    images is drawing their counts from a multinomial."""
    counts = np.array([lost, won, images - lost - won])
    draws = np.random.default_rng(0).multinomial(images, counts / images, RESAMPLES)
    drawn_lost = draws[:, 0]
    drawn_won = draws[:, 1]
    drops = 100 * (drawn_lost - drawn_won) / images
    return float((drops <= max_drop).mean())


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test on `lost` and `won` discordant pairs."""
    total = lost + won
    ways = 0
    for k in range(min(lost, won) + 1):
        ways += comb(total, k)
    tail = ways / 2**total
    return min(1.0, 2 * tail)
