"""Minutes of the quickstart alone and beside one busy process, by how threads that wait for each other do so.

    uv run tools/bench_quickstart.py                    # a short quickstart, four times: some minutes
    uv run tools/bench_quickstart.py --steps 400 --per-class 120 --rounds 3

Asleep is what edgeqat asks for (OMP_WAIT_POLICY=passive); awake is what an OpenMP library does if nobody asks, which is to
spin for a while at every barrier. The four cases run in turn, in every round. The ratio is to asleep and alone.
"""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import tyro
from processor import processor

ROOT = Path(__file__).parent.parent
WAITING: dict[str, dict[str, str]] = {
    "asleep": {},
    "awake": {"KMP_BLOCKTIME": "200"},  # another library's variable, so that edgeqat asks for nothing
}


@dataclass(frozen=True)
class Flags:
    steps: int = 60
    per_class: int = 40
    rounds: int = 1


def quickstart(flags: Flags, variables: dict[str, str]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time."""
    asked = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    with TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--steps", str(flags.steps), "--per-class",
            str(flags.per_class), "--max-drop", "100", "--out", f"{folder}/run",
        ]  # fmt: skip
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, env=asked | variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.monotonic() - began, used


def measured(flags: Flags, waiting: str, beside: bool) -> tuple[float, float]:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
    try:
        return quickstart(flags, WAITING[waiting])
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()


def main(flags: Flags) -> None:
    cases = [(waiting, beside) for beside in (False, True) for waiting in WAITING]
    seen: dict[tuple[str, bool], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(flags.rounds):
        for case in cases:
            seen[case].append(measured(flags, *case))
    print(f"{processor()}, {os.cpu_count()} cores; {flags.steps} steps, {flags.per_class} images per class and style")
    print("| threads wait | beside | minutes | ratio | processor minutes |\n|---|---|---|---|---|")
    first = median(clock for clock, _ in seen[cases[0]])
    for (waiting, beside), runs in seen.items():
        clock, used = median(run[0] for run in runs), median(run[1] for run in runs)
        neighbour = "one busy process" if beside else "nothing"
        print(f"| {waiting} | {neighbour} | {clock / 60:.2f} | {clock / first:.2f} | {used / 60:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
