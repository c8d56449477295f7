"""A settled net computes what its file computes: the same integers, image for image."""

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import session
from export.lower import lower, lower_to_integers, lowered_anew, trained_codes
from export.native_graph import emit
from export.passes import to_integers
from export.targets import TARGETS
from qat.quantizers.lsq import LSQWeight
from qat.quantizers.spec import QuantSpec
from qat.settle import Settlement, _scale_weight, settle_
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import LayerSpec, QuantConv2d
from qat.surgery.swap import quantize_, quantized_weights, quantizers, uniform_rules
from tests.quick import slow_but
from tests.surgery.nets import TinyNet, with_random_norms

IMAGES = torch.randn(24, 3, 33, 29, generator=torch.Generator().manual_seed(5))


def tiny(bits: int, rules: list[tuple[str, LayerSpec]] | None = None) -> nn.Module:
    torch.manual_seed(bits)
    model = with_random_norms(TinyNet()).eval()
    quantize_(model, rules or uniform_rules(bits, bits, ("stem", "head")), IMAGES[:1], weight_init="mse")
    calibrate(model, [IMAGES])
    return model


def differing(model: nn.Module, target: str) -> int:
    """Codes that differ between the net and its file, both run freely from the image on."""
    lowered = lower_to_integers(model, IMAGES[:1], TARGETS[target])
    names = list(lowered.quantizers)
    found = session.load(session.with_outputs(emit(lowered, TARGETS[target]), names)).run(IMAGES.numpy())
    trained, _ = trained_codes(model, IMAGES.numpy())
    return sum(
        int((np.sort(found[name].ravel()) != np.sort(trained[name].ravel())).sum())
        if name in lowered.trained_at  # the file has it before a pool or another order of its elements
        else int((found[name].ravel() != trained[name].ravel()).sum())
        for name in names
        if found[name].size == trained[name].size
    )


@pytest.mark.parametrize(
    ("bits", "target"),
    slow_but(
        [(2, "ort-packed"), (3, "ort-native")],
        [(2, "ort-packed"), (4, "ort-int8"), (4, "ort-packed-int4"), (3, "ort-native"), (8, "ort-int8")],
    ),
)
def test_the_file_computes_the_settled_nets_codes_on_every_target(bits: int, target: str) -> None:
    model = tiny(bits)
    before = differing(model, target)
    settle_(model, IMAGES[:1])
    assert before > 0 and differing(model, target) == 0, before


@pytest.mark.slow
def test_settling_twice_is_settling_once() -> None:
    model = tiny(4)
    settle_(model, IMAGES[:1])
    once = copy.deepcopy(model.state_dict())
    again = settle_(model, IMAGES[:1])
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    assert all(torch.equal(value, once[key]) for key, value in tensors.items())
    assert not again.moved and not again.scaled


def test_weight_codes_and_the_function_stay_what_they_were() -> None:
    model = tiny(4)
    codes = [quantizer.codes(weight) for weight, quantizer in quantized_weights(model)]
    with torch.no_grad():
        before = model(IMAGES)
        settlement = settle_(model, IMAGES[:1])
        after = model(IMAGES)
    assert all(torch.equal(q.codes(w), c) for (w, q), c in zip(quantized_weights(model), codes, strict=True))
    assert 0 < float((after - before).abs().max()) < 0.1 * float(before.std())
    assert settlement.biases == 6 and settlement.scaled == 5  # the head writes floats, which have no ties


def test_biases_are_whole_numbers_of_units_and_no_sum_lies_near_a_tie() -> None:
    """In float64 from the model's own parameters, for a convolution after a residual block: no lowering is asked."""
    model = tiny(4)
    before = nearest_to_a_tie(model)
    settle_(model, IMAGES[:1])
    conv, norm = model.get_submodule("block.conv1"), model.get_submodule("block.bn1")
    assert isinstance(conv, QuantConv2d) and isinstance(norm, nn.BatchNorm2d)
    codes_in_a_bias = folded_bias(norm) / unit(conv, norm)
    assert np.abs(codes_in_a_bias - np.rint(codes_in_a_bias)).max() < 1e-2
    assert np.abs(np.rint(codes_in_a_bias)).max() > 20
    assert nearest_to_a_tie(model) > 1e-4 > before


MULTIPLIER = 15  # 4-bit weights in a byte: 127 // 8


def unit(conv: QuantConv2d, norm: nn.BatchNorm2d) -> np.ndarray:
    assert conv.input_quantizer is not None and conv.weight_quantizer is not None and norm.running_var is not None
    a = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    scales = conv.input_quantizer.scale.double() * conv.weight_quantizer.scale.double()
    return (scales * a / MULTIPLIER).detach().numpy()


def folded_bias(norm: nn.BatchNorm2d) -> np.ndarray:
    assert norm.running_var is not None and norm.running_mean is not None
    a = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return (norm.bias.double() - a * norm.running_mean.double()).detach().numpy()


