"""Build hook: puts the compiled kernels of `export/kernels` into wheels.

The variable EDGEQAT_BUILD_KERNELS says for which processor:

    unset     this machine's; where there is no C++ compiler the wheel is built without them, and says so
    1         this machine's, or the build fails
    aarch64   another architecture, by GCC's cross compiler, or the build fails
    0         none

A wheel with kernels belongs to one platform; one without is as portable as the rest of the package.
`tools/build_wheels.py` makes the wheels of a release.
"""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "EDGEQAT_BUILD_KERNELS"
INSIDE = "export/kernels"


class KernelsHook(BuildHookInterface):
    """Adds the compiled library to wheels; an editable installation finds it beside the sources."""

    scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sys.path.insert(0, self.root)
        try:
            # All of it needs the standard library alone
            from edgeqat import cpp
            from export.kernels import build as kernels
        finally:
            sys.path.pop(0)
        asked = os.environ.get(VARIABLE, "")
        if asked == "0":
            self.app.display_info(f"edgeqat: kernels left out, as {VARIABLE}=0 asks")
            return
        if asked not in ("", "1", cpp.machine()):
            # What lies beside the sources is this machine's
            self.scratch = tempfile.TemporaryDirectory(prefix="edgeqat-kernels-")
            path = kernels.build(Path(self.scratch.name), asked)
            build_data["force_include"][str(path)] = f"{INSIDE}/{path.name}"
            self.belongs_to(f"linux_{asked}", build_data)
            return
        folder = Path(self.root) / INSIDE
        current = kernels.library_name().removesuffix(".so")
        for old in folder.glob("edgeqat_kernels-*.so"):
            if not old.name.startswith(f"{current}-"):
                old.unlink()
        try:
            path = kernels.build(folder)
        except (cpp.BuildError, OSError) as error:
            if asked:
                raise
            self.app.display_warning(
                "edgeqat: installed without kernels of its own; they are compiled when a file of target ort-native is first "
                f"loaded, or not at all, and everything else works: {error}"
            )
            return
        build_data["artifacts"].append(f"{INSIDE}/{path.name}")
        self.belongs_to(sysconfig.get_platform(), build_data)

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        if self.scratch is not None:
            self.scratch.cleanup()

    def belongs_to(self, platform: str, build_data: dict[str, Any]) -> None:
        """Tag the wheel for any Python 3 of one platform: the library knows nothing of Python."""
        build_data["pure_python"] = False
        tag = platform.replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"
