"""One tiny run end to end, from training to report, and every way to misuse its folder."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeqat.files import FileError, write_atomically
from qat import cli
from qat.analysis.compare import compare_runs, mcnemar, write_baseline
from qat.deploy import certify_run, export_run, measure_run, write_report
from qat.domains.splits import seed_hash, split_indices
from qat.domains.synthetic import synthetic_domains
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, from_json, recipe_of, to_json
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder
from qat.train.evaluate import accuracy
from qat.train.loop import run
from qat.train.start import schedule_of

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "image_size": 32,
    "steps": 4,
    "batch_size": 4,
    "evaluate_every": 2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    run(recipe_of("fp", **TINY, out=root / "fp"), DOMAINS)
    run(recipe_of("lsq", **TINY, out=root / "lsq", init_from=root / "fp"), DOMAINS)
    return root / "fp", root / "lsq"


def test_run_folder_is_complete(runs: tuple[Path, Path]) -> None:
    for path in runs:
        names = {p.name for p in path.iterdir()}
        assert {
            "recipe.json",
            "checkpoint.pt",
            "last.pt",
            "metrics.jsonl",
            "results.json",
            "samples.npz",
        } <= names
        assert not any(name.endswith(".partial") for name in names)
    results = RunFolder.open(runs[1]).results()
    assert (
        set(results["source_validation"]) == {"art_painting", "cartoon", "photo"} and results["test_domain"] == "sketch"
    )
    samples = RunFolder.open(runs[1]).samples()
    assert samples.images.shape[1:] == (3, 32, 32) and set(samples.domains) == {d.name for d in DOMAINS}


def test_a_second_domain_is_left_out_and_measured(tmp_path: Path) -> None:
    folder = run(recipe_of("fp", **TINY, also_left_out="photo", out=tmp_path / "fp"), DOMAINS)
    results = folder.results()
    assert set(results["source_validation"]) == {"art_painting", "cartoon"}
    _, _, built = load_run(folder.path)
    (photo,) = [domain for domain in DOMAINS if domain.name == "photo"]
    _, rest = split_indices(len(photo), int(0.2 * len(photo)), seed_hash(0, DOMAINS.index(photo)))
    images = torch.stack([torch.from_numpy(np.array(photo.images[i])).permute(2, 0, 1) for i in rest]) / 255
    mean, std = torch.tensor(built.mean).view(3, 1, 1), torch.tensor(built.std).view(3, 1, 1)
    with torch.no_grad():
        predicted = built.model.eval()((images - mean) / std).argmax(1).numpy()
    assert results["also_left_out"] == pytest.approx((predicted == photo.labels[rest]).mean())
    with pytest.raises(RecipeError, match="also-left-out"):
        run(recipe_of("lsq", **TINY, out=tmp_path / "lsq", init_from=folder.path), DOMAINS)


def test_reloaded_model_is_the_selected_one(runs: tuple[Path, Path]) -> None:
    folder, recipe, built = load_run(runs[1])
    samples = folder.samples()
    chosen = samples.domains == "photo"
    predicted = built.model(torch.from_numpy(samples.images[chosen])).argmax(1).numpy()
    # photo's samples are its whole held-out part here
    assert (predicted == samples.labels[chosen]).mean() == pytest.approx(folder.results()["source_validation"]["photo"])
    assert isinstance(recipe, Recipe) and recipe.grids.bits == 4


def test_export_certify_compare_report(runs: tuple[Path, Path]) -> None:
    baseline, quantized = runs
    file = export_run(quantized)
    certificate = certify_run(quantized, file)
    assert certificate.passed and certificate.mismatches == 0, str(certificate)
    latencies = measure_run(quantized, file)
    assert [entry.name for entry in latencies] == ["fp32", "quantized"] and latencies[1].size < 0.5 * latencies[0].size
    page = write_report(quantized).read_text()
    for text in (
        "Certificate",
        "Learned scales",
        "Weights on their grid",
        "Size and latency",
        "sketch (target)",
        "<svg",
    ):
        assert text in page
    assert "src=" not in page and 'href="http' not in page  # self-contained
    assert export_run(baseline, "fp32").exists()
    assert "sketch (target)" in str(compare_runs(baseline, quantized, 100.0))


def test_same_seed_same_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    again = run(recipe_of("fp", **TINY, out=tmp_path / "again"), DOMAINS)
    first = torch.load(runs[0] / "checkpoint.pt", weights_only=True)["model"]
    second = again.load("checkpoint.pt")["model"]
    assert all(torch.equal(first[k], second[k]) for k in first)


def killed_and_resumed(recipe: Recipe, at: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """`recipe` killed before step `at + 1` and resumed from what its folder holds."""
    from qat.train import loop

    whole = loop._Trainer._train

    def dies(self: loop._Trainer, *args: object) -> None:
        if self.progress.step == at:
            raise KeyboardInterrupt
        whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop._Trainer, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, DOMAINS)
    monkeypatch.undo()
    return run(recipe.changed(resume=True), DOMAINS)


def same_model(first: RunFolder, second: RunFolder) -> bool:
    expected, found = (folder.load("last.pt")["model"] for folder in (first, second))
    return all(torch.equal(v, found[k]) for k, v in expected.items() if isinstance(v, torch.Tensor))


def test_an_interrupted_run_resumes_to_the_same_result(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("lsq", **TINY, out=tmp_path / "cut", init_from=runs[0])
    resumed = killed_and_resumed(recipe, 3, monkeypatch)
    assert same_model(RunFolder.open(runs[1]), resumed)
    assert [e["step"] for e in resumed.metrics() if "loss" in e] == [1, 2, 3, 4]


@pytest.mark.slow
def test_masks_survive_kill_and_resume(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a window, one step after the last save."""
    recipe = recipe_of("gaqat", **TINY | {"steps": 8}, window=3, threshold=0.7, per_channel=True, init_from=runs[0])
    whole = run(recipe.changed(out=tmp_path / "whole"), DOMAINS)
    resumed = killed_and_resumed(recipe.changed(out=tmp_path / "cut"), 5, monkeypatch)
    assert same_model(whole, resumed)
    first, second = (folder.load("last.pt")["step"]["freezer"] for folder in (whole, resumed))
    assert torch.equal(first["frozen"], second["frozen"]) and 0 < int(first["frozen"].sum()) < first["frozen"].numel()
    assert all(torch.equal(first[k], second[k]) for k in ("last", "flips")) and first["step"] == second["step"] == 8
    assert (whole / "scales.f16").read_bytes() == (resumed / "scales.f16").read_bytes()


