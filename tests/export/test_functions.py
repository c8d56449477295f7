"""Functions of one code and products of codes in native files: tables of 256 bytes and QMul, code by code."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from edgeqat.cpp import compiler
from export import reference, session
from export.arithmetic import softmax_codes
from export.certificate import Certificate, certify
from export.lower import lower_to_integers, trained_codes
from export.lowered import DOMAIN, LoweredModel
from export.native_graph import emit
from export.targets import TARGETS
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.surgery.nets import with_random_norms

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")
NATIVE = TARGETS["ort-native"]
IMAGES = torch.randn(3, 3, 13, 11, generator=torch.Generator().manual_seed(4))
CERTIFIED_WITH = IMAGES.numpy()

# What the second, dumber computation takes one real number at a time
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "silu": (F.silu, lambda x: x / (1 + math.exp(-x))),
    "gelu": (F.gelu, lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "hardswish": (F.hardswish, lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0)),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + math.exp(-x))),
    "tanh": (torch.tanh, math.tanh),
    "mish": (F.mish, lambda x: x * math.tanh(math.log1p(math.exp(x)))),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), lambda x: x if x > 0 else 0.1 * x),
    "elu": (F.elu, lambda x: x if x > 0 else math.expm1(x)),
}


class Bent(nn.Module):
    """Convolutions with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.stem, self.norm = nn.Conv2d(3, 21, 3, padding=1, bias=False), nn.BatchNorm2d(21)
        self.middle = nn.Conv2d(21, 19, 1)
        self.head = nn.Linear(19, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.norm(self.stem(x)))
        x = self.function(self.middle(x))
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excite: a gate for each channel; one for each pixel; and a product of two whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 21, 3, padding=1, bias=False), nn.BatchNorm2d(21)
        self.squeeze, self.excite = nn.Conv2d(21, 6, 1), nn.Conv2d(6, 21, 1)
        self.middle = nn.Conv2d(21, 21, 3, padding=1, groups=3)
        self.place, self.twin = nn.Conv2d(21, 1, 1), nn.Conv2d(21, 21, 1)
        self.head = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = F.hardswish(self.middle(x * torch.sigmoid(gate)))
        x = torch.sigmoid(self.place(x)) * x
        x = x * torch.tanh(self.twin(x))
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """Layer norms and the layer scale of a ConvNeXt block, and a layer norm of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 21, 3, padding=1), nn.Conv2d(21, 21, 3, padding=1, groups=21)
        self.norm, self.norm2 = nn.LayerNorm(21), nn.LayerNorm(21)
        self.wide, self.narrow = nn.Conv2d(21, 40, 1), nn.Conv2d(40, 21, 1)
        self.layer_scale = nn.Parameter(torch.rand(21) + 0.5)
        self.head = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.middle(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.narrow(F.gelu(self.wide(y))) * self.layer_scale.reshape(1, -1, 1, 1)
        return self.head(self.norm2(x.mean((2, 3))))


class Tokens(nn.Module):
    """The MLP of a transformer's block, on tokens."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.stem, self.norm = nn.Conv2d(3, 20, 3, 3), nn.LayerNorm(20)
        self.wide, self.narrow, self.head = nn.Linear(20, 35), nn.Linear(35, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(self.function(self.wide(self.norm(x))))
        return self.head(x)


class Attending(nn.Module):
    """Attention of two heads; of 15 tokens, which no number of lanes divides. `axis`: what the softmax sums over."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.stem, self.norm = nn.Conv2d(3, 20, 3, 3), nn.LayerNorm(20)
        self.query, self.key, self.value = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        q, k, v = (part(x).unflatten(-1, (2, 10)).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1)).softmax(self.axis)
        return self.head((weights @ v).transpose(1, 2).flatten(2))


class Sloped(nn.Module):
    """PReLUs with a slope for each channel: of images, and of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 21, 3), nn.Conv2d(21, 9, 1)
        self.first, self.second = nn.PReLU(21), nn.PReLU(9)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(self.stem(x)))).mean((2, 3)))


def quantized(model: nn.Module, bits: int) -> nn.Module:
    torch.manual_seed(bits)
    model = with_random_norms(model).eval()
    rules = [(name, replace(spec, table=True)) for name, spec in uniform_rules(bits, bits, ("stem", "head"))]
    quantize_(model, rules, IMAGES[:1], weight_init="mse")
    calibrate(model, [IMAGES])
    return model


def native(model: nn.Module) -> tuple[LoweredModel, onnx.ModelProto]:
    canonical = lower_to_integers(model, IMAGES, NATIVE)
    return canonical, emit(canonical, NATIVE)


def proven(model: nn.Module, canonical: LoweredModel, proto: onnx.ModelProto, folder: Path) -> Certificate:
    file = folder / "native.onnx"
    onnx.save(proto, str(file))
    labels = np.zeros(len(IMAGES), np.int64)
    return certify(canonical, file, CERTIFIED_WITH, labels, lambda x: trained_codes(model, x))


