"""C++ sources of this package, compiled once by the system's compiler and called through ctypes.

The library lies in the user's cache folder under a name made of source, flags, compiler and processor. Without a compiler
the callers use their plain PyTorch formulas, and one line on the log says so. EDGEQAT_NATIVE=0 asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

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
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\n".join([source.read_text(), " ".join(FLAGS), version, _processor()])
    path = _cache_folder() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(source, compiler, path)
    return path


def _compile(source: Path, compiler: str, path: Path) -> None:
    for attempt in OPTIONAL:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [*compiler.split(), *FLAGS, *attempt, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                made.replace(path)  # another process may have been faster; both files are the same
                return
    raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr.strip())


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        folder = Path(base) / "edgeqat"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _own_folder()


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="edgeqat-"))


def _processor() -> str:
    """What -march=native depends on, for home folders that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
