"""One-bit networks on an unmodified ONNX Runtime: every code of every quantizer, at the levels that run integer kernels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import session
from export.fidelity import fidelity
from export.graph import emit_qdq
from export.lower import lower, lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.reference import IntegerReference
from export.targets import TARGETS
from export.thresholds import code_thresholds, with_threshold_bias
from qat.surgery.binarize import BIPER, Binarizer, binary_weights
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import binary_rules, quantize_, quantizers
from tests.surgery.nets import with_random_norms

IMAGES = torch.randn(3, 3, 14, 12, generator=torch.Generator().manual_seed(0))
EDGES = ("stem", "head")


class BinaryNet(nn.Module):
    """A chain that is read from sums, through a pool; a residual one that is read from codes; zero channels; a 1×1 branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((8, 8), (8, 8), (8, 13), (13, 13))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (8, 8, 8, 13, 13))
        self.pool, self.downsample, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 13, 1), nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norms[0](self.stem(x)))
        y = F.hardtanh(self.norms[1](self.convs[0](x)))
        y = F.hardtanh(self.norms[2](self.convs[1](y)) + x)
        y = F.hardtanh(self.norms[3](self.pool(self.convs[2](y)))) + self.downsample(F.avg_pool2d(y, 2))
        y = F.hardtanh(self.norms[4](self.convs[3](y)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)))
        return self.head(y.mean((2, 3)))


def binary_net(binarizer: Binarizer = BIPER) -> nn.Module:
    torch.manual_seed(0)
    model = with_random_norms(BinaryNet()).eval()
    quantize_(model, binary_rules(model, EDGES, binarizer=binarizer), IMAGES[:1])
    for quantizer in quantizers(model).values():
        if getattr(quantizer, "threshold", None) is not None:
            quantizer.threshold.data.normal_(0, 0.3)
    calibrate(model, [IMAGES])
    return model


def mismatches(lowered: LoweredModel, target: str, level: str) -> dict[str, int]:
    names = list(lowered.quantizers)
    proto = session.with_outputs(emit_qdq(lowered, TARGETS[target]), names)
    found = session.load(proto, level=level).run(IMAGES.numpy())
    expected, defined = IntegerReference(lowered, session.FloatOperators()).run(IMAGES, given=found)
    assert np.array_equal(defined["logits"], found["logits"])
    for name in names:
        if lowered.quantizers[name].is_binary:
            assert set(np.unique(found[name])) == {0, 254}
    return {name: wrong for name in names if (wrong := int((expected[name] != found[name]).sum()))}


@pytest.mark.parametrize(
    ("binarizer", "target"),
    [
        (BIPER, "ort-packed"),
        (replace(BIPER, learn_thresholds=True), "ort-int8"),
        (Binarizer("recu"), "ort-packed-int4"),
    ],
)
def test_every_code_matches(binarizer: Binarizer, target: str) -> None:
    model = binary_net(binarizer)
    lowered = lower_to_integers(model, IMAGES, TARGETS[target])
    assert {level: mismatches(lowered, target, level) for level in ("EXTENDED", "ALL")} == {"EXTENDED": {}, "ALL": {}}
    binary = [q for q in lowered.quantizers.values() if q.is_binary]
    assert {q.write_scale is None for q in binary} == {True, False}  # read from codes, and from sums
    assert any((layer.scale < 0).any() for layer in lowered.layers.values() if layer.bits == 1)


