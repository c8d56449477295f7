"""A model's own names and those that an export adds never meet; equal tensors that the exporter writes once stay two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from tests.quick import slow_but

TARGETS = ("ort-int8", "ort-packed", "ort-native")
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Fresh(nn.Module):
    """As ConvNeXt before its first step: all biases are zero, and those of linear layers and norms are equally long."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow, self.wide = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.last, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 5)
        for module in (self.stem, self.narrow, self.wide, self.head):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x).permute(0, 2, 3, 1)
        features = features + self.wide(torch.relu(self.narrow(self.norm(features))))
        return self.head(self.last(features.mean((1, 2))))


class SharedWeight(nn.Module):
    """A layer that a FLOAT rule leaves alone begins as a copy of a quantized one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (
            nn.Conv2d(3, 8, 3),
            *(nn.Conv2d(8, 8, 1) for _ in "lr"),
            nn.Linear(8, 5),
        )
        self.right.load_state_dict(self.left.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x))
        return self.head(torch.cat([self.left(features), self.right(features)], 3).mean((2, 3)))


class Unlucky(nn.Module):
    """Parameters called what an export calls its own tensors."""

    NAMES = ("s0", "s1", "zero128", "zero0", "clip15", "flat", "x1", "128", "0")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        for index, name in enumerate(self.NAMES):
            self.register_parameter(name, nn.Parameter(torch.linspace(0.5, 1.5, 8) + index / 10))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x)).mean((2, 3))
        for name in self.NAMES:
            features = torch.tanh(features * getattr(self, name))
        return self.head(features)


class UnluckyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.other = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, s0: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.stem(s0)).mean((2, 3))
        return {"s1": self.head(features), "zero0": self.other(features)}


QUICK = {(Fresh, "ort-packed"), (SharedWeight, "ort-int8"), (Unlucky, "ort-native"), (UnluckyOutputs, "ort-packed")}
CASES = [(make, target) for make in (Fresh, SharedWeight, Unlucky, UnluckyOutputs) for target in TARGETS]


@pytest.mark.parametrize(("make", "target"), slow_but(QUICK, CASES))
def test_the_file_is_certified(make: Any, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    rules = [("right", qat.FLOAT)] if make is SharedWeight else []
    qat.quantize_(model, [*rules, *qat.uniform_rules(4)], IMAGES)
    qat.calibrate(model, [IMAGES])
    qat.settle_(model)
    file = qat.export_onnx(model, tmp_path / "model.onnx", target)
    certificate = qat.certify(model, file, IMAGES)
    assert certificate.passed, str(certificate)
