"""Size, certificate and speed of whole backbones: FP32, ONNX Runtime's static INT8, and ours, interleaved in one process.

    uv run tools/bench_backbones.py --backbones resnet18 mobilenetv2_100 --bits 4 --target ort-packed

Weights are random, batch norms too (every term at work); speed and codes do not depend on training.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
import tyro
from torch import nn

from export.bench import bench
from export.certificate import certify
from export.lower import lower, lower_float, trained_codes
from export.lowered import LoweredModel
from export.native_graph import emit
from export.passes import to_integers
from export.targets import target_named
from qat.settle import settle_
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules


@dataclass(frozen=True)
class Flags:
    backbones: tuple[str, ...] = (
        "resnet18",
        "mobilenetv2_100",
        "mobilenetv3_small_100",
        "convnext_atto",
        "vit_tiny_patch16_224",
    )
    """timm model names."""
    bits: int = 4
    """Bits of weights and activations; first and last layer have 8. 1: the signs of the 2-bit codes, for size and codes of
    a binary file (the net they came from was not trained for it)."""
    target: str = "ort-packed"
    """Export target."""
    image_size: int = 224
    """Side of the images, pixels."""
    classes: int = 1000
    """Outputs of the classifier."""
    threads: int = 1
    """Threads of the runtime."""
    rounds: int = 60
    """Interleaved rounds."""
    speed: bool = True
    """Also measure speed, not size and codes alone."""


def main(flags: Flags) -> None:
    for name in flags.backbones:
        torch.manual_seed(0)
        kwargs = {"img_size": flags.image_size} if "vit" in name or "swin" in name else {}
        model, _ = create_backbone(name, flags.classes, **kwargs)
        images = torch.randn(8, 3, flags.image_size, flags.image_size)
        settle_norms(model, images)
        fp32 = lower_float(model, images)
        bits = max(flags.bits, 2)
        quantize_(model, uniform_rules(bits, bits, first_and_last(model)), images[:1], weight_init="mse")
        calibrate(model, [images])
        target = target_named(flags.target)
        settle_(model, images[:1])
        lowered = lower(model, images)
        if flags.bits == 1:
            make_binary(lowered)
        lowered = to_integers(lowered, target)
        proto = emit(lowered, target)
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.onnx"
            onnx.save(proto, str(file))
            print(certify(lowered, file, images.numpy(), np.zeros(8, np.int64), lambda x, m=model: trained_codes(m, x)))
        theory = sum(layer.codes.size * layer.bits for layer in lowered.layers.values()) / 8
        theory += sum(8 * len(layer.scale) for layer in lowered.layers.values())
        print(
            f"size {proto.ByteSize():,} bytes, {proto.ByteSize() / fp32.ByteSize():.4f} of FP32; codes, scales and biases"
        )
        print(f"alone are {theory:,.0f} bytes: the file is {proto.ByteSize() / theory - 1:+.2%} over them")
        if flags.speed:
            print(
                bench(
                    fp32,
                    {f"{name} W{flags.bits}A{flags.bits}": proto},
                    images.numpy(),
                    threads=flags.threads,
                    rounds=flags.rounds,
                )
            )


def make_binary(lowered: LoweredModel) -> None:
    for name, layer in lowered.layers.items():
        if layer.bits == 2:
            lowered.layers[name] = replace(layer, codes=np.where(layer.codes >= 0, 1, -1).astype(np.int8), bits=1)


def settle_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Random gamma and beta, and statistics that fit."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.3, 1.2).mul_(torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0))
            module.bias.data.uniform_(-0.3, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images)
    model.eval()


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
