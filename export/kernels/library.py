"""Where the compiled kernels are: beside their sources if the installation had a compiler, else compiled now."""

import os
from functools import cache
from pathlib import Path

from export.kernels.build import HERE, BuildError, build, library_name
from export.lowered import ExportError

VARIABLE = "EDGEQAT_KERNELS"


@cache
def library() -> Path:
    """Path of the shared library. Raises ExportError that says how to get it.

    In this order: the file that EDGEQAT_KERNELS names; the one built when the package was installed; one in the user's
    cache folder; one compiled into there now.
    """
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise ExportError(f"{VARIABLE}={named}: no such file")
        return Path(named)
    for folder in (HERE, _cache_folder()):
        if (folder / library_name()).is_file():
            return folder / library_name()
    try:
        return build(_cache_folder())
    except (BuildError, OSError) as error:
        raise ExportError(
            f"a file of target ort-native needs edgeqat's kernels, and they are not built: {error}. Install a C++ compiler "
            "and load the file again (it takes seconds), or reinstall edgeqat where there is one, or set "
            f"{VARIABLE} to the library; the same codes without kernels are target ort-packed's"
        ) from error


@cache
def library_for(architecture: str) -> Path:
    """Path of the library for another architecture, compiled into the cache folder. Raises ExportError."""
    path = _cache_folder() / library_name(architecture)
    try:
        return path if path.is_file() else build(_cache_folder(), architecture)
    except (BuildError, OSError) as error:
        raise ExportError(f"edgeqat's kernels for {architecture} are not built: {error}") from error


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeqat"
