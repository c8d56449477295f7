"""Offsets, power-of-two scales and float weights go through export with every code as trained."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.certificate import Certificate, certify
from export.graph import emit_qdq
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredModel
from export.targets import TARGETS, Target
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import LayerSpec
from qat.surgery.swap import quantize_, quantizers
from tests.surgery.nets import TinyNet, with_random_norms

IMAGES = torch.randn(6, 3, 33, 29, generator=torch.Generator().manual_seed(3))


def exported(
    layer: LayerSpec, stream: QuantSpec, tmp_path: Path, target: Target = TARGETS["ort-int8"]
) -> tuple[torch.nn.Module, LoweredModel, Path]:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    quantize_(model, [("*", layer)], IMAGES[:1], stream=stream, weight_init="mse")
    calibrate(model, [IMAGES])
    lowered = lower_to_integers(model, IMAGES, target)
    file = tmp_path / "tiny.onnx"
    onnx.save(emit_qdq(lowered), str(file))
    return model, lowered, file


def proof(model: torch.nn.Module, lowered: LoweredModel, file: Path) -> Certificate:
    labels = np.zeros(6, np.int64)
    return certify(lowered, file, IMAGES.numpy(), labels, lambda images: trained_codes(model, images))


def test_lsq_plus_exports_its_zero_points(tmp_path: Path) -> None:
    plus = QuantSpec(4, offset=True)
    layer = LayerSpec(QuantSpec(4, signed=True, axis=0), plus)
    model, lowered, file = exported(layer, QuantSpec(8, offset=True), tmp_path)
    found = {name: q for name, q in quantizers(model).items() if isinstance(q, LSQPlus)}
    assert {lowered.quantizers[name].zero_point for name in found} == {q.zero_point for q in found.values()}
    assert any(q.zero_point not in (0, 8, 128) for q in found.values())
    certificate = proof(model, lowered, file)
    assert certificate.passed and certificate.mismatches == 0
    dropped = dataclasses.replace(lowered, quantizers=dict(lowered.quantizers))
    name = next(n for n, q in found.items() if q.zero_point not in (0, 8, 128))
    dropped.quantizers[name] = dataclasses.replace(lowered.quantizers[name], zero_point=0)
    onnx.save(emit_qdq(dropped), str(file))
    assert not proof(model, lowered, file).passed


def test_power_of_two_scales_export(tmp_path: Path) -> None:
    layer = LayerSpec(QuantSpec(4, signed=True, axis=0, power_of_two=True), QuantSpec(4, power_of_two=True))
    keeping = dataclasses.replace(TARGETS["ort-int8"], keeps_scales=True)
    model, lowered, file = exported(layer, QuantSpec(8, power_of_two=True), tmp_path, keeping)
    scales = np.array([q.scale for q in lowered.quantizers.values()])
    assert np.array_equal(np.log2(scales), np.rint(np.log2(scales)))
    assert proof(model, lowered, file).mismatches == 0
    assert any(tried.remaining for tried in lowered.tried)  # ties that runtimes round differently


def test_power_of_two_scales_stay_and_their_ties_are_counted(tmp_path: Path) -> None:
    """The net in PyTorch rounds its ties as this runtime does; a moved scale would ship another net than was trained."""
    layer = LayerSpec(QuantSpec(4, signed=True, axis=0, power_of_two=True), QuantSpec(4, power_of_two=True))
    model, lowered, file = exported(layer, QuantSpec(8, power_of_two=True), tmp_path)
    scales = {name: float(q.scale) for name, q in quantizers(model).items() if not q.is_weight}
    assert {name: float(grid.scale) for name, grid in lowered.quantizers.items()} == scales
    assert any(tried.remaining for tried in lowered.tried)
    found = proof(model, lowered, file)
    assert found.mismatches == 0 and "at ties that runtimes may round differently" in str(found)


def test_float_weights_on_quantized_inputs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"stem.*activation-only"):
        exported(LayerSpec(None, QuantSpec(4)), QuantSpec(8), tmp_path)
