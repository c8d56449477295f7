"""Sweeps: which cells there are, what runs when, what is not run twice, and the table at the end."""

import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat.domains.hyperparameters import hyperparameters
from qat.runs.parts import RecipeError
from qat.sweep import engine
from qat.sweep.engine import run_sweep
from qat.sweep.report import write_tables
from qat.sweep.spec import Cell, Sweep, read_sweep
from qat.sweep.table import sign_test, table_of

GRID = """
methods = ["fp", "lsq", "gaqat"]
bits = [4]
targets = ["sketch", "photo"]
seeds = [0, 1, 2, 3]

[values]
steps = 4
image-size = 32

[method.gaqat]
window = 2
"""

# Stands for `qat train`: notes that it ran, and leaves the results of a run whose accuracy follows from the cell's name.
TRAINED = """
import json, sys, time, zlib
from pathlib import Path
folder = Path(sys.argv[1])
with (folder.parent / "ran.txt").open("a") as log:
    log.write(folder.name + "\\n")
time.sleep(float(sys.argv[2]))
if folder.name in sys.argv[3].split(","):
    print("error: this cell fails")
    sys.exit(2)
share = zlib.crc32(folder.name.encode()) % 1000 / 1000
(folder / "results.json").write_text(json.dumps({
    "method": "lsq", "test_domain": "sketch", "selection": "last step", "selected_step": 4, "source_validation": {"a": 0.5},
    "target": share, "train_seconds": 1.0, "images_per_second": 1.0, "classes": ["x", "y"], "settled": None,
    "target_holdout": 0.5, "also_left_out": 0.5, "split": {"trial_seed": 0, "holdout": 0.2},
}))
"""


