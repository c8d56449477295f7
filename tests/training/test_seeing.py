"""What a scale log is turned into: numbers against loops over the raw signs, pictures' data, inspect, report, TensorBoard."""

import dataclasses
import json
import sys
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import Parameter

from qat import cli
from qat.analysis.figures import POINTS, smooth, thinned
from qat.analysis.inspection import conflicted, inspect_run
from qat.analysis.report import labelled
from qat.analysis.scale_figures import COLUMNS, conflict_curves, disorder_curves, disorder_map, heat_map
from qat.analysis.scale_view import ScaleView, bounds, coin_below, frozen_spans
from qat.deploy import write_report
from qat.domains.synthetic import synthetic_domains
from qat.objectives.contract import Gradients
from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer, Seen
from qat.runs.parts import RecipeError
from qat.runs.recipe import recipe_of
from qat.runs.run_folder import RunFolder
from qat.runs.scale_log import ScaleHistory, ScaleLog, read_scales
from qat.train.loop import run
from qat.train.scale_scalars import scale_scalars

NAMES = ("a.weight", "a.input", "b.weight", "b.input", "b#add0")
CHANNELS = (3, 1, 5, 1, 1)
IS_WEIGHT = np.array([True, False, True, False, False])
WINDOW, STEPS = 7, 45  # six windows and three steps more
DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "image_size": 32,
    "steps": 5,
    "batch_size": 4,
    "evaluate_every": 4,
    "workers": 0,
}


