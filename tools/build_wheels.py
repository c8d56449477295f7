"""The wheels of a release: with kernels for x86-64 and 64-bit ARM Linux, without them for any platform, and the sources.

    uv run tools/build_wheels.py                       # into dist/
    uv run tools/build_wheels.py --for x86_64 any      # some of them

Kernels for another architecture than this machine's are compiled by GCC's cross compiler (apt-get install
g++-aarch64-linux-gnu). A wheel with kernels gets the oldest manylinux tag that its library's symbols allow, by auditwheel;
the tag must be no newer than NEWEST, so that it runs wherever ONNX Runtime's own wheels do.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIABLE = "EDGEQAT_BUILD_KERNELS"
ARCHITECTURES = ("x86_64", "aarch64")
ANY, SOURCES = "any", "sources"
NEWEST = (2, 28)  # glibc of ONNX Runtime's wheels
MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(\w+?)(?=\.|$)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder to write into")
    everything = (*ARCHITECTURES, ANY, SOURCES)
    parser.add_argument("--for", dest="wanted", nargs="+", choices=everything, default=everything, help="which")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for wanted in arguments.wanted:
        print(build(wanted, arguments.out))


def build(wanted: str, out: Path) -> Path:
    """Build a wheel for an architecture or for "any", or the "sources", into `out`; returns the file.

    Exits with the reason where a compiler is missing or the wheel would not run where ONNX Runtime's do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        kind = "sdist" if wanted == SOURCES else "wheel"
        kernels = wanted if wanted in ARCHITECTURES else "0"
        command = ["uv", "build", "--quiet", f"--{kind}", "--out-dir", scratch, str(ROOT)]
        run(command, {VARIABLE: kernels})
        (made,) = (path for path in Path(scratch).iterdir() if path.suffix in (".whl", ".gz"))
        if wanted in ARCHITECTURES:
            made = tagged(made, wanted)
        return Path(shutil.copy(made, out))


def tagged(wheel: Path, architecture: str) -> Path:
    """`wheel` under its manylinux tags, in a folder beside it."""
    folder = wheel.parent / "tagged"
    # Without a patcher the library stays as it is, byte for byte: its name has its SHA-256
    audit = [sys.executable, "-m", "auditwheel", "repair", "--patcher", "none"]
    run([*audit, "--wheel-dir", str(folder), str(wheel)])
    (made,) = folder.glob("*.whl")
    tags = [(int(major), int(minor)) for major, minor, of in MANYLINUX.findall(made.stem) if of == architecture]
    if not tags or min(tags) > NEWEST:
        sys.exit(
            f"{made.name}: needs a newer glibc than manylinux_{NEWEST[0]}_{NEWEST[1]}_{architecture} allows; "
            f"`auditwheel show {made.name}` names the symbols"
        )
    return made


def run(command: list[str], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (variables or {}))
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())


if __name__ == "__main__":
    main()
