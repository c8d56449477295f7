"""What lowering does to weights, biases and bounds, against the unfolded net in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import qat
from export.graph import emit_qdq
from export.lower import lower, lower_to_integers
from export.lowered import ExportError, LoweredLayer, LoweredQuantizer
from export.passes.batch_norms import fold_batch_norms
from export.targets import saturates
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from tests.export.conftest import Exported, build_tiny
from tests.surgery.nets import TinyNet

IMAGES = torch.randn(4, 3, 33, 29, generator=torch.Generator().manual_seed(5))


def test_codes_are_the_quantizers_codes_whatever_the_norm(tiny: Exported) -> None:
    for name, quantizer in quantizers(tiny.model).items():
        if quantizer.is_weight:
            weight = tiny.model.get_parameter(name)
            assert np.array_equal(tiny.lowered.layers[name].codes, quantizer.codes(weight).numpy())


@pytest.mark.parametrize(
    ("layer", "norm"), [("stem", "bn"), ("block.conv1", "block.bn1"), ("block.conv2", "block.bn2")]
)
def test_folded_scale_and_bias_reproduce_conv_and_norm(tiny: Exported, layer: str, norm: str) -> None:
    """codes·scale + bias == batch_norm(conv) in float64, with random gamma (some negative), beta, mean and variance."""
    lowered, conv, bn = (
        tiny.lowered.layers[f"{layer}.weight"],
        tiny.model.get_submodule(layer),
        tiny.model.get_submodule(norm),
    )
    assert isinstance(conv, torch.nn.Conv2d) and isinstance(bn, torch.nn.BatchNorm2d)
    x = torch.randn(2, lowered.codes.shape[1] * conv.groups, 9, 7, dtype=torch.float64)
    weight = (lowered.codes.astype(np.float64).reshape(len(lowered.scale), -1) * lowered.scale[:, None]).reshape(
        conv.weight.shape
    )
    folded = torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(lowered.bias), groups=conv.groups)
    latent = quantizers(tiny.model)[f"{layer}.weight"](conv.weight).detach().double()
    y = torch.nn.functional.conv2d(x, latent, None if conv.bias is None else conv.bias.double(), groups=conv.groups)
    double = lambda t: t.detach().double()  # noqa: E731
    expected = torch.nn.functional.batch_norm(
        y, double(bn.running_mean), double(bn.running_var), double(bn.weight), double(bn.bias), eps=bn.eps
    )
    # the scale is stored in float32: 2^-24 relative per channel
    assert (folded - expected).abs().max() <= 2**-22 * expected.abs().max()
    assert (lowered.scale < 0).any() == (bn.weight < 0).any().item()


def test_folding_reports_whether_it_changed_anything(tiny: Exported) -> None:
    fresh = lower(tiny.model, IMAGES)
    assert fold_batch_norms(fresh) is True
    assert fold_batch_norms(fresh) is False


def test_bias_codes_are_rounded_in_units_of_both_scales(tiny: Exported) -> None:
    layer = tiny.lowered.layers["block.conv1.weight"]
    assert layer.weight_multiplier == 15
    scale = quantizers(tiny.model)["block.conv1.input"].scale.item()
    expected = np.rint(layer.bias / (np.float64(np.float32(scale)) * layer.scale.astype(np.float64) / 15))
    assert np.abs(layer.bias_codes - expected).max() <= 1  # the unit itself is rounded to float32
    assert (layer.bias_codes == expected).mean() > 0.8


def test_clip_activations_move_onto_the_codes(tiny: Exported) -> None:
    relu6 = tiny.lowered.quantizers["#clip0"]
    assert relu6.low == relu6.zero_point == 0
    assert relu6.high == min(255, int(np.rint(np.float32(6) / relu6.scale)))
    signed = tiny.lowered.quantizers["block.bn2#batch_norm0"]
    assert (signed.zero_point, signed.low, signed.high) == (128, 0, 255)


def test_a_clip_above_the_grid_changes_nothing_and_one_below_binds() -> None:
    grid = LoweredQuantizer.in_storage("q", 0.5, 4, signed=False)
    assert grid.clipped(0.0, 100.0) == grid
    assert grid.clipped(0.0, 3.2).high == 6  # rint(3.2 / 0.5)
    assert LoweredQuantizer.in_storage("q", 0.5, 4, signed=True).clipped(0.0, np.inf).low == 8


def test_a_silenced_channel_keeps_its_bias_alone() -> None:
    model = build_tiny(4, IMAGES)
    model.bn.weight.data[2] = 0.0
    model.bn.weight.data[3] = 1e-30
    lowered = lower_to_integers(model, IMAGES)
    layer = lowered.layers["stem.weight"]
    assert layer.bias_only_channels == (2, 3)
    assert not layer.codes[[2, 3]].any()
    unit = np.float32(lowered.quantizers["stem.input"].scale) * layer.stored_scale
    assert np.allclose((layer.bias_codes * unit)[[2, 3]], model.bn.bias.detach().numpy()[[2, 3]], rtol=1e-5)
    assert any("'stem'" in note and "[2, 3]" in note for note in lowered.notes)


def test_eight_bit_layers_that_could_saturate_get_uint8_weights(tiny: Exported) -> None:
    types = {t.name: t.data_type for t in tiny.proto.graph.initializer}
    assert types["stem.weight"] == 2 and types["block.conv1.weight"] == 3  # UINT8, INT8
    grid = LoweredQuantizer.in_storage("q", 1.0, 8, signed=False)
    layer = LoweredLayer("l", "conv", np.full((1, 2), 64, np.int8), np.ones(1, np.float32), 8)
    assert not saturates(layer, grid)  # 2 · 255 · 64 = 32640
    assert saturates(LoweredLayer("l", "conv", np.full((1, 2), 65, np.int8), np.ones(1, np.float32), 8), grid)


def test_model_without_quantizers_or_calibration_is_refused() -> None:
    with pytest.raises(ExportError, match="no quantizers"):
        lower(TinyNet(), IMAGES)
    model = TinyNet()
    quantize_(model, uniform_rules(4, 4, ("stem", "head")), IMAGES)
    with pytest.raises(ExportError, match=r"'stem.input' has no scale"):
        lower(model, IMAGES)


@pytest.mark.parametrize(
    ("name", "value"), [("stem.weight", float("inf")), ("bn.running_var", float("inf")), ("floor", float("nan"))]
)
def test_what_is_not_finite_after_training_is_refused_by_name(name: str, value: float) -> None:
    model = build_tiny(4, IMAGES)
    model.register_buffer("floor", torch.tensor(0.0))
    model.state_dict()[name].fill_(value)
    with pytest.raises(ExportError, match=f"^{name}: holds NaN or infinity"):
        lower(model, IMAGES[:1])


def test_an_infinite_bound_in_a_buffer_is_not_refused() -> None:
    model = build_tiny(4, IMAGES)
    model.register_buffer("floor", torch.tensor(float("-inf")))
    assert lower(model, IMAGES[:1]).layers


def test_the_model_itself_is_untouched_by_export(tiny: Exported) -> None:
    before = tiny.model(IMAGES).detach()
    emit_qdq(lower_to_integers(tiny.model, IMAGES))
    assert torch.equal(tiny.model(IMAGES), before)


def test_a_layer_that_nothing_depends_on_is_named() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unread = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unread(x)
            return self.used(x)

    model, x = Unread().eval(), torch.randn(2, 4)
    qat.quantize_(model, qat.uniform_rules(4), x)
    qat.calibrate(model, [x])
    with pytest.raises(ExportError, match=r"layer 'unread': nothing that the model returns depends on it, .* forward"):
        lower_to_integers(model, x)