def sweep_of(tmp_path: Path, text: str = GRID, **flags: Any) -> Sweep:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return read_sweep(file, **flags)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes cells run the stand-in, which takes `seconds` and fails for some names."""

    def use(seconds: float = 0.0, failing: tuple[str, ...] = ()) -> None:
        def command(sweep: Sweep, cell: Cell) -> list[str]:
            return [sys.executable, "-c", TRAINED, str(sweep.out / cell.name), str(seconds), ",".join(failing)]

        monkeypatch.setattr(engine, "command_of", command)

    return use


def ran(sweep: Sweep) -> Counter[str]:
    file = sweep.out / "ran.txt"
    return Counter(file.read_text().split() if file.exists() else [])


def test_every_combination_is_a_cell_and_starts_come_first(tmp_path: Path) -> None:
    cells = sweep_of(tmp_path).cells()
    expected = {
        (method, target, seed)
        for method, target, seed in itertools.product(("fp", "lsq", "gaqat"), ("sketch", "photo"), range(4))
    }
    assert {(cell.method, cell.target, cell.seed) for cell in cells} == expected and len(cells) == 24
    places = {cell.name: index for index, cell in enumerate(cells)}
    for cell in cells:
        if cell.method != "fp":
            assert places[cell.after] < places[cell.name]
            assert cell.recipe.init_from == tmp_path / "grid" / cell.after
        assert cell.recipe.images.test_domain == cell.target and cell.recipe.optimization.seed == cell.seed
    windows = {cell.recipe.freezing.window for cell in cells if cell.recipe.freezing is not None}
    assert windows == {2} and {cell.recipe.optimization.steps for cell in cells} == {4}


def test_a_grid_that_is_stopped_three_times_runs_no_cell_twice(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path)
    trained()
    rounds = 0
    for minutes in (0.01, 0.02, 0.02, None):
        progress = run_sweep(sweep, jobs=2, minutes=minutes, say=lambda line: None)
        rounds += 1
        if minutes is not None:
            continue
        assert len(progress.done) == 24 and not progress.failed and not progress.left
    done_at_once = ran(sweep)
    assert set(done_at_once) == {cell.name for cell in sweep.cells()}
    # A cell that was running when the time was over begins again; what was done is not
    assert sum(done_at_once.values()) <= 24 + 2 * (rounds - 1)
    before = ran(sweep)
    run_sweep(sweep, say=lambda line: None)
    assert ran(sweep) == before


def test_a_cell_that_fails_is_said_and_stops_only_what_starts_from_it(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path, seeds=(0,))
    trained(failing=("fp-photo-s0", "lsq-4bit-sketch-s0"))
    said: list[str] = []
    progress = run_sweep(sweep, jobs=2, say=said.append)
    assert {cell.name for cell in progress.done} == {"fp-sketch-s0", "gaqat-4bit-sketch-s0"}
    assert progress.failed["fp-photo-s0"] == "error: this cell fails"
    assert progress.failed["lsq-4bit-photo-s0"] == "starts from fp-photo-s0, which failed"
    assert (sweep.out / "lsq-4bit-sketch-s0" / "failure.txt").read_text() == "error: this cell fails\n"
    assert "2 of 6 cells done, 4 failed" in str(progress)
    trained()
    again = run_sweep(sweep, say=said.append)
    assert len(again.done) == 6 and not (sweep.out / "lsq-4bit-sketch-s0" / "failure.txt").exists()


def test_submitit_runs_the_same_cells(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path, methods=("fp", "lsq"), seeds=(0,), targets=("photo",))
    # submitit pickles the command line, so the stand-in reaches its process as words
    trained()
    progress = run_sweep(sweep, jobs=2, engine="submitit-local", say=lambda line: None)
    assert len(progress.done) == 2 and ran(sweep) == {"fp-photo-s0": 1, "lsq-4bit-photo-s0": 1}


def test_a_grid_begun_before_a_flag_existed_goes_on(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path)
    trained()
    run_sweep(sweep, say=lambda line: None)
    for cell in sweep.cells():
        file = sweep.out / cell.name / engine.CELL
        values = json.loads(file.read_text())
        del values["mixup"]
        file.write_text(json.dumps(values))
    before = ran(sweep)
    run_sweep(sweep, say=lambda line: None)
    assert ran(sweep) == before


def test_a_changed_grid_is_refused_before_anything_runs(tmp_path: Path, trained: Any) -> None:
    trained()
    run_sweep(sweep_of(tmp_path, seeds=(0,)), say=lambda line: None)
    changed = sweep_of(tmp_path, GRID.replace("steps = 4", "steps = 5"), seeds=(0,))
    before = ran(changed)
    with pytest.raises(RecipeError, match=r"was begun with steps = 4, .*grid\.toml has 5"):
        run_sweep(changed, say=lambda line: None)
    assert ran(changed) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown entries colour"),
        ("source = 'x'", "unknown entries source"),
        ("methods = ['lqs']", "unknown method 'lqs'"),
        ("methods = 'lsq'", "methods must be a list of words"),
        ("seeds = [0.5]", "seeds must be a list of whole numbers"),
        ("seeds = [1, 1]", "names something twice"),
        ("presets = ['long']", r"has no table \[preset.long\]"),
        ("start = 3", "start must be a word, got 3"),
        ("rule = 'best'", "unknown rule 'best'; known: training-domain, leave-one-domain-out, oracle"),
        ("rule = 'leave-one-domain-out'", "name all domains of the data set, three or more, in `domains`; got none"),
        ("rule = 'leave-one-domain-out'\ndomains = ['sketch', 'photo']", "three or more"),
        ("rule = 'leave-one-domain-out'\ndomains = ['a', 'b', 'sketch']\ntargets = ['c']", "three or more"),
        ("rule = 'leave-one-domain-out'\ndomains = ['photo', 'cartoon', 'sketch']", 'set select = "last"'),
        ("draws = [-1]", "draws are 0 or more, got -1"),
        ("start = 'lsq'", "start must be a method of full precision"),
        ("[values]\nstpes = 3", r"\[values\]: none of its methods has stpes"),
        ("[method.fp]\nbits = 3", "unknown entries bits"),
        ("[values]\nsteps = 'many'", "entry 'steps' cannot be"),
        ("values = 3", "values must be a table"),
        ("bits = [9]", "--bits must be at least 2 and at most 8"),
    ],
)
def test_faults_of_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep_of(tmp_path, text).cells()


def test_the_table_has_means_and_standard_errors_over_seeds(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path, methods=("fp", "lsq"), seeds=(0, 1, 2))
    trained()
    run_sweep(sweep, jobs=2, say=lambda line: None)
    table, report = write_tables(sweep)
    accuracy = {
        cell.name: json.loads((sweep.out / cell.name / "results.json").read_text())["target"] for cell in sweep.cells()
    }
    header, fp, lsq = table.entries()
    assert header == ["method", "sketch", "photo", "average", "seeds"] and lsq[0] == "lsq 4 bit" and fp[-1] == "3"
    photo = [100 * accuracy[f"fp-photo-s{seed}"] for seed in range(3)]
    mean = sum(photo) / 3
    error = (sum((value - mean) ** 2 for value in photo) / 3) ** 0.5 / 3**0.5  # of the population, as DomainBed's
    assert fp[2] == f"{mean:.1f} ± {error:.1f}"
    difference = [
        100 * (accuracy[f"fp-{t}-s{s}"] - accuracy[f"lsq-4bit-{t}-s{s}"]) for t in ("sketch", "photo") for s in range(3)
    ]
    (test,) = table.tests()
    assert test.pairs == 6 and test.difference == pytest.approx(sum(difference) / 6)
    variance = sum((value - test.difference) ** 2 for value in difference) / 5
    assert test.spread == pytest.approx(variance**0.5)
    # At so many pairs of this spread the interval is one point to either side, at one fewer it is more
    interval = [1.96 * (variance / count) ** 0.5 for count in (test.pairs_for_one_point, test.pairs_for_one_point - 1)]
    assert interval[0] <= 1 < interval[1]
    assert (sweep.out / "table.csv").read_text().count("\n") == 13 and "lsq 4 bit" in (
        sweep.out / "table.tex"
    ).read_text()
    assert "<svg" in report.read_text()
    (sweep.out / "lsq-4bit-photo-s1" / "results.json").unlink()
    partial = table_of(sweep)
    assert partial.missing == ("lsq-4bit-photo-s1",) and partial.entries()[2][-1] == "2"


def test_draws_are_domainbeds_and_the_table_has_the_one_that_its_rule_chooses(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path, "methods = ['sagm']\ntargets = ['photo']\ndraws = [0, 1, 2]\nseeds = [0, 1]")
    rates = {cell.name: cell.recipe.optimization.lr for cell in sweep.cells()}
    assert rates["sagm-photo-s0"] == 1e-3 and len(rates) == 6 and len(set(rates.values())) == 5
    drawn = hyperparameters(2, algorithm="sagm", trial_seed=1)
    (cell,) = [cell for cell in sweep.cells() if cell.name == "sagm-photo-s1-draw2"]
    assert {name: cell.recipe.entries()[name] for name in drawn} == drawn
    trained()
    run_sweep(sweep, jobs=2, say=lambda line: None)
    # seed 0: draw 1 is best on the sources; seed 1: draw 0 is; the oracle takes the best held-out target
    sources = {"sagm-photo-s0-draw1": 0.9, "sagm-photo-s1": 0.8}
    for name in rates:
        file = sweep.out / name / "results.json"
        results = json.loads(file.read_text())
        results["source_validation"] = {"a": sources.get(name, 0.5)}
        results["target_holdout"] = 0.7 if name.endswith("draw2") else 0.1
        file.write_text(json.dumps(results))
    reached = {name: json.loads((sweep.out / name / "results.json").read_text())["target"] for name in rates}
    (row,) = table_of(sweep).rows
    assert row.accuracy == {("photo", 0): reached["sagm-photo-s0-draw1"], ("photo", 1): reached["sagm-photo-s1"]}
    (row,) = table_of(dataclasses.replace(sweep, rule="oracle")).rows
    assert row.accuracy == {("photo", seed): reached[f"sagm-photo-s{seed}-draw2"] for seed in (0, 1)}


CROSS_VALIDATED = """
methods = ["lsq"]
targets = ["photo", "sketch"]
domains = ["cartoon", "photo", "sketch"]
draws = [0, 1]
rule = "leave-one-domain-out"
[values]
select = "last"
"""


def test_cross_validation_adds_the_pairs_and_starts_them_without_both_domains(tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in sweep_of(tmp_path, CROSS_VALIDATED).cells()}
    left_out = ["photo", "sketch", "cartoon+photo", "cartoon+sketch", "photo+sketch"]
    expected = {f"fp-{domains}-s0" for domains in left_out}
    expected |= {f"lsq-4bit-{domains}-s0{draw}" for domains in left_out for draw in ("", "-draw1")}
    assert cells.keys() == expected
    pair = cells["lsq-4bit-cartoon+sketch-s0-draw1"]
    assert (pair.recipe.images.test_domain, pair.recipe.images.also_left_out) == ("cartoon", "sketch")
    start = cells[pair.after]
    assert (start.recipe.images.test_domain, start.recipe.images.also_left_out) == ("cartoon", "sketch")


def test_cross_validation_chooses_the_draw_by_the_domains_that_pairs_left_out(tmp_path: Path, trained: Any) -> None:
    sweep = sweep_of(tmp_path, CROSS_VALIDATED)
    trained()
    run_sweep(sweep, jobs=2, say=lambda line: None)
    # (accuracy on the first, on the second of a pair); of photo draw 0 has 0.9 + 0.2, draw 1 0.6 + 0.7; of sketch 0.8 + 0.9
    # and 0.1 + 0.3
    reached = {
        "cartoon+photo-s0": (0.9, 0.1),
        "photo+sketch-s0": (0.8, 0.2),
        "cartoon+sketch-s0": (0.9, 0.1),
        "cartoon+photo-s0-draw1": (0.6, 0.1),
        "photo+sketch-s0-draw1": (0.3, 0.7),
        "cartoon+sketch-s0-draw1": (0.1, 0.1),
        "photo-s0": (0.41, None),
        "photo-s0-draw1": (0.42, None),
        "sketch-s0": (0.43, None),
        "sketch-s0-draw1": (0.44, None),
    }
    sources = {"cartoon": 0.5, "photo": 0.5, "sketch": 0.5}
    for name, (first, second) in reached.items():
        file = sweep.out / f"lsq-4bit-{name}" / "results.json"
        results = json.loads(file.read_text()) | {"target": first, "also_left_out": second}
        of_cell = {domain: share for domain, share in sources.items() if domain not in name}
        file.write_text(json.dumps(results | {"source_validation": of_cell}))
    in_full, row = table_of(sweep).rows
    assert in_full.name == "fp" and row.accuracy == {("photo", 0): 0.42, ("sketch", 0): 0.43}
    (sweep.out / "lsq-4bit-cartoon+photo-s0" / "results.json").unlink()
    partial = table_of(sweep)
    assert partial.missing == ("lsq-4bit-cartoon+photo-s0",) and partial.rows[1].accuracy["photo", 0] == 0.42


def test_p_of_random_signs_counts_every_assignment() -> None:
    differences = np.array([0.3, -0.1, 0.7, 0.2, 0.5])
    as_large = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= abs(differences.sum()) - 1e-12
        for signs in itertools.product((1, -1), repeat=5)
    ]
    assert sign_test(differences) == sum(as_large) / 32
    many = np.random.default_rng(1).normal(0.5, 1, 40)
    assert 0 < sign_test(many) < 0.05 and sign_test(many - many.mean()) > 0.9
