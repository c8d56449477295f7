"""Whether the bounds in pyproject.toml are true: bundles on several versions of ONNX Runtime, on this machine and on emulated
ARM, and the suite at the lowest versions of everything. A row per version and machine.

    uv run qat bundle runs/w4a4 model.onnx --out bundle
    uv run tools/check_versions.py bundle --versions 1.18.1 1.25.1 1.28.0 1.32.0
    uv run tools/check_versions.py --machines here --versions --suite tests    # in an environment of the lowest versions

ARM systems are made by `tools/arm64/make_root.py --onnxruntime VERSION`; for this machine, wheels go into a temporary folder.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from edgeqat.terminal import printable
from export.elsewhere import CPUS, run_python, unavailable

ROOT = Path(__file__).parents[1]
NUMPY_BEFORE_2 = "numpy==1.26.4"  # what ONNX Runtime before 1.19 was built against


@dataclass(frozen=True)
class Flags:
    bundles: Positional[tuple[Path, ...]] = ()
    """Folders that `qat bundle` wrote."""
    versions: tuple[str, ...] = ("1.18.1", "1.25.1", "1.28.0", "1.32.0")
    """Of ONNX Runtime."""
    machines: tuple[str, ...] = ("here", "cortex-a72", "neoverse-n1", "max")
    """This machine, and emulated ones."""
    suite: tuple[str, ...] = ()
    """Tests to run at the lowest versions that pyproject.toml allows; `tests` for all."""
    log: Path | None = None
    """File for what they print."""


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


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1] if lines else f"nothing printed, exit code {done.returncode}"


def uv(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(["uv", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"uv {' '.join(arguments)}: {done.stderr.strip()}")


def suite_at_the_lowest_versions(tests: tuple[str, ...], place: Path) -> subprocess.CompletedProcess[str]:
    """The tests in a new environment: every direct dependency, those of development too, at its lower bound."""
    environment = os.environ | {"VIRTUAL_ENV": str(place)}
    uv(["venv", "--quiet", str(place)], environment)
    development, wanted = place / "development.in", place / "lowest.txt"
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    # The group names this project and its extras, too, which the resolver would look for in an index.
    others = [requirement for requirement in groups["dev"] if not requirement.startswith("edgeqat")]
    development.write_text("\n".join(others))
    uv(
        ["pip", "compile", "--quiet", "--resolution", "lowest-direct", "--extra", "all", "pyproject.toml", str(development),
         "--output-file", str(wanted)],
        environment,
    )  # fmt: skip
    uv(["pip", "install", "--quiet", "--requirement", str(wanted)], environment)
    uv(["pip", "install", "--quiet", "--no-deps", "--editable", "."], environment)
    command = [str(place / "bin" / "python"), "-m", "pytest", *tests]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def main(flags: Flags) -> int:
    failed = 0
    print("| bundle | ONNX Runtime | machine | verdict |\n|---|---|---|---|", flush=True)
    if flags.suite:
        with tempfile.TemporaryDirectory() as place:
            done = suite_at_the_lowest_versions(flags.suite, Path(place) / "lowest")
        failed += done.returncode != 0
        if flags.log is not None:
            flags.log.write_text(done.stdout + done.stderr)
        print(f"| {' '.join(flags.suite)} | lowest of everything | here | {last_line(done)} |", flush=True)
        for line in done.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(f"    {line}", flush=True)
    for version in flags.versions:
        with tempfile.TemporaryDirectory() as place:
            if "here" in flags.machines and flags.bundles:
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
                    print(f"| {cell(bundle.name)} | {version} | {machine} | {cell(last_line(done))} |", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
