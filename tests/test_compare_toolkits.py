"""`tools/compare_toolkits.py`: what its tables say of toolkits that failed, and how weight codes are compared."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("compare_toolkits", TOOLS / "compare_toolkits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_toolkits", module)
    spec.loader.exec_module(module)
    return module


def test_a_toolkit_that_failed_is_a_row_that_says_why(tool: ModuleType) -> None:
    rows = [
        tool.Row("able", "net", "resnet18", 8, 1.5, 1.25, 0.26, 0.0, 0.004, 1000, 0),
        tool.Row("able", "net", "resnet18", 4, reason="training: ValueError: no 4 | 2 bits"),
        tool.Row("able", "coverage", "resnet18", 8),
        tool.Row("able", "coverage", "levit_128s", 8, reason="export: KeyError: x"),
        tool.Row("absent", "toolkit", reason="ended with code 1: no solution found"),
    ]
    assert tool.tables(rows).splitlines() == [
        "**resnet18**",
        "",
        "| toolkit | bits | step / FP | memory / FP | size / FP32 | answers differ | logits differ | weight codes |  |",
        "|---|---|---|---|---|---|---|---|---|",
        "| able | W8A8 | 1.50 | 1.25 | 0.26 | 0.0% | 0.004 | 0 of 1,000 |  |",
        "| able | W4A4 | – | – | – | – | – | – | training: ValueError: no 4 / 2 bits |",
        "| absent | – | – | – | – | – | – | – | ended with code 1: no solution found |",
        "",
        "| toolkit | nets that came through | which did not, and why |",
        "|---|---|---|",
        "| able | 1 of 2 | levit_128s (export: KeyError: x) |",
        "| absent | – | ended with code 1: no solution found |",
    ]


def test_a_worker_that_dies_leaves_its_last_line(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text("raise SystemExit('first\\n\\nno solution found')")
    monkeypatch.setattr(tool, "__file__", str(dying))
    assert tool.in_its_environment("edgeqat", [], 60) == "ended with code 1: no solution found"


def test_a_worker_that_takes_too_long_is_ended_with_its_children(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late.py"
    late.write_text("import subprocess; subprocess.run(['sleep', '600'])")
    monkeypatch.setattr(tool, "__file__", str(late))
    began = time.monotonic()
    assert tool.in_its_environment("edgeqat", [], 0.5) == "took longer than 0 s"  # the child holds stderr: waits for it
    assert time.monotonic() - began < 60


def test_codes_are_the_same_in_any_scale_and_sign_per_channel(tool: ModuleType) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (7, 5, 3, 3)).astype(np.float32)
    scales = random.choice([-1, 1], 7) * random.uniform(0.001, 3, 7)
    stored = codes * scales.reshape(7, 1, 1, 1)
    assert tool.different_codes(codes, stored) == 0
    stored[2, 1, 0, 2] += scales[2]
    stored[6, 4, 2, 1] -= 2 * scales[6]
    assert tool.different_codes(codes, stored) == 2


def test_a_layer_is_compared_with_the_nearest_operand_of_its_shape(tool: ModuleType) -> None:
    random = np.random.default_rng(0)
    first, second, absent = (random.integers(-7, 8, shape).astype(np.float32) for shape in [(5, 5), (5, 5), (3, 7)])
    stored = [0.5 * second.T, 2.0 * first]
    stored[0][1, 1] += 0.5
    assert tool.compare_codes([first, second, absent], stored) == (50, 1)


class PerChannel(torch.nn.Module):
    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = self.scale.reshape(-1, 1, 1, 1)
        return (weight / scale).round().clamp(-7, 7) * scale


class OneConvolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        self.quantizer = PerChannel(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.7]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, self.quantizer(self.weight))


def test_codes_of_a_pass_are_those_that_a_quantizer_of_weights_gives(tool: ModuleType) -> None:
    net = OneConvolution()
    codes = tool.codes_of_a_pass(net, lambda module: getattr(module, "scale", None))
    scales = [0.1, 0.2, 0.3, 0.4, 0.7]
    expected = [
        [max(-7, min(7, round(w / s))) for w in row.flatten().tolist()]
        for row, s in zip(net.weight, scales, strict=True)
    ]
    assert [row.flatten().tolist() for row in codes["quantizer"]] == expected
    assert list(codes) == ["quantizer"]
    assert not net.quantizer._forward_hooks
