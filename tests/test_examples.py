"""The examples run as they stand, at toy size, and what they export is certified."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.quick import slow_but

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = {
    "plain_loop.py": ["--steps", "8", "--out", "model.onnx"],
    "timm_loop.py": ["--model", "resnet18", "--size", "32", "--steps", "2", "--out", "model.onnx"],
    "torchvision_models.py": ["--size", "32", "--steps", "2"],
    "segmentation.py": ["--steps", "3", "--out", "model.onnx"],
    "detector_backbone.py": ["--model", "resnet18", "--size", "64", "--steps", "2", "--out", "model.onnx"],
    "lightning_module.py": ["--steps", "8", "--out", "model.onnx"],
}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


LONG = LINES.keys() - {"plain_loop.py"}  # whole backbones, or a framework to load


@pytest.mark.parametrize("name", slow_but(LINES.keys() - LONG, LINES))
def test_an_example_exports_what_is_certified(name: str, tmp_path: Path) -> None:
    assert ": certified on ONNX Runtime" in run([sys.executable, str(EXAMPLES / name), *LINES[name]], tmp_path)


@pytest.mark.slow
def test_two_processes_calibrate_to_the_same_scales(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    out = run([*launch, str(EXAMPLES / "accelerate_loop.py"), "--steps", "4"], tmp_path)
    assert "2 processes, scales alike: True" in out and ": certified on ONNX Runtime" in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    code = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(code) <= 60, f"{path.name}: {len(code)} lines"
