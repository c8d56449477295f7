"""The suite as other machines run it: older instruction sets, one and four threads, other orders of tests. A row per run.

    uv run tools/check_machines.py                                      # the whole suite, ten times: hours
    uv run tools/check_machines.py tests/quantizers tests/training --processes 2

A library takes the newest instructions that the processor has unless an environment variable says otherwise; each setting
hides some of them. Every run has its own order of tests; its seed is in the table, `--randomly-seed SEED` repeats it.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

# PyTorch's own kernels, its convolutions and products (oneDNN), this project's native kernels, threads.
SETTINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "4"},
    {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "4"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "4"},
    {"EDGEQAT_ISA": "avx2", "OMP_NUM_THREADS": "1"},
    {"EDGEQAT_ISA": "portable", "OMP_NUM_THREADS": "4"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "EDGEQAT_ISA": "avx2", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "EDGEQAT_ISA": "portable", "OMP_NUM_THREADS": "4"},
)


@dataclass(frozen=True)
class Flags:
    tests: Positional[tuple[str, ...]] = ("tests",)
    """What pytest runs."""
    processes: str = "auto"
    """Of pytest at a time."""
    seed: int = 1
    """Of the first run's order; each later run adds one."""
    logs: Path = Path("runs/machines")
    """Folder for what every run printed."""


def count(output: str, word: str) -> int:
    """`word` in pytest's last line, "3 failed, 417 passed, 1 skipped in 61.02s" -> how many."""
    found = re.findall(rf"(\d+) {word}", output)
    return int(found[-1]) if found else 0


def run(setting: dict[str, str], seed: int, flags: Flags) -> tuple[int, str]:
    """Exit code and output of the tests in an environment that has of these variables `setting` alone."""
    variables = {name for each in SETTINGS for name in each}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    command = [sys.executable, "-m", "pytest", "-n", flags.processes, f"--randomly-seed={seed}", *flags.tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | setting)
    return done.returncode, done.stdout + done.stderr


def main(flags: Flags) -> int:
    bad = 0
    flags.logs.mkdir(parents=True, exist_ok=True)
    print("| setting | seed | passed | failed | minutes |\n|---|---|---|---|---|", flush=True)
    for number, setting in enumerate(SETTINGS):
        seed = flags.seed + number
        started = time.monotonic()
        code, output = run(setting, seed, flags)
        minutes = (time.monotonic() - started) / 60
        (flags.logs / f"{number}.txt").write_text(output)
        failed = count(output, "failed") + count(output, "errors?")
        verdict = str(failed) if failed or code == 0 else f"pytest ended with {code}"
        bad += code != 0
        words = " ".join(f"{name}={value}" for name, value in setting.items())
        print(f"| {words} | {seed} | {count(output, 'passed')} | {verdict} | {minutes:.1f} |", flush=True)
        for line in output.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(f"    {line}", flush=True)
    if bad:
        print(f"\n{bad} of {len(SETTINGS)} runs failed; their output lies in {flags.logs}")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
