"""From a run to a proven file and its bundle: what `qat certify` and `qat bundle` leave behind."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from export.lowered import ExportError
from export.metadata import proof_of, read_metadata, write_metadata
from export.predict import predict
from export.verify import verify_file
from qat.analysis.compare import compare_runs, write_baseline
from qat.cli import Bundle, Certify, Compare, execute, guarded
from qat.deploy import (
    bundle_run,
    certificate_of,
    certify_run,
    compare_file,
    export_run,
    measure_file,
    write_report,
)
from qat.domains.synthetic import synthetic_domains
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import recipe_of
from qat.runs.run_folder import RunFolder
from qat.surgery.calibrate import in_full_precision
from qat.train.loop import run
from tests.quick import slow_but

TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 4, "evaluate_every": 2, "workers": 0,
    "calibration_batches": 2, "per_class": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    domains = synthetic_domains(per_class=6, image_size=32, seed=0)
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        run(recipe_of("lsq", **TINY, seed=seed, out=folder / name), domains)
    return folder / "first", folder / "second"


@pytest.fixture(scope="module")
def file(runs: tuple[Path, Path]) -> Path:
    return export_run(runs[0], "ort-packed")


def test_a_proven_file_says_where_and_its_certificate_is_of_that_file(runs: tuple[Path, Path], file: Path) -> None:
    assert proof_of(onnx.load(str(file))) == []
    certificate = certify_run(runs[0], file)
    assert certificate.passed
    (entry,) = proof_of(onnx.load(str(file)))
    assert entry["images"] == certificate.images and entry["runtime"].startswith("ONNX Runtime ")
    written = json.loads((runs[0] / "certificate.json").read_text())
    assert written["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "other processors (arm64,x86,wasm; --on or on= tries them)" in str(certificate)
    schema = json.loads((Path(__file__).parents[2] / "docs/certificate.schema.json").read_text())
    jsonschema.validate(written, schema)
    with pytest.raises(jsonschema.ValidationError, match="'passed' is a required property"):
        jsonschema.validate({key: value for key, value in written.items() if key != "passed"}, schema)


def test_a_bundle_is_checked_by_its_own_script(runs: tuple[Path, Path], file: Path, tmp_path: Path) -> None:
    folder = bundle_run(runs[0], file, tmp_path / "deep" / "bundle", images=3)
    done = subprocess.run([sys.executable, str(folder / "check.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "on 3 images" in done.stdout and done.stdout.endswith("THE SAME CODES\n")
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]  # nothing else is left behind


def test_a_bundle_of_another_runs_file_or_over_a_folder_is_refused(
    runs: tuple[Path, Path], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ExportError, match=r"model\.onnx: is not a file of .*second: layer '.*': .* weight codes differ"
    ):
        bundle_run(runs[1], file, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert guarded(lambda: execute(Bundle(runs[0], file, tmp_path))) == 2
    assert f"{tmp_path}: exists; name a new folder" in capsys.readouterr().err


def test_a_file_that_every_runtime_computes_as_it_likes_has_no_bundle(runs: tuple[Path, Path], tmp_path: Path) -> None:
    plain = export_run(runs[0], "qdq", tmp_path / "plain.onnx")
    with pytest.raises(ExportError, match=r"plain\.onnx: a file of target qdq has no one arithmetic"):
        bundle_run(runs[0], plain, tmp_path / "bundle")


def test_a_file_of_an_earlier_format_is_verified_but_not_certified(
    runs: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    proto = onnx.load(str(file))
    (entry,) = (p for p in proto.metadata_props if p.key == "edgeqat")
    entry.value = json.dumps(json.loads(entry.value) | {"format": 1})
    onnx.save(proto, str(tmp_path / "older.onnx"))
    assert verify_file(tmp_path / "older.onnx").passed
    with pytest.raises(ExportError, match=r"older\.onnx: was written by edgeqat .* in format 1, .* export it again"):
        certify_run(runs[0], tmp_path / "older.onnx")


def test_an_unknown_machine_is_refused_before_anything_runs(
    runs: tuple[Path, Path], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: execute(Certify((runs[0], file), on="arm46"))) == 2
    assert "on 'arm46': unknown; there are arm64, x86, wasm" in capsys.readouterr().err


def resaid(file: Path, out: Path, **changes: object) -> Path:
    """The file with other metadata, its digests made anew as whoever changes it would."""
    proto = onnx.load(str(file))
    value = read_metadata(proto, str(file))
    for key, change in changes.items():
        part = value["input"] if key in value["input"] else value
        part[key] = change(part[key]) if callable(change) else change
    write_metadata(proto, value)
    onnx.save(proto, str(out))
    return out


CLAIMS: dict[str, object] = {
    "classes": lambda names: names[::-1],
    "mean": [0.0, 0.0, 0.0],
    "std": [0.1, 0.1, 0.1],
    "size": 64,
    "target": "ort-int8",
    "session_options": {"session.x64quantprecision": "1"},
    "layers": lambda layers: layers[1:],
}


TOGETHER = ["classes", "mean", "std", "session_options", "layers"]


@pytest.mark.parametrize(
    "claims",
    slow_but([["target"]], [["target"], TOGETHER, *([claim] for claim in CLAIMS if claim != "target")]),
    ids=",".join,
)
def test_what_a_file_says_of_itself_is_certified_too(
    claims: list[str], runs: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    changed = resaid(file, tmp_path / "changed.onnx", **{claim: CLAIMS[claim] for claim in claims})
    certificate = certificate_of(runs[0], changed)
    # The run is asked what it would say for the target that is claimed.
    named = {{"target": "storage"}.get(claim, claim) for claim in claims}
    assert not certificate.passed and set(certificate.said) == named, str(certificate)
    assert all(f"{name}: the file" in str(certificate) for name in named) and certificate.stored == {}


def test_a_layer_entry_of_another_width_is_no_longer_the_runs(
    runs: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    changed = resaid(file, tmp_path / "changed.onnx", layers=lambda ls: [ls[0] | {"sha256": "0" * 64}, *ls[1:]])
    certificate = certificate_of(runs[0], changed)
    assert not certificate.passed and list(certificate.said) == ["layers"]


def altered(file: Path, out: Path, suffix: str, *, signed: bool) -> tuple[Path, str]:
    """The file with one number of one layer changed, and that layer; signed anew where asked."""
    proto = onnx.load(str(file))
    value = read_metadata(proto, str(file))
    entry = value["layers"][2]
    tensor = next(t for t in proto.graph.initializer if t.name == f"{entry['name']}{suffix}")
    changed = bytearray(tensor.raw_data)
    changed[2] ^= 1
    tensor.raw_data = bytes(changed)
    if signed:
        key = {".weight/s": "scale_sha256", ".bias": "bias_sha256"}[suffix]
        entry[key] = hashlib.sha256(tensor.raw_data).hexdigest()
        write_metadata(proto, value)
    onnx.save(proto, str(out))
    return out, entry["name"]


@pytest.mark.parametrize(("suffix", "what"), [(".weight/s", "scale"), (".bias", "bias")])
def test_a_changed_scale_or_bias_is_seen_without_the_run_and_signed_anew_with_it(
    suffix: str, what: str, runs: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    plain, layer = altered(file, tmp_path / "plain.onnx", suffix, signed=False)
    check = verify_file(plain)
    assert not check.passed and check.signed == {layer: f"its {what} does not match its SHA-256"}
    forged, layer = altered(file, tmp_path / "forged.onnx", suffix, signed=True)
    assert verify_file(forged).passed and "whoever can change a file can sign it anew" in str(verify_file(forged))
    certificate = certificate_of(runs[0], forged)
    assert not certificate.passed and layer in certificate.stored


def test_a_changed_graph_and_a_changed_list_are_seen_without_the_run(file: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(file))
    proto.graph.node[-1].name = "other"
    onnx.save(proto, str(tmp_path / "graph.onnx"))
    assert list(verify_file(tmp_path / "graph.onnx").signed) == ["graph"]
    proto = onnx.load(str(file))
    (entry,) = (p for p in proto.metadata_props if p.key == "edgeqat")
    value = json.loads(entry.value)
    value["layers"][0]["scale_sha256"] = "0" * 64
    entry.value = json.dumps(value)
    onnx.save(proto, str(tmp_path / "list.onnx"))
    assert "list of layers" in verify_file(tmp_path / "list.onnx").signed


def test_the_file_answers_as_its_run_did_on_every_image(runs: tuple[Path, Path], file: Path) -> None:
    """The predictions that the run keeps are of the settled net, and the file's are the same."""
    measured = measure_file(file, RunFolder.open(runs[0]).recipe())
    for domain, (predicted, labels) in RunFolder.open(runs[0]).predictions().items():
        found, same_labels = measured.predictions[domain]
        assert np.array_equal(found, predicted) and np.array_equal(same_labels, labels)
    comparison = compare_file(runs[0], file, 0.0)
    assert comparison.passed and all(row.drop == 0 and row.mcnemar == 1 for row in comparison.rows)


