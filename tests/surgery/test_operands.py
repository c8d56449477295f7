"""Weights that are computed, used directly, or used by another module: quantized where they are multiplied, or refused."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.certificate import Certificate, certify
from export.graph import emit_qdq
from export.lower import lower_to_integers, trained_codes
from export.metadata import Preprocessing, sign
from export.targets import TARGETS
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import begin, calibrate, pause
from qat.surgery.layers import FLOAT, LayerSpec
from qat.surgery.swap import computed_weights, parameter_groups, quantize_, quantizers, uniform_rules

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    """Weight standardization, as in BiT and NFNets: what is multiplied is not the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Odd(nn.Module):
    """A standardized conv, a conv on a bare parameter, a linear whose weight its parent uses with a bias made of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardized(3, 6, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(5, 6, 3, 3))
        self.qkv = nn.Linear(5, 7, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        return self.head(F.relu(F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.v_bias]))))


def odd() -> tuple[Odd, list[str]]:
    torch.manual_seed(1)
    model = Odd().eval()
    table = quantize_(model, uniform_rules(4, 4), X)
    calibrate(model, [X])
    return model, [row.name for row in table.rows if row.weight is not None]


def certified(model: nn.Module, file: Path) -> Certificate:
    target = TARGETS["ort-packed"]
    lowered = lower_to_integers(model, X[:1], target)
    seen = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tuple("abcd"))
    onnx.save(sign(emit_qdq(lowered, target), lowered, target, seen, "test"), str(file))
    return certify(lowered, file, X.numpy(), torch.zeros(4).long().numpy(), lambda x: trained_codes(model, x))


def test_every_weight_is_quantized_under_the_name_of_its_owner() -> None:
    model, names = odd()
    assert sorted(names) == ["conv", "head", "kernel", "qkv"]
    assert {f"{n}.weight" for n in names} <= set(quantizers(model)) and len(computed_weights(model)) == 3


def test_the_output_is_that_of_the_quantized_operands() -> None:
    model, _ = odd()
    q = quantizers(model)

    w = model.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    x = F.relu(F.conv2d(q["conv.input"](X), q["conv.weight"](w), model.conv.bias, padding=1))
    x = F.relu(F.conv2d(q["kernel.input"](x), q["kernel.weight"](model.kernel), padding=1))
    x = q["#clip1"](x).mean((2, 3))  # what is pooled is on the 8-bit stream
    x = F.linear(q["qkv.input"](x), q["qkv.weight"](model.qkv.weight), torch.cat([model.q_bias, model.v_bias]))
    expected = F.linear(q["head.input"](F.relu(x)), q["head.weight"](model.head.weight), model.head.bias)
    assert torch.equal(model(X), expected)


def test_all_scales_learn() -> None:
    model, _ = odd()
    optimizer = torch.optim.SGD(parameter_groups(model.train(), 0.0, 1e-3), lr=1e-3)
    before = {n: copy.deepcopy(q.scale) for n, q in quantizers(model).items()}
    F.cross_entropy(model(X), torch.arange(4)).backward()
    optimizer.step()
    assert all(not torch.equal(before[n], q.scale) for n, q in quantizers(model).items())


def test_delayed_quantization_starts_from_the_weights_of_now() -> None:
    model, _ = odd()
    pause(model)
    with torch.no_grad():
        model.kernel.mul_(3)
        model.conv.weight.mul_(3)  # standardized: what is multiplied stays
    before = {n: q.scale for n, q in quantizers(model).items()}
    begin(model, [X], "lsq")
    after = quantizers(model)
    assert torch.allclose(after["kernel.weight"].scale, 3 * before["kernel.weight"])
    assert torch.allclose(after["conv.weight"].scale, before["conv.weight"])


def test_the_file_holds_the_codes_of_the_computed_weights(tmp_path: Path) -> None:
    model, names = odd()
    lowered = lower_to_integers(model, X[:1], TARGETS["ort-packed"])
    w = model.conv.weight.detach()
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    scale = quantizers(model)["conv.weight"].scale
    assert (lowered.layers["conv.weight"].codes == (w / scale.view(-1, 1, 1, 1)).round().clamp(-8, 7).numpy()).all()
    assert lowered.layers["qkv.weight"].bias == pytest.approx([*model.q_bias.tolist(), *model.v_bias.tolist()])
    certificate = certified(model, tmp_path / "odd.onnx")
    assert certificate.passed, str(certificate)
    assert certificate.layers == len(names)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.conv(x)), self.conv.weight).mean((2, 3))


def test_a_weight_with_two_users_has_one_scale_and_one_set_of_codes(tmp_path: Path) -> None:
    model = Tied().eval()
    table = quantize_(model, uniform_rules(4, 4), X)
    calibrate(model, [X])
    assert [row.name for row in table.rows] == ["conv", "conv2d0"]
    found = quantizers(model)
    assert found["conv.weight"].raw_scale is found["conv2d0.weight"].raw_scale
    lowered = lower_to_integers(model, X[:1], TARGETS["ort-packed"])
    assert (lowered.layers["conv.weight"].codes == lowered.layers["conv2d0.weight"].codes).all()
    certificate = certified(model, tmp_path / "tied.onnx")
    assert certificate.passed, str(certificate)
    assert len([p for group in parameter_groups(model, 0.0, 1e-3) for p in group["params"]]) == len(
        list(model.parameters())
    )


def test_two_rules_for_one_weight_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"conv and conv2d0 share the weight conv\.weight, and rules give it different bits"
    ):
        quantize_(Tied(), [("conv", FLOAT), *uniform_rules(4, 4)], X)


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv(x).mean((0, 2, 3)).view(3, 1, 1, 1).expand(3, 3, 1, 1))


def test_a_weight_that_depends_on_the_image_raises() -> None:
    with pytest.raises(ValueError, match=r"#conv2d0: the weight of this conv2d depends on the image"):
        quantize_(Dynamic(), uniform_rules(4, 4), X)


def test_a_float_rule_holds_for_functional_weights_too() -> None:
    model = Odd().eval()
    spec = LayerSpec(QuantSpec(4, signed=True, axis=0), QuantSpec(4))
    table = quantize_(model, [("kernel", FLOAT), ("*", spec)], X)
    assert [row.name for row in table.rows if row.weight is None] == ["kernel"] and "kernel.weight" not in quantizers(
        model
    )
    calibrate(model, [X])
    model(X)


class Table(nn.Module):
    """A product with a table of positions stays in floating point, and is listed with its cost."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(8, 6), nn.Linear(5, 3)
        self.register_buffer("positions", torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(self.linear(x.flatten(1, 2)) @ self.positions, -1)).mean(1)


