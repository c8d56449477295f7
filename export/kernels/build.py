"""Compiles the kernels beside this file into one shared library, which needs nothing but the standard library.

    python -m export.kernels.build [FOLDER [ARCHITECTURE]]      # another one, such as aarch64: with GCC's cross compiler

Every instruction set is a translation unit of its own, chosen at run time, so the library runs on any processor of its
architecture. Its name carries a hash of sources and flags, so that a library of other sources is never taken for this one's,
and one of its own contents (`edgeqat/compiled.py`).
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeqat import cpp
from edgeqat.compiled import make_library
from edgeqat.cpp import BuildError, machine

HERE = Path(__file__).parent
LIBRARY_FLAGS = (
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
)
AVX512 = (
    "-mavx2",
    "-mfma",
    *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni", "vbmi", "vpopcntdq")),
)
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2.cpp": ("-mavx2", "-mfma"),
        "avxvnni.cpp": ("-mavx2", "-mfma", "-mavxvnni"),
        "loops_avx2.cpp": ("-mavx2", "-mfma"),
        "avx512.cpp": AVX512,
        "loops_avx512.cpp": AVX512,
    },
    # Moving loads and steps ahead of each other before registers are allotted makes a tile need more of them than there are.
    "aarch64": {
        "neon.cpp": ("-fno-schedule-insns",),
        "neon_dotprod.cpp": ("-march=armv8.2-a+dotprod", "-fno-schedule-insns"),
        "neon_i8mm.cpp": ("-march=armv8.2-a+dotprod+i8mm", "-fno-schedule-insns"),
    },
}
PARALLEL = 2


def sources() -> list[Path]:
    """The C++ files of the kernels."""
    return sorted(HERE.glob("*.cpp"))


def library_name(architecture: str | None = None) -> str:
    """Name of the library made of the present sources, for `architecture` (this machine's, by default)."""
    flags = (cpp.EXACT, LIBRARY_FLAGS, ISA_FLAGS, architecture or machine())
    files = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.hpp")])
    named = [part for path in files for part in (path.name, path)]
    return cpp.library_name("edgeqat_kernels", [flags, *named])


def build(folder: Path, architecture: str | None = None) -> Path:
    """Compile into `folder` for `architecture`, by default this machine's; returns the library's path. Raises BuildError."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_library(
        folder,
        library_name(architecture),
        lambda path: compile_library(path, architecture),
    )


def compile_library(path: Path, architecture: str | None = None) -> None:
    """Compile the library into the file `path`, with object files beside it. Raises BuildError."""
    command = cpp.required_compiler(architecture)
    objects = compile_all(
        command, sources(), path.parent, architecture or machine(), LIBRARY_FLAGS
    )
    # Helpers of libgcc are taken from the process's own library, which libstdc++ needs anyway: copies of newer compilers
    # need a newer C library than the runtime does.
    cpp.run([*command, "-shared", *map(str, objects), "-o", str(path)], path.parent)


def compile_all(
    command: Sequence[str],
    files: Sequence[Path],
    folder: Path,
    architecture: str,
    extra: Sequence[str] = (),
) -> list[Path]:
    """Object files of `files` for `architecture` (x86_64, aarch64, ...), each with its instruction set's flags."""

    def one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        isa = ISA_FLAGS.get(architecture, {}).get(source.name, ())
        if not cpp.accepts(command, isa, folder):
            isa = ()  # the file then says that the processor lacks the instruction set
        cpp.run(
            [
                *command,
                *cpp.EXACT,
                *extra,
                *isa,
                f"-I{HERE}",
                "-c",
                str(source),
                "-o",
                str(made),
            ],
            folder,
        )
        return made

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(one, files))


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, *sys.argv[2:3]))
    except (BuildError, OSError) as error:
        sys.exit(f"edgeqat kernels: {error}")
