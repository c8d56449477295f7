"""Ensembles of runs: accuracies against a loop over single images, the command line from runs to a certified file."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat import cli
from qat.analysis.compare import mcnemar
from qat.analysis.ensemble import Answers, compare_ensemble, evaluate_ensemble
from qat.deploy import export_ensemble
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import RecipeError
from qat.runs.recipe import recipe_of
from qat.runs.run_folder import RunFolder
from qat.train.loop import run

TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 4, "batch_size": 4, "evaluate_every": 2, "workers": 0,
    "per_class": 6,
}  # fmt: skip
DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)


def answers(seed: int, images: int) -> Answers:
    generator = np.random.default_rng(seed)
    labels = generator.integers(4, size=images)
    logits = 2 * generator.normal(size=(3, images, 4)) + 2 * np.eye(4)[labels]
    return Answers(logits.astype(np.float32), labels)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_accuracies_and_tests_against_a_loop_over_images(average: str) -> None:
    found = {"a": answers(0, 60), "b": answers(1, 80), "t": answers(2, 90)}
    table = compare_ensemble(["x", "y", "z"], found, "t", average)  # type: ignore[arg-type]
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["a", "b", "source domains", "t (target)"]
    target = found["t"]
    alone, together = np.zeros((3, 90), bool), np.zeros(90, bool)
    for n in range(90):
        total = np.zeros(4)
        for m in range(3):
            z = target.logits[m, n].astype(np.float64)
            alone[m, n] = z.argmax() == target.labels[n]
            total += z if average == "logits" else np.exp(z) / np.exp(z).sum()
        together[n] = total.argmax() == target.labels[n]
    row = rows["t (target)"]
    assert row.ensemble == pytest.approx(100 * together.mean()) and row.images == 90
    assert row.members == pytest.approx([100 * a.mean() for a in alone])
    assert row.gain == pytest.approx(100 * (together.mean() - alone.mean())) and row.gain > 5
    assert row.interval[0] < row.gain < row.interval[1]
    standard_error = (100 * (together - alone.mean(0))).std() / 90**0.5
    assert row.interval[1] - row.interval[0] == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    lost, won = int((alone[1] & ~together).sum()), int((~alone[1] & together).sum())
    assert row.mcnemar[1] == mcnemar(lost, won)
    assert rows["source domains"].images == 140


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("ensemble")
    run(recipe_of("lsq", **TINY, out=root / "w4"), DOMAINS)
    run(recipe_of("lsq", **TINY, seed=0, bits=3, out=root / "w3"), DOMAINS)
    run(recipe_of("qtdog", **TINY, quant_start_step=1, out=root / "dog"), DOMAINS)
    return [root / name for name in ("w4", "w3", "dog")]


def test_members_answers_are_those_their_runs_recorded(runs: list[Path]) -> None:
    table = evaluate_ensemble(runs)
    for row in table.rows[:-2]:
        assert row.members == pytest.approx(
            [100 * RunFolder.open(r).results()["source_validation"][row.name] for r in runs]
        )
    assert table.rows[-1].members == pytest.approx([100 * RunFolder.open(r).results()["target"] for r in runs])
    assert "mean of the members' softmax probabilities" in str(table)


@pytest.mark.slow  # two whole certificates
def test_from_runs_to_a_certified_file(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "ensemble.onnx", tmp_path / "table.json"

    def qat(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["qat", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    pair = [runs[0], runs[2]]
    assert qat("ensemble", *pair, "--out", file, "--json", table) == 0
    assert "sketch (target)" in capsys.readouterr().out
    assert json.loads(table.read_text())["members"] == [str(r) for r in pair]
    assert qat("certify", file) == 0
    assert qat("certify", *pair, file) == 0
    output = capsys.readouterr().out
    assert output.count(": certified") == 2 and "2 members compute the codes they compute alone" in output
    assert not (runs[0] / "certificate.json").exists()
    assert qat("certify", *runs, file) == 2
    assert "holds 2 members, 3 runs were named" in capsys.readouterr().err


def test_what_cannot_answer_together_raises(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two"):
        evaluate_ensemble(runs[:1])
    with pytest.raises(RecipeError, match="--target fp32 has no codes"):
        export_ensemble(runs, "fp32", tmp_path / "e.onnx")
    other = run(recipe_of("fp", **TINY | {"steps": 1}, test_domain="photo", out=tmp_path / "photo"), DOMAINS).path
    with pytest.raises(RecipeError, match="differ in --test-domain"):
        evaluate_ensemble([runs[0], other])
