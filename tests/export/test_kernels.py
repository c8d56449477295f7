"""The C++ kernels alone, random layers and extreme codes against loops that spell the definition out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeqat import cpp
from edgeqat.cpp import compiler, machine
from export.kernels import library as kernels_library
from export.kernels.build import HERE, compile_all, library_name, sources
from tools.sweep_kernels import build_sweep

ROOT = Path(__file__).parent.parent.parent
ISAS = {
    "x86_64": ("portable", "avx2", "avxvnni", "avx512"),
    "aarch64": ("portable", "neon", "neon-dotprod", "neon-i8mm"),
}
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")  # where Debian's cross compiler has them
UNKNOWN = 2  # the sweep's exit status for an instruction set that is not there

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sweep(tmp_path_factory.mktemp("sweep"), cpp.required_compiler(), machine())


@pytest.mark.parametrize("isa", ISAS.get(machine(), ("portable",)))
def test_random_layers_compute_the_defined_codes(sweep: Path, isa: str) -> None:
    done = subprocess.run([str(sweep), "300", isa, "1"], capture_output=True, text=True)
    if done.returncode == UNKNOWN:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def arm_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = compiler("aarch64")
    if command is None or not ARM_LIBRARIES.is_dir() or shutil.which("qemu-aarch64") is None:
        pytest.skip("apt-get install qemu-user g++-aarch64-linux-gnu")
    return build_sweep(tmp_path_factory.mktemp("arm_sweep"), command, "aarch64")


@pytest.mark.parametrize("isa", [isa for isa in ISAS["aarch64"] if isa != "portable"])
def test_random_layers_on_an_emulated_arm_processor(arm_sweep: Path, isa: str) -> None:
    command = ["qemu-aarch64", "-L", str(ARM_LIBRARIES), "-cpu", "max", str(arm_sweep), "40", isa, "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("cpu", "chosen"), [("cortex-a72", "neon"), ("neoverse-n1", "neon-dotprod"), ("max", "neon-i8mm")]
)
def test_an_arm_processor_runs_the_widest_instructions_it_has(arm_sweep: Path, cpu: str, chosen: str) -> None:
    command = ["qemu-aarch64", "-L", str(ARM_LIBRARIES), "-cpu", cpu, str(arm_sweep), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{chosen}: 0 layers, 0 with wrong codes\n"


@pytest.mark.slow
def test_thousands_of_layers_under_sanitizers() -> None:
    command = [sys.executable, str(ROOT / "tools" / "sweep_kernels.py"), "--count", "2000", "--sanitize"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_or_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file under the plain name, as it was found before, and one whose contents are not those it is named for."""
    commands: list[list[str]] = []

    def compile_nothing(command: list[str], scratch: Path) -> None:
        if "-fsyntax-only" in command:  # asks whether the compiler knows a file's flags
            return
        commands.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"compiled")

    monkeypatch.setattr(cpp, "run", compile_nothing)
    monkeypatch.setattr(kernels_library, "HERE", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernels_library.VARIABLE, raising=False)
    folder = tmp_path / "edgeqat"
    folder.mkdir(mode=0o700)
    (folder / library_name()).write_bytes(b"planted")
    named = library_name().removesuffix(".so")
    (folder / f"{named}-{'0' * 64}.so").write_bytes(b"planted")
    find = kernels_library.library.__wrapped__
    found = find()
    assert found.read_bytes() == b"compiled" and len(commands) == len(list(HERE.glob("*.cpp"))) + 1
    assert find() == found and len(commands) == len(list(HERE.glob("*.cpp"))) + 1
    found.write_bytes(b"compile")
    assert find().read_bytes() == b"compiled" and len(commands) == 2 * len(list(HERE.glob("*.cpp"))) + 2


OLD_COMPILER = """#!/bin/sh
# Knows no AVX-VNNI, as GCC 10; makes empty object files and notes what it was asked.
for word in "$@"; do
  if [ "$word" = -mavxvnni ]; then echo "unrecognized command-line option '-mavxvnni'" >&2; exit 1; fi
done
while [ $# -gt 0 ]; do
  case "$1" in
    -c) source=$2 ;;
    -o) : > "$2" ;;
    -mavx2) flagged=yes ;;
  esac
  shift
done
if [ -n "$source" ]; then echo "$(basename "$source") $flagged" >> "$0.log"; fi
"""


def test_a_compiler_older_than_an_instruction_set_builds_the_others(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text(OLD_COMPILER)
    old.chmod(0o755)
    made = compile_all([str(old)], sources(), tmp_path, "x86_64")
    assert len(made) == len(sources()) and all(path.exists() for path in made)
    asked = dict(line.split(" ") for line in (tmp_path / "old.log").read_text().splitlines())
    assert asked["avx2.cpp"] == "yes" and asked["avx512.cpp"] == "yes" and asked["avxvnni.cpp"] == ""