def raw_signs() -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], NDArray[np.int64]]:
    """Task and smoothing signs (steps, channels) of every scale, and whether it is frozen (steps, scales).

    a.input is in steady conflict, b#add0 gets no gradient.
    """
    rng = np.random.default_rng(3)
    task = [rng.choice([-1, 1], (STEPS, c)) for c in CHANNELS]
    smoothing = [rng.choice([-1, 1], (STEPS, c)) for c in CHANNELS]
    smoothing[1] = -task[1] * np.where(np.arange(STEPS) % 9 == 0, -1, 1)[:, None]
    task[4][:] = smoothing[4][:] = 0
    frozen = np.repeat(rng.integers(0, 2, (STEPS // WINDOW + 1, len(NAMES))), WINDOW, axis=0)[:STEPS]
    return task, smoothing, frozen


def hand_made() -> NDArray[np.float16]:
    """The log of `raw_signs`, row by row, counted in loops."""
    task, smoothing, frozen = raw_signs()
    values = np.zeros((STEPS, len(NAMES), 4), np.float16)
    for i in range(len(NAMES)):
        for step in range(STEPS):
            first = step - step % WINDOW
            pairs = [(task[i][j - 1, c], task[i][j, c]) for j in range(first + 1, step + 1) for c in range(CHANNELS[i])]
            flips = sum(a != b for a, b in pairs) / max(len(pairs), 1)
            products = task[i][step] * smoothing[i][step]
            values[step, i] = (flips, np.mean(products < 0), np.mean(products), frozen[step, i])
    return values


def view_of(values: NDArray[np.float16], rule: FreezeRule | None = None) -> ScaleView:
    rule = rule or FreezeRule(window=WINDOW)
    return ScaleView(ScaleHistory(NAMES, WINDOW, values), np.array(CHANNELS), IS_WEIGHT, rule)


def test_conflicted_scales_against_loops_over_the_raw_signs() -> None:
    task, smoothing, frozen = raw_signs()
    metrics = [{"step": s, "scales": {n: s + i + 1.0 for i, n in enumerate(NAMES)}} for s in (0, 20, 45)] + [
        {"step": 46}
    ]
    rows = {row.name: row for row in conflicted(view_of(hand_made()), metrics, 10)}
    assert next(iter(rows)) == "a.input" and len(rows) == len(NAMES)
    half_f16 = 2.0**-12  # the log's rounding of a number in [0.5, 1)
    for i, name in enumerate(NAMES):
        row, products = rows[name], task[i] * smoothing[i]
        assert row.conflict == pytest.approx((products < 0).mean(), abs=half_f16)
        assert row.cosine == pytest.approx(products.mean(), abs=half_f16)
        assert row.frozen == frozen[:, i].mean() and row.channels == CHANNELS[i]
        assert (row.scale_start, row.scale_end) == (i + 1.0, i + 46.0)
        n = CHANNELS[i] * (WINDOW - 1)
        assert (row.coin_low, row.coin_high) == pytest.approx(
            (0.5 - 2 * (0.25 / n) ** 0.5, 0.5 + 2 * (0.25 / n) ** 0.5)
        )
        last = task[i][5 * WINDOW : 6 * WINDOW]
        flips = int((last[1:] != last[:-1]).sum())
        assert row.disorder == (None if name == "b#add0" else flips / n)  # exact in spite of float16
    assert {row.name: row.kind for row in rows.values()} == dict(
        zip(NAMES, ("weight", "input", "weight", "input", "stream"), strict=True)
    )


def test_order_is_by_conflict_and_top_cuts_it() -> None:
    values = hand_made()
    rows = conflicted(view_of(values), [], 2)
    means = sorted(values[:, :, 1].astype(np.float64).mean(axis=0), reverse=True)
    assert [row.conflict for row in rows] == pytest.approx(means[:2], abs=1e-12) and rows[0].scale_start is None


@pytest.mark.parametrize(
    "rule",
    [
        FreezeRule(window=WINDOW, z=1.0),
        FreezeRule(window=WINDOW, threshold=0.5),
        FreezeRule(window=WINDOW, threshold=0.5, weight_threshold=0.4),
        FreezeRule(window=WINDOW, threshold=1 / 3, when="above"),
    ],
)
def test_shares_beyond_the_threshold_are_what_the_freezer_freezes(rule: FreezeRule) -> None:
    view, (task, smoothing, _) = view_of(hand_made(), rule), raw_signs()
    scales = [Parameter(torch.ones(c)) for c in CHANNELS]
    freezer = ScaleFreezer(NAMES, scales, IS_WEIGHT.tolist(), rule)
    owner, expected = np.repeat(np.arange(5), CHANNELS), []
    for step in range(STEPS):
        first, second = ([torch.from_numpy(s[step]).float() for s in branch] for branch in (task, smoothing))
        freezer.mask(Gradients(torch.zeros(()), first, second, (0.5, 0.5)), scales)
        if step % WINDOW == WINDOW - 1:
            expected.append([bool(freezer.frozen[owner == i].all()) for i in range(4)])  # b#add0 gets no gradient
    assert view.below()[:, :4].tolist() == expected and not view.below()[:, 4].any()
    share, coin = view.share_below(np.arange(5))
    assert share == pytest.approx(np.mean(expected, axis=1)) and 0 < share.mean() < 1
    by_scale = coin_below(view.comparisons, bounds(rule, view.comparisons, IS_WEIGHT))
    assert coin == pytest.approx([by_scale[:4].mean()] * 6)


@pytest.mark.parametrize("bound", [Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(3, 10), Fraction(11, 10)])
def test_fair_coins_below_a_bound_are_counted(bound: Fraction) -> None:
    counts = [6, 10, 30, 99]
    expected = [float(Fraction(sum(comb(n, k) for k in range(n + 1) if Fraction(k, n) < bound), 2**n)) for n in counts]
    assert coin_below(counts, np.full(4, float(bound))) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_heat_map_matrix_and_frozen_spans() -> None:
    _, _, frozen = raw_signs()
    values = hand_made()
    found = heat_map(view_of(values), "input")
    assert found.labels == ("a", "b") and found.edges.tolist() == [0, 7, 14, 21, 28, 35, 42]
    for row, scale in enumerate((1, 3)):
        assert found.values[row] == pytest.approx(values[6:42:7, scale, 0].astype(np.float64), abs=2.0**-12)
        held = {step for r, first, last in found.spans if r == row for step in range(first, last + 1)}
        assert held == {step + 1 for step in range(42) if frozen[step, scale]}
    stream = heat_map(view_of(values), "stream")
    assert stream.labels == ("b#add0",) and np.isnan(stream.values).all() and np.isnan(stream.cosine).all()


def test_spans_are_maximal_and_partial_freezing_counts_from_half() -> None:
    frozen = np.array([[1, 0.4], [1, 0.5], [0, 0.6], [1, 0.0]])
    assert frozen_spans(frozen, 10) == [(0, 1, 20), (0, 31, 40), (1, 11, 30)]


def test_a_long_log_is_drawn_in_fewer_columns_of_means() -> None:
    windows = 2 * COLUMNS + 1
    values = np.tile(np.array([0.0, 0.5, 0.5, 0.0], np.float16), (windows * 2, 1, 1))
    values[1::2, 0, 0] = np.arange(windows) % 3 == 0
    view = ScaleView(ScaleHistory(("a.input",), 2, values), np.array([1]), np.array([False]), FreezeRule(window=2))
    found = heat_map(view, "input")
    assert len(found.edges) == found.values.shape[1] + 1 <= COLUMNS + 1 and found.edges[-1] == 2 * windows
    whole = np.arange(windows) % 3 == 0
    assert found.values[0] == pytest.approx([whole[a : a + 3].mean() for a in range(0, windows, 3)])
    assert len(disorder_map(view, "input")) < 150_000


def test_a_run_shorter_than_a_window_and_one_kind_alone_can_be_drawn() -> None:
    view = view_of(hand_made()[:4])
    assert view.ends.tolist() == [4] and view.comparisons.tolist() == [9, 3, 15, 3, 3]
    for picture in (
        disorder_curves(view),
        conflict_curves(view),
        *(disorder_map(view, k) for k in ("weight", "stream")),
    ):
        assert picture.startswith("<svg") and picture.rstrip().endswith("</svg>")
    only = ScaleView(
        ScaleHistory(("a.weight",), 7, hand_made()[:, :1]), np.array([3]), IS_WEIGHT[:1], FreezeRule(window=7)
    )
    assert disorder_map(only, "input") == "" and "weight scales (1)" in disorder_curves(only)


def test_step_scalars_by_group_against_the_log() -> None:
    values = torch.from_numpy(hand_made().astype(np.float32))
    freezer = ScaleFreezer(
        NAMES,
        [Parameter(torch.ones(c)) for c in CHANNELS],
        IS_WEIGHT.tolist(),
        FreezeRule(window=WINDOW, threshold=0.5),
    )
    for step in (WINDOW - 1, WINDOW):
        freezer.step = step + 1
        row = values[step]
        found = scale_scalars(Seen(row[:, 0], row[:, 1], row[:, 2], row[:, 3]), freezer)
        assert found["conflict"] == pytest.approx(float(row[:, 1].mean()), abs=1e-5)
        assert found["weights"]["cosine"] == pytest.approx(float(row[[0, 2], 2].mean()), abs=1e-5)  # type: ignore[index]
        assert ("disorder" in found) == (step == WINDOW - 1)
    at_end = values[WINDOW - 1]
    freezer.step = WINDOW
    found = scale_scalars(Seen(at_end[:, 0], at_end[:, 1], at_end[:, 2], at_end[:, 3]), freezer)
    assert found["disorder"] == pytest.approx(float(at_end[:4, 0].mean()), abs=1e-5)  # b#add0 got no gradient
    share = np.mean([float(at_end[i, 0]) < 0.5 for i in (1, 3)])
    assert found["activations"]["below_threshold"] == pytest.approx(share)  # type: ignore[index]


def test_curves_are_smoothed_to_the_end_and_thinned_with_their_ends() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    found = smooth(values)
    assert found[0] == values[0] and found[500] == pytest.approx(values[490:511].mean())
    assert found[-1] == pytest.approx(values[-11:].mean())
    steps, thin = thinned(np.arange(1000), values)
    assert len(steps) <= POINTS and (steps[0], steps[-1]) == (0, 999) and thin.tolist() == values[steps].tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    run(recipe_of("fp", **TINY, out=root / "fp"), DOMAINS)
    run(recipe_of("gaqat", **TINY, window=2, tensorboard=True, init_from=root / "fp", out=root / "gaqat"), DOMAINS)
    return root / "fp", root / "gaqat"


def test_inspect_prints_and_writes_what_the_run_recorded(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspect_run(runs[1], top=3)
    history = read_scales(runs[1])
    assert history is not None and inspection.steps == 5 and inspection.windows == 2 and len(inspection.scales) == 3
    worst = inspection.scales[0]
    column = history.names.index(worst.name)
    assert worst.conflict == pytest.approx(float(history.column("conflict")[:, column].mean()), abs=1e-6)
    recorded = [e for e in RunFolder.open(runs[1]).metrics() if "scales" in e]
    assert (inspection.first_step, inspection.last_step) == (0, 5) and recorded[0]["step"] == 0
    assert worst.scale_end == recorded[-1]["scales"][worst.name]
    monkeypatch.setattr(sys, "argv", ["qat", "inspect", str(runs[1]), "--top", "3", "--json", str(tmp_path / "i.json")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and worst.name in capsys.readouterr().out
    assert json.loads((tmp_path / "i.json").read_text())["scales"][0] == dataclasses.asdict(worst)


def test_a_run_without_a_scale_log_is_told_so(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no scale log .* this run's method is fp"):
        inspect_run(runs[0])
    with pytest.raises(RecipeError, match="--top must be positive"):
        inspect_run(runs[1], top=0)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("recipe.json", "checkpoint.pt"):
        (other / name).write_bytes((runs[1] / name).read_bytes())
    ScaleLog(other, ["elsewhere.weight"], 2).close()
    with pytest.raises(RecipeError, match="holds 0 steps"):
        inspect_run(other)
    np.zeros((3, 1, 4), np.float16).tofile(other / "scales.f16")
    with pytest.raises(RecipeError, match="names other scales than this run's model has"):
        inspect_run(other)


@pytest.mark.slow
def test_report_shows_the_scale_log_and_runs_side_by_side(runs: tuple[Path, Path]) -> None:
    page = write_report(runs[1], beside=[runs[0]]).read_text()
    for text in ("Side by side", "Gradient disorder and conflict", "weight scales (", "stream scales (", "Most conflicted",
                 "<th>gaqat W4A4</th>", "<th>fp</th>", "beyond the threshold", "data:image/png"):  # fmt: skip
        assert text in page, text
    assert "src=" not in page and 'href="http' not in page and len(page) < 3e6
    plain = write_report(runs[0]).read_text()
    assert "Gradient disorder" not in plain and "Side by side" not in plain and "Training" in plain


def test_runs_of_other_domains_are_not_shown_beside(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    results = json.loads((runs[0] / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(results | {"test_domain": "photo"}))
    with pytest.raises(RecipeError, match=r"other: its test domain is photo, .* has sketch"):
        write_report(runs[1], beside=[other])
    with pytest.raises(RecipeError, match="no such run folder"):
        write_report(runs[1], beside=[tmp_path / "nowhere"])


def test_labels_tell_runs_apart(runs: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "recipe.json").write_bytes((runs[1] / "recipe.json").read_bytes())
    folders = [RunFolder.open(p) for p in (runs[0], runs[1], again, runs[1])]
    assert list(labelled(folders)) == ["fp", "gaqat W4A4 (gaqat)", "gaqat W4A4 (again)"]


def test_tensorboard_holds_the_scalars(runs: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[1] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    groups = {f"{g}{n}" for g in ("", "weights/", "activations/") for n in
              ("disorder", "frozen", "below_threshold", "cosine", "conflict")}  # fmt: skip
    sources = {f"source_validation/{d}" for d in ("art_painting", "cartoon", "photo")}
    assert tags >= groups | sources | {"loss", "accuracy", "gradient_norm", "learning_rate"}
    history = read_scales(runs[1])
    assert history is not None
    logged = events.Scalars("conflict")
    assert [e.step for e in logged] == [1, 2, 3, 4, 5] and [e.step for e in events.Scalars("disorder")] == [2, 4]
    assert [e.value for e in logged] == pytest.approx(history.column("conflict").mean(axis=1).tolist(), abs=1e-3)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(5e-4)
