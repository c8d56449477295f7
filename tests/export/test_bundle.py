"""A bundle says on a device whether the codes are the expected ones, and names what computes others."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export import elsewhere, session
from export.across import Elsewhere, certify_elsewhere, compared
from export.bundle import origins, write_bundle
from export.bundled.check import Computed, verdict
from export.certificate import certify
from export.elsewhere import machines_of
from export.lowered import ExportError
from export.metadata import proof_of, record_proof
from export.ties import float_quantizers
from tests.export.conftest import Exported


@pytest.fixture
def bundle(tiny: Exported, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, tiny.lowered, tiny.proto, "tiny.onnx", tiny.images)
    return folder


def check(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it: the script alone, in a folder that knows nothing of this project."""
    command = [sys.executable, "check.py", *arguments]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, env={"PYTHONPATH": ""})


def test_the_bundle_of_a_certified_file_is_as_expected(bundle: Path, tiny: Exported) -> None:
    done = check(bundle, "--codes", "codes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "THE SAME CODES"
    assert f"{len(tiny.images)} of {len(tiny.images)} as expected" in done.stdout
    trained, outputs = tiny.trained(tiny.images)
    logits = outputs["logits"]
    written = np.fromfile(bundle / "codes" / "logits.bin", np.float32).reshape(logits.shape)
    assert (written.argmax(1) == logits.argmax(1)).all()
    assert np.array_equal(np.fromfile(bundle / "codes" / "0.bin", np.uint8), trained["stem.input"].ravel())


@pytest.mark.parametrize("layer", ["stem", "block.conv2", "right"])
def test_a_corrupted_code_is_named_by_its_layer(bundle: Path, layer: str) -> None:
    proto = onnx.load(str(bundle / "model.onnx"))
    weight = next(t for t in proto.graph.initializer if t.name == f"{layer}.weight")
    weight.raw_data = bytes([weight.raw_data[0] ^ 0x40]) + weight.raw_data[1:]
    onnx.save(proto, str(bundle / "model.onnx"))
    done = check(bundle)
    assert done.returncode == 1
    (wrong,) = [line for line in done.stdout.splitlines() if "WRONG" in line]
    assert f"(computed by layer {layer})" in wrong
    assert "model.onnx is not the file that was bundled" in done.stdout
    assert done.stdout.splitlines()[-1] == "NOT THE SAME CODES: 1 operations compute other codes from the same inputs"


def test_a_changed_expectation_or_image_is_told(bundle: Path) -> None:
    path = bundle / "expected.json"
    expected = json.loads(path.read_text())
    name = expected["tensors"][4]["name"]
    expected["tensors"][4]["sha256"][0] = "0" * 16
    path.write_text(json.dumps(expected))
    done = check(bundle)
    assert done.returncode == 1 and f"{name} (computed by" in done.stdout and "on 1 of 6 images" in done.stdout
    pixels = bytearray((bundle / "images.bin").read_bytes())
    pixels[3] ^= 0x80
    (bundle / "images.bin").write_bytes(bytes(pixels))
    assert "images.bin is not the file that was bundled" in check(bundle).stdout


def test_what_cannot_be_run_is_one_line(bundle: Path, tmp_path: Path) -> None:
    done = check(bundle, str(tmp_path))
    assert done.returncode == 2 and "expected.json: no such file" in done.stderr and "Traceback" not in done.stderr
    (bundle / "model.onnx").write_bytes(b"nonsense")
    done = check(bundle)
    assert done.returncode == 2 and "cannot run the file" in done.stderr and "Traceback" not in done.stderr


def test_differences_are_excused_by_floating_point_and_by_what_came_before() -> None:
    tensors: list[dict[str, Any]] = [
        {"name": "a", "made_by": "layer a", "sources": [], "float": False, "sha256": ["1", "1"]},
        {"name": "b", "made_by": "Softmax", "sources": ["a"], "float": True, "sha256": ["2", "2"]},
        {"name": "c", "made_by": "layer c", "sources": ["b"], "float": False, "sha256": ["3", "3"]},
        {"name": "d", "made_by": "layer d", "sources": ["a"], "float": False, "sha256": ["4", "4"]},
    ]
    expected = {"tensors": tensors, "answers": [1, 0], "logits": [[0.0, 1.0], [1.0, 0.0]], "output": "logits"}

    def judged(**digests: str) -> tuple[str, bool]:
        found = Computed(expected)
        found.logits = [np.array([0, 1], np.float32), np.array([1, 0], np.float32)]
        found.digests = {t["name"]: [t["sha256"][0], digests.get(t["name"], t["sha256"][1])] for t in tensors}
        lines, passed = verdict(expected, found)
        return "\n".join(lines), passed

    text, passed = judged()
    assert passed and text.endswith("\nTHE SAME CODES")
    text, passed = judged(b="x", c="x")
    assert passed and "float     b (computed by Softmax) on 1 of 2 images" in text and "1 tensors that are" in text
    text, passed = judged(b="x", c="x", d="x")
    assert not passed and "WRONG     d (computed by layer d)" in text
    text, passed = judged(c="x")
    assert not passed and "WRONG     c (computed by layer c)" in text


def test_every_tensor_knows_what_it_is_computed_from(tiny: Exported) -> None:
    found = {name: (maker, sources) for name, maker, sources in origins(tiny.lowered)}
    assert list(found) == [n for n in found if n in tiny.lowered.quantizers] and len(found) == len(
        tiny.lowered.quantizers
    )
    assert found["stem.input"] == ("the quantizer of the images", [])
    assert found["block.conv2.input"][0] == "layer block.conv1"
    assert found["block#clip1"][0] == "Add" and len(found["block#clip1"][1]) == 2
    assert found["block.conv1.input"][0] == "requantization"
    assert float_quantizers(tiny.lowered) == []


def test_codes_of_another_machine_are_compared_operation_by_operation(tiny: Exported, tmp_path: Path) -> None:
    """A machine that computes one code of one tensor otherwise, and everything after it accordingly."""
    folder, codes = tmp_path / "bundle", tmp_path / "codes"
    folder.mkdir()
    expected = write_bundle(folder, tiny.lowered, tiny.proto, "tiny.onnx", tiny.images)
    assert check(folder, "--codes", str(codes)).returncode == 0
    same = compared("there", "1", codes, tiny.lowered, tiny.images, expected)
    assert same.passed and same.differing == 0 and "0 mismatches" in str(same)
    index = list(expected.codes).index("block.conv2.input")
    values = np.fromfile(codes / f"{index}.bin", np.uint8)
    values[5] ^= 1
    values.tofile(codes / f"{index}.bin")
    other = compared("there", "1", codes, tiny.lowered, tiny.images, expected)
    assert not other.passed and other.differing == 1 and "block.conv2.input 1" in str(other)
    assert other.mismatches["block.conv2.input"] == 1
    (codes / "0.bin").write_bytes(b"12")
    with pytest.raises(ExportError, match=r"stem\.input: the machine computed 2 codes"):
        compared("there", "1", codes, tiny.lowered, tiny.images, expected)


def test_a_machine_that_is_not_there_fails_the_certificate_with_the_remedy(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = certify_elsewhere(tiny.lowered, tiny.proto, "tiny.onnx", tiny.images[:1], ("cortex-a72",))
    assert not found.passed and "apt-get install qemu-user" in str(found)
    (found,) = certify_elsewhere(tiny.lowered, tiny.proto, "tiny.onnx", tiny.images[:1], ("wasm",))
    assert "apt-get install nodejs" in str(found)
    labels = np.zeros(len(tiny.images), np.int64)
    certificate = certify(tiny.lowered, tiny.file, tiny.images, labels, tiny.trained, ("cortex-a72",))
    assert not certificate.passed and "NOT RUN" in str(certificate)
    assert "other processors (arm64,x86,wasm; --on or on= tries them)" in str(certificate)
    partly = dataclasses.replace(certificate, elsewhere=(Elsewhere("neoverse-n1"),))
    assert "other processors (cortex-a72,max,x86,wasm; --on or on= tries them)" in str(partly)


def test_unknown_machines_are_named_with_those_there_are() -> None:
    assert machines_of("arm64, wasm,cortex-a72") == ("cortex-a72", "neoverse-n1", "max", "wasm")
    assert machines_of("") == ()
    with pytest.raises(ExportError, match="on 'amiga': unknown; there are arm64, x86, wasm"):
        machines_of("arm64,amiga")


def test_the_record_of_where_a_file_was_proven_holds_for_its_graph_alone(tiny: Exported, tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.proto)
    assert proof_of(proto) == []
    first, second = ({"machine": m, "runtime": "ONNX Runtime 1.32.0", "images": 8} for m in ("x86_64", "wasm"))
    record_proof(proto, [first])
    record_proof(proto, [second])  # replaces the older one
    onnx.save(proto, str(tmp_path / "proven.onnx"))
    read = onnx.load(str(tmp_path / "proven.onnx"))
    assert proof_of(read) == [second]
    read.graph.initializer[0].raw_data = bytes(len(read.graph.initializer[0].raw_data))
    assert proof_of(read) == []


@pytest.mark.parametrize("machine", ["haswell", "wasm"])
def test_this_machines_emulators_compute_the_same(tiny: Exported, machine: str) -> None:
    if reason := elsewhere.unavailable(machine, session.version()):
        pytest.skip(reason)
    (found,) = certify_elsewhere(tiny.lowered, tiny.proto, "tiny.onnx", tiny.images[:2], (machine,))
    assert found.passed and found.images == 2 and found.codes > 10_000, str(found)


def test_a_machine_in_a_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "edgeqat/wasm/node_modules"
    (modules / "onnxruntime-web").mkdir(parents=True)
    modules.parent.chmod(0o777)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(elsewhere.WASM_VARIABLE, raising=False)
    assert f"others can write {modules.parent}" in str(elsewhere.unavailable("wasm", "1.0"))
    monkeypatch.setenv(elsewhere.WASM_VARIABLE, str(modules.parent))  # the user names it: the user's own affair
    assert elsewhere.unavailable("wasm", "1.0") is None
    monkeypatch.delenv(elsewhere.WASM_VARIABLE)
    modules.parent.chmod(0o755)
    assert elsewhere.unavailable("wasm", "1.0") is None


def test_a_bundle_does_not_steer_the_terminal() -> None:
    from export.bundled.check import printable

    assert printable("a\x1b[2J\n\u202e b é") == "a\\x1b[2J\\n\\u202e b é"
