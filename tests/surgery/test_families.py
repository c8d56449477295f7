"""Backbones of several families: quantized whole, every scale parameter trained, nothing silently left out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, quantizers, uniform_rules

FAMILIES: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32},
    "mobilenetv2_035": {"pad_type": "same"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_quantizer_is_reached_and_gets_a_finite_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, _ = create_backbone(name, 5, **FAMILIES[name])
    x = torch.randn(2, 3, 32, 32)
    table = quantize_(model, uniform_rules(4, 4, first_and_last(model)), x)
    assert all(row.weight is not None for row in table.rows)
    calibrate(model, [x])
    (model.train()(x) ** 2).sum().backward()
    gradients = {n: q.raw_scale.grad for n, q in quantizers(model).items()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())


def test_attention_products_and_gates_have_quantized_operands() -> None:
    model, _ = create_backbone("vit_tiny_patch16_224", 5, img_size=32)
    points = quantize_(model, uniform_rules(4, 4, first_and_last(model)), torch.zeros(1, 3, 32, 32)).points
    assert {"blocks.0.attn.qkv#linear0", "blocks.0.attn#softmax0", "blocks.0.attn#mul0", "blocks.0#add1"} <= set(points)
    gated, _ = create_backbone("mobilenetv3_small_050", 5)
    points = quantize_(gated, uniform_rules(4, 4, first_and_last(gated)), torch.zeros(1, 3, 32, 32)).points
    assert any(".se.gate#" in point for point in points), points


def test_unknown_backbone_and_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--backbone mobilenetv2_10: timm has no such model; nearest: mobilenetv2_1"):
        create_backbone("mobilenetv2_10", 5)
    file = tmp_path / "other.pt"
    torch.save({"a.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"other\.pt: does not fit the backbone; missing or of another shape: "):
        create_backbone("mobilenetv2_035", 5, weights=file)
    with pytest.raises(ValueError, match="No such file"):
        create_backbone("mobilenetv2_035", 5, weights=tmp_path / "absent.pt")
