"""The table of a sweep: a row for each method, bits and preset; a column for each target; paired tests between rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.domains.selection import RULES, Record, mean_and_standard_error
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.sweep.spec import DEFAULT, Cell, Sweep

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
        words = [method]
        if bits is not None:
            words.append(f"{bits} bit")
        if preset != DEFAULT:
            words.append(f"({preset})")
        return " ".join(words)

    def of_target(self, target: str) -> list[float]:
        """Over the seeds, in percent."""
        percents = []
        for (name, _), share in self.accuracy.items():
            if name == target:
                percents.append(100 * share)
        return percents

    def averages(self, targets: Sequence[str]) -> list[float]:
        """The mean over all targets of each seed that has them all, in percent."""
        means = []
        for seed in sorted({seed for _, seed in self.accuracy}):
            shares = []
            for target in targets:
                if (target, seed) in self.accuracy:
                    shares.append(self.accuracy[target, seed])
            if len(shares) == len(targets):
                means.append(100 * float(np.mean(shares)))
        return means


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
        lines = [["method", *self.targets, "average", "seeds"]]
        for row in self.rows:
            line = [row.name]
            for target in self.targets:
                line.append(_with_error(row.of_target(target)))
            averages = row.averages(self.targets)
            line.append(_with_error(averages))
            line.append(str(len(averages)))
            lines.append(line)
        return lines

    def markdown(self) -> str:
        """For a README: accuracies on the unseen domain in percent, ± standard error over seeds."""
        lines = _markdown_table(self.entries())
        tests = self.tests()
        if tests:
            entries = [TEST_HEADER]
            for test in tests:
                entries.append(_test_entries(test))
            lines += ["", *_markdown_table(entries)]
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
        for row in rows:
            lines.append(_latex(row))
        lines += ["\\hline", "\\end{tabular}"]
        return "\n".join(lines) + "\n"

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
        tests = []
        for first, second in combinations(self.rows, 2):
            differences = []
            for place in sorted(first.accuracy.keys() & second.accuracy.keys()):
                differences.append(first.accuracy[place] - second.accuracy[place])
            if len(differences) < 2:
                continue
            points = 100 * np.array(differences)
            test = Test(
                first=first.name,
                second=second.name,
                pairs=len(points),
                difference=float(points.mean()),
                spread=float(points.std(ddof=1)),
                p=sign_test(points),
            )
            tests.append(test)
        return tests


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
    rows = []
    for key, of_row in records.items():
        rows.append(_row(sweep, key, of_row))
    return Table(sweep.targets, tuple(rows), tuple(missing))


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
    left_out = [cell.target]
    if cell.also_left_out:
        measured[cell.also_left_out] = results["also_left_out"]
        left_out.append(cell.also_left_out)
    step = results["selected_step"]
    return Record(step, tuple(left_out), measured, held_out, cell.draw, cell.seed)


def sign_test(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the mean of paired `differences` (pairs,) under random signs (Fisher's randomization test).

    Every assignment of signs is counted for few pairs, else 20,000 are drawn from a fixed seed. Differences of one target or
    one seed are taken as independent, which they are not quite.
    """
    observed = abs(float(differences.sum())) - 1e-12
    count = len(differences)
    if count <= EXACT_PAIRS:
        numbers = np.arange(2**count)[:, None]
        bits = numbers >> np.arange(count) & 1
        signs = 1 - 2 * bits
        is_as_large = np.abs(signs @ differences) >= observed
        return float(is_as_large.mean())
    signs = np.random.default_rng(0).choice((-1, 1), (DRAWS, count))
    is_as_large = np.abs(signs @ differences) >= observed
    return float((is_as_large.sum() + 1) / (DRAWS + 1))


def _with_error(values: list[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_standard_error(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {error:.1f}"


def _test_entries(test: Test) -> list[str]:
    names = f"{test.first} − {test.second}"
    return [
        names,
        f"{test.difference:+.2f}",
        str(test.pairs),
        f"{test.p:.3f}",
        str(test.pairs_for_one_point),
    ]


def _markdown_table(entries: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; `entries` begin with its header."""
    header, *rows = entries
    lines = [_bars(header), _bars(["---"] * len(header))]
    for row in rows:
        lines.append(_bars(row))
    return lines


def _bars(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def _latex(entries: Sequence[str]) -> str:
    line = " & ".join(entries).replace("_", "\\_").replace("±", "$\\pm$")
    return line + " \\\\"