def test_stored_weights_are_the_latent_ones_signs_in_one_bit_each() -> None:
    model = binary_net()
    lowered = lower_to_integers(model, IMAGES, TARGETS["ort-packed"])
    sizes = {t.name: len(t.raw_data) for t in emit_qdq(lowered, TARGETS["ort-packed"]).graph.initializer}
    pairs = list(binary_weights(model))
    assert len(pairs) == 4
    for quantizer, latent in pairs:
        expected = np.where(np.sin(np.float32(20.0) * latent.detach().numpy()) >= 0, 1, -1)
        assert np.array_equal(lowered.layers[quantizer.name].codes, expected)
        assert sizes[f"{quantizer.name}/p0"] == -(-latent.numel() // 8)


def test_the_trained_net_has_the_files_codes() -> None:
    model = binary_net()
    codes, outputs = trained_codes(model, IMAGES.numpy())
    reference = IntegerReference(lower_to_integers(model, IMAGES), session.FloatOperators())
    judged, _ = fidelity(reference, IMAGES.numpy(), lambda images: (codes, outputs), outputs, len(IMAGES))
    # bias codes of the 8-bit layers round by up to 1/22 of an output code: what is near a tie goes the other way
    assert not judged.unexplained and judged.at_ties <= judged.codes / 22, judged
    assert set(np.unique(codes["convs.0.input"])) == {0, 254}


@pytest.mark.parametrize("weight_multiplier", [1, 64])
@pytest.mark.parametrize("gain_from_bits", [1, 4])
def test_threshold_biases_decide_as_exact_fractions_do(weight_multiplier: int, gain_from_bits: int) -> None:
    """sign(acc·u + b - t) for every sum, u of both signs and 0, against float64 in real units."""
    rng = np.random.default_rng(weight_multiplier)
    channels, fan_in = 41, 9
    scale = (rng.normal(size=channels) * 0.3).astype(np.float32)
    scale[:2] = 0.0, 1e-37
    bias = rng.normal(size=channels)
    source = (
        LoweredQuantizer.binary("x", 1.0, (0.0,))
        if gain_from_bits == 1
        else LoweredQuantizer.in_storage("x", 0.37, gain_from_bits, signed=False)
    )
    target = LoweredQuantizer.binary("y", 1.0, tuple(rng.normal(size=channels).tolist()))
    codes = rng.choice([-1, 1], (channels, fan_in)).astype(np.int8)
    layer = LoweredLayer("l", "conv", codes, scale, 1, bias, weight_multiplier=weight_multiplier)
    done, written = with_threshold_bias(layer, source, target)
    unit = (source.scale * done.stored_scale).astype(np.float64)
    for total in range(-fan_in * 15, fan_in * 15 + 1):
        acc = np.where(
            np.isin(np.arange(channels), done.bias_only_channels), 0, total * weight_multiplier * source.gain
        )
        decided = (acc + done.bias_codes) * np.sign(unit) >= 0
        real = (
            acc * (source.scale * (scale / np.float32(weight_multiplier))).astype(np.float64)
            + bias
            - np.array(target.thresholds)
        )
        assert np.array_equal(decided, real >= 0)
        shown = (
            np.rint((acc + done.bias_codes).astype(np.float32) * (unit / written.write_scale).astype(np.float32)) + 254
        )
        assert np.array_equal(np.clip(shown, 0, 254), 254 * decided)
    assert done.bias_only_channels[:2] == (0, 1) and done.bits == 2  # no 1-bit code is 0


def test_code_thresholds_are_the_first_code_that_reaches() -> None:
    source = LoweredQuantizer.in_storage("x", 0.1, 8, signed=True)
    thresholds = (0.0, -0.05, 0.1, np.float32(0.1) * 7, -99.0, -np.inf)
    target = LoweredQuantizer.binary("y", 1.0, tuple(float(t) for t in thresholds))
    values = (np.arange(256) - 128).astype(np.float32) * np.float32(0.1)
    expected = [int(np.argmax(values >= np.float32(t))) for t in thresholds]
    assert code_thresholds(source, target).tolist() == expected
    with pytest.raises(ExportError, match=r"channels \[1\], which are -1 throughout"):
        code_thresholds(source, LoweredQuantizer.binary("y", 1.0, (0.0, 99.0)))


def test_a_clip_in_front_moves_thresholds() -> None:
    grid = LoweredQuantizer.binary("y", 1.0, (0.0, 0.5, -0.5))
    assert grid.clipped(0.0, np.inf).thresholds == (-np.inf, 0.5, -np.inf)
    assert grid.clipped(-1.0, 0.2).thresholds == (0.0, np.inf, -0.5)


def test_stage_one_is_refused() -> None:
    with pytest.raises(ExportError, match="stage 1"):
        lower(binary_net(replace(BIPER, stage=1)), IMAGES)
