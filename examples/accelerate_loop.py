"""Hugging Face accelerate on several processes: each calibrates on its own part of the data, all get the same scales.

uv run torchrun --nproc_per_node 2 examples/accelerate_loop.py --steps 50
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from plain_loop import quadrants, small_net
from torch.utils.data import DataLoader

import qat


def main(steps: int, out: Path) -> bool:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = small_net()
    qat.quantize_(model, qat.uniform_rules(4), torch.zeros(1, 3, 16, 16))  # before prepare: it wraps the model
    loader = accelerator.prepare(DataLoader(quadrants(128), batch_size=16))
    qat.calibrate(model, loader)
    scales = torch.cat([group.detach().flatten() for group in qat.parameter_groups(model, 0.0)[-1]["params"]])
    everywhere = accelerator.gather(scales.unsqueeze(0))
    alike = bool((everywhere == everywhere[0]).all())
    accelerator.print(f"{accelerator.num_processes} processes, scales alike: {alike}")
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    taken = 0
    while taken < steps:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            taken += 1
    passed = alike
    trained = accelerator.unwrap_model(model).eval()
    if accelerator.is_main_process:
        qat.settle_(trained)
        qat.export_onnx(trained, out)
        certificate = qat.certify(trained, out, quadrants(16).tensors[0])
        print(certificate)
        passed = passed and certificate.passed
    accelerator.wait_for_everyone()
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.steps, arguments.out) else 1)
