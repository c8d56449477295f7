"""On emulated ARM: planted faults show there, and what the exporter does about them mends them.

A file with a weight byte -128 in a depthwise layer, and one with two sums of power-of-two scales, compute other codes on ARM
than on x86; the exporter's own files do not. `.ci/run` sets the machines up where QEMU is installed.
"""

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export import graph, layer_weights
from export.across import Elsewhere, certify_elsewhere
from export.elsewhere import unavailable
from export.lower import lower_to_integers
from export.native_graph import emit
from export.passes import biases
from export.targets import TARGETS, LayerPlan, Target
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import LayerSpec, QuantConv2d
from qat.surgery.swap import quantize_, quantizers

MACHINE = "neoverse-n1"
REASON = unavailable(MACHINE, onnxruntime.__version__)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(11))


class TwoSums(nn.Module):
    """Convolutions, one of them depthwise, and two residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.depthwise(x)
        x = x + self.point(x)
        return self.head(x.mean((2, 3)))


def net(power_of_two: bool) -> nn.Module:
    torch.manual_seed(1)
    model = TwoSums().eval()
    layer = LayerSpec(
        QuantSpec(4, signed=True, axis=0, power_of_two=power_of_two), QuantSpec(4, power_of_two=power_of_two)
    )
    quantize_(model, [("*", layer)], IMAGES[:1], stream=QuantSpec(8, power_of_two=power_of_two))
    calibrate(model, [IMAGES])
    return model


def on_arm(model: nn.Module, target: Target) -> Elsewhere:
    lowered = lower_to_integers(model, IMAGES[:1], target)
    (found,) = certify_elsewhere(lowered, emit(lowered, target), "net.onnx", IMAGES.numpy(), (MACHINE,))
    assert not found.not_run
    return found


def test_the_byte_minus_128_is_computed_wrongly_on_arm_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """All depthwise weights at their lowest code, over inputs of which many are 0."""
    model = net(power_of_two=False)
    assert isinstance(model.depthwise, QuantConv2d)
    with torch.no_grad():
        model.depthwise.weight.fill_(-100.0)
    assert on_arm(model, TARGETS["ort-int8"]).passed
    monkeypatch.setattr(biases, "weight_multiplier_of", lambda target, bits, source: 16)
    for module in (graph, layer_weights):
        monkeypatch.setattr(module, "plan_layer", lambda target, layer, source: LayerPlan(8, uint8=False))
    planted = on_arm(model, TARGETS["ort-int8"])
    assert not planted.passed
    assert list(planted.mismatches) == ["depthwise#conv2d0"] and planted.mismatches["depthwise#conv2d0"] > 100


def test_ties_of_two_sums_are_rounded_otherwise_on_arm_and_moved_away() -> None:
    """Scales that happen to be powers of two are moved; those that must be stay, and the proof on ARM fails."""
    model = net(power_of_two=False)
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.raw_scale.copy_(2.0 ** quantizer.scale.log2().round())
    planted = on_arm(model, Target("keeping", keeps_scales=True))
    assert not planted.passed
    assert set(planted.mismatches) <= {"#add0", "#add1"} and planted.total > 50
    assert on_arm(model, TARGETS["ort-int8"]).passed
    assert not on_arm(net(power_of_two=True), TARGETS["ort-int8"]).passed


def test_edgeqats_kernels_compute_the_same_on_arm() -> None:
    found = on_arm(net(power_of_two=True), TARGETS["ort-native"])
    assert found.passed, str(found)
