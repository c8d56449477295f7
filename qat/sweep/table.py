"""The table of a sweep: a row for each method, bits and preset; a column for each target; paired tests between rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.domains.selection import Record, mean_and_standard_error
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.sweep.spec import DEFAULT, RULES, Cell, Sweep

RowKey = tuple[str, int | None, str]
Place = tuple[str, int]  # target and seed
# Below so many pairs every assignment of signs is counted, above it this many are drawn
EXACT_PAIRS, DRAWS = 14, 20_000
NORMAL_95 = (
    1.96  # standard deviations to either side that hold 95 % of a normal distribution
)


@dataclass(frozen=True)
class Row:
    """Accuracies of one method, bits and preset. accuracy: (target, seed) -> share of the target's images."""

    key: RowKey
    accuracy: dict[Place, float]

    @property
    def name(self) -> str:
        """As the table shows it."""
        method, bits, preset = self.key
        words = [method, "" if bits is None else f"{bits} bit"]
        words.append("" if preset == DEFAULT else f"({preset})")
        return " ".join(word for word in words if word)

    def of_target(self, target: str) -> list[float]:
        """Over the seeds, in percent."""
        return [100 * v for (name, _), v in self.accuracy.items() if name == target]

    def averages(self, targets: Sequence[str]) -> list[float]:
        """The mean over all targets of each seed that has them all, in percent."""
        seeds = sorted({seed for _, seed in self.accuracy})
        whole = [s for s in seeds if all((t, s) in self.accuracy for t in targets)]
        return [
            100 * float(np.mean([self.accuracy[t, s] for t in targets])) for s in whole
        ]


@dataclass(frozen=True)
class Test:
    """A paired comparison of two rows, in points.

    difference: mean of first − second over pairs. spread: standard deviation of the pairs' differences. p: two-sided, by
    random signs.
    """

    first: str
    second: str
    pairs: int
    difference: float
    spread: float
    p: float

    @property
    def pairs_for_one_point(self) -> int:
        """Pairs from which the mean's 95 % interval reaches one point to either side, at this spread: (1.96 · spread)²."""
        return max(2, math.ceil((NORMAL_95 * self.spread) ** 2))


