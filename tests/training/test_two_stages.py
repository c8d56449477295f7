"""BiPer's two stages: what passes between them, what a schedule does, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qat.deploy import certify_run, export_run, write_report
from qat.domains.cifar import cifar10_split
from qat.domains.folders import ArrayImages, Domain
from qat.domains.splits import Split
from qat.runs.build import load_run
from qat.runs.parts import Binarization, RecipeError
from qat.runs.recipe import from_json, recipe_of, to_json
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder
from qat.surgery.binarize import periodic_weights
from qat.train import loop
from qat.train.data import in_steps
from qat.train.start import schedule_of
from qat.train.two_stages import run_stages

TINY = recipe_of("biper",
    data="cifar10", test_domain="test", backbone="test_resnet", image_size=32, batch_size=8, augmentation="crop-flip",
    normalization="imagenet", epochs=1, stage2_epochs=1, warmup=0, workers=0, lr=0.01, stage2_lr=1e-9, frequency=15.0,
    calibration_batches=1, holdout=0.25,
)  # fmt: skip
DEFAULT = Binarization()
# Stage 2 by itself takes the flags of every run
ALONE = TINY.changed(stage2_epochs=DEFAULT.stage2_epochs, stage2_lr=DEFAULT.stage2_lr)


def split() -> Split:
    rng = np.random.default_rng(0)
    train, test = [
        Domain(name, ("a", "b"), ArrayImages(rng.integers(0, 256, (n, 32, 32, 3), np.uint8)), np.arange(n) % 2)
        for name, n in (("train", 32), ("test", 8))
    ]
    return cifar10_split(train, test, 0.25, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("biper") / "run"
    return run_stages(TINY.changed(frequency_start=5.0, out=out), split()).path


def test_stage_two_begins_with_stage_ones_parameters_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, torch.Tensor]] = []

    class Stopped(Exception):
        pass

    def stop(trainer: loop._Trainer) -> None:
        begun.append({k: v for k, v in trainer.built.model.state_dict().items() if isinstance(v, torch.Tensor)})
        raise Stopped

    monkeypatch.setattr(loop._Trainer, "fit", stop)
    second = ALONE.changed(stage=2, init_from=finished / "stage1", out=tmp_path / "second")
    with pytest.raises(Stopped):
        run_stages(second, split())
    stored = RunFolder.open(finished / "stage1").load("checkpoint.pt")["model"]
    assert begun[0].keys() == {k for k, v in stored.items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(value, stored[name]) for name, value in begun[0].items())


def test_both_stages_are_whole_run_folders_and_know_their_stage(finished: Path) -> None:
    for path, stage in ((finished / "stage1", 1), (finished, 2)):
        _, recipe, built = load_run(path)
        assert recipe.binarization.stage == stage
        pairs = periodic_weights(built.model)
        assert pairs and {q.stage for q, _ in pairs} == {stage}
        assert {round(float(q.frequency), 4) for q, _ in pairs} == {15.0}  # the schedule's end, taken over by stage 2
    assert RunFolder.open(finished).recipe().optimization.lr == TINY.binarization.stage2_lr
    assert RunFolder.open(finished).results()["target_holdout"] is None


@pytest.mark.slow
def test_the_run_is_exported_certified_and_reported(finished: Path) -> None:
    file = export_run(finished, "ort-packed")
    certificate = certify_run(finished, file)
    exact = [level.total for level in certificate.levels if level.level in ("EXTENDED", "ALL")]
    assert exact == [0, 0] and not certificate.stored and not certificate.adversarial
    assert certificate.integer_kernels == certificate.layers
    assert "Quantization error and frequency" in write_report(finished).read_text()
    with pytest.raises(ValueError, match="stage 1"):
        export_run(finished / "stage1", "ort-packed")


def test_a_finished_first_stage_is_not_run_again(finished: Path) -> None:
    before = (finished / "stage1" / "checkpoint.pt").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="holds a run already"):
        run_stages(TINY.changed(out=finished), split())
    run_stages(TINY.changed(out=finished, frequency_start=5.0, resume=True), split())
    assert (finished / "stage1" / "checkpoint.pt").stat().st_mtime_ns == before


def test_recipes_are_recorded_and_checked(tmp_path: Path) -> None:
    recipe = TINY.changed(binarizer="recu", init_from=tmp_path)
    assert from_json(to_json(recipe), tmp_path) == recipe
    for change, message in (
        ({"edge_bits": 9}, "--edge-bits"),
        ({"frequency": 0.0}, "--frequency must be more than 0"),
        ({"frequency_start": 3.0, "learn_frequency": True}, "has no schedule"),
        ({"data": "domains"}, "give --steps"),
    ):
        with pytest.raises(RecipeError, match=message):
            check(TINY.changed(**change))
    with pytest.raises(RecipeError, match="name its folder with --init-from"):
        check(ALONE.changed(stage=2))


def test_stage_two_refuses_another_kind_of_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a stage-1 run of biper"):
        run_stages(ALONE.changed(stage=2, init_from=finished, out=tmp_path / "x"), split())


def test_epochs_and_warm_up_are_counted_in_steps() -> None:
    recipe = in_steps(recipe_of("fp", data="cifar10", batch_size=10, epochs=4, warmup=2), split())
    # 24 images left: 3 steps an epoch
    assert (recipe.optimization.steps, recipe.optimization.warmup) == (12, 6)
    assert recipe.tracking.evaluate_every == 3
    factor = schedule_of(recipe.optimization)
    expected = [(s + 1) / 6 for s in range(6)] + [0.5 * (1 + np.cos(np.pi * s / 6)) for s in range(6)]
    assert np.allclose([factor(s) for s in range(12)], expected, rtol=0, atol=1e-12)
