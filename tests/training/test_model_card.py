"""The model card beside an export: its numbers are those of the run, and a card that somebody edited stays."""

from pathlib import Path

import numpy as np
import pytest

from qat.analysis.model_card import MARK, card_of, standard_error
from qat.deploy import certify_run, export_run
from qat.domains.synthetic import synthetic_domains
from qat.runs.recipe import recipe_of
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.train.loop import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lsq"
    tiny = {"backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 4, "evaluate_every": 2, "workers": 0}
    run(recipe_of("lsq", **tiny, out=out), synthetic_domains(per_class=6, image_size=32, seed=0))
    return out


def test_the_card_says_what_was_measured_and_then_what_was_proven(trained: Path) -> None:
    model = export_run(trained, "ort-packed")
    card = card_of(model).read_text()
    folder = RunFolder(trained)
    results = results_of(folder)
    for domain, (predicted, labels) in folder.predictions().items():
        right = (predicted == labels).astype(float)
        # The standard error of a mean, computed of the answers themselves
        error = float(np.std(right)) / len(right) ** 0.5
        note = " (never trained on)" if domain == results["test_domain"] else ""
        assert f"| {domain}{note} | {100 * right.mean():.2f} | {100 * error:.2f} | {len(right)} |" in card
    assert "target ort-packed" in card and "None yet" in card
    assert certify_run(trained, model).passed
    proven = card_of(model).read_text()
    assert "Certificate: passed" in proven and "None yet" not in proven


@pytest.mark.slow
def test_a_card_that_somebody_edited_stays(trained: Path, tmp_path: Path) -> None:
    model = export_run(trained, out=tmp_path / "net.onnx")
    card = tmp_path / "net.md"
    mine = card.read_text().replace(f"{MARK}\n", "").replace("license: other", "license: mit")
    card.write_text(mine)
    export_run(trained, "ort-packed", out=model)
    certify_run(trained, model)
    assert card.read_text() == mine


@pytest.mark.slow
def test_a_file_written_anew_has_not_the_old_one_s_certificate(trained: Path) -> None:
    model = export_run(trained)
    certify_run(trained, model)
    export_run(trained, "fp32", out=model)
    assert "None yet" in card_of(model).read_text()


def test_the_error_of_a_sure_thing_is_none() -> None:
    assert standard_error(1.0, 7) == 0 == standard_error(0.0, 7)
