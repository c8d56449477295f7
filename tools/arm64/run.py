"""Python on an emulated ARM processor, with NumPy and ONNX Runtime's arm64 build (see make_root.py).

    uv run tools/arm64/run.py neoverse-n1 script.py arguments...
    uv run tools/arm64/run.py --count cortex-a72 script.py arguments...

With --count, "instructions N" goes to standard error at the end: all that the whole process executed. The difference
between runs of 11 and of 1 inferences, over 10, is one inference; starting up differs by tens of millions from run to run.
"""

import argparse
import importlib.metadata
import subprocess
import sys

from export.elsewhere import CPUS, environment_of, python_command, unavailable

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--count", action="store_true", help="count executed instructions")
parser.add_argument("--onnxruntime", default=importlib.metadata.version("onnxruntime"), help="version")
parser.add_argument("cpu", choices=[name for name, cpu in CPUS.items() if cpu.architecture == "aarch64"])
parser.add_argument("arguments", nargs=argparse.REMAINDER, help="script and its arguments")
given = parser.parse_args()
if reason := unavailable(given.cpu, given.onnxruntime):
    sys.exit(reason)
command = python_command(CPUS[given.cpu], given.onnxruntime, given.arguments, count=given.count)
sys.exit(subprocess.run(command, env=environment_of(CPUS[given.cpu], given.onnxruntime)).returncode)
