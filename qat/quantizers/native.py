"""C++ sources of this package, compiled once by the system's compiler and called through ctypes.

The library's name is made of source, flags, compiler and processor; `edgeqat/compiled.py` says where it lies. Without a
compiler the callers use their plain PyTorch formulas, and one line on the log says so. EDGEQAT_NATIVE=0 asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from edgeqat.compiled import library as kept_library

# Contraction would round differently from PyTorch; the other two change no result but let the compiler vectorise rint.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fPIC", "-shared", "-fvisibility=default"]
OPTIONAL = [["-fopenmp"], []]  # a compiler without OpenMP makes a library of one thread

log = logging.getLogger("edgeqat")


def wanted() -> bool:
    """Whether kernels may be built and used at all."""
    return os.environ.get("EDGEQAT_NATIVE", "1") != "0"


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The loaded library of `source`, or None (noted once) where it cannot be built."""
    if not wanted():
        return None
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        log.warning("no C++ compiler found (set CXX): %s runs as plain PyTorch, slower", source.stem)
        return None
    try:
        return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning(
            "%s could not be built with %s, it runs as plain PyTorch, slower: %s", source.stem, compiler, reason
        )
        return None


def _built(source: Path, compiler: str) -> Path:
    command = [*compiler.split(), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
    key = "\n".join([source.read_text(), " ".join(FLAGS), version, _processor()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    return kept_library(name, source.parent, lambda path: _compile(source, compiler, path))


def _compile(source: Path, compiler: str, path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(path.parent)}  # which goes with all that is in it
    for attempt in OPTIONAL:
        command = [*compiler.split(), *FLAGS, *attempt, str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode == 0:
            return
    raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr.strip())


def _processor() -> str:
    """What -march=native depends on, for home folders that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
