"""The whole job on rendered images, in minutes on two cores: full precision, W4A4, export, certificate, comparison, report.

uv run recipes/quickstart.py
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from edgeqat.interrupts import Interrupted
from edgeqat.terminal import say
from qat.analysis.compare import compare_runs
from qat.cli import DEBUG_HELP, arguments, guarded
from qat.deploy import certify_run, export_run, measure_run, write_report
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import RecipeError
from qat.runs.ranges import COMMAND, out_of_range
from qat.runs.recipe import recipe_of
from qat.runs.recipe_checks import check
from qat.train.loop import run


@dataclass(frozen=True)
class Quickstart:
    backbone: str = "test_resnet"
    """Any timm model name."""
    image_size: int = 48
    """Side of the images, pixels."""
    per_class: int = 120
    """Images per class and style."""
    steps: int = 400
    """Training steps in full precision; W4A4 trains for as many again."""
    bits: int = 4
    """Bits of weights and activations."""
    batch_size: int = 32
    """Images of each source domain in a step."""
    test_domain: str = "cartoon"
    """The style that training never sees. Of the four, full precision is highest on this one."""
    seed: int = 0
    """Seed of the images, the initialisation and the batches."""
    max_drop: float = 3.0
    """Percentage points W4A4 may lose, on the source domains and on the unseen one. Beyond that the exit code is 1."""
    out: Path = Path("runs/quickstart")
    """Folder for both runs."""


def quickstart(flags: Quickstart) -> int:
    if problem := out_of_range(flags, COMMAND):
        raise RecipeError(problem)
    out = flags.out
    number = 2
    while out.exists():
        out, number = flags.out.with_name(f"{flags.out.name}-{number}"), number + 1
    shared = {
        f.name: getattr(flags, f.name)
        for f in dataclasses.fields(flags)
        if f.name in ("backbone", "image_size", "per_class", "steps", "batch_size", "test_domain", "seed")
    } | {"evaluate_every": max(flags.steps // 5, 1)}
    in_full = recipe_of("fp", **shared, out=out / "fp", lr=5e-3)
    check(in_full)  # before images are rendered
    domains = synthetic_domains(per_class=flags.per_class, image_size=flags.image_size, seed=flags.seed)
    say("1/5  training in full precision")
    baseline = run(in_full, domains)
    say(f"2/5  training W{flags.bits}A{flags.bits} from it (LSQ)")
    quantized = run(recipe_of("lsq", **shared, out=out / "lsq", bits=flags.bits, init_from=out / "fp"), domains)
    say("3/5  exporting to ONNX")
    model = export_run(quantized.path)
    say("4/5  certifying on ONNX Runtime")
    certificate = certify_run(quantized.path, model)
    latencies = measure_run(quantized.path, model)
    say("5/5  comparing and reporting")
    comparison = compare_runs(baseline.path, quantized.path, flags.max_drop)
    report = write_report(quantized.path, max_drop=flags.max_drop)
    say(f"\n{certificate}\n\n{comparison}\n")
    fp32, small = latencies
    say(f"size     {fp32.size / 1e6:.2f} MB -> {small.size / 1e6:.2f} MB ({small.size / fp32.size:.1%})")
    say(f"latency  {small.speedup:.2f}x the speed of FP32 (batch 1, one thread, interleaved)")
    say(f"codes:   {certificate.mismatches} mismatches")
    say(f"report   {report}")
    return 0 if certificate.passed and comparison.passed else 1


def begin(flags: Quickstart) -> int:
    """The quickstart; stopped by a signal it says that it cannot be resumed."""
    try:
        return quickstart(flags)
    except Interrupted as stop:
        raise Interrupted(stop.number, "stopped; the quickstart takes minutes and begins anew: run it again") from None


if __name__ == "__main__":
    sys.exit(guarded(lambda: begin(tyro.cli(Quickstart, description=f"{__doc__}\n\n{DEBUG_HELP}", args=arguments()))))
