"""A Lightning module: the quantized net is an attribute like any other, Lightning's loop trains it.

pip install lightning && uv run examples/lightning_module.py --steps 200
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from plain_loop import quadrants, small_net
from torch import Tensor
from torch.utils.data import DataLoader

import qat


class Quantized(lightning.LightningModule):
    def __init__(self, bits: int, loader: Any) -> None:
        super().__init__()
        self.net = small_net()
        qat.quantize_(self.net, qat.uniform_rules(bits), torch.zeros(1, 3, 16, 16))
        qat.calibrate(self.net, loader)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(qat.parameter_groups(self.net, weight_decay=1e-4), lr=1e-3)


def main(steps: int, out: Path) -> bool:
    lightning.seed_everything(0)
    loader = DataLoader(quadrants(128), batch_size=16, shuffle=True)
    module = Quantized(4, loader)
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    net = module.net.eval()
    qat.settle_(net)
    qat.export_onnx(net, out)
    certificate = qat.certify(net, out, quadrants(32).tensors[0])
    print(certificate)
    return certificate.passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("model.onnx"))
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.steps, arguments.out) else 1)
