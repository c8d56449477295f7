"""Where the compiled kernels are: in the user's cache, beside their sources if the installation had a compiler, else compiled
now (`edgeqat/compiled.py` says which places and files count)."""

import os
from functools import cache
from pathlib import Path

from edgeqat.compiled import library as kept_library
from edgeqat.cpp import BuildError
from export.kernels.build import HERE, compile_library, library_name
from export.lowered import ExportError

VARIABLE = "EDGEQAT_KERNELS"


@cache
def library() -> Path:
    """Path of the shared library. Raises ExportError that says how to get it.

    The file that EDGEQAT_KERNELS names, which is the user's own affair; without one, that of these sources.
    """
    if named := os.environ.get(VARIABLE):
        return _named(Path(named))
    try:
        return kept_library(library_name(), HERE, compile_library)
    except (BuildError, OSError) as error:
        raise ExportError(
            f"a file of target ort-native needs edgeqat's kernels, and they are not built: {error}. Install a C++ compiler "
            "and load the file again (it takes seconds), or reinstall edgeqat where there is one, or set "
            f"{VARIABLE} to the library; the same codes without kernels are target ort-packed's"
        ) from error


@cache
def library_for(architecture: str) -> Path:
    """Path of the library for another architecture, compiled where there is none. Raises ExportError."""
    try:
        return kept_library(
            library_name(architecture),
            HERE,
            lambda path: compile_library(path, architecture),
        )
    except (BuildError, OSError) as error:
        raise ExportError(
            f"edgeqat's kernels for {architecture} are not built: {error}"
        ) from error


def _named(path: Path) -> Path:
    if not path.exists():
        raise ExportError(f"{VARIABLE}={path}: no such file")
    if not path.is_file():
        raise ExportError(
            f"{VARIABLE}={path}: is not a regular file; name the compiled library"
        )
    return path
