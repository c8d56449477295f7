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
from export.lowered import ExportError
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
OTHER_TYPES: dict[str, tuple[Answers, list[torch.dtype]]] = {
    "a class": (lambda net, x: net.head(net.features(x).mean((2, 3))).argmax(1), [torch.int64]),
    "the best two": (
        lambda net, x: tuple(net.head(net.features(x).mean((2, 3))).topk(2)), [torch.float32, torch.int64]
    ),
    "a mask": (lambda net, x: {"mask": net.features(x) > 0, "map": net.features(x)}, [torch.bool, torch.float32]),
    "halves": (lambda net, x: net.features(x).half(), [torch.float16]),
}  # fmt: skip
WITHOUT_BATCH: dict[str, Answers] = {
    "total": lambda net, x: {"map": net.features(x), "total": net.features(x).mean()},
    "anchors": lambda net, x: {"map": net.features(x), "anchors": torch.arange(8.0) + net.norm.weight},
    "size": lambda net, x: {"map": net.features(x), "size": torch.tensor(x.shape[2:])},
    "mean of all": lambda net, x: {"map": net.features(x), "mean of all": net.features(x).mean(0)},
}
QUICK = {("a batch norm by name", "ort-packed"), ("tokens that are read again", "ort-int8"), ("a batch norm", "qdq"),
         ("tokens that are read again", "qonnx"), ("a number for each image", "qdq")}  # fmt: skip
ALL = [(case, target) for case in CASES for target in TARGETS]


def ready(net: nn.Module, *inputs: Tensor) -> nn.Module:
    """Quantized to 8 bits, calibrated and settled."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    qat.quantize_(net, qat.uniform_rules(8), tuple(tensor[:1] for tensor in inputs))
    qat.calibrate(net, [inputs], batches=None)
    net.eval()
    qat.settle_(net)
    return net


@pytest.mark.parametrize(("case", "target"), slow_but(QUICK, ALL))
def test_names_and_values_are_the_nets(case: str, target: str, tmp_path: Path) -> None:
    answers, names = CASES[case]
    net = ready(Net(answers), IMAGES)
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
            quantizer.forward = lambda x: x  # type: ignore[method-assign]
    with torch.no_grad():
        found = net(IMAGES)
    if isinstance(found, dict):
        found = tuple(found.values())
    values = [found] if isinstance(found, Tensor) else list(found)
    written = ort.InferenceSession(file).run(None, {"x": IMAGES.numpy()})
    for value, expected in zip(written, values, strict=True):
        # It tells outputs apart: codes are the business of the certificate, and a float sum may end a code away.
        assert value.shape == tuple(expected.shape)
        assert np.abs(value - expected.numpy()).max() < 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("case", OTHER_TYPES)
def test_types_are_the_nets(case: str, tmp_path: Path) -> None:
    answers, types = OTHER_TYPES[case]
    net = ready(Net(answers), IMAGES)
    file = qat.export_onnx(net, tmp_path / "net.onnx", target="ort-packed")
    written = ort.InferenceSession(file).run(None, {"x": IMAGES.numpy()})
    assert [value.dtype for value in written] == [torch.zeros(0, dtype=dtype).numpy().dtype for dtype in types]
    assert qat.certify(net, file, IMAGES).passed


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_an_output_that_is_no_answer_for_each_sample_is_refused_by_name(name: str, tmp_path: Path) -> None:
    net = Net(WITHOUT_BATCH[name])
    qat.quantize_(net, qat.uniform_rules(8), IMAGES[:1])
    qat.calibrate(net, [IMAGES])
    with pytest.raises(ExportError, match=f"output '{name}' has no batch as its first axis"):
        qat.export_onnx(net.eval(), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


class Masked(nn.Module):
    """Activations are multiplied by a mask of truth values, which has no float of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.head((F.relu(self.stem(x)) * keep[:, None]).mean((2, 3)))


@pytest.mark.parametrize("target", ["ort-int8", "ort-native", "qdq"])
def test_a_mask_is_quantized_as_the_number_that_it_is(target: str, tmp_path: Path) -> None:
    keep = torch.rand(4, 10, 10, generator=torch.Generator().manual_seed(2)) > 0.5
    net = ready(Masked(), IMAGES, keep)
    file = qat.export_onnx(net, tmp_path / "net.onnx", target=target)
    certificate = qat.certify(net, file, (IMAGES, keep))
    assert certificate.passed, str(certificate)
