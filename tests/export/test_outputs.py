"""What a net returns, and under which names, in files of every target."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.surgery.swap import quantizers
from tests.quick import slow_but

TARGETS = ("ort-int8", "ort-packed", "ort-native", "qdq", "fp32", "qonnx")
IMAGES = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
Answers = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Two convolutions with batch norms, a linear layer over pixels and one over channels."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.along, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.conv(F.relu(self.norm(self.stem(x)))))

    def tokens(self, x: Tensor) -> Tensor:
        return self.along(F.relu(self.stem(x)).flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Any:
        return self.answers(self, x)


def tokens_that_are_read_again(net: Net, x: Tensor) -> dict[str, Tensor]:
    tokens = net.tokens(x)
    return {"tokens": tokens, "logits": net.head((tokens + F.relu(tokens)).mean(1))}


def a_sum_and_its_reader(net: Net, x: Tensor) -> dict[str, Tensor]:
    features = net.features(x)
    total = features + F.relu(features)
    return {"sum": total, "logits": net.head(total.mean((2, 3)))}


def moved(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    features = net.features(x)
    total = features + F.relu(features)
    return total.flatten(2).transpose(1, 2), F.max_pool2d(total, 2)


CASES: dict[str, tuple[Answers, list[str]]] = {
    "a batch norm": (lambda net, x: net.features(x), ["logits"]),
    "a batch norm by name": (lambda net, x: {"embedding": net.features(x)}, ["embedding"]),
    "a batch norm and its ReLU": (lambda net, x: {"a": (h := net.features(x)), "b": F.relu(h)}, ["a", "b"]),
    "a ReLU": (lambda net, x: {"map": F.relu(net.features(x))}, ["map"]),
    "a clip": (lambda net, x: {"map": F.hardtanh(net.features(x), -1, 1)}, ["map"]),
    "padded": (lambda net, x: {"map": F.pad(net.features(x), (1, 1))}, ["map"]),
    "tokens": (lambda net, x: {"tokens": net.tokens(x)}, ["tokens"]),
    "tokens that are read again": (tokens_that_are_read_again, ["tokens", "logits"]),
    "a sum and its reader": (a_sum_and_its_reader, ["sum", "logits"]),
    "moved codes": (moved, ["output0", "output1"]),
    "a number for each image": (lambda net, x: {"score": net.head(net.features(x).mean((2, 3))).sum(1)}, ["score"]),
    "a mean over the image": (lambda net, x: {"embedding": net.features(x).mean((2, 3))}, ["embedding"]),
    "a softmax": (lambda net, x: {"shares": net.head(net.features(x).mean((2, 3))).softmax(1)}, ["shares"]),
}
QUICK = {("a batch norm by name", "ort-packed"), ("tokens that are read again", "ort-int8"), ("a batch norm", "qdq"),
         ("tokens that are read again", "qonnx"), ("a number for each image", "qdq")}  # fmt: skip
ALL = [(case, target) for case in CASES for target in TARGETS]


@pytest.mark.parametrize(("case", "target"), slow_but(QUICK, ALL))
def test_names_and_values_are_the_nets(case: str, target: str, tmp_path: Path) -> None:
    answers, names = CASES[case]
    torch.manual_seed(1)
    net = Net(answers)
    qat.quantize_(net, qat.uniform_rules(8), IMAGES[:1])
    qat.calibrate(net, [IMAGES])
    net.eval()
    qat.settle_(net)
    file = qat.export_onnx(net, tmp_path / "net.onnx", target=target)
    assert [output.name for output in onnx.load(file).graph.output] == names
    if target == "qonnx":  # its operators are not the runtime's
        return
    if target != "fp32":
        certificate = qat.certify(net, file, IMAGES)
        assert certificate.passed, str(certificate)
    if target == "ort-native":
        return
    if target == "fp32":
        for quantizer in quantizers(net).values():
            quantizer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        found = net(IMAGES)
    values = [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)
    written = ort.InferenceSession(file).run(None, {"x": IMAGES.numpy()})
    for value, expected in zip(written, values, strict=True):
        # It tells outputs apart: codes are the business of the certificate, and a float sum may end a code away.
        assert value.shape == tuple(expected.shape)
        assert np.abs(value - expected.numpy()).max() < 0.01 * float(expected.abs().max())
