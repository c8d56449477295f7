"""Speed of the native kernels, layer by layer and for whole nets, against ONNX Runtime's FP32 and static INT8.

    uv run tools/bench_kernels.py --bits 4 --threads 1
    uv run tools/bench_kernels.py --nets bireal_resnet18 --bits 1 --no-layers
    uv run tools/bench_kernels.py --on arm64 --no-layers

Variants take turns in one process, in a new order every round; printed are medians of the per-round ratios. A layer is a
chain of equal convolutions with their ReLUs, so that what stands at a session's borders weighs little. Shares are of the
multiply-adds that the processor's own 8-bit instruction reaches from registers, measured just before (`--peak` overrides).

With `--on`, nothing is timed: executed instructions are counted on emulated ARM processors (`tools/arm64`), which is exact
and says nothing of caches or of how many instructions a cycle takes; a model of the inner loops by llvm-mca follows.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import tyro
from bench_backbones import settle_norms
from count_inferences import counts
from model_loops import print_model
from numpy.typing import NDArray
from processor import processor
from torch import Tensor, nn

from edgeqat import cpp
from export import latency, session
from export.elsewhere import CPUS, machines_of
from export.lower import lower_float, lower_to_integers
from export.native_graph import emit
from export.targets import target_named
from qat.surgery.backbones import create_backbone, first_and_last
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import binary_rules, quantize_, uniform_rules

# side, inputs, outputs, kernel, stride, groups
RESNET18 = ((56, 64, 64, 3, 1, 1), (28, 128, 128, 3, 1, 1), (14, 256, 256, 3, 1, 1), (7, 512, 512, 3, 1, 1))
MOBILENETV2 = (
    (112, 32, 32, 3, 1, 32), (56, 144, 144, 3, 1, 144), (14, 384, 384, 3, 1, 384),
    (56, 24, 24, 1, 1, 1), (28, 32, 32, 1, 1, 1), (14, 96, 96, 1, 1, 1), (7, 320, 320, 1, 1, 1),
)  # fmt: skip
CHAIN = 4
PEAK_SOURCE = """
#include <cstdio>
#include <ctime>
static double now() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
#define EIGHT(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
int main() {
  double best = 1e9;
  for (int turn = 0; turn < 300; ++turn) {
    const double began = now();
    for (int i = 0; i < 4000; ++i) {
#define M(k) asm volatile(STEP(k) ::: "xmm" #k);
      EIGHT(M) EIGHT(M) EIGHT(M)
    }
    const double taken = now() - began;
    if (taken < best) best = taken;
  }
  std::printf("%f", 4000.0 * 24 * MACS / best / 1e9);
}
"""
STEPS = {
    "avx512": ('-DSTEP(k)="vpdpbusd %%zmm30,%%zmm31,%%zmm" #k', "-DMACS=64", "-mavx512f", "-mavx512vnni"),
    "avx2": (
        '-DSTEP(k)="vpmaddubsw %%ymm14,%%ymm15,%%ymm13\\n vpaddw %%ymm13,%%ymm" #k ",%%ymm" #k',
        "-DMACS=32",
        "-mavx2",
    ),
}


@dataclass(frozen=True)
class Flags:
    nets: tuple[str, ...] = ("resnet18", "mobilenetv2_100")
    """timm model names, measured whole."""
    bits: int = 4
    """Bits of weights and activations; 1: binary (a net with Hardtanh, such as bireal_resnet18)."""
    threads: int = 1
    """Threads of the runtime."""
    rounds: int = 40
    """Interleaved rounds."""
    layers: bool = True
    """Also measure single layers of ResNet-18 and MobileNetV2."""
    peak: float = 0.0
    """Billions of multiply-adds a second to take shares of; 0: measure."""
    on: str = ""
    """Emulated ARM processors to count instructions on, comma-separated: arm64 (all), cortex-a72, neoverse-n1, max."""


class Chain(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        _, inputs, outputs, kernel, stride, groups = shape
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups) for _ in range(CHAIN)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


@dataclass(frozen=True)
class Case:
    """One line of the table: files of the same function, and its input."""

    name: str
    files: dict[str, onnx.ModelProto]
    images: Tensor
    macs: int


def main(flags: Flags) -> None:
    if flags.on:
        count(flags)
    else:
        measure(flags)


def measure(flags: Flags) -> None:
    """Prints times beside the baselines'."""
    isa, peak = _isa(), flags.peak or measured_peak(_isa())
    print(
        f"{processor()}: kernels {isa}, {peak:.0f} G 8-bit multiply-adds a second a core at most, {flags.threads} thread(s)"
    )
    print(f"{'':<34} {'native ms':>9} {'x fp32':>7} {'x int8':>7} {'G mul-add/s':>12} {'of peak':>8}")
    for case in cases(flags):
        report(case, peak, flags)


