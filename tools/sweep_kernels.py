"""Random and extreme layers through the C++ kernels against their definition, without ONNX Runtime.

    uv run tools/sweep_kernels.py --count 3000
    uv run tools/sweep_kernels.py --count 1000 --sanitize
    uv run tools/sweep_kernels.py --count 1000 --compiler aarch64-linux-gnu-g++ --architecture aarch64 \\
        --runner "qemu-aarch64 -L /usr/aarch64-linux-gnu"
"""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from edgeqat import cpp
from edgeqat.cpp import machine
from export.kernels.build import compile_all, sources

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
UNKNOWN = 2  # the program's exit status for an instruction set that is not there
NEED_THE_RUNTIME = {"library.cpp", "op_layer.cpp", "op_pointwise.cpp", "op_softmax.cpp", "op_transpose.cpp"}


@dataclass(frozen=True)
class Flags:
    count: int = 1000
    """Layers per instruction set."""
    isas: tuple[str, ...] = ()
    """Instruction sets; by default all that are built for the architecture."""
    seed: int = 0
    """Of the layers."""
    sanitize: bool = False
    """Build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler: str = ""
    """C++ compiler, by default the system's."""
    architecture: str = ""
    """Of the code the compiler makes, by default this machine's."""
    runner: str = ""
    """Command that runs such code, for instance an emulator."""


def build_sweep(folder: Path, command: list[str], architecture: str, sanitize: bool = False) -> Path:
    """The sweep's program in `folder`. Raises BuildError."""
    files = [f for f in sources() if f.name not in NEED_THE_RUNTIME]
    files.append(Path(__file__).with_suffix(".cpp"))
    extra = SANITIZERS if sanitize else ()
    objects = compile_all(command, files, folder, architecture, (*extra, "-Wno-psabi"))
    program = folder / "sweep"
    cpp.run([*command, *extra, *map(str, objects), "-o", str(program)])
    return program


def main(flags: Flags) -> int:
    architecture = flags.architecture or machine()
    defaults = {
        "x86_64": ("portable", "avx2", "avxvnni", "avx512"),
        "aarch64": ("portable", "neon", "neon-dotprod", "neon-i8mm"),
    }
    command = flags.compiler.split() or cpp.required_compiler()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        program = build_sweep(Path(folder), command, architecture, flags.sanitize)
        for isa in flags.isas or defaults.get(architecture, ("portable",)):
            run = [*shlex.split(flags.runner), str(program), str(flags.count), isa, str(flags.seed)]
            status = subprocess.run(run).returncode
            absent = status == UNKNOWN and not flags.isas
            failed += status != 0 and not absent
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
