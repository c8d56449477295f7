"""examples/cpp: a photo's label from C++, compiled and run against the runtime's library; it is `qat predict`'s."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import qat
from export.kernels.build import ISA_FLAGS
from export.kernels.library import library
from export.predict import predict
from tests.surgery.nets import TinyNet, with_random_norms

CPP = Path(__file__).parent.parent / "examples/cpp"
JPEG_HEADER = "#include <cstdio>\n#include <jpeglib.h>\n"
SIDE = 16


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program, linked against the library of the installed runtime."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("needs CMake and a C++ compiler")
    probe = subprocess.run(
        [compiler, "-x", "c++", "-fsyntax-only", "-"], input=JPEG_HEADER, text=True, capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip("needs libjpeg's header (libjpeg-dev)")
    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not found:
        pytest.skip("this build of onnxruntime has no library of its own")
    folder = tmp_path_factory.mktemp("cpp")
    runtime = folder / "libonnxruntime.so.1"  # its name at run time
    runtime.symlink_to(found[0])
    build = folder / "build"
    for command in (
        ["cmake", "-S", str(CPP), "-B", str(build), f"-DONNXRUNTIME_LIBRARY={runtime}"],
        ["cmake", "--build", str(build), "--target", "classify"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "classify"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos larger and smaller than the net's input, in colour and in grey, of sides that no scale divides."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    paths = []
    for name, size, mode in (("large", (157, 83), "RGB"), ("small", (11, 7), "RGB"), ("grey", (61, 16), "L")):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        path = folder / f"{name}.jpg"
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, quality=90)
        paths.append(path)
    return paths


@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-native"])
def test_it_prints_what_predict_says(target: str, classify: Path, photos: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    images = torch.randn(8, 3, SIDE, SIDE)
    qat.quantize_(model, qat.uniform_rules(4), images)
    qat.calibrate(model, [images])
    model.eval()
    qat.settle_(model)
    names = ['a "b" \\', "ä 写", "c", "😀", "e"]
    said: dict[str, Any] = {"classes": names, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    file = qat.export_onnx(model, tmp_path / "model.onnx", target, **said)
    kernels = [str(library())] if target == "ort-native" else []
    for expected in predict(file, photos):
        command = [str(classify), str(file), str(expected.image), *kernels]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # To the last printed digit: pixels are resized with Pillow's integers, and the file's codes are the same.
        assert done.stdout == f"{expected.image}: {expected.label} ({100 * expected.probability:.1f}%)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: "),
        (["nothing.onnx", "photo.jpg"], 1, "nothing.onnx"),
    ],
)
def test_what_it_cannot_do_is_one_line(arguments: list[str], code: int, words: str, classify: Path) -> None:
    done = subprocess.run([str(classify), *arguments], capture_output=True, text=True)
    assert done.returncode == code and words in done.stderr and done.stdout == ""


def test_cmake_compiles_the_kernels_as_the_package_does() -> None:
    text = (CPP / "CMakeLists.txt").read_text()
    pattern = r'set_source_files_properties\("\$\{KERNELS\}/(\w+\.cpp)" PROPERTIES COMPILE_OPTIONS\s+"([^"]*)"\)'
    variables = {f"${{{name}}}": value for name, value in re.findall(r'set\((\w+) "([^"]*)"\)', text)}
    written = {name: tuple(variables.get(flags, flags).split(";")) for name, flags in re.findall(pattern, text)}
    expected = {name: flags for files in ISA_FLAGS.values() for name, flags in files.items()}
    assert written == expected
