"""What 8-bit codes before a transformer's GELU cost in accuracy: a small ViT on CIFAR-10, W4A4 with and without tables.

    uv run tools/compare_tables.py --data-root CIFAR --out tables.json           # three seeds; run again to go on

Each seed trains in full precision, then quantizes that net twice and fine-tunes both on the same batches. Without tables a
GELU reads the floats of the layer before it; with them (`LayerSpec(table=True)`) it reads 8-bit codes with a learned scale.
The test images are measured at the last step; nothing selects. A seed's numbers are written as soon as they are known.
"""

import copy
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from processor import processor
from torch import Tensor, nn

import qat
from edgeqat.files import write_json
from qat.domains.cifar import read_cifar10
from qat.domains.folders import ArrayImages, Domain
from qat.surgery.backbones import first_and_last

PAD = 4


@dataclass(frozen=True)
class Flags:
    data_root: Path
    """CIFAR-10, as `recipes/cifar10.py` reads it."""
    out: Path
    """JSON file of the seeds that are done."""
    seeds: int = 3
    """Nets."""
    steps: int = 2000
    """Steps in full precision, 128 images each."""
    quantized_steps: int = 600
    """Steps of fine-tuning."""
    bits: int = 4
    """Bits of weights and activations; first and last layer have 8."""


@dataclass(frozen=True)
class Seed:
    """Accuracies on all test images, percent; tables: operations that read 8-bit codes for a table."""

    seed: int
    full_precision: float
    without_tables: float
    with_tables: float
    tables: int
    seconds: float


@dataclass(frozen=True)
class Images:
    """uint8 [N, 3, 32, 32] and their labels."""

    pixels: Tensor
    labels: Tensor

    def batches(self, seed: int, steps: int, size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """Random ones, cropped out of a border and mirrored by chance."""
        generator = torch.Generator().manual_seed(seed)
        chance = random.Random(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.labels), (size,), generator=generator)
            padded = F.pad(self.pixels[chosen], (PAD,) * 4)
            top, left = chance.randint(0, 2 * PAD), chance.randint(0, 2 * PAD)
            images = padded[..., top : top + 32, left : left + 32]
            mirrored = torch.rand(size, generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            yield normalized(images), self.labels[chosen]


def normalized(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def images_of(domain: Domain) -> Images:
    assert isinstance(domain.images, ArrayImages)
    pixels = torch.from_numpy(domain.images.pixels).permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), torch.from_numpy(domain.labels))


def small_vit() -> nn.Module:
    """64 tokens of 64 channels, four blocks."""
    size: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


def fit(model: nn.Module, data: Images, seed: int, steps: int, lr: float) -> None:
    """AdamW with a cosine after a short warm-up."""
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=0.05), lr=lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05)
    model.train()
    for images, labels in data.batches(seed, steps):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    right = 0
    for first in range(0, len(data.labels), 500):
        found = model(normalized(data.pixels[first : first + 500])).argmax(1)
        right += int((found == data.labels[first : first + 500]).sum())
    return 100 * right / len(data.labels)


@dataclass(frozen=True)
class Quantized:
    accuracy: float
    quantizers: int


def quantized(model: nn.Module, train: Images, test: Images, seed: int, flags: Flags, table: bool) -> Quantized:
    """A copy of `model`, quantized and fine-tuned."""
    model = copy.deepcopy(model)
    rules = qat.uniform_rules(flags.bits, flags.bits, first_and_last(model))
    rules = [(name, replace(spec, table=table)) for name, spec in rules]
    calibration = [images for images, _ in train.batches(seed, 4)]
    found = qat.quantize_(model, rules, calibration[0][:2])
    qat.calibrate(model, calibration)
    fit(model, train, seed + 100, flags.quantized_steps, lr=5e-4)
    qat.settle_(model)
    return Quantized(accuracy(model, test), len(found.points))


def run_seed(seed: int, train: Images, test: Images, flags: Flags) -> Seed:
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = small_vit()
    fit(model, train, seed, flags.steps, lr=1e-3)
    before = accuracy(model, test)
    floats = quantized(model, train, test, seed, flags, table=False)
    tables = quantized(model, train, test, seed, flags, table=True)
    added = tables.quantizers - floats.quantizers
    return Seed(seed, before, floats.accuracy, tables.accuracy, added, round(time.perf_counter() - began))


def main(flags: Flags) -> None:
    """Run the seeds that are not done, then print all."""
    train, test = (images_of(domain) for domain in read_cifar10(flags.data_root))
    done = [Seed(**row) for row in json.loads(flags.out.read_text())] if flags.out.exists() else []
    for seed in range(flags.seeds):
        if seed in [row.seed for row in done]:
            continue
        done.append(run_seed(seed, train, test, flags))
        write_json(flags.out, [asdict(row) for row in done])
        print(done[-1], flush=True)
    differences = [row.with_tables - row.without_tables for row in done]
    spread = statistics.stdev(differences) if len(done) > 1 else float("nan")
    mean = statistics.mean(differences)
    print(f"{processor()}: with tables less without {mean:+.2f} points, deviation {spread:.2f}, {len(done)} seeds")


if __name__ == "__main__":
    main(tyro.cli(Flags))
