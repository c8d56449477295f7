"""A detector's backbone: timm's feature maps at several scales, a small pyramid on top, outputs by name.

uv run examples/detector_backbone.py --model mobilenetv3_small_050
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat


class Detector(nn.Module):
    """Scores and boxes on the finer of two scales, with the coarser one added."""

    def __init__(self, name: str, width: int = 16) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, out_indices=(2, 3))
        fine, coarse = self.backbone.feature_info.channels()
        self.fine, self.coarse = nn.Conv2d(fine, width, 1), nn.Conv2d(coarse, width, 1)
        self.scores, self.boxes = nn.Conv2d(width, 3, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine, coarse = self.backbone(image)
        joined = self.fine(fine) + F.interpolate(self.coarse(coarse), scale_factor=2, mode="nearest")
        return {"scores": self.scores(F.relu(joined)), "boxes": self.boxes(F.relu(joined))}


def main(name: str, size: int, steps: int, out: Path) -> bool:
    torch.manual_seed(0)
    images = torch.randn(8, 3, size, size)
    model = Detector(name)
    table = qat.quantize_(model, qat.uniform_rules(8), images[:2])
    print(table)
    qat.calibrate(model, [images])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
    model.train()
    for _ in range(steps):
        answers = model(images)
        loss = answers["scores"].square().mean() + answers["boxes"].square().mean()
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
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("detector.onnx"))
    given = parser.parse_args()
    raise SystemExit(0 if main(given.model, given.size, given.steps, given.out) else 1)
