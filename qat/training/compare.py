"""The gate: a run against its full-precision baseline, domain by domain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.training.checkpoint import RunFolder
from qat.training.recipe import RecipeError


@dataclass(frozen=True)
class Comparison:
    """Accuracies in percent by row name; rows named in `gated` may lose at most `max_drop` points."""

    rows: dict[str, tuple[float, float]]
    gated: tuple[str, ...]
    max_drop: float

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def source_passed(self) -> bool:
        """Whether the source domains alone pass."""
        return "source mean" not in self.failures

    @property
    def failures(self) -> list[str]:
        return [n for n in self.gated if self.rows[n][0] - self.rows[n][1] > self.max_drop]

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"{'accuracy, %':<{width}}  baseline      run   change"]
        for name, (baseline, run) in self.rows.items():
            gate = "" if name not in self.gated else "  FAILED" if name in self.failures else "  ok"
            lines.append(f"{name:<{width}}  {baseline:>8.2f} {run:>8.2f} {run - baseline:>+8.2f}{gate}")
        verdict = "passed" if self.passed else f"failed: {', '.join(self.failures)} lost more"
        return "\n".join([*lines, f"allowed drop {self.max_drop:g} points: {verdict}"])


def compare_runs(baseline: Path, run: Path, max_drop: float) -> Comparison:
    """Compare two finished runs. Raises RecipeError when they were not measured on the same images."""
    if max_drop < 0:
        raise RecipeError(f"--max-drop must not be negative, got {max_drop}")
    first, second = RunFolder.open(baseline).results(), RunFolder.open(run).results()
    for key in ("test_domain", "split", "classes"):
        if first[key] != second[key]:
            raise RecipeError(
                f"{baseline} and {run} differ in {key}: {first[key]} and {second[key]}; compare like with like"
            )
    target, source = f"{first['test_domain']} (target)", "source mean"
    rows = {name: (_percent(first, name), _percent(second, name)) for name in first["source_validation"]}
    rows[source] = (_mean_percent(first), _mean_percent(second))
    rows[target] = (100 * first["target"], 100 * second["target"])
    return Comparison(rows, (source, target), max_drop)


def _percent(results: dict[str, Any], domain: str) -> float:
    return float(100 * results["source_validation"][domain])


def _mean_percent(results: dict[str, Any]) -> float:
    values = results["source_validation"].values()
    return float(100 * sum(values) / len(values))
