"""What scale freezing costs: a GAQAT step against the same SAGM + LSQ step without a freezer, interleaved in one process.

    uv run tools/bench_objectives.py --backbone mobilenetv2_100 --image-size 64 --batch-size 48

Time is the median of paired ratios in random order; memory is each variant's peak in a process of its own.
"""

import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import tyro
from processor import processor
from torch import Tensor

from qat.runs.recipe import recipe_of
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import parameter_groups, quantize_, uniform_rules
from qat.train.from_recipe import training_step
from qat.train.step import TrainingStep

VARIANTS = ("sagm-lsq", "gaqat")


@dataclass(frozen=True)
class Flags:
    backbone: str = "mobilenetv2_100"
    """timm model name."""
    image_size: int = 64
    """Side of the images, pixels."""
    batch_size: int = 48
    """Images of a step."""
    bits: int = 4
    """Bits of weights and activations."""
    rounds: int = 30
    """Paired steps; the freezer decides every 10, so masks are at work in most."""
    threads: int = 1
    """Threads of torch."""
    only: str = ""
    """Run this variant alone and print its peak memory in MB (used by the benchmark itself)."""


class Plain:
    """Float32, gradients where autograd puts them."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def step_of(variant: str, flags: Flags) -> TrainingStep:
    """A training step on a calibrated model; a threshold above 1 masks every scale once a window has passed."""
    torch.manual_seed(0)
    model, _ = create_backbone(flags.backbone, 7)
    images = torch.randn(8, 3, flags.image_size, flags.image_size)
    quantize_(model, uniform_rules(flags.bits, flags.bits, first_and_last(model)), images[:1], weight_init="mse")
    calibrate(model, [images])
    model.to(memory_format=torch.channels_last).train()
    recipe = recipe_of("gaqat", window=10, threshold=1.1)
    optimizer = torch.optim.Adam(parameter_groups(model, 0.0, 1e-5), lr=1e-4)
    step = training_step(recipe, model, model, optimizer, Plain(), domains=1)
    if variant == "sagm-lsq":
        step.freezer = None
    return step


def peak_mb(variant: str, flags: Flags) -> float:
    command = [sys.executable, __file__, "--only", variant, "--rounds", "12", "--threads", str(flags.threads)]
    for name in ("backbone", "image_size", "batch_size", "bits"):
        command += [f"--{name.replace('_', '-')}", str(getattr(flags, name))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(flags: Flags) -> None:
    torch.set_num_threads(flags.threads)
    batch = torch.randn(flags.batch_size, 3, flags.image_size, flags.image_size)
    labels, domains = torch.randint(0, 7, (flags.batch_size,)), torch.zeros(flags.batch_size, dtype=torch.long)
    if flags.only:
        step = step_of(flags.only, flags)
        for _ in range(flags.rounds):
            step(batch, labels, domains)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    steps = {name: step_of(name, flags) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_ in range(flags.rounds + 2):
        for name in random.sample(VARIANTS, len(VARIANTS)):
            began = time.perf_counter()
            steps[name](batch, labels, domains)
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(times["sagm-lsq"], times["gaqat"], strict=True))
    memory = {name: peak_mb(name, flags) for name in VARIANTS}
    for name in VARIANTS:
        print(f"{name:<9} median {statistics.median(times[name]) * 1e3:8.1f} ms a step, peak {memory[name]:7.1f} MB")
    more = memory["gaqat"] / memory["sagm-lsq"]
    print(f"{processor()}: gaqat / sagm-lsq: time {ratio:.4f} (median of {flags.rounds} pairs), memory {more:.4f}")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
