"""C++ sources of this package, compiled once by the system's compiler and called through ctypes.

The library's name is made of source, flags, compiler and processor; `edgeqat/compiled.py` says where it lies. Without a
compiler the callers use their plain PyTorch formulas, and one line on the log says so. EDGEQAT_NATIVE=0 asks for that.
"""

import ctypes
import logging
import os
import platform
from functools import cache
from pathlib import Path

from edgeqat import cpp
from edgeqat.compiled import library as kept_library

FLAGS = (*cpp.EXACT, "-march=native", "-fPIC", "-shared", "-fvisibility=default")
THREADED = "-fopenmp"  # a compiler without OpenMP makes a library of one thread

log = logging.getLogger("edgeqat")


def wanted() -> bool:
    """Whether kernels may be built and used at all."""
    return os.environ.get("EDGEQAT_NATIVE", "1") != "0"


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The loaded library of `source`, or None (noted once) where it cannot be built."""
    if not wanted():
        return None
    command = cpp.compiler()
    if command is None:
        log.warning(
            "no C++ compiler found (set CXX): %s runs as plain PyTorch, slower",
            source.stem,
        )
        return None
    try:
        return ctypes.CDLL(str(_built(source, command)))
    except (OSError, cpp.BuildError) as error:
        log.warning(
            "%s could not be built, it runs as plain PyTorch, slower: %s",
            source.stem,
            error,
        )
        return None


def _built(source: Path, command: list[str]) -> Path:
    version = cpp.run([*command, "--version"])
    name = cpp.library_name(source.stem, [source, FLAGS, version, _processor()])
    return kept_library(
        name, source.parent, lambda path: _compile(source, command, path)
    )


def _compile(source: Path, command: list[str], path: Path) -> None:
    rest = [*FLAGS, str(source), "-o", str(path)]
    try:
        cpp.run([*command, THREADED, *rest], path.parent)
    except cpp.BuildError:
        cpp.run([*command, *rest], path.parent)


def _processor() -> str:
    """What -march=native depends on, for home folders that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted(
            {
                line
                for line in lines
                if line.startswith(("flags", "Features", "model name"))
            }
        )
    )