@dataclass(frozen=True)
class Table:
    """Rows in the order of the sweep; `missing`: cells without results."""

    targets: tuple[str, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    def entries(self) -> list[list[str]]:
        """The table as text, a header first."""
        header = ["method", *self.targets, "average", "seeds"]
        lines = [header]
        for row in self.rows:
            numbers = [_with_error(row.of_target(t)) for t in self.targets]
            averages = row.averages(self.targets)
            lines.append(
                [row.name, *numbers, _with_error(averages), str(len(averages))]
            )
        return lines

    def markdown(self) -> str:
        """For a README: accuracies on the unseen domain in percent, ± standard error over seeds."""
        header, *rows = self.entries()
        lines = [_bars(header), _bars(["---"] * len(header))]
        lines += [_bars(row) for row in rows]
        tests = self.tests()
        if tests:
            lines += ["", _bars(TEST_HEADER), _bars(["---"] * len(TEST_HEADER))]
            lines += [_bars(_test_entries(test)) for test in tests]
        if self.missing:
            lines += ["", f"Without results: {', '.join(self.missing)}."]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """For a paper."""
        header, *rows = self.entries()
        columns = "l" + "c" * (len(header) - 1)
        lines = [
            f"\\begin{{tabular}}{{{columns}}}",
            "\\hline",
            _latex(header),
            "\\hline",
        ]
        lines += [_latex(row) for row in rows]
        return "\n".join([*lines, "\\hline", "\\end{tabular}"]) + "\n"

    def csv(self) -> str:
        """One line for each cell: method, bits, preset, target, seed, accuracy in [0, 1]."""
        lines = ["method,bits,preset,target,seed,accuracy"]
        for row in self.rows:
            method, bits, preset = row.key
            for (target, seed), value in sorted(row.accuracy.items()):
                bits_text = "" if bits is None else bits
                lines.append(f"{method},{bits_text},{preset},{target},{seed},{value!r}")
        return "\n".join(lines) + "\n"

    def tests(self) -> list[Test]:
        """Every two rows, over the targets and seeds that both have."""
        found = []
        for index, first in enumerate(self.rows):
            for second in self.rows[index + 1 :]:
                shared = sorted(first.accuracy.keys() & second.accuracy.keys())
                if len(shared) < 2:
                    continue
                pairs = [first.accuracy[k] - second.accuracy[k] for k in shared]
                points = 100 * np.array(pairs)
                mean, p = float(points.mean()), sign_test(points)
                spread = float(points.std(ddof=1))
                found.append(
                    Test(first.name, second.name, len(points), mean, spread, p)
                )
        return found


TEST_HEADER = [
    "paired over targets and seeds",
    "difference, points",
    "pairs",
    "p",
    "pairs for ± 1 point",
]


def table_of(sweep: Sweep) -> Table:
    """The table of the cells that are done. Raises RecipeError for a damaged run folder."""
    records: dict[RowKey, list[Record]] = {}
    missing = []
    for cell in sweep.cells():
        of_row = records.setdefault((cell.method, cell.bits, cell.preset), [])
        record = _record(sweep.out, cell)
        if record is None:
            missing.append(cell.name)
        else:
            of_row.append(record)
    rows = tuple(_row(sweep, key, of_row) for key, of_row in records.items())
    return Table(sweep.targets, rows, tuple(missing))


def _row(sweep: Sweep, key: RowKey, records: Sequence[Record]) -> Row:
    """What the sweep's rule chooses among the draws of each target and seed."""
    accuracy: dict[Place, float] = {}
    for target in sweep.targets:
        for seed, choice in RULES[sweep.rule].choose(records, target).items():
            accuracy[target, seed] = choice.accuracy
    return Row(key, accuracy)


def _record(out: Path, cell: Cell) -> Record | None:
    """The checkpoint that the cell's run selected, as DomainBed's rules take it: a seed of the sweep is a trial."""
    if not (out / cell.name / "results.json").exists():
        return None
    results = results_of(RunFolder.open(out / cell.name))
    held_out = dict(results["source_validation"])
    if results["target_holdout"] is not None:
        held_out[cell.target] = results["target_holdout"]
    measured = {cell.target: results["target"]}
    step = results["selected_step"]
    return Record(step, (cell.target,), measured, held_out, cell.draw, cell.seed)


def sign_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the mean of paired `differences` (pairs,) under random signs (Fisher's randomization test).

    Every assignment of signs is counted for few pairs, else 20,000 are drawn from a fixed seed. Differences of one target or
    one seed are taken as independent, which they are not quite.
    """
    observed = abs(float(differences.sum()))
    count = len(differences)
    if count <= EXACT_PAIRS:
        numbers = np.arange(2**count)[:, None]
        signs = 1 - 2 * (numbers >> np.arange(count) & 1)
        sums = np.abs(signs @ differences)
        return float((sums >= observed - 1e-12).mean())
    signs = np.random.default_rng(0).choice((-1, 1), (DRAWS, count))
    as_large = np.abs(signs @ differences) >= observed - 1e-12
    return float((as_large.sum() + 1) / (DRAWS + 1))


def _with_error(values: list[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_standard_error(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {error:.1f}"


def _test_entries(test: Test) -> list[str]:
    names = f"{test.first} − {test.second}"
    return [
        names,
        f"{test.difference:+.2f}",
        str(test.pairs),
        f"{test.p:.3f}",
        str(test.pairs_for_one_point),
    ]


def _bars(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def _latex(entries: Sequence[str]) -> str:
    escaped = (e.replace("_", "\\_").replace("±", "$\\pm$") for e in entries)
    return " & ".join(escaped) + " \\\\"