def nearest_to_a_tie(model: nn.Module) -> float:
    """Distance in codes of the sum next to a tie, of all sums that `block.conv1` can have."""
    conv, norm = model.get_submodule("block.conv1"), model.get_submodule("block.bn1")
    assert isinstance(conv, QuantConv2d) and isinstance(norm, nn.BatchNorm2d)
    reader = quantizers(model)["block.conv2.input"]
    sums = np.arange(-200_000, 200_000)[:, None]
    codes = sums * unit(conv, norm) / float(reader.scale)
    inside = (codes > 0) & (codes < 15)
    return float(np.abs(codes - np.floor(codes) - 0.5)[inside].min())


class Twins(nn.Module):
    """Two batch norms of equal β, which the exporter writes as one tensor; and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 3, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)) + self.norms[1](self.second(x))
        return self.head(self.again(torch.relu(self.again(torch.relu(y)))).mean((2, 3)))


def test_equal_betas_are_rounded_apart_and_a_layer_with_two_grids_is_left() -> None:
    torch.manual_seed(1)
    model = Twins().eval()
    for norm in model.norms:
        norm.bias.data = torch.linspace(-1, 1, 8)
    quantize_(model, uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    settlement = settle_(model, IMAGES[:1])
    assert not torch.equal(model.norms[0].get_parameter("bias"), model.norms[1].get_parameter("bias"))
    assert set(settlement.left) <= {"again", "again@1", "again.input@1"}


class Standardized(nn.Conv2d):
    """A weight that is computed: its codes do not follow its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / spread, self.bias, padding=1)


def test_a_computed_weight_keeps_its_codes() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    quantize_(model, uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    before = {name: layer.codes for name, layer in lower(model, IMAGES[:1]).layers.items()}
    settle_(model, IMAGES[:1])
    after = {name: layer.codes for name, layer in lower(model, IMAGES[:1]).layers.items()}
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_a_power_of_two_stays_one() -> None:
    spec = LayerSpec(QuantSpec.of_weight(4), QuantSpec(4, power_of_two=True))
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    quantize_(model, [("*", spec)], IMAGES[:1], stream=QuantSpec(8, power_of_two=True))
    calibrate(model, [IMAGES])
    settle_(model, IMAGES[:1])
    for quantizer in quantizers(model).values():
        if quantizer.spec.power_of_two:
            assert float(quantizer.scale.log2()) == round(float(quantizer.scale.log2()))


def test_a_net_that_cannot_be_lowered_stays_as_it_was() -> None:
    model = tiny(4)
    with torch.no_grad():
        model.get_submodule("head").bias[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"head\.bias: holds NaN"):
        settle_(model, IMAGES[:1])
    now = model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in before.items() if isinstance(v, Tensor) and k != "head.bias")


def test_scaling_that_would_change_a_code_is_undone() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]]))
    grid = LSQWeight(QuantSpec.of_weight(4), weight)
    scale, latent = grid.raw_scale.clone(), weight.clone()
    with torch.no_grad():
        grid.codes = lambda x: torch.round(100 * (x / grid.raw_scale + x)).int()  # type: ignore[method-assign]
        assert not _scale_weight(weight, grid, torch.tensor([1.5]).double())
    assert torch.equal(grid.raw_scale, scale) and torch.equal(weight, latent)


def test_the_report_of_a_settlement_is_plain_data() -> None:
    settlement = Settlement(2, {"conv": 0.25}, 1, {"conv.input": -3}, {"head": "why"})
    assert settlement.to_json() == {
        "biases": 2, "shifts": {"conv": 0.25}, "scaled": 1, "moved": {"conv.input": -3}, "left": {"head": "why"},
    }  # fmt: skip


@pytest.mark.parametrize("make", [lambda: with_random_norms(TinyNet()), Twins])
def test_a_graph_that_is_copied_holds_what_an_export_would_hold(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(2)
    model = make().eval()
    quantize_(model, uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    before = lower(model, IMAGES[:1])
    to_integers(lowered_anew(before, model, IMAGES[:1]))  # which leaves `before` as it is
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(torch.rand_like(module.weight) + 0.5)
        for quantizer in quantizers(model).values():
            quantizer.raw_scale.mul_(1.1)
        for weight, _ in quantized_weights(model):
            weight.mul_(1.2)
    found, expected = (to_integers(x) for x in (lowered_anew(before, model, IMAGES[:1]), lower(model, IMAGES[:1])))
    assert found.quantizers == expected.quantizers and found.tried == expected.tried
    assert found.layers.keys() == expected.layers.keys() and found.multiply_adds == expected.multiply_adds
    for name, layer in expected.layers.items():
        for field in ("codes", "scale", "bias", "bias_codes"):
            assert np.array_equal(getattr(found.layers[name], field), getattr(layer, field)), (name, field)
    file, other = (re.sub(r"val_\d+", "val", str(emit(x, TARGETS["ort-int8"]))) for x in (found, expected))
    assert file == other  # but for names that passes make up
