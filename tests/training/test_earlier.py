"""Run folders written before a quantizer's scale was called so: they load, resume, compare, and show what they showed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qat.analysis.inspection import inspect_run
from qat.deploy import certify_run, export_run, write_report
from qat.domains.synthetic import synthetic_domains
from qat.quantizers.lsq import LSQ
from qat.quantizers.spec import QuantSpec
from qat.runs.build import load_run
from qat.runs.recipe import Recipe, recipe_of
from qat.runs.run_folder import RunFolder
from qat.train.loop import run

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 4, "batch_size": 4, "evaluate_every": 1, "workers": 0,
    "averaging": "swad", "window": 2, "scale_lr_unit": "scale",
}  # fmt: skip


# Flags that came later, which neither recipe.json nor a checkpoint of then has
LATER = ("label_smoothing", "mixup", "trackers", "input_scales", "edges")


def as_before(folder: Path) -> None:
    """Give every file the names that it had: written out here, by hand, as they stand in a folder of version 0.1."""
    text = (folder / "recipe.json").read_text()
    for now, then in (("scale_lr_ratio", "step_lr_ratio"), ("scale_lr_unit", "step_lr_unit")):
        assert f'"{now}"' in text
        text = text.replace(f'"{now}"', f'"{then}"')
    recipe = json.loads(text)
    recipe["step_lr_unit"] = "step"
    for name in LATER:
        recipe.pop(name)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    log = (folder / "metrics.jsonl").read_text()
    assert '"scales": {' in log
    (folder / "metrics.jsonl").write_text(log.replace('"scales": {', '"steps": {'))
    for name in ("last.pt", "checkpoint.pt"):
        state = torch.load(folder / name, weights_only=True)
        state = everywhere(state, lambda key: key.replace("raw_scale", "raw_step"))
        if "scale_sizes" in state:
            state["step_sizes"] = state.pop("scale_sizes")
        if "recipe" in state:
            state["recipe"] = {key.replace("scale_lr", "step_lr"): value for key, value in state["recipe"].items()}
            state["recipe"]["step_lr_unit"] = "step"
            for name in LATER:
                state["recipe"].pop(name)
        torch.save(state, folder / name)


def everywhere(value: Any, rename: Callable[[str], str]) -> Any:
    """Keys of dictionaries, however deep, renamed."""
    if isinstance(value, dict):
        return {rename(k) if isinstance(k, str) else k: everywhere(v, rename) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(everywhere(v, rename) for v in value)
    return value


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that stopped after two of its steps, in files of before."""
    root = tmp_path_factory.mktemp("earlier")
    start = run(
        recipe_of("fp", backbone="test_resnet", image_size=32, steps=1, batch_size=4, workers=0, out=root / "fp"),
        DOMAINS,
    )
    recipe = recipe_of("gaqat", **TINY, init_from=start.path, out=root / "run")
    from qat.train import loop

    whole = loop._Trainer._train

    def dies(self: loop._Trainer, *args: object) -> None:
        if self.progress.step == 2:
            raise KeyboardInterrupt
        whole(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, DOMAINS)
    assert recipe.tracking.out is not None
    as_before(recipe.tracking.out)
    return recipe


@pytest.mark.slow
def test_a_run_of_before_resumes_and_ends_as_one_that_never_stopped(stopped: Recipe, tmp_path: Path) -> None:
    whole = run(stopped.changed(out=tmp_path / "whole"), DOMAINS)
    resumed = run(stopped.changed(resume=True), DOMAINS)
    expected, found = (folder.load("checkpoint.pt")["model"] for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if isinstance(value, torch.Tensor))
    names = [list(entry["scales"]) for entry in resumed.metrics() if "scales" in entry]
    assert len(names) == 5 and all(each == names[0] for each in names)  # before the first step, and after each
    assert all(
        "scales" in line for line in (resumed / "metrics.jsonl").read_text().splitlines() if '"source_mean"' in line
    )

    before = inspect_run(resumed.path)
    predictions = resumed.predictions()
    as_before(resumed.path)
    again = RunFolder.open(resumed.path)
    assert inspect_run(resumed.path) == before
    assert all((again.predictions()[name][0] == value[0]).all() for name, value in predictions.items())
    file = export_run(resumed.path, "ort-packed")
    certificate = certify_run(resumed.path, file, images=None)
    assert certificate.passed
    assert write_report(resumed.path).read_text().count(">Learned scales<") == 1


def test_a_state_dict_of_before_loads_into_a_model_of_now() -> None:
    trained, fresh = (nn.Sequential(nn.Flatten(), LSQ(QuantSpec(4, signed=True))) for _ in range(2))
    trained[1].initialize(torch.tensor(0.37))
    state = {name.replace("raw_scale", "raw_step"): value for name, value in trained.state_dict().items()}
    assert "1.raw_step" in state
    fresh.load_state_dict(state)
    assert float(fresh[1].scale) == pytest.approx(0.37)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({name: value for name, value in state.items() if name != "1.raw_step"})


def test_a_run_without_the_entries_of_newer_versions_loads(tmp_path: Path) -> None:
    tiny = {"backbone": "test_resnet", "image_size": 32, "steps": 1, "batch_size": 4, "workers": 0}
    folder = run(recipe_of("fp", **tiny, out=tmp_path / "run"), DOMAINS).path
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    recipe = json.loads((folder / "recipe.json").read_text())
    for entries in (state["recipe"], recipe):
        del entries["label_smoothing"]
    torch.save(state, folder / "checkpoint.pt")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert load_run(folder)[1].method == "fp"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(["images", "images (selected on)"], "images (selected on)"), (["images", "test"], "test"), (["images"], "test")],
)
def test_a_part_that_was_called_test_bears_its_own_name(measured: list[str], expected: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    answers = np.zeros(3, np.int64)
    folder.write_predictions(dict.fromkeys(measured, (answers, answers)))
    written = {"test_domain": "test", "source_validation": {"images": 1.0}}
    (tmp_path / "results.json").write_text(json.dumps(written))
    assert folder.results() == written | {"test_domain": expected}