def test_products_with_a_table_are_listed_in_float() -> None:
    table = quantize_(Table(), uniform_rules(4, 4), X)
    costs = {row.kind: row.multiplications for row in table.in_float}
    assert costs == {"matmul": 24 * 6 * 5, "softmax": 24 * 5}
    assert table.float_share == pytest.approx((720 + 120) / (24 * 8 * 6 + 24 * 5 * 3 + 720 + 120))
    assert "1 matmul" in str(table) and "1 softmax" in str(table)


class Shared(nn.Module):
    """One convolution that runs twice, once on the stream and once on another layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(x))))
        return self.head(F.relu(self.norm(self.conv(x)) + x).mean((2, 3)))


def test_a_layer_that_runs_twice_is_certified_in_both_places(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Shared().eval()
    table = quantize_(model, uniform_rules(4, 4), X)
    assert {row.name: row.macs for row in table.rows}["conv"] == 2 * 6 * 6 * 9 * 36
    calibrate(model, [X])
    certificate = certified(model, tmp_path / "shared.onnx")
    assert certificate.passed, str(certificate)
    assert certificate.layers == 4
    # Only the integer biases are rounded: by at most half a unit, which for this net's second pass is a tenth of a code.
    lowered = lower_to_integers(model, X[:1], TARGETS["ort-packed"])
    layer = lowered.layers["conv@1.weight"]
    unit = layer.stored_scale * lowered.quantizers["conv.input@1"].scale
    largest_shift = float((unit / 2 / lowered.quantizers["norm#batch_norm0"].scale).max())
    assert certificate.fidelity.at_ties / certificate.fidelity.codes < largest_shift < 0.2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.head = nn.Conv2d(3, 4, 1), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0].mean(1))


def test_an_lstm_is_refused_not_skipped() -> None:
    with pytest.raises(ValueError, match=r"lstm#lstm0: .* products of lstm; put \('lstm', FLOAT\) before"):
        quantize_(Recurrent(), uniform_rules(4, 4), X)
