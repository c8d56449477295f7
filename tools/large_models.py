"""Time and memory to quantize, calibrate, export and certify models of 50 to 200 million parameters: a line each.

uv run tools/large_models.py                              # 20 models, fresh and as if trained by turns: most of an hour
uv run tools/large_models.py vit_base_patch16_224 --size 224 --images 4

Every model has a process of its own, whose largest resident memory is the one shown. A fresh model is as timm makes it, with
many tensors of zeros and ones; one as if trained has random numbers added to them. No weights are loaded. Exits with 1 where
a model is not certified, or takes longer or more memory than --minutes and --gigabytes allow.
"""

import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from tyro.conf import Positional

MODELS = (
    "resnet152", "wide_resnet50_2", "wide_resnet101_2", "resnext101_32x8d", "regnety_160", "dpn131", "hrnet_w48", "vgg16",
    "convnext_small", "convnext_base", "convnextv2_base", "caformer_b36", "efficientnet_b7", "tf_efficientnetv2_m",
    "tf_efficientnetv2_l", "vit_base_patch16_224", "beit_base_patch16_224", "mixer_b16_224",
    "swin_small_patch4_window7_224", "swin_base_patch4_window7_224",
)  # fmt: skip
OF_ONE_SIZE = ("vit", "beit", "mixer", "swin", "vgg")  # families whose weights are made for their own image size


@dataclass(frozen=True)
class Flags:
    names: Positional[tuple[str, ...]] = ()
    """timm models; the 20 of the list, if none is given."""
    size: int = 128
    """Pixels of a side, of models that take any; others take their own."""
    images: int = 2
    """Images that the certificate compares."""
    bits: int = 8
    target: str = "ort-int8"
    settle: bool = True
    """Settle the net before it is exported, as a training loop does at its end."""
    minutes: float = 3.0
    gigabytes: float = 8.0
    trained: bool | None = None
    """Only as if trained, or only fresh; by turns, if not given."""
    alone: bool = False
    """Run the one model that is named in this process, and print its numbers as JSON."""


def measured(name: str, trained: bool, flags: Flags) -> dict[str, object]:
    import timm
    import torch

    import qat

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    size = model.pretrained_cfg["input_size"][-1] if name.startswith(OF_ONE_SIZE) else flags.size
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() <= 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    images = torch.randn(flags.images, 3, size, size)
    began = time.monotonic()
    qat.quantize_(model, qat.uniform_rules(flags.bits), images[:1])
    qat.calibrate(model, [images])
    model.eval()
    if flags.settle:
        qat.settle_(model)
    with TemporaryDirectory() as folder:
        file = qat.export_onnx(model, Path(folder) / "model.onnx", target=flags.target)
        to_file = time.monotonic() - began
        certificate = qat.certify(model, file, images)
    return {
        "name": name, "trained": trained, "size": size, "to_file": to_file, "seconds": time.monotonic() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "certified": certificate.passed,
        "certificate": str(certificate),
    }  # fmt: skip


def line(found: dict[str, object], flags: Flags) -> tuple[str, bool]:
    """Of the table, and whether it is within the limits."""
    good = bool(found["certified"])
    good &= float(found["seconds"]) <= 60 * flags.minutes and float(found["gigabytes"]) <= flags.gigabytes  # type: ignore[arg-type]
    kind = "as if trained" if found["trained"] else "fresh"
    verdict = "certified" if found["certified"] else "NOT CERTIFIED"
    text = (
        f"{found['name']:<30} {kind:<13} {found['size']:>4} px {found['parameters'] / 1e6:6.1f} M "  # type: ignore[operator]
        f"{found['to_file']:6.1f} s to the file {found['seconds']:6.1f} s in all {found['gigabytes']:5.2f} GB  {verdict}"
    )
    return text, good


def main(flags: Flags) -> int:
    if flags.alone:
        print(json.dumps(measured(flags.names[0], bool(flags.trained), flags)))
        return 0
    failed = 0
    for index, name in enumerate(flags.names or MODELS):
        trained = bool(index % 2) if flags.trained is None else flags.trained
        command = [
            sys.executable, __file__, name, "--alone", "--trained", str(trained), "--size", str(flags.size),
            "--images", str(flags.images), "--bits", str(flags.bits), "--target", flags.target,
            "--settle" if flags.settle else "--no-settle",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            failed += 1
            print(f"{name:<30} {done.stderr.strip().splitlines()[-1][:300]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        text, good = line(found, flags)
        failed += not good
        print(text, flush=True)
        if not found["certified"]:
            print(found["certificate"], flush=True)
    print(f"{failed} beyond {flags.minutes:g} minutes or {flags.gigabytes:g} GB, or not certified")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
