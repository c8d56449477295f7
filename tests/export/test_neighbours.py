"""Layers beside what stays in floating point, sequences, and results that are not classes: certified on every target."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.certificate import Certificate, certify
from export.lower import lower_to_integers, trained_codes
from export.native_graph import emit
from export.targets import TARGETS
from qat.settle import settle_
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import FLOAT, LayerSpec
from qat.surgery.swap import quantize_, uniform_rules
from tests.quick import slow_but

IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(8))


class Chain(nn.Module):
    """Two convolutions, `middle`, and two layers after it."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), middle
        self.last, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)).mean((2, 3)))
        return self.head(torch.relu(self.middle(x)))


class Sequence(nn.Module):
    """Convolutions over one axis: with padding, stride, groups, dilation; on rows and on tokens; one gives the result."""

    def __init__(self, gives_map: bool) -> None:
        super().__init__()
        self.gives_map = gives_map
        self.first, self.rows = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3, padding=1)
        self.grouped, self.dilated = nn.Conv1d(8, 8, 3, stride=2, groups=8), nn.Conv1d(8, 6, 2, dilation=3)
        if not gives_map:
            self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).flatten(2)
        x = self.dilated(torch.relu(self.grouped(torch.relu(self.rows(x)))))
        return x if self.gives_map else self.head(torch.relu(x).mean(2))


class Map(nn.Module):
    """A convolution is the result, as in segmentation; another result is read by an addition of floats."""

    def __init__(self, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, kernel, padding=kernel // 2, stride=kernel, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class SquareTokens(nn.Module):
    """As many tokens as channels: codes in another order have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix, self.head = nn.Conv2d(3, 16, 3, stride=3), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.mix(tokens)).mean(1))


Rules = list[tuple[str, LayerSpec]]
NETS: dict[str, tuple[Callable[[], nn.Module], Rules]] = {
    "a convolution in float": (lambda: Chain(nn.Conv2d(8, 8, 3)), [("middle", FLOAT)]),
    "a transposed convolution in float": (lambda: Chain(nn.ConvTranspose2d(8, 8, 2, stride=2)), [("middle", FLOAT)]),
    "a linear in float": (Mlp, [("middle", FLOAT)]),
    "a classifier in float": (Mlp, [("head", FLOAT)]),
    "the first layer in float": (Mlp, [("first", FLOAT)]),
    "a sequence": (lambda: Sequence(gives_map=False), []),
    "a sequence as the result": (lambda: Sequence(gives_map=True), []),
    "a map": (lambda: Map(1), []),
    "a map of 3x3": (lambda: Map(3), []),
    "a depthwise map": (lambda: Map(3, groups=4), []),
    "as many tokens as channels": (SquareTokens, []),
}


def certificate(net: str, target: str, tmp_path: Path) -> Certificate:
    make, rules = NETS[net]
    torch.manual_seed(1)
    model = make().eval()
    quantize_(model, rules + uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    settle_(model, IMAGES[:1])
    lowered = lower_to_integers(model, IMAGES[:1], TARGETS[target])
    file = tmp_path / "model.onnx"
    onnx.save(emit(lowered, TARGETS[target]), str(file))
    labels = np.zeros(len(IMAGES), np.int64)
    return certify(lowered, file, IMAGES.numpy(), labels, lambda images: trained_codes(model, images))


EITHER = list(itertools.product(NETS, ["ort-packed", "ort-native"]))
QUICK = [(net, ("ort-packed", "ort-native")[index % 2]) for index, net in enumerate(NETS)]


@pytest.mark.parametrize(("net", "target"), slow_but(QUICK, EITHER))
def test_certified_with_every_quantized_layer_on_integers(net: str, target: str, tmp_path: Path) -> None:
    result = certificate(net, target, tmp_path)
    assert result.passed and result.integer_kernels == result.layers, str(result)
    assert result.fidelity.at_ties == 0 and not result.fidelity.missing
    in_float = {layer.removesuffix("*") for layer, _ in NETS[net][1]}
    assert set(result.fidelity.in_float) == in_float


@pytest.mark.parametrize(
    "target", slow_but(["ort-int8-vnni"], ["ort-int8-vnni", "ort-packed-vnni", "ort-int8", "ort-packed-int4"])
)
def test_a_map_and_a_float_layer_on_the_other_targets(target: str, tmp_path: Path) -> None:
    for net in ("a map of 3x3", "a transposed convolution in float"):
        result = certificate(net, target, tmp_path)
        assert result.passed and result.integer_kernels == result.layers, str(result)