def count(flags: Flags) -> None:
    """Prints executed instructions beside the baselines', then the model of the inner loops."""
    machines = machines_of(flags.on)
    for machine in machines:
        if CPUS.get(machine) is None or CPUS[machine].architecture != "aarch64":
            raise SystemExit(f"--on {machine}: instructions are counted on ARM processors only: arm64, or one of them")
    print("count: millions of executed instructions of one inference, one thread, batch 1")
    print(f"{'':<34} {'':<12} {'fp32':>8} {'int8':>8} {'native':>8} {'/ fp32':>7} {'/ int8':>7} {'a mul-add':>10}")
    for case in cases(flags):
        feed = np.ascontiguousarray(case.images[:1].numpy())
        for machine in machines:
            found = counts(case.files, feed, machine)
            native = found["native"]
            millions = " ".join(f"{found[name] / 1e6:>8.1f}" for name in ("fp32", "int8", "native"))
            ratios = f"{native / found['fp32']:>7.2f} {native / found['int8']:>7.2f}"
            print(f"{case.name:<34} {machine:<12} {millions} {ratios} {native / case.macs:>10.3f}", flush=True)
    print_model()


def cases(flags: Flags) -> Iterator[Case]:
    """Layers, then whole nets."""
    for shape in (*RESNET18, *MOBILENETV2) if flags.layers and flags.bits > 1 else ():
        side, inputs, outputs, kernel, _, groups = shape
        torch.manual_seed(0)
        images = torch.rand(2, inputs, side, side)
        files = variants(Chain(shape).eval(), images, flags.bits, binary=False)
        macs = CHAIN * side * side * outputs * inputs // groups * kernel * kernel
        kind = "depthwise " if groups > 1 else ""
        yield Case(f"{kind}{side}² {inputs}→{outputs} {kernel}×{kernel}", files, images, macs)
    for name in flags.nets:
        torch.manual_seed(0)
        model, _ = create_backbone(name, 1000)
        images = torch.randn(2, 3, 224, 224)
        settle_norms(model, images)
        macs = _macs(model, images)
        files = variants(model, images, flags.bits, binary=flags.bits == 1)
        yield Case(f"{name} W{flags.bits}A{flags.bits}", files, images, macs)


def variants(model: nn.Module, images: Tensor, bits: int, binary: bool) -> dict[str, onnx.ModelProto]:
    """FP32, ONNX Runtime's static INT8, and ours."""
    fp32 = lower_float(model, images)
    int8 = session.static_int8(fp32, images.numpy())
    ends = first_and_last(model) if not isinstance(model, Chain) else ()
    if binary:
        quantize_(model, binary_rules(model, ends), images[:1])
    else:
        quantize_(model, uniform_rules(bits, bits, ends), images[:1], weight_init="mse")
    calibrate(model, [images])
    target = target_named("ort-native")
    return {"fp32": fp32, "int8": int8, "native": emit(lower_to_integers(model, images, target), target)}


def report(case: Case, peak: float, flags: Flags) -> None:
    files = case.files
    feed = np.ascontiguousarray(case.images[:1].numpy())
    over = {}
    for baseline in ("fp32", "int8"):
        ordered = {baseline: files[baseline], **files}
        rows = latency.compare(ordered, feed, threads=flags.threads, rounds=flags.rounds)
        over[baseline] = next(row for row in rows if row.name == "native")
    best = over["int8"].median_ms
    rate = case.macs / best / 1e6
    print(
        f"{case.name:<34} {best:>9.3f} {over['fp32'].speedup:>7.2f} {over['int8'].speedup:>7.2f} {rate:>12.0f} "
        f"{rate / peak / flags.threads:>8.0%}"
    )
    if flags.threads > 1:
        print(f"{'':<34} over one thread: {', '.join(scaling(files, feed, flags))}")


def scaling(files: dict[str, onnx.ModelProto], feed: NDArray[np.float32], flags: Flags) -> list[str]:
    """How much faster each file is on `threads` threads than on one."""
    found = []
    for name, file in files.items():
        counts = {"one": 1, "several": flags.threads}
        rows = latency.compare(dict.fromkeys(counts, file), feed, threads=counts, rounds=flags.rounds)
        found.append(f"{name} x {rows[-1].speedup:.2f}")
    return found


def measured_peak(isa: str) -> float:
    """Billions of multiply-adds a second that the instruction set's own step reaches from registers."""
    command = cpp.compiler()
    if command is None or isa not in STEPS:
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "peak.cpp", Path(folder) / "peak"
        source.write_text(PEAK_SOURCE)
        subprocess.run([*command, "-O2", *STEPS[isa], str(source), "-o", str(program)], check=True)
        return float(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)


def _isa() -> str:
    import ctypes

    from export.kernels.library import library

    name = ctypes.CDLL(str(library())).edgeqat_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def _macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one image."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()  # type: ignore[union-attr, operator, index]

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    return total


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
