"""Build hook: compiles the kernels of `export/kernels` where there is a C++ compiler, and says so where there is none.

A wheel with kernels belongs to one platform; one without is as portable as the rest of the package. EDGEQAT_BUILD_KERNELS=0
asks for the latter.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Adds the compiled library to wheels; an editable installation finds it beside the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root) / "export" / "kernels"
        sys.path.insert(0, self.root)
        try:
            from edgeqat.cpp import BuildError

            # All of it needs the standard library alone
            from export.kernels import build as kernels
        finally:
            sys.path.pop(0)
        if os.environ.get("EDGEQAT_BUILD_KERNELS", "1") == "0":
            self.app.display_info(
                "edgeqat: kernels left out, as EDGEQAT_BUILD_KERNELS=0 asks"
            )
            return
        current = kernels.library_name().removesuffix(".so")
        for old in folder.glob("edgeqat_kernels-*.so"):
            if not old.name.startswith(f"{current}-"):
                old.unlink()
        try:
            path = kernels.build(folder)
        except (BuildError, OSError) as error:
            self.app.display_warning(
                "edgeqat: installed without kernels of its own; they are compiled when a file of target ort-native is first "
                f"loaded, or not at all, and everything else works: {error}"
            )
            return
        build_data["artifacts"].append(f"export/kernels/{path.name}")
        build_data["pure_python"] = False
        build_data["tag"] = (
            f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        )
