"""The system's C++ compiler: which it is, how it is run, and the flags under which kernels compute what their formulas say.

Nothing but the standard library is needed, so that an installer can build.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

# Contraction would round differently from the definition; the last two change no result but let loops be vectorised.
EXACT = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
NAMES = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources; the message says which."""


def machine() -> str:
    """This machine's architecture: x86_64, aarch64, ..."""
    return MACHINES.get(platform.machine(), platform.machine())


def compiler(architecture: str | None = None) -> list[str] | None:
    """Command of the C++ compiler: CXX, or the first of c++, g++, clang++ there is; for another architecture, GCC's cross
    compiler. None where there is none."""
    if architecture not in (None, machine()):
        cross = shutil.which(f"{architecture}-linux-gnu-g++")
        return None if cross is None else [cross]
    if named := os.environ.get("CXX"):
        return named.split()
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return None if found is None else [found]


def required_compiler(architecture: str | None = None) -> list[str]:
    """As `compiler`. Raises BuildError that says how to get one."""
    command = compiler(architecture)
    if command is not None:
        return command
    if architecture not in (None, machine()):
        raise BuildError(
            f"no compiler for {architecture} found: apt-get install g++-{architecture}-linux-gnu"
        )
    raise BuildError("no C++ compiler found (install g++ or clang++, or set CXX)")


def run(command: list[str], scratch: Path | None = None) -> str:
    """Run a compiler, its temporary files in `scratch`, which goes with all that is in it; returns what it prints.

    Raises BuildError with the compiler's words.
    """
    environment = (
        os.environ if scratch is None else os.environ | {"TMPDIR": str(scratch)}
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def accepts(command: Sequence[str], flags: Sequence[str], scratch: Path) -> bool:
    """Whether a compiler knows `flags`: one that is older than an instruction set does not. scratch: see `run`."""
    empty = ["-x", "c++", "-fsyntax-only", os.devnull]
    try:
        run([*command, *flags, *empty], scratch)
    except BuildError:
        return False
    return True


def library_name(stem: str, made_of: Iterable[object]) -> str:
    """Name of a shared library with a hash of what it is made of: sources, flags, the compiler, the processor."""
    digest = hashlib.sha256()
    for part in made_of:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(hashlib.sha256(content).digest())
    return f"{stem}-{digest.hexdigest()[:16]}.so"
