"""Executed instructions of an inference on emulated ARM processors (see tools/arm64)."""

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from export.elsewhere import CPUS, environment_of, python_command, unavailable
from export.kernels.library import library_for

SCRIPT = Path(__file__).parent / "arm64" / "count_inferences.py"
RUNS = 1  # the count is the same each time but for what the runtime's own bookkeeping does


def counts(files: Mapping[str, onnx.ModelProto], feed: NDArray[np.float32], machine: str) -> dict[str, float]:
    """Instructions of one inference of each file on `machine`, one of `export.elsewhere.CPUS`, one thread.

    Exits with the remedy where the machine cannot be emulated here, or with what it printed where it fails.
    """
    if reason := unavailable(machine, ort.__version__):
        raise SystemExit(reason)
    cpu = CPUS[machine]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, file in files.items():
            onnx.save(file, folder / f"{name}.onnx")
            np.save(folder / f"{name}.npy", feed)
        arguments = [str(SCRIPT), str(RUNS), str(library_for("aarch64")), str(folder), *files]
        command = python_command(cpu, ort.__version__, arguments, count=True)
        environment = environment_of(cpu, ort.__version__)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    marks = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("marked ")]
    if done.returncode != 0:
        raise SystemExit(f"{machine} failed:\n{done.stderr}")
    if len(marks) != 2 * len(files):
        raise SystemExit(
            "the emulated system counts no parts of a program: uv run tools/arm64/make_root.py makes it anew"
        )
    found = {}
    for i, name in enumerate(files):
        found[name] = (marks[2 * i + 1] - marks[2 * i]) / RUNS
    return found
