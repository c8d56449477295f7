"""Step time and peak memory of 4-bit training: full precision, ours, brevitas, and torch's learnable fake-quantize op.

    python tools/bench_training.py --out bench.json     # resnet18, mobilenetv2_100, vit_tiny; eager and compiled
    python tools/bench_training.py --modes eager --backbones resnet18 --image-size 96 --batch 8 --clock cpu
    python tools/bench_training.py --device cuda --batch 64 --rounds 30

The defaults are sized for about 20 minutes on two quiet cores, half of it compiling (an estimate, not a timing). A row is
printed, and `--out` written, as soon as it is known: what is stopped has lost nothing. A contestant that cannot be built,
compiled or run gets a row with the reason.

All contestants of a backbone live in one process and take their steps in a random order, round by round; a ratio is the
median over rounds of a step's time over full precision's of the same round and mode. Peak memory is what a step allocates
at most above what it found, plus parameters and their gradients; from PyTorch's own allocation events, on a GPU from its
allocator's count.
"""

import argparse
import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from processor import processor
from torch import Tensor, nn

from edgeqat.files import write_json
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import WEIGHTED, quantize_, uniform_rules

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
UNTIMED_ON_GPU = 5  # steps of each contestant before the first that counts: libraries choose kernels, memory pools fill


def ours(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    quantize_(model, uniform_rules(bits, bits, first_and_last(model)), images)
    calibrate(model, [images])
    return model


def of_brevitas(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Brevitas layers with its own learned per-tensor scales in every conv and linear's place."""
    from qat.surgery.brevitas_bridge import brevitas_layer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, WEIGHTED)]:
        model.set_submodule(name, brevitas_layer(layer, bits))
    with torch.no_grad():
        model.train()(images)  # its scales are collected from the first batches
    return model


class _TorchFakeQuantized(nn.Module):
    """A layer on inputs and weights through torch's `_fake_quantize_learnable_per_tensor_affine`."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer, top = layer, (1 << (bits - 1)) - 1
        self.weight_range, self.input_range = (-top - 1, top), (0, (1 << bits) - 1)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.weight_scale = nn.Parameter(2 * weight.detach().abs().mean().reshape(1) / top**0.5)
        self.input_scale = nn.Parameter(torch.full((1,), 0.2))
        self.weight_zero, self.input_zero = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        quantize = torch._fake_quantize_learnable_per_tensor_affine
        x = quantize(x, self.input_scale, self.input_zero, *self.input_range, 1e-3)
        weight = quantize(self.layer.weight, self.weight_scale, self.weight_zero, *self.weight_range, 1e-3)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)  # type: ignore[operator]


def of_torch(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    edges = first_and_last(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, WEIGHTED)]:
        model.set_submodule(name, _TorchFakeQuantized(layer, 8 if name in edges else bits))
    return model


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, int], nn.Module]] = {
    "fp": lambda model, images, bits: model,
    "ours": ours,
    "brevitas": of_brevitas,
    "torch": of_torch,
}


class Contestant:
    """One model and its training step: forward, cross entropy, backward."""

    def __init__(self, model: nn.Module, mode: str, images: Tensor, labels: Tensor) -> None:
        self.model = model.train().to(memory_format=torch.channels_last)
        self.run = torch.compile(self.model) if mode == "compiled" else self.model
        self.images, self.labels = images, labels
        for _ in range(UNTIMED_ON_GPU if images.is_cuda else 1):
            self.step()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        F.cross_entropy(self.run(self.images), self.labels).backward()

    def seconds(self, clock: Callable[[], float]) -> float:
        """How long a step takes. A GPU works on after the call returns: its work is waited for."""
        if self.images.is_cuda:
            torch.cuda.synchronize()
        began = clock()
        self.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return clock() - began

    def peak_mb(self) -> float:
        """Megabytes: parameters, buffers, and the most that a step has allocated at any time, gradients among them."""
        for parameter in self.model.parameters():
            parameter.grad = None
        held = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        peak = self._allocated_on_gpu() if self.images.is_cuda else self._allocated()
        return (held + peak) / 1e6

    def _allocated_on_gpu(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _allocated(self) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        current = peak = 0
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        for event in sorted(events, key=lambda e: e.start_ns()):
            current += event.nbytes()
            peak = max(peak, current)
        return peak


Row = dict[str, object]
COLUMNS = ("backbone", "mode", "contestant", "ms", "time / FP", "peak MB", "memory / FP", "note")


def entrants(options: argparse.Namespace, backbone: str, mode: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that can take a step, each having taken one, and why the others cannot."""
    torch._dynamo.reset()  # the last backbone's compilations must not count against this one's limit
    torch.manual_seed(0)
    kwargs = {"img_size": options.image_size} if "vit" in backbone else {}
    float_model, _ = create_backbone(backbone, 10, **kwargs)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    images, labels = images.contiguous(memory_format=torch.channels_last), torch.randint(0, 10, (options.batch,))
    able, failed = dict[str, Contestant](), dict[str, str]()
    for name in dict.fromkeys(["fp", *options.contestants]):
        try:
            model = CONTESTANTS[name](copy.deepcopy(float_model), images, options.bits)
            device = (
                options.device
            )  # all are built on the CPU: not everybody's quantizers are made where their model is
            able[name] = Contestant(model.to(device), mode, images.to(device), labels.to(device))
        except Exception as error:  # whatever a contestant dies of is its result
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return able, failed


def bench(options: argparse.Namespace, backbone: str, mode: str) -> Iterator[Row]:
    """A row for every contestant: median milliseconds of a step, ratio to full precision, peak memory and its ratio."""
    contestants, failed = entrants(options, backbone, mode)
    clock, times = CLOCKS[options.clock], {name: list[float]() for name in contestants}
    for _ in range(options.rounds):
        for name in random.sample(list(contestants), len(contestants)):
            times[name].append(contestants[name].seconds(clock))
    memory = {name: contestant.peak_mb() for name, contestant in contestants.items()}
    for name, taken in times.items():
        numbers: list[object] = [round(1e3 * statistics.median(taken), 1), "", round(memory[name], 1), ""]
        if "fp" in times:
            numbers[1] = round(statistics.median(a / b for a, b in zip(taken, times["fp"], strict=True)), 2)
            numbers[3] = round(memory[name] / memory["fp"], 2)
        yield dict(zip(COLUMNS, (backbone, mode, name, *numbers, ""), strict=True))
    for name, reason in failed.items():
        yield dict(zip(COLUMNS, (backbone, mode, name, "", "", "", "", reason), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--contestants", nargs="+", choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--bits", type=int, default=4, help="bits of weights and activations")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; a step before them is not timed")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, on a busy machine")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the rows as JSON, anew after every one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    machine = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(
        f"{machine}, PyTorch {torch.__version__}, {options.threads} threads, {options.image_size} px, batch {options.batch}\n"
    )
    rows: list[Row] = []
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    for mode in options.modes:
        for backbone in options.backbones:
            for row in bench(options, backbone, mode):
                rows.append(row)
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
                if options.out is not None:
                    write_json(options.out, rows)


if __name__ == "__main__":
    main()
