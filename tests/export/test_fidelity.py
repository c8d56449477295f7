"""A file and its reference that share a mistake are caught by the trained net, and the place is named."""

import copy
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.certificate import Certificate, certify
from export.fidelity import Fidelity, _einsum_products, within_share
from export.lower import lower, lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredModel
from export.native_graph import emit
from export.targets import TARGETS
from qat.settle import settle_
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, quantizers, uniform_rules

IMAGES = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(8))


class Net(nn.Module):
    """What can be got wrong is an attribute, so that a twin with the same parameters differs in one operation."""

    fill, clip, stride, ceil, counts, sign, order, gain = 0.0, 6.0, 2, False, True, 1.0, (0, 1), 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(16, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.norm(self.first(x)), 0.0, self.clip)
        x = x + self.right(x) * self.gain
        y = self.left(F.pad(x, (1, 1, 1, 1), value=self.fill))
        parts = (y, self.right_of(x))
        x = torch.cat([parts[i] for i in self.order], 1)
        x = F.avg_pool2d(x, 3, 2, 1, self.ceil, self.counts)
        return self.head(self.last(x).mean((2, 3)))

    def right_of(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1) * self.sign if self.sign != 1.0 else F.max_pool2d(x, 3, 1, 1)


def trained(bits: int = 8) -> nn.Module:
    torch.manual_seed(4)
    model = Net().eval()
    model.norm.weight.data = torch.rand(8) + 0.5
    model.norm.bias.data = torch.randn(8)
    quantize_(model, uniform_rules(bits, bits), IMAGES[:1])
    calibrate(model, [IMAGES])
    return model


def certificate(
    model: nn.Module, lowered: LoweredModel, tmp_path: Path, target: str = "ort-int8", images: Tensor = IMAGES
) -> Certificate:
    """Of a file and a reference that both come from `lowered`, judged by `model`."""
    file = tmp_path / "model.onnx"
    onnx.save(emit(lowered, TARGETS[target]), str(file))
    labels = np.zeros(len(images), np.int64)
    return certify(lowered, file, images.numpy(), labels, lambda batch: trained_codes(model, batch))


