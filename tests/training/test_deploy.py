"""From a run to a proven file and its bundle: what `qat certify` and `qat bundle` leave behind."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.lowered import ExportError
from export.metadata import proof_of
from export.verify import verify_file
from qat.cli import Bundle, Certify, execute, guarded
from qat.deploy import bundle_run, certify_run, export_run
from qat.domains.synthetic import synthetic_domains
from qat.training.loop import run
from qat.training.recipe import LsqRecipe

TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 4, "evaluate_every": 2, "workers": 0,
    "calibration_batches": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    domains = synthetic_domains(per_class=6, image_size=32, seed=0)
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        run(LsqRecipe(**TINY, seed=seed, out=folder / name), domains)
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
    assert "not tried  arm64, x86, wasm" in str(certificate)


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
    assert "--on arm46: unknown; there are arm64, x86, wasm" in capsys.readouterr().err