def test_a_file_is_judged_against_a_stored_baseline_and_a_worse_one_fails(
    runs: tuple[Path, Path], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.json"
    write_baseline(runs[0], baseline)
    assert guarded(lambda: execute(Compare(baseline, file, max_drop=0.0))) == 0
    value = json.loads(baseline.read_text())
    value["domains"] = {domain: [labels, labels] for domain, (_, labels) in value["domains"].items()}  # all right
    baseline.write_text(json.dumps(value))
    assert guarded(lambda: execute(Compare(baseline, file, max_drop=1.0))) == 1
    assert "FAILED" in capsys.readouterr().out
    del value["recipe"]
    baseline.write_text(json.dumps(value))
    assert guarded(lambda: execute(Compare(baseline, file))) == 2
    assert "does not say which images" in capsys.readouterr().err
    assert guarded(lambda: execute(Compare(runs[0], tmp_path / "absent.onnx"))) == 2
    assert "absent.onnx: no such file" in capsys.readouterr().err


def test_renamed_classes_are_not_compared(
    runs: tuple[Path, Path], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    results = json.loads((other / "results.json").read_text())
    results["classes"][1:3] = results["classes"][2:0:-1]
    (other / "results.json").write_text(json.dumps(results))
    for judge in (
        lambda: compare_runs(other, runs[0], 1.0),
        lambda: compare_file(other, file, 1.0),
        lambda: write_report(runs[0], other),
    ):
        with pytest.raises(RecipeError, match="have other classes: number 1 is"):
            judge()


@pytest.mark.slow
def test_the_example_gate_fails_where_there_is_nothing_to_judge(tmp_path: Path) -> None:
    gate = Path(__file__).parents[2] / "examples/test_accuracy_gate.py"
    shutil.copyfile(gate, tmp_path / gate.name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", gate.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "baselines/resnet18.json: not a stored baseline" in done.stdout


@pytest.mark.parametrize("target", ["fp32", "fp16"])
def test_a_float_file_is_checked_says_what_it_needs_and_predicts_as_the_float_net(
    target: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    file = export_run(runs[0], target, tmp_path / f"{target}.onnx")
    onnx.checker.check_model(onnx.load(str(file)), full_check=True)
    metadata = read_metadata(onnx.load(str(file)), str(file))
    assert metadata["target"] == target and metadata["layers"] == []
    pixels = np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    _, _, built = load_run(runs[0])
    seen = (pixels.astype(np.float32) / 255 - np.array(built.mean, np.float32)) / np.array(built.std, np.float32)
    with torch.no_grad(), in_full_precision(built.model):
        logits = built.model(torch.from_numpy(seen.transpose(2, 0, 1)[None].astype(np.float32)))[0].double()
    (found,) = predict(file, [tmp_path / "image.png"])
    assert found.label == RunFolder.open(runs[0]).results()["classes"][int(logits.argmax())]
    tolerance = 1e-5 if target == "fp32" else 5e-3  # float16 has 11 bits
    assert found.probability == pytest.approx(float(logits.softmax(0).max()), abs=tolerance)
    assert verify_file(file).passed
    with pytest.raises(ExportError, match=f"is a float file \\(target {target}\\)"):
        certify_run(runs[0], file)


def test_a_qonnx_file_says_that_the_runtime_cannot_run_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = export_run(runs[0], "qonnx", tmp_path / "q.onnx")
    assert read_metadata(onnx.load(str(file)), str(file))["target"] == "qonnx"
    with pytest.raises(ExportError, match="for FINN"):
        predict(file, [])