def test_the_right_lowering_is_certified(tmp_path: Path) -> None:
    model = trained()
    settle_(model, IMAGES[:1])
    result = certificate(model, lower_to_integers(model, IMAGES[:1]), tmp_path)
    assert result.passed, str(result)
    assert result.fidelity.at_ties <= 1e-5 * result.fidelity.codes and result.fidelity.same == len(IMAGES)
    by_hand = 144 * 8 * 27 + 144 * 8 * 8 + 144 * 8 * 72 + 16 * 12 * 144 + 12 * 5  # pixels · outputs · products of each
    assert result.fidelity.multiply_adds == result.fidelity.on_integers == by_hand and not result.fidelity.in_float


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "padding with another value": ({"fill": -2.0}, "left#conv2d0"),
    "a clip with another bound": ({"clip": 1.0}, "#clip0"),
    "a border counted in a mean": ({"counts": False}, "last.input"),
    "branches in another order": ({"order": (1, 0)}, "#cat0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_file_and_reference_share_is_named(mistake: str, tmp_path: Path) -> None:
    model = trained()
    settle_(model, IMAGES[:1])
    twin = copy.deepcopy(model)
    attributes, where = MISTAKES[mistake]
    for name, value in attributes.items():
        setattr(model, name, value)  # what was trained; the twin is what was lowered
    result = certificate(model, lower_to_integers(twin, IMAGES[:1]), tmp_path)
    assert all(level.passed for level in result.levels) and not result.stored  # file and reference agree
    assert not result.passed and "NOT CERTIFIED" in str(result)
    assert next(iter(result.fidelity.unexplained)) == where and where in str(result), str(result)


def edited(model: nn.Module, name: str, **changes: Callable[[np.ndarray], np.ndarray]) -> LoweredModel:
    lowered = lower_to_integers(model, IMAGES[:1])
    layer = lowered.layers[f"{name}.weight"]
    values: dict[str, Any] = {field: change(getattr(layer, field).copy()) for field, change in changes.items()}
    lowered.layers[f"{name}.weight"] = dataclasses.replace(layer, **values)
    return lowered


def first_doubled(values: np.ndarray) -> np.ndarray:
    values[0] *= 2
    return values


def first_silent(values: np.ndarray) -> np.ndarray:
    values[0] = 0
    return values


EDITS: dict[str, tuple[str, dict[str, Callable[[np.ndarray], np.ndarray]]]] = {
    "weights of a channel dropped": ("left", {"codes": first_silent}),
    "a channel's scale doubled": ("first", {"scale": first_doubled}),
    "a bias dropped": ("last", {"bias_codes": first_silent}),
    "the classifier's bias dropped": ("head", {"bias_codes": first_silent}),
    "the classifier's scale doubled": ("head", {"scale": first_doubled}),
    "all of the classifier's scales 1 % too large": ("head", {"scale": lambda scales: scales * np.float32(1.01)}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_layer_that_was_lowered_wrong_is_named(edit: str, tmp_path: Path) -> None:
    model = trained()
    settle_(model, IMAGES[:1])
    name, changes = EDITS[edit]
    result = certificate(model, edited(model, name, **changes), tmp_path)
    assert all(level.passed for level in result.levels) and not result.passed
    follows = {"first": "#clip0", "left": "left#conv2d0", "last": "last#conv2d0", "head": "output logits"}[name]
    found = str(result)
    expected = f"{name}: its bias is" if "bias_codes" in changes else f"{follows}: "
    assert expected in found, found


def test_an_outlier_in_calibration_is_not_hidden(tmp_path: Path) -> None:
    """Bias codes of ±1 and results a quarter off: the unsettled net is refused with the layer; what is settled is what is
    measured, so that its file is right and its accuracy tells."""
    torch.manual_seed(4)
    model = Net().eval()
    model.norm.bias.data = torch.randn(8)
    quantize_(model, uniform_rules(8, 8), IMAGES[:1])
    outlier = IMAGES.clone()
    outlier[0, 0, 0, 0] = 1e6
    calibrate(model, [outlier])
    result = certificate(model, lower_to_integers(model, IMAGES[:1]), tmp_path)
    assert not result.passed and "rounding its bias moves results" in str(result), str(result)
    settlement = settle_(model, IMAGES[:1])
    assert max(settlement.shifts.values()) > 0.5
    assert certificate(model, lower_to_integers(model, IMAGES[:1]), tmp_path).passed


class Scaled(nn.Module):
    """Tokens multiplied in floating point by a trained gain, as by a LayerScale, before they are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(1024, 32), nn.Parameter(torch.ones(32))
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.permute(0, 2, 3, 1)) * self.gain).mean((1, 2))


def test_results_far_beyond_a_grid_may_end_next_to_its_ties(tmp_path: Path) -> None:
    """A sum of float32 is off by its last bit, which is many codes' thousandths where the sum is 100,000 codes."""
    torch.manual_seed(6)
    images = torch.randn(16, 1024, 16, 16)
    model = Scaled().eval()
    quantize_(model, uniform_rules(8, 8), images[:1])
    calibrate(model, [images])
    found = quantizers(model)
    found["first.weight"].raw_scale.data.fill_(found["first.weight"].scale.mean())
    unit = (
        found["first.input"].scale * found["first.weight"].scale
    )  # of the sums: every result is next to a tie of this grid
    found["last.input"].raw_scale.data.copy_(unit.max())
    model.first.bias.data.copy_(unit * (0.5 - 0.002))
    result = certificate(model, lower_to_integers(model, images[:1]), tmp_path, images=images).fidelity
    assert result.at_ties > 0 and result.unexplained == {}


class Wide(nn.Module):
    """A channel whose bias outweighs its largest sum, yet does not decide alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 2048, 1), nn.BatchNorm2d(2048)
        self.second, self.last_norm = nn.Conv2d(2048, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last_norm(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(x + 0.5 * x).mean((2, 3)))


def wide(bias_in_units: float) -> nn.Module:
    """A bias of `bias_in_units` of the integer sums in channel 0 of `second`, on grids that reach it."""
    torch.manual_seed(0)
    model = Wide().eval()
    model.second.weight.data = 1 + 0.01 * model.second.weight.data  # codes next to 127: the largest sum is 2^26
    quantize_(model, uniform_rules(8, 8), IMAGES[:1], weight_init="mse")
    calibrate(model, [IMAGES])
    lowered = lower_to_integers(model, IMAGES[:1])
    layer = lowered.layers["second.weight"]
    bias = bias_in_units * float(lowered.quantizers[layer.input_quantizer].scale * layer.stored_scale[0])
    with torch.no_grad():
        model.last_norm.bias[0] = bias
        for name, quantizer in quantizers(model).items():
            if "#" in name or name == "head.input":
                quantizer.raw_scale.fill_(1.6 * bias / 127)
    return model


@pytest.mark.parametrize("bias", [0.5 * 2**30, 1.2 * 2**30, 1.7 * 2**30])
def test_a_large_bias_keeps_its_sums(bias: float, tmp_path: Path) -> None:
    model = wide(bias)
    lowered = lower_to_integers(model, IMAGES[:1])
    assert not lowered.layers["second.weight"].bias_only_channels
    result = certificate(model, lowered, tmp_path)
    assert not result.fidelity.unexplained, str(result)


def test_a_bias_that_no_integer_holds_beside_its_sums_is_refused_by_name() -> None:
    with pytest.raises(
        ExportError, match=r"layer 'second': the bias of output channel 0 is .* 32 bits cannot hold both"
    ):
        lower_to_integers(wide(2.1 * 2**30), IMAGES[:1])


def test_a_channel_that_its_bias_alone_decides_keeps_only_that(tmp_path: Path) -> None:
    """The same bias, clipped whatever the sum: no code depends on it."""
    model = wide(2.1 * 2**30)
    with torch.no_grad():
        for name in ("last_norm#batch_norm0", "#mul0", "#clip1"):
            quantizers(model)[name].raw_scale.mul_(1e-3)
    lowered = lower_to_integers(model, IMAGES[:1])
    assert lowered.layers["second.weight"].bias_only_channels == (0,) and "only the bias decides" in lowered.notes[0]
    assert not certificate(model, lowered, tmp_path).fidelity.unexplained


def test_answers_are_judged_by_what_a_sample_can_tell() -> None:
    """Against exact binomial sums in rational arithmetic."""
    for count, differing in ((64, 3), (64, 4), (128, 5), (128, 6), (1000, 18), (1000, 20), (12, 0), (12, 2), (12, 3)):
        share = Fraction(1, 100)
        below = sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(differing))
        expected = differing <= count / 100 or 1 - below >= Fraction(1, 100)
        assert within_share(differing, count, 0.01, 0.01) is bool(expected), (count, differing)
    judged = Fidelity(10, 0, {}, ("", 0.0), {}, {}, 1000, 590, 5, 5, {})
    assert not judged.passed and "fewer than 99 %" in str(judged)


def test_multiply_adds_that_are_not_in_the_file_are_missed() -> None:
    assert Fidelity(10, 0, {}, ("", 0.0), {}, {}, 10, 10, 100, 60, {"head": 40}).passed
    lost = Fidelity(10, 0, {}, ("", 0.0), {}, {}, 10, 10, 100, 60, {"head": 30})
    assert not lost.passed and "10 multiply-adds of the trained net are not in the file" in str(lost)


class Outputs(nn.Module):
    """Several results: as a dict or a tuple, one of them not N_C."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        if kind != "map":
            self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> object:
        features = torch.relu(self.second(torch.relu(self.first(x))))
        if self.kind == "map":
            return features
        logits = self.head(features.mean((2, 3)))
        if self.kind == "dict":
            return {"classes": logits, "map": features}
        return (logits, features) if self.kind == "tuple" else logits


@pytest.mark.parametrize(
    ("kind", "names"),
    [("dict", ["classes", "map"]), ("tuple", ["output0", "output1"]), ("map", ["logits"]), ("plain", ["logits"])],
)
def test_every_output_is_certified_under_its_name(kind: str, names: list[str], tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Outputs(kind).eval()
    quantize_(model, uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    settle_(model, IMAGES[:1])
    lowered = lower_to_integers(model, IMAGES[:1])
    result = certificate(model, lowered, tmp_path)
    assert result.passed, str(result)
    assert [o.name for o in onnx.load(str(tmp_path / "model.onnx")).graph.output] == names
    assert result.fidelity.answers == (len(IMAGES) if kind != "map" else len(IMAGES) * 64)
    assert bool(result.accuracy) is (kind != "map")
    with torch.no_grad():
        wrong = copy.deepcopy(model)
        wrong.get_submodule("second").bias[0] += 1.0  # type: ignore[index]
    assert not certificate(wrong, lowered, tmp_path).passed


def test_a_result_that_is_no_tensor_is_refused() -> None:
    class Nested(Outputs):
        def forward(self, x: Tensor) -> object:
            return {"logits": super().forward(x), "aux": [x]}

    model = Nested("plain").eval()
    quantize_(model, uniform_rules(4, 4), IMAGES[:1])
    calibrate(model, [IMAGES])
    with pytest.raises(ExportError, match="its output 'aux' is a list"):
        lower(model, IMAGES[:1])


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bchw, dc -> bdhw", [(2, 3, 4, 5), (6, 3)]),
        ("...i,ij->...j", [(2, 7, 3), (3, 5)]),
        ("...ij,...jk", [(2, 1, 3, 4), (2, 6, 4, 5)]),
        ("bij,bjk,bkl->bil", [(2, 3, 4), (2, 4, 5), (2, 5, 6)]),
    ],
)
def test_products_of_an_einsum_are_counted_by_its_indices(equation: str, shapes: list[tuple[int, ...]]) -> None:
    """As many as NumPy finds combinations of indices, where none is summed over."""
    operands = equation.replace(" ", "").split("->")[0]
    letters = "".join(sorted(set(operands) & set("bcdhijkwl")))
    kept = np.einsum(
        f"{operands}->{'...' if '...' in operands else ''}{letters}", *[np.ones(shape) for shape in shapes]
    )
    assert _einsum_products(equation, shapes) == kept.size
