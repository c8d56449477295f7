"""What a sweep's report shows beside its table: the hardest images, disorder, size and latency. Cells are real, and tiny."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeqat.files import write_json
from qat.analysis.hardest import hardest_images, lost_images
from qat.deploy import measure_sweep
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import RecipeError
from qat.runs.run_folder import RunFolder
from qat.sweep.report import write_tables
from qat.sweep.spec import Sweep, read_sweep
from qat.train.loop import run
from tools.tables import line

SIZE, PER_CLASS = 32, 3
GRID = f"""
methods = ["fp", "gaqat"]
targets = ["sketch"]
seeds = [0]

[values]
backbone = "test_resnet"
image-size = {SIZE}
per-class = {PER_CLASS}
steps = 4
batch-size = 2
evaluate-every = 4
workers = 0
calibration-batches = 1

[method.gaqat]
window = 2
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    file = tmp_path_factory.mktemp("sweep") / "grid.toml"
    file.write_text(GRID)
    found = read_sweep(file)
    domains = synthetic_domains(per_class=PER_CLASS, image_size=SIZE, seed=0)
    for cell in found.cells():
        run(cell.recipe, domains)
    return found


def test_the_hardest_images_are_those_that_most_runs_answer_wrongly(sweep: Sweep, monkeypatch: Any) -> None:
    folders = [RunFolder.open(sweep.out / cell.name) for cell in sweep.cells()]
    labels = folders[0].predictions()["sketch"][1]
    classes = int(labels.max()) + 1
    # Image 5 is wrong in both runs, image 2 in one, all others in none
    answers = [labels.copy(), labels.copy()]
    for predicted in answers:
        predicted[5] = (labels[5] + 1) % classes
    answers[1][2] = (labels[2] + 2) % classes
    given = iter(answers)
    monkeypatch.setattr(RunFolder, "predictions", lambda self: {"sketch": (next(given), labels)})
    names = folders[0].results()["classes"]
    worst, next_worst = hardest_images(folders, 5)
    assert (worst.label, worst.mistaken_for, worst.wrong, worst.runs) == (
        names[labels[5]], names[(labels[5] + 1) % classes], 2, 2,
    )  # fmt: skip
    assert (next_worst.label, next_worst.wrong) == (names[labels[2]], 1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(worst.png))))
    domain = next(d for d in synthetic_domains(per_class=PER_CLASS, image_size=SIZE, seed=0) if d.name == "sketch")
    alike = [int(i) for i in range(len(domain.labels)) if np.array_equal(np.asarray(domain.images[i]), shown)]
    assert alike and all(domain.labels[i] == labels[5] for i in alike)


def test_lost_images_are_those_that_the_baseline_alone_answers_rightly(sweep: Sweep, monkeypatch: Any) -> None:
    baseline, folder = (RunFolder.open(sweep.out / cell.name) for cell in sweep.cells()[:2])
    labels = baseline.predictions()["sketch"][1]
    classes = int(labels.max()) + 1
    first, second = labels.copy(), labels.copy()
    first[[1, 4]] = (labels[[1, 4]] + 1) % classes
    second[[1, 3, 6]] = (labels[[1, 3, 6]] + 2) % classes  # 1 is wrong in both, 3 and 6 are lost, 4 is won
    given = {baseline.path: first, folder.path: second}
    monkeypatch.setattr(RunFolder, "predictions", lambda self: {"sketch": (given[self.path], labels)})
    names = baseline.results()["classes"]
    found = [(image.label, image.mistaken_for) for image in lost_images(baseline, folder)]
    assert found == [(names[labels[i]], names[(labels[i] + 2) % classes]) for i in (3, 6)]
    assert len(lost_images(baseline, folder, count=1)) == 1


def test_runs_of_other_images_are_refused(sweep: Sweep, monkeypatch: Any) -> None:
    folders = [RunFolder.open(sweep.out / cell.name) for cell in sweep.cells()]
    labels = folders[0].predictions()["sketch"][1]
    given = iter([labels, labels[:-1]])

    def predictions(folder: RunFolder) -> dict[str, Any]:
        found = next(given)
        return {"sketch": (found, found)}

    monkeypatch.setattr(RunFolder, "predictions", predictions)
    with pytest.raises(RecipeError, match="not of the images"):
        hardest_images(folders)


def test_the_report_has_images_disorder_and_a_frontier_once_files_are_measured(sweep: Sweep) -> None:
    _, report = write_tables(sweep)
    text = report.read_text()
    assert "data:image/png" in text and "Disorder of the scales" in text and "Accuracy, size, latency" not in text
    sizes = [
        {"name": "fp32", "size": 4_000_000, "median_ms": 2.0},
        {"name": "quantized", "size": 700_000, "median_ms": 1.0},
    ]
    quantized = next(cell for cell in sweep.cells() if cell.method == "gaqat")
    write_json(sweep.out / quantized.name / "latency.json", sizes)
    _, report = write_tables(sweep)
    text = report.read_text()
    assert "Accuracy, size, latency" in text and "gaqat 4 bit, 1.00 ms" in text and "fp, 2.00 ms" in text
    (sweep.out / quantized.name / "latency.json").unlink()


def test_a_file_of_every_quantized_row_is_measured_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = next(cell for cell in sweep.cells() if cell.method == "gaqat")
    (sweep.out / quantized.name / "latency.json").unlink(missing_ok=True)
    assert measure_sweep(sweep, "ort-packed") == {}
    fp32, packed = json.loads((sweep.out / quantized.name / "latency.json").read_text())
    assert packed["size"] == (sweep.out / quantized.name / "model.onnx").stat().st_size < fp32["size"] / 2
    monkeypatch.setattr("qat.deploy.export_run", lambda *given: pytest.fail("measured again"))
    assert measure_sweep(sweep, "ort-packed") == {}
    (sweep.out / quantized.name / "latency.json").unlink()


def test_a_row_that_has_no_file_for_a_target_is_named(sweep: Sweep) -> None:
    (left,) = measure_sweep(sweep, "warp").items()
    assert left[0].startswith("gaqat-4bit-sketch") and "warp" in left[1]


def test_every_number_of_a_table_names_its_folder_and_command(sweep: Sweep) -> None:
    for cell in sweep.cells():
        folder = RunFolder.open(sweep.out / cell.name)
        share = folder.results()["target"]
        text = line(sweep, cell)
        assert f"{100 * share:.2f} %" in text and "seed 0, 4 steps" in text
        assert f"qat train {cell.method} --config {sweep.out / cell.name / 'recipe.json'}" in text


def test_images_that_are_gone_are_said_in_the_report(sweep: Sweep, monkeypatch: Any) -> None:
    def gone(*arguments: Any, **options: Any) -> Any:
        raise RecipeError("no such folder")

    monkeypatch.setattr("qat.analysis.hardest.split_of", gone)
    _, report = write_tables(sweep)
    assert "its images are gone (no such folder)" in report.read_text()
