"""Wheels: what is in them, for whom they are tagged, and that a machine without a compiler runs the kernels they carry.

A copy of the sources is built without a network, by the build backend itself. The quick tests' compiler is a script.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import qat
from edgeqat.cpp import compiler, machine
from export.elsewhere import CPUS, environment_of, python_command, unavailable
from export.kernels.build import library_name
from export.kernels.library import library as library_here
from export.predict import predict
from tests.surgery.nets import TinyNet, with_random_norms
from tools.build_wheels import NEWEST, tagged

ROOT = Path(__file__).parent.parent
PARTS = ("edgeqat", "qat", "export", "hatch_build.py", "pyproject.toml", "README.md", "LICENSE")
BYTES = b"a library for "
COMPILER = f"""#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then printf '{BYTES.decode()}%s' "$(basename "$0")" > "$2"; fi
  shift
done
"""
NO_COMPILER = "#!/bin/sh\necho no such flag >&2; exit 1\n"


def sources(folder: Path) -> Path:
    """A copy of what wheels are made of, without anything compiled."""
    copy = folder / "sources"
    copy.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".making-*"))
        else:
            shutil.copy(ROOT / part, copy / part)
    return copy


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def built(copy: Path, out: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    kept = {name: value for name, value in os.environ.items() if name != "EDGEQAT_BUILD_KERNELS"}
    return subprocess.run(command, cwd=copy, env=kept | variables, capture_output=True, text=True)


def only(paths: Sequence[Path]) -> Path:
    (path,) = paths
    return path


def wheel_in(folder: Path) -> Path:
    return only(sorted(folder.glob("*.whl")))


def libraries(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}


def tag_inside(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        (tag,) = (line for line in archive.read(name).decode().splitlines() if line.startswith("Tag: "))
        return tag.removeprefix("Tag: ")


@pytest.mark.parametrize(
    ("asked", "made_by", "platform"),
    [
        ("", "c++", sysconfig.get_platform()),
        ("1", "c++", sysconfig.get_platform()),
        ("riscv64", "riscv64-linux-gnu-g++", "linux_riscv64"),
    ],
)
def test_a_wheel_carries_the_library_of_the_processor_that_was_asked_for(
    tmp_path: Path, asked: str, made_by: str, platform: str
) -> None:
    script(tmp_path / "bin" / made_by, COMPILER)
    copy = sources(tmp_path)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    variables = {"EDGEQAT_BUILD_KERNELS": asked, "PATH": path, "CXX": "c++"}
    done = built(copy, tmp_path / "out", **variables)
    assert done.returncode == 0, done.stderr
    wheel = wheel_in(tmp_path / "out")
    tag = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
    assert wheel.name.endswith(f"-{tag}.whl") and tag_inside(wheel) == tag
    ((name, contents),) = libraries(wheel).items()
    assert contents == BYTES + made_by.encode()
    stem = library_name(asked if asked == "riscv64" else None).removesuffix(".so")
    assert name == f"export/kernels/{stem}-{hashlib.sha256(contents).hexdigest()}.so"
    beside = list((copy / "export/kernels").glob("*.so"))
    assert len(beside) == (0 if asked == "riscv64" else 1)  # this machine's alone lies beside the sources


def test_a_wheel_without_kernels_is_for_any_platform(tmp_path: Path) -> None:
    copy = sources(tmp_path)
    refusing = str(script(tmp_path / "refusing", NO_COMPILER))
    asked = built(copy, tmp_path / "asked", EDGEQAT_BUILD_KERNELS="0", CXX=refusing)
    unable = built(copy, tmp_path / "unable", CXX=refusing)
    assert asked.returncode == unable.returncode == 0
    assert "installed without kernels of its own" in unable.stdout + unable.stderr
    for folder in ("asked", "unable"):
        wheel = wheel_in(tmp_path / folder)
        assert wheel.name.endswith("-py3-none-any.whl") and libraries(wheel) == {}


@pytest.mark.parametrize("asked", ["1", "riscv64"])
def test_kernels_that_were_asked_for_and_cannot_be_compiled_end_the_build(tmp_path: Path, asked: str) -> None:
    refusing = script(tmp_path / "bin/riscv64-linux-gnu-g++", NO_COMPILER)
    path = f"{refusing.parent}:{os.environ['PATH']}"
    variables = {"EDGEQAT_BUILD_KERNELS": asked, "CXX": str(refusing), "PATH": path}
    done = built(sources(tmp_path), tmp_path / "out", **variables)
    assert done.returncode != 0 and "no such flag" in done.stderr
    assert not list((tmp_path / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A file of target ort-native, an image, and what `qat predict` says of it here."""
    folder = tmp_path_factory.mktemp("native")
    model = with_random_norms(TinyNet())
    images = torch.randn(8, 3, 16, 16)
    qat.quantize_(model, qat.uniform_rules(4), images)
    qat.calibrate(model, [images])
    model.eval()
    qat.settle_(model)
    said: dict[str, Any] = {"classes": list("abcde"), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    file = qat.export_onnx(model, folder / "native.onnx", "ort-native", **said)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = folder / "image.png"
    Image.fromarray(pixels).save(image)
    (found,) = predict(file, [image])
    return file, image, f"{found.label} {found.probability:.4f}"


SAYS = """
import sys
from pathlib import Path
from export.kernels.library import library
print(library())
from export.predict import predict
(found,) = predict(Path(sys.argv[1]), [Path(sys.argv[2])])
print(found.label, f"{found.probability:.4f}")
"""


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def no_compiler(folder: Path) -> dict[str, str]:
    """Variables of a process that finds neither a compiler nor what another one compiled."""
    (folder / "nothing").mkdir()
    return {
        "PATH": str(folder / "nothing"),
        "CXX": "",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "EDGEQAT_KERNELS": "",
    }


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")
def test_without_a_compiler_predict_runs_the_kernels_of_the_wheel(
    native: tuple[Path, Path, str], tmp_path: Path
) -> None:
    pytest.importorskip("auditwheel")
    done = built(sources(tmp_path), tmp_path / "out", EDGEQAT_BUILD_KERNELS="1")
    assert done.returncode == 0, done.stderr
    wheel = tagged(wheel_in(tmp_path / "out"), machine())
    major, minor = re.fullmatch(rf"py3-none-manylinux_(\d+)_(\d+)_{machine()}", tag_inside(wheel)).groups()
    assert (int(major), int(minor)) <= NEWEST
    installed = unpacked(wheel, tmp_path / "installed")
    file, image, expected = native
    variables = os.environ | no_compiler(tmp_path) | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", SAYS, str(file), str(image)]
    ran = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    library, said = ran.stdout.splitlines()
    assert Path(library) == only(list((installed / "export/kernels").glob("*.so"))) and said == expected


ON_ARM = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime as ort
from edgeqat.compiled import library
from export.kernels.build import HERE, library_name  # export/kernels/library.py calls the same; the machine has no onnx
def refuse(path):
    raise SystemExit("would compile")
path = library(library_name(), HERE, refuse)
print(path)
options = ort.SessionOptions()
options.register_custom_ops_library(str(path))
session = ort.InferenceSession(sys.argv[1], options)
(logits,) = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})
print(json.dumps(logits.tolist()))
"""
ARM = "cortex-a72"
NO_ARM = unavailable(ARM, onnxruntime.__version__)
NO_CROSS = "apt-get install g++-aarch64-linux-gnu" if compiler("aarch64") is None else None


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_ARM or NO_CROSS), reason=str(NO_ARM or NO_CROSS))
def test_an_arm_processor_runs_the_kernels_of_its_wheel(native: tuple[Path, Path, str], tmp_path: Path) -> None:
    """The wheel that this machine cross-compiles, on an emulated processor without a compiler: the same outputs as here."""
    pytest.importorskip("auditwheel")
    done = built(sources(tmp_path), tmp_path / "out", EDGEQAT_BUILD_KERNELS="aarch64")
    assert done.returncode == 0, done.stderr
    installed = unpacked(tagged(wheel_in(tmp_path / "out"), "aarch64"), tmp_path / "installed")
    images = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    version = onnxruntime.__version__
    command = python_command(CPUS[ARM], version, ["-c", ON_ARM, str(native[0]), str(tmp_path / "images.npy")])
    command[0] = str(shutil.which(command[0]))
    variables = environment_of(CPUS[ARM], version) | no_compiler(tmp_path)
    variables["PYTHONPATH"] += f":{installed}"
    ran = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    library, logits = ran.stdout.splitlines()
    assert Path(library) == only(list((installed / "export/kernels").glob("*.so")))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_here()))
    session = onnxruntime.InferenceSession(str(native[0]), options)
    (expected,) = session.run(None, {session.get_inputs()[0].name: images})
    assert np.array_equal(np.array(json.loads(logits), np.float32), expected)
