"""Compiles the kernels beside this file into one shared library; by itself, so that an installer can run it.

    python export/kernels/build.py [FOLDER [ARCHITECTURE]]      # another one, such as aarch64: with GCC's cross compiler

Every instruction set is a translation unit of its own, chosen at run time, so the library runs on any processor of its
architecture. Its name carries a hash of sources and flags, so that a library of other sources is never taken for this one's,
and one of its own contents (`edgeqat/compiled.py`).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# Contraction would round differently from the definition; the other two change no result but let loops be vectorised.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LIBRARY_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")
AVX512 = ("f", "bw", "vl", "dq", "vnni", "vbmi", "vpopcntdq")
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2.cpp": ("-mavx2", "-mfma"),
        "avx512.cpp": ("-mavx2", "-mfma", *(f"-mavx512{x}" for x in AVX512)),
    },
    "aarch64": {"neon_dotprod.cpp": ("-march=armv8.2-a+dotprod",)},
}
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
PARALLEL = 2


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources; the message says which."""


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def library_name(architecture: str | None = None) -> str:
    """Name of the library made of the present sources, for `architecture` (this machine's, by default)."""
    digest = hashlib.sha256(repr((FLAGS, LIBRARY_FLAGS, ISA_FLAGS, architecture or machine())).encode())
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.hpp")]):
        digest.update(path.name.encode() + path.read_bytes())
    return f"edgeqat_kernels-{digest.hexdigest()[:16]}.so"


def machine() -> str:
    return MACHINES.get(platform.machine(), platform.machine())


def compiler(architecture: str | None = None) -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ there is; for another architecture, GCC's cross compiler."""
    if architecture not in (None, machine()):
        return shutil.which(f"{architecture}-linux-gnu-g++")
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path, architecture: str | None = None) -> Path:
    """Compile into `folder` for `architecture`, by default this machine's; returns the library's path. Raises BuildError."""
    from edgeqat.compiled import make_library

    folder.mkdir(parents=True, exist_ok=True)
    return make_library(folder, library_name(architecture), lambda path: compile_library(path, architecture))


def compile_library(path: Path, architecture: str | None = None) -> None:
    """Compile the library into the file `path`, with object files beside it. Raises BuildError."""
    command = compiler(architecture)
    if command is None and architecture not in (None, machine()):
        raise BuildError(f"no compiler for {architecture} found: apt-get install g++-{architecture}-linux-gnu")
    if command is None:
        raise BuildError("no C++ compiler found (install g++ or clang++, or set CXX)")
    objects = compile_all(command, sources(), path.parent, architecture or machine(), LIBRARY_FLAGS)
    # The runtime's process has libgcc's two or three helpers in a library of its own; ours carries them along.
    _run([*command.split(), "-shared", "-static-libgcc", *map(str, objects), "-o", str(path)], path.parent)


def compile_all(
    command: str, files: Sequence[Path], folder: Path, architecture: str, extra: Sequence[str] = ()
) -> list[Path]:
    """Object files of `files` for `architecture` (x86_64, aarch64, ...), each with its instruction set's flags."""

    def one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        isa = ISA_FLAGS.get(architecture, {}).get(source.name, ())
        _run([*command.split(), *FLAGS, *extra, *isa, f"-I{HERE}", "-c", str(source), "-o", str(made)], folder)
        return made

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, files))


def _run(command: list[str], scratch: Path) -> None:
    """Run a compiler whose temporary files lie in `scratch`, which goes with all that is in it."""
    environment = os.environ | {"TMPDIR": str(scratch)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, *sys.argv[2:3]))
    except (BuildError, OSError) as error:
        sys.exit(f"edgeqat kernels: {error}")
