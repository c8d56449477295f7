"""timm's way: its factory for models and optimizers, EMA, clipping, bfloat16, activation checkpointing, channels last.

uv run examples/timm_loop.py --model resnet18 --steps 200
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

import qat


def main(name: str, size: int, steps: int, out: Path) -> bool:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(16) % 5
    first, last = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    rules = qat.uniform_rules(4, 4, first_and_last=[first, last], edge_bits=8)
    print(qat.quantize_(model, rules, images[:2]))
    qat.calibrate(model, [(images, labels)])
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(qat.parameter_groups(model, weight_decay=1e-4), opt="adamw", lr=1e-3)
    ema = ModelEmaV3(model, decay=0.9)
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
    deployed = ema.module.eval()
    qat.settle_(deployed)
    qat.export_onnx(deployed, out, target="ort-int8")
    certificate = qat.certify(deployed, out, images.contiguous(), labels)
    print(certificate)
    return certificate.passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    given = parser.parse_args()
    raise SystemExit(0 if main(given.model, given.size, given.steps, given.out) else 1)