def test_folder_faults_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds a run already"):
        run(recipe_of("fp", **TINY, out=runs[0]), DOMAINS)
    with pytest.raises(RecipeError, match=r"nowhere: no such run folder"):
        export_run(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"full-precision run; --target ort-int8 needs a quantized one"):
        export_run(runs[0])
    with pytest.raises(RecipeError, match=r"--init-from .* --image-size 32, this run has 40"):
        run(recipe_of("lsq", **(TINY | {"image_size": 40}), init_from=runs[0], out=tmp_path / "x"), DOMAINS)
    with pytest.raises(RecipeError, match=r"is a lsq run"):
        run(recipe_of("lsq", **TINY, init_from=runs[1], out=tmp_path / "x"), DOMAINS)
    assert not (tmp_path / "x").exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "recipe.json").write_text((runs[1] / "recipe.json").read_text())
    (damaged / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(RecipeError, match=r"checkpoint\.pt: is not a readable checkpoint"):
        load_run(damaged)


def test_an_export_that_fails_leaves_the_old_file(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def explode(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(FileError, match=r"model\.onnx: cannot be written \(disk full\)"):
        write_atomically(target, explode)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 0}, "--steps"),
        ({"batch_size": -1}, "--batch-size"),
        ({"holdout": 1.0}, "--holdout"),
        ({"bits": 9}, "--bits"),
    ],
)
def test_impossible_values_name_their_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe_of("lsq", **flags))


def test_recipes_round_trip_through_json() -> None:
    recipe = recipe_of(
        "lsq", data_root=Path("data"), bits=3, weight_bits=2, init_from=Path("runs/fp"), tensorboard=True
    )
    assert from_json(json.loads(json.dumps(to_json(recipe))), Path("recipe.json")) == recipe
    with pytest.raises(RecipeError, match=r"recipe\.json: unknown entries colour"):
        from_json(to_json(recipe) | {"colour": "red"}, Path("recipe.json"))


