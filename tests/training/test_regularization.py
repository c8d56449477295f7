"""Label smoothing, mixup, RandAugment, services that take scalars, and the choices of GAQAT's first author."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qat.deploy import export_run
from qat.domains.synthetic import synthetic_domains
from qat.domains.transforms import randaugment
from qat.objectives.domain_aware import smoothed_loss
from qat.runs.build import build
from qat.runs.parts import RecipeError
from qat.runs.presets import PRESETS
from qat.runs.recipe import recipe_of
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder
from qat.surgery.backbones import Mixup
from qat.surgery.swap import quantizers
from qat.train import loop
from qat.train.data import split_domains
from qat.train.loop import run
from qat.train.start import calibrated, is_sgd
from qat.train.tracking import Tracker

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 3, "evaluate_every": 2, "workers": 0,
}  # fmt: skip


def test_smoothed_labels_give_the_cross_entropy_with_shares_of_all_classes() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 3, 1])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            share = 0.2 / 5 + (0.8 if index == label else 0.0)
            expected -= share * (value - total) / 4
    found = smoothed_loss(0.2)(logits, logits, labels, labels)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_mixup_mixes_every_image_with_its_mirror_in_the_batch(count: int) -> None:
    images, labels = torch.randn(count, 3, 4, 4), torch.arange(count) % 3
    mix = Mixup(0.4, classes=3, seed=7)
    mixed, shares = mix(images, labels, 11)
    # Two unknown numbers, l and 1 - l, from the first pixel of the first image
    first, last, seen = float(images[0, 0, 0, 0]), float(images[-1, 0, 0, 0]), float(mixed[0, 0, 0, 0])
    share = (seen - last) / (first - last)
    assert 0 <= share <= 1
    for index in range(count):
        other = count - 1 - index
        expected = images[index].numpy() * share + images[other].numpy() * (1 - share)
        assert np.allclose(mixed[index].numpy(), expected, atol=1e-5)
        row = [0.0, 0.0, 0.0]
        row[int(labels[index])] += share
        row[int(labels[other])] += 1 - share
        assert shares[index].tolist() == pytest.approx(row, abs=1e-5)


def test_mixup_follows_from_seed_and_step_and_leaves_generators_alone() -> None:
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    drawn = [
        float(Mixup(1.0, 3, seed)(images, labels, step)[1][0, 0]) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    before = torch.get_rng_state()
    Mixup(1.0, 3, 0)(images, labels, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_randaugment_changes_images_by_torchs_generator_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    transform = randaugment(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def seen(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return transform(image)

    assert seen(1).shape == (3, 32, 32) and seen(1).dtype == torch.float32
    assert torch.equal(seen(1), seen(1)) and not torch.equal(seen(1), seen(2))


def test_a_run_with_all_of_them_differs_from_one_without_and_resumes_to_the_same(tmp_path: Path) -> None:
    flags = TINY | {
        "mixup": 0.3,
        "label_smoothing": 0.1,
        "augmentation": "randaugment",
        "steps": 4,
        "evaluate_every": 2,
    }
    whole = run(recipe_of("fp", **flags, out=tmp_path / "whole"), DOMAINS)
    plain = run(recipe_of("fp", **(flags | {"mixup": 0.0}), out=tmp_path / "plain"), DOMAINS)
    run(recipe_of("fp", **(flags | {"steps": 2}), schedule="constant", out=tmp_path / "half"), DOMAINS)
    again = recipe_of("fp", **flags, schedule="constant", out=tmp_path / "half", resume=True)
    resumed = run(again, DOMAINS)
    straight = run(recipe_of("fp", **flags, schedule="constant", out=tmp_path / "straight"), DOMAINS)

    def losses(folder: RunFolder) -> list[float]:
        return [entry["loss"] for entry in folder.metrics() if "loss" in entry]

    assert losses(whole) != losses(plain)
    assert losses(resumed) == losses(straight)


@pytest.mark.parametrize("name", ["mixup", "label_smoothing"])
def test_losses_that_read_classes_refuse_shares_of_them(name: str) -> None:
    with pytest.raises(RecipeError, match=f"--{name.replace('_', '-')} .* --domain-loss coral"):
        check(recipe_of("fp", **(TINY | {name: 0.2}), domain_loss="coral"))


def test_the_authors_choices_are_those_of_their_study(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **(TINY | PRESETS["authors"]), out=tmp_path / "run")
    folder = run(recipe, DOMAINS)
    state = folder.load("checkpoint.pt")["model"]
    assert "conv1.0.input_quantizer.raw_scale" in state and "conv1.0.weight_quantizer.raw_scale" not in state
    assert not any(name.startswith("fc.") and "quantizer" in name for name in state)
    kinds = [node.op_type for node in _graph(export_run(folder.path, "qonnx"))]
    assert kinds.count("Quant") > 10
    with pytest.raises(ValueError, match="float weight"):
        export_run(folder.path, "ort-packed")


def test_input_scales_start_at_one_and_sums_where_calibration_puts_them() -> None:
    scales: dict[str, dict[str, float]] = {}
    for start in ("calibrated", "one"):
        recipe = recipe_of("lsq", **TINY, input_scales=start)
        split = split_domains(recipe.images, DOMAINS)
        torch.manual_seed(0)
        built = build(recipe, len(split.classes))
        processes = SimpleNamespace(rank=0, count=1)
        calibrated(recipe, built, split, processes)  # type: ignore[arg-type]
        scales[start] = {name: float(q.raw_scale.detach().mean()) for name, q in quantizers(built.model).items()}
    inputs = [name for name in scales["one"] if name.endswith(".input")]
    assert inputs and all(scales["one"][name] == 1.0 for name in inputs)
    assert all(scales["calibrated"][name] != 1.0 for name in inputs)
    others = scales["one"].keys() - set(inputs)
    assert others and all(scales["one"][name] == scales["calibrated"][name] for name in others)


def test_nesterov_steps_along_the_gradient() -> None:
    assert [is_sgd(name) for name in ("sgd", "momentum", "nesterov", "nadam", "adam")] == [True] * 3 + [False] * 2


def test_services_get_every_scalar_by_its_step(tmp_path: Path) -> None:
    sent: list[tuple[int, dict[str, float]]] = []

    def send(values: dict[str, float], step: int) -> None:
        sent.append((step, values))

    with Tracker(tmp_path, steps=2, services=send) as tracker:
        tracker.log(1, {"loss": 0.5, "source": {"a": 0.1, "b": 0.2}})
        tracker.log(2, {"loss": 0.4})
    assert sent == [(1, {"loss": 0.5, "source/a": 0.1, "source/b": 0.2}), (2, {"loss": 0.4})]


def test_a_service_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(RecipeError, match=r"--trackers comet_ml: comet-ml is not installed.*pip install comet-ml"):
        run(recipe_of("fp", **TINY, trackers=("comet_ml",), out=tmp_path / "run"), DOMAINS)
    assert not (tmp_path / "run").exists()


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(str(path)).graph.node