def ordinary(proto: onnx.ModelProto) -> set[str]:
    """Kinds of the nodes that are not edgeqat's."""
    return {node.op_type for node in proto.graph.node if node.domain != DOMAIN}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_between_two_quantizers_is_a_table_of_its_layer(name: str, tmp_path: Path) -> None:
    torch_function, by_hand = FUNCTIONS[name]
    torch.manual_seed(1)
    model = quantized(Bent(torch_function), 4)
    canonical, proto = native(model)
    assert ordinary(proto) <= {"Reshape", "Flatten"}
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed, str(result)
    assert {level.level: level.total for level in result.levels} == dict.fromkeys(session.LEVELS, 0)
    (conv,) = [node for node in proto.graph.node if node.name == "stem"]
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    (table,) = tensors[conv.input[-1]]
    labels = next(a.strings for a in conv.attribute if a.name == "codes")
    source = canonical.quantizers[labels[0].decode()]
    target = canonical.quantizers[labels[-1].decode()]
    for code in range(source.low, source.high + 1):
        real = by_hand((code - source.zero_point) * float(source.scale))
        expected = min(max(round(real / float(target.scale)) + target.zero_point, target.low), target.high)
        assert table[code] == expected, code


@pytest.mark.parametrize("name", ["gelu", "silu", "elu"])
def test_a_function_of_a_linear_is_a_table(name: str, tmp_path: Path) -> None:
    torch_function, by_hand = FUNCTIONS[name]
    torch.manual_seed(1)
    model = quantized(Tokens(torch_function), 4)
    canonical, proto = native(model)
    assert ordinary(proto) <= {"Reshape", "Flatten", "Transpose"}
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed, str(result)
    assert {level.level: level.total for level in result.levels} == dict.fromkeys(session.LEVELS, 0)
    (node,) = [node for node in proto.graph.node if node.op_type == "QTables"]
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    ((table,),) = [tensors[name] for name in node.input if name in tensors]
    source, target = canonical.quantizers["wide#linear0"], canonical.quantizers["narrow.input"]
    for code in range(source.low, source.high + 1):
        real = by_hand((code - source.zero_point) * float(source.scale))
        expected = min(max(round(real / float(target.scale)) + target.zero_point, target.low), target.high)
        assert table[code] == expected, code


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gates_stay_in_codes(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = quantized(Gated(), bits)
    canonical, proto = native(model)
    kinds = [node.op_type for node in proto.graph.node]
    assert ordinary(proto) <= {"Reshape", "Flatten"} and kinds.count("QMul") == 3
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed, str(result)
    assert {level.level: level.total for level in result.levels} == dict.fromkeys(session.LEVELS, 0)


def test_layer_norms_and_scales_read_and_write_codes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = quantized(Normed(), 4)
    canonical, proto = native(model)
    kinds = [node.op_type for node in proto.graph.node]
    assert ordinary(proto) <= {"Reshape", "Flatten", "Squeeze"}
    assert kinds.count("QLayerNorm") == 2 and kinds.count("QScale") == 1
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed, str(result)
    assert {level.level: level.total for level in result.levels} == dict.fromkeys(session.LEVELS, 0)
    plain = emit(lower_to_integers(model, IMAGES, TARGETS["ort-packed"]), TARGETS["ort-packed"])
    assert "LayerNormalization" in ordinary(plain)


@pytest.mark.parametrize("axis", [-1, 3, -2])
def test_a_softmax_over_the_last_axis_writes_codes(axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    model = quantized(Attending(axis), 4)
    canonical, proto = native(model)
    kinds = [node.op_type for node in proto.graph.node]
    assert ("QSoftmax" in kinds, "Softmax" in kinds) == (axis != -2, axis == -2)
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed and result.mismatches == 0, str(result)
    if axis == -2:
        return
    monkeypatch.setattr(reference, "softmax_codes", lambda x, out: softmax_codes(x, out) + 1)
    wrong = proven(model, canonical, proto, tmp_path)
    assert not wrong.passed and "#softmax0" in str(wrong)


def test_a_parametric_relu_stays_in_codes(tmp_path: Path) -> None:
    torch.manual_seed(6)
    net = Sloped()
    for slopes in (net.first.weight, net.second.weight):
        nn.init.uniform_(slopes, -0.5, 0.9)
    model = quantized(net, 4)
    canonical, proto = native(model)
    scaled = [node for node in proto.graph.node if node.op_type == "QScale"]
    assert len(scaled) == 2 and ordinary(proto) <= {"Reshape", "Flatten"}
    result = proven(model, canonical, proto, tmp_path)
    assert result.passed, str(result)
    assert {level.level: level.total for level in result.levels} == dict.fromkeys(session.LEVELS, 0)
