"""The accuracy gate: a run against its full-precision baseline, image by image.

Both were measured on the same images, so the drop is judged on pairs: a paired bootstrap over images asks whether a drop
beyond `max_drop` points is real (one-sided, level alpha), and McNemar's exact test says whether the two differ at all. A
noisy half point does not fail a build; a real one does.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.training.checkpoint import RunFolder
from qat.training.recipe import RecipeError

RESAMPLES = 4000
Predictions = Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Row:
    """One group of images. Accuracies and `drop` in percent; `beyond`: bootstrap probability that the drop does not exceed
    the allowance; `mcnemar`: two-sided p-value that both are equally often right."""

    name: str
    images: int
    baseline: float
    run: float
    beyond: float
    mcnemar: float
    failed: bool

    @property
    def drop(self) -> float:
        return self.baseline - self.run


@dataclass(frozen=True)
class Comparison:
    """Rows per domain, the source domains together and the target; any of the last two may fail the gate."""

    rows: tuple[Row, ...]
    max_drop: float
    alpha: float

    @property
    def passed(self) -> bool:
        return not any(row.failed for row in self.rows)

    @property
    def source_passed(self) -> bool:
        return not any(row.failed for row in self.rows if row.name == SOURCES)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'accuracy, %':<{width}}  baseline      run   change  images  p(drop <= {self.max_drop:g})"]
        for row in self.rows:
            verdict = "  FAILED" if row.failed else ""
            lines.append(
                f"{row.name:<{width}}  {row.baseline:>8.2f} {row.run:>8.2f} {-row.drop:>+8.2f} {row.images:>7} "
                f"{row.beyond:>12.3f}{verdict}"
            )
        return "\n".join([*lines, self._verdict()])

    def markdown(self) -> str:
        """A table for a pull request."""
        lines = ["| accuracy, % | baseline | run | change | images | |", "|---|---:|---:|---:|---:|---|"]
        for row in self.rows:
            mark = "**failed**" if row.failed else ""
            lines.append(
                f"| {row.name} | {row.baseline:.2f} | {row.run:.2f} | {-row.drop:+.2f} | {row.images} | {mark} |"
            )
        return "\n".join([*lines, "", self._verdict()])

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}

    def _verdict(self) -> str:
        failed = ", ".join(row.name for row in self.rows if row.failed)
        outcome = f"failed: {failed} lost more" if failed else "passed"
        return f"allowed drop {self.max_drop:g} points, alpha {self.alpha:g}: {outcome}"


SOURCES = "source domains"


def compare_runs(baseline: Path, run: Path, max_drop: float, alpha: float = 0.05) -> Comparison:
    """Compare two finished runs, or a run with a stored baseline file (`write_baseline`).

    Raises RecipeError when they were not measured on the same images, or for an impossible allowance.
    """
    first, target = load_baseline(baseline)
    second, other = load_baseline(run)
    if target != other:
        raise RecipeError(f"{baseline} was tested on {target}, {run} on {other}; compare like with like")
    return compare_predictions(first, second, target, max_drop, alpha, f"{baseline} and {run}")


def compare_predictions(
    first: Predictions, second: Predictions, target: str, max_drop: float, alpha: float = 0.05, names: str = "the two"
) -> Comparison:
    """Compare per-image predictions by domain; `target` names the held-out one."""
    if max_drop < 0 or not 0 < alpha < 1:
        raise RecipeError(f"--max-drop must not be negative and --alpha lie in (0, 1), got {max_drop} and {alpha}")
    if first.keys() != second.keys():
        raise RecipeError(
            f"{names} have different domains: {', '.join(first)} and {', '.join(second)}; compare like with like"
        )
    pairs = {}
    for domain in first:
        if not np.array_equal(first[domain][1], second[domain][1]):
            raise RecipeError(
                f"{names} were measured on different images of {domain}; use the same data, split and seed"
            )
        label = first[domain][1]
        pairs[domain] = (first[domain][0] == label, second[domain][0] == label)
    sources = [both for domain, both in pairs.items() if domain != target]
    rows = [_row(domain, *both, max_drop, alpha, gate=False) for domain, both in pairs.items() if domain != target]
    if sources:
        joined = (np.concatenate([a for a, _ in sources]), np.concatenate([b for _, b in sources]))
        rows.append(_row(SOURCES, *joined, max_drop, alpha, gate=True))
    if target in pairs:
        rows.append(_row(f"{target} (target)", *pairs[target], max_drop, alpha, gate=True))
    return Comparison(tuple(rows), max_drop, alpha)


def write_baseline(run: Path, file: Path) -> None:
    """Store a run's per-image predictions as one small JSON file that a repository can keep."""
    predictions, target = load_baseline(run)
    value = {"target": target, "domains": {d: [p.tolist(), label.tolist()] for d, (p, label) in predictions.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def load_baseline(path: Path) -> tuple[Predictions, str]:
    """(predictions, target domain) of a run folder or a stored baseline file."""
    if path.is_dir() or path.suffix != ".json":
        folder = RunFolder.open(path)
        return folder.predictions(), str(folder.results()["test_domain"])
    try:
        value = json.loads(path.read_text())
        domains = {d: (np.array(p, np.int64), np.array(label, np.int64)) for d, (p, label) in value["domains"].items()}
        return domains, str(value["target"])
    except (OSError, KeyError, ValueError) as error:
        raise RecipeError(f"{path}: not a stored baseline ({error})") from None


def _row(
    name: str, baseline: NDArray[np.bool_], run: NDArray[np.bool_], max_drop: float, alpha: float, *, gate: bool
) -> Row:
    lost, won = int((baseline & ~run).sum()), int((~baseline & run).sum())
    within = _within_allowance(lost, won, len(run), max_drop)
    failed = gate and within < alpha
    return Row(name, len(run), 100 * baseline.mean(), 100 * run.mean(), within, mcnemar(lost, won), failed)


def _within_allowance(lost: int, won: int, images: int, max_drop: float) -> float:
    """Bootstrap probability that the drop is at most `max_drop` points. Only three kinds of pairs exist, so resampling
    images is drawing their counts from a multinomial."""
    counts = np.array([lost, won, images - lost - won])
    draws = np.random.default_rng(0).multinomial(images, counts / images, RESAMPLES)
    return float((100 * (draws[:, 0] - draws[:, 1]) / images <= max_drop).mean())


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test on `lost` and `won` discordant pairs."""
    total = lost + won
    tail = sum(comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return float(min(1.0, 2 * tail))
