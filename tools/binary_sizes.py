"""Bytes of a binary network's file, part by part, against the same weights in FP32.

python tools/binary_sizes.py bireal_cifar_resnet18            random weights
python tools/binary_sizes.py bireal_cifar_resnet20 --run RUN  a trained run
"""

import argparse
from pathlib import Path

import onnx
import torch
from torch import nn

from export.graph import emit_qdq
from export.lower import lower_float, lower_to_integers
from export.targets import TARGETS
from qat.runs.build import load_run
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import binary_rules, quantize_

TARGET = TARGETS["ort-packed"]


def random_net(name: str, classes: int) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    model, config = create_backbone(name, classes)
    images = torch.randn(4, 3, config.image_size, config.image_size)
    quantize_(model.eval(), binary_rules(model, first_and_last(model)), images[:1])
    calibrate(model, [images])
    return model, config.image_size


def sizes(model: nn.Module, image_size: int) -> dict[str, float]:
    """Bytes: of the one-bit layers and of the others in the file and in FP32, of both files as a whole."""
    example = torch.zeros(1, 3, image_size, image_size)
    lowered = lower_to_integers(model, example, TARGET)
    proto = emit_qdq(lowered, TARGET)
    stored: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        owner = next(
            (x.name for x in lowered.layers.values() if tensor.name.startswith((f"{x.name}.weight", f"{x.name}.bias"))),
            "",
        )
        stored[owner] = stored.get(owner, 0) + len(tensor.raw_data)
    binary = [x for x in lowered.layers.values() if x.bits == 1]
    others = [x for x in lowered.layers.values() if x.bits != 1]
    return {
        "one-bit layers, file": sum(stored[x.name] for x in binary),
        "one-bit layers, FP32": sum(4 * (x.codes.size + len(x.scale)) for x in binary),  # weights and a folded bias
        "other layers, file": sum(stored[x.name] for x in others),
        "other layers, FP32": sum(4 * (x.codes.size + len(x.scale)) for x in others),
        "grids and tables, file": stored.get("", 0),
        "whole file": proto.ByteSize(),
        "whole FP32 file": onnx.ModelProto.ByteSize(lower_float(model, example)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--run", type=Path, default=None)
    flags = parser.parse_args()
    if flags.run is None:
        model, side = random_net(flags.backbone, flags.classes)
    else:
        _, recipe, built = load_run(flags.run)
        model, side = built.model, recipe.model.image_size
    found = sizes(model, side)
    for name, count in found.items():
        print(f"{name:<24}{count:>14,} bytes")
    print(f"one-bit layers: 1/{found['one-bit layers, FP32'] / found['one-bit layers, file']:.1f} of FP32; ", end="")
    print(f"the whole file: 1/{found['whole FP32 file'] / found['whole file']:.1f}")


if __name__ == "__main__":
    main()
