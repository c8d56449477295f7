"""torchvision's ResNet and ViT, fused attention and all, to certified files.

uv run examples/torchvision_models.py --steps 100
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import qat


def models(size: int) -> dict[str, nn.Module]:
    """Small forms; `torchvision.models.vit_b_16` goes the same way."""
    vit = torchvision.models.VisionTransformer(
        size, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )
    return {"resnet18": torchvision.models.resnet18(num_classes=5), "vit": vit}


def main(size: int, steps: int, folder: Path) -> bool:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, size, size), torch.arange(8) % 5
    passed = True
    for name, model in models(size).items():
        qat.quantize_(model, qat.uniform_rules(4), images[:2])
        qat.calibrate(model, [(images, labels)])
        optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
        model.train()
        for _ in range(steps):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        qat.settle_(model)
        file = qat.export_onnx(model, folder / f"{name}.onnx", target="ort-packed")
        certificate = qat.certify(model, file, images, labels)
        print(certificate)
        passed = passed and certificate.passed
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.size, arguments.steps, arguments.out) else 1)
