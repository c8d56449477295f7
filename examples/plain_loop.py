"""Your model, your loop: quantize, calibrate, train, settle, export, certify.

uv run examples/plain_loop.py --steps 200
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def quadrants(count: int, side: int = 16) -> TensorDataset:
    """Noise with one bright quadrant, which is the class."""
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, side, side) * 0.5
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = half * (label // 2), half * (label % 2)
        image[:, top : top + half, left : left + half] += 1
    return TensorDataset(images, labels)


def main(steps: int, out: Path) -> bool:
    torch.manual_seed(0)
    loader = DataLoader(quadrants(256), batch_size=32, shuffle=True)
    model = small_net()
    print(qat.quantize_(model, qat.uniform_rules(4), torch.zeros(1, 3, 16, 16)))
    qat.calibrate(model, loader)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
    taken = 0
    while taken < steps:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken += 1
    model.eval()
    qat.settle_(model)
    qat.export_onnx(model, out, target="ort-packed")
    images, labels = quadrants(64).tensors
    certificate = qat.certify(model, out, images, labels)
    print(certificate)
    return certificate.passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.steps, arguments.out) else 1)
