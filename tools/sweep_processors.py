"""Codes of whole nets on other processors: differing codes per net, bits, target and machine, against the integer definition.

    uv run tools/sweep_processors.py                                   # every row, about an hour on two cores
    uv run tools/sweep_processors.py --models resnet18 --bits 4 --targets ort-packed --on arm64,wasm

Nets have random weights and random norm statistics, calibrated on noise; with --adversarial all weights are at their lowest
code and the images are 0, at their lowest and at their highest. How a machine is set up: export/elsewhere.py.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import tyro
from torch import nn

from export.across import Elsewhere, certify_elsewhere
from export.elsewhere import machines_of
from export.lower import lower_to_integers
from export.native_graph import emit
from export.targets import TARGETS
from qat.surgery.backbones import first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.surgery.swap import quantize_, uniform_rules

MODELS = (
    "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224",
)  # fmt: skip


@dataclass(frozen=True)
class Flags:
    models: tuple[str, ...] = MODELS
    """timm names."""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Of weights and activations; first and last layers have 8."""
    targets: tuple[str, ...] = ("ort-packed", "ort-int8", "ort-native")
    """Export targets; ort-native runs on arm64 alone."""
    on: str = "arm64,wasm,haswell"
    """Machines."""
    images: int = 2
    """Images per row."""
    image_size: int = 96
    """Side of the square images, pixels."""
    adversarial: bool = False
    """All weights at their lowest code; images 0, lowest, highest."""
    out: Path | None = None
    """File to append the rows to, as Markdown."""


def quantized_net(name: str, bits: int, size: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A calibrated net of random weights, and the noise it was calibrated on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, drop_rate=0.0, **options)
    noise = torch.randn(16, 3, size, size, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one pass below sets the statistics
            with torch.no_grad():
                module.weight.copy_(0.9 + 0.3 * torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    with torch.no_grad():
        model.train()(noise)
    model.eval()
    quantize_(model, uniform_rules(bits, bits, first_and_last(model), 8), noise[:1])
    calibrate(model, [noise])
    return model.eval(), noise


def make_adversarial(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """All weights to their lowest code, in place; images of 0, of the lowest and of the highest value."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (QuantConv2d, QuantLinear)) and module.weight_quantizer is not None:
                module.weight.fill_(-1e4)
    extremes = [0.0, float(images.min()), float(images.max())]
    return torch.stack([torch.full_like(images[0], value) for value in extremes])


def row(name: str, bits: int, target: str, found: Elsewhere, ppm: list[int]) -> str:
    moved = [abs(p) for p in ppm if p]
    scales = f"{len(moved)} of {len(ppm)}, at most {max(moved, default=0)}"
    floats = f"{sum(found.float_differences.values())} of {found.float_codes:,}" if found.float_codes else "none"
    result = found.not_run or f"{found.total} of {found.codes:,}"
    return (
        f"| {name} | W{bits}A{bits} | {target} | {found.machine} | {result} | {floats} | {found.differing} | "
        f"{found.answers_changed} of {found.images} | {scales} |"
    )


def main(flags: Flags) -> int:
    machines = machines_of(flags.on)
    failed = 0
    for name in flags.models:
        for bits in flags.bits:
            model, noise = quantized_net(name, bits, flags.image_size)
            images = make_adversarial(model, noise) if flags.adversarial else noise[: flags.images]
            for target in flags.targets:
                chosen = TARGETS[target]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    lowered = lower_to_integers(model, noise[:1], chosen)
                proto = emit(lowered, chosen)
                where = tuple(m for m in machines if not chosen.native or m in machines_of("arm64"))
                for found in certify_elsewhere(lowered, proto, name, np.asarray(images), where):
                    failed += not found.passed
                    line = row(name, bits, target, found, [tried.ppm for tried in lowered.tried])
                    print(line, flush=True)
                    if flags.out is not None:
                        with flags.out.open("a") as file:
                            file.write(line + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