@pytest.mark.parametrize(
    ("kind", "factors"), [("cosine", [1.0, 0.5, 0.0]), ("linear", [1.0, 0.5, 0.0]), ("constant", [1, 1, 1])]
)
def test_schedules(kind: str, factors: list[float]) -> None:
    factor = schedule_of(recipe_of("fp", schedule=kind, steps=10).optimization)
    assert [factor(0), factor(5), factor(10)] == pytest.approx(factors, abs=1e-12)


def test_accuracy_counts_what_is_right() -> None:
    logits = torch.eye(5)[[0, 1, 2, 3, 4, 0]]
    labels = torch.tensor([0, 1, 2, 0, 0, 0])
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    assert accuracy(lambda x: x, batches, 5) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="no images"):
        accuracy(lambda x: x, [], 5)


def fake_run(path: Path, wrong: int, images: int = 2000, gained: int = 0) -> Path:
    """A run folder whose target predictions have `wrong` errors, `gained` of the baseline's errors put right."""
    path.mkdir()
    label = np.arange(images) % 7
    predicted = label.copy()
    predicted[gained : wrong + gained] += 1
    RunFolder.open(path).write_predictions({"a": (label[:100], label[:100]), "c": (predicted, label)})
    (path / "results.json").write_text(json.dumps({"test_domain": "c"}))
    return path


def test_compare_fails_a_planted_three_point_drop_and_passes_a_small_one_on_2000_images(tmp_path: Path) -> None:
    baseline = fake_run(tmp_path / "fp", 600)
    assert not compare_runs(baseline, fake_run(tmp_path / "bad", 660), 1.0).passed
    assert compare_runs(baseline, fake_run(tmp_path / "good", 604), 1.0).passed
    assert compare_runs(baseline, tmp_path / "bad", 4.0).passed


def test_a_drop_within_the_noise_passes_and_the_same_drop_on_more_images_fails(tmp_path: Path) -> None:
    """1.5 points with many answers changed both ways is noise on 200 images and real on 20,000."""
    for images, passes in ((200, True), (20_000, False)):
        unit = images // 200
        baseline = fake_run(tmp_path / f"fp{images}", 60 * unit, images)
        run_path = fake_run(tmp_path / f"run{images}", 63 * unit, images, gained=20 * unit)
        assert compare_runs(baseline, run_path, 0.5).passed is passes


def test_mcnemar_against_the_binomial_distribution() -> None:
    rng = np.random.default_rng(0)
    simulated = rng.binomial(24, 0.5, 400_000)
    assert mcnemar(6, 18) == pytest.approx(((simulated <= 6) | (simulated >= 18)).mean(), abs=2e-3)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0


def test_stored_baselines_and_outputs(tmp_path: Path) -> None:
    baseline, worse = fake_run(tmp_path / "fp", 600), fake_run(tmp_path / "bad", 700)
    write_baseline(baseline, tmp_path / "baselines/net.json")
    comparison = compare_runs(tmp_path / "baselines/net.json", worse, 1.0)
    assert not comparison.passed and "**failed**" in comparison.markdown() and comparison.to_json()["passed"] is False
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"bad\.json: not a stored baseline"):
        compare_runs(tmp_path / "bad.json", worse, 1.0)
    other = fake_run(tmp_path / "other", 10, images=1999)
    with pytest.raises(RecipeError, match="different images of c"):
        compare_runs(baseline, other, 1.0)


@pytest.mark.parametrize(("run_name", "code"), [("bad", 1), ("good", 0), ("absent", 2)])
def test_the_command_line_exits_with_the_verdict(
    tmp_path: Path, run_name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run(tmp_path / "fp", 600)
    fake_run(tmp_path / "bad", 700)
    fake_run(tmp_path / "good", 600)
    arguments = ["qat", "compare", str(tmp_path / "fp"), str(tmp_path / run_name), "--max-drop", "1.0"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    if code == 2:
        assert "absent: no such run folder" in capsys.readouterr().err


def test_samples_are_evenly_spread(runs: tuple[Path, Path]) -> None:
    samples = RunFolder.open(runs[0]).samples()
    _, counts = np.unique(samples.domains, return_counts=True)
    assert counts.max() - counts.min() <= 1
