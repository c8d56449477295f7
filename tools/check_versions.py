"""One bundle on several versions of ONNX Runtime, on this machine and on emulated ARM: a row per version and machine.

    uv run qat bundle runs/w4a4 model.onnx --out bundle
    uv run tools/check_versions.py bundle --versions 1.18.1 1.23.2 1.27.0 1.32.0

ARM systems are made by `tools/arm64/make_root.py --onnxruntime VERSION`; for this machine, wheels go into a temporary folder.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from export.elsewhere import CPUS, run_python, unavailable
from qat.terminal import printable

NUMPY_BEFORE_2 = "numpy==1.26.4"  # what ONNX Runtime before 1.19 was built against


@dataclass(frozen=True)
class Flags:
    bundles: Positional[tuple[Path, ...]]
    """Folders that `qat bundle` wrote."""
    versions: tuple[str, ...] = ("1.18.1", "1.23.2", "1.27.0", "1.32.0")
    """Of ONNX Runtime."""
    machines: tuple[str, ...] = ("here", "cortex-a72", "neoverse-n1", "max")
    """This machine, and emulated ones."""


def numpy_for(version: str) -> str:
    major, minor = (int(part) for part in version.split(".")[:2])
    return NUMPY_BEFORE_2 if (major, minor) < (1, 19) else "numpy"


def check_here(bundle: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """check.py with the wheels in `site`, before the environment's own."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, str(bundle / "check.py")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def install(version: str, site: Path) -> None:
    requirements = [f"onnxruntime=={version}", numpy_for(version)]
    command = ["uv", "pip", "install", "--quiet", "--target", str(site), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"ONNX Runtime {version} cannot be installed: {done.stderr.strip()}")


def cell(text: str) -> str:
    """A cell of a Markdown table."""
    return printable(text).replace("|", "/")


def main(flags: Flags) -> int:
    failed = 0
    print("| bundle | ONNX Runtime | machine | verdict |\n|---|---|---|---|")
    for version in flags.versions:
        with tempfile.TemporaryDirectory() as place:
            if "here" in flags.machines:
                install(version, Path(place))
            for machine in flags.machines:
                reason = None if machine == "here" else unavailable(machine, version)
                for bundle in flags.bundles:
                    if reason is not None:
                        print(f"| {cell(bundle.name)} | {version} | {machine} | not run: {cell(reason)} |", flush=True)
                        continue
                    if machine == "here":
                        done = check_here(bundle, Path(place))
                    else:
                        done = run_python(CPUS[machine], version, [str(bundle / "check.py")])
                    failed += done.returncode != 0
                    verdict = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
                    print(f"| {cell(bundle.name)} | {version} | {machine} | {cell(verdict)} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
