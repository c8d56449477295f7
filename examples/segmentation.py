"""A segmentation net with skip connections and transposed convolutions: a class for every pixel.

uv run examples/segmentation.py --steps 200
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, classes: int = 2, width: int = 8) -> None:
        super().__init__()
        self.fine, self.coarse = twice(3, width), twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined, self.out = twice(2 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)
        coarse = self.coarse(F.max_pool2d(fine, 2))
        return self.out(self.joined(torch.cat([self.up(coarse), fine], dim=1)))


def main(steps: int, out: Path) -> bool:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    masks = (images.mean(1) > 0).long()
    model = UNet()
    print(qat.quantize_(model, qat.uniform_rules(4), images[:2]))
    qat.calibrate(model, [images])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    qat.settle_(model)
    qat.export_onnx(model, out)
    certificate = qat.certify(model, out, images)
    print(certificate)
    return certificate.passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("unet.onnx"))
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.steps, arguments.out) else 1)
