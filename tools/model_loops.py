"""What llvm-mca expects of the ARM kernels' inner loops: a model of the processor, not a measurement.

    uv run tools/model_loops.py

A kernel's inner loop is the loop of its function, in the compiled object file, with the most steps: the instruction that
multiplies and adds. Its cycles stand beside those of the same steps alone, each into a register of its own: the peak.
"""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeqat import cpp
from export.kernels.build import HERE, LIBRARY_FLAGS, compile_all

PROCESSORS = ("cortex-a55", "cortex-a76", "neoverse-n1", "apple-m1")
ITERATIONS = 100
PEAK_SUMS = 12
FEATURES = "-mattr=+dotprod,+i8mm"


@dataclass(frozen=True)
class Loop:
    """An inner loop to model.

    source: C++ file. function: its demangled name, up to the arguments. step: the instruction that is counted. macs:
    multiply-adds a step. peak: what a step takes at least, from registers; {k} is the number of its sum's register, {t} of
    another one of its own.
    """

    name: str
    source: str
    function: str
    step: str
    macs: int
    peak: tuple[str, ...]


LOOPS = (
    Loop("product, sdot", "neon_dotprod.cpp", "product_tiles<8, false>", "sdot", 16, ("sdot v{k}.4s, v30.16b, v31.4b[0]",)),
    Loop("product, smmla", "neon_i8mm.cpp", "product_tiles<8, false>", "smmla", 32, ("smmla v{k}.4s, v30.16b, v31.16b",)),
    Loop("product, smlal", "neon.cpp", "product_tiles<4, false>", "smlal", 8, ("smlal v{k}.8h, v30.8b, v31.8b",)),
    Loop(
        "one bit, udot", "neon_dotprod.cpp", "binary_tiles<8>", "udot", 128,
        ("eor v{t}.16b, v30.16b, v31.16b", "cnt v{t}.16b, v{t}.16b", "udot v{k}.4s, v{t}.16b, v29.16b"),
    ),
    Loop(
        "one bit, add", "neon.cpp", "binary_tiles<4>", "cnt", 128,
        ("eor v{t}.16b, v30.16b, v31.16b", "cnt v{t}.16b, v{t}.16b", "add v{k}.16b, v{k}.16b, v{t}.16b"),
    ),
)  # fmt: skip


def print_model() -> None:
    """One line per loop: cycles of 1,000 multiply-adds, and the share of the peak, on each processor."""
    if shutil.which("llvm-mca") is None:
        print("no model of the inner loops: llvm-mca is not installed (apt-get install llvm)")
        return
    version = re.search(r"LLVM version (\S+)", run(["llvm-mca", "--version"]))
    print(f"model by llvm-mca {version[1] if version else ''}: cycles of 1,000 multiply-adds, share of the step's peak")
    print(f"{'':<18} {'instructions':>13}" + "".join(f"{cpu:>18}" for cpu in PROCESSORS))
    with tempfile.TemporaryDirectory() as folder:
        files = sorted({HERE / loop.source for loop in LOOPS})
        command = cpp.required_compiler("aarch64")
        objects = compile_all(command, files, Path(folder), "aarch64", LIBRARY_FLAGS)
        listings = {path.stem: disassembled(path) for path in objects}
    for loop in LOOPS:
        body = inner_loop(listings[Path(loop.source).stem], loop)
        steps = steps_in(body, loop)
        macs = steps * loop.macs
        row = f"{loop.name:<18} {1000 * len(body) / macs:>13.1f}"
        for cpu in PROCESSORS:
            taken = cycles("\n".join(body), cpu) / macs
            least = cycles(peak_of(loop), cpu) / (PEAK_SUMS * loop.macs)
            row += f"{1000 * taken:>12.1f} {least / taken:>5.0%}"
        print(row)


def peak_of(loop: Loop) -> str:
    """The least that PEAK_SUMS independent steps take."""
    lines = []
    for instruction in loop.peak:
        for k in range(PEAK_SUMS):
            lines.append(instruction.format(k=k, t=PEAK_SUMS + k))
    return "\n".join(lines)


def steps_in(body: list[str], loop: Loop) -> int:
    """Steps among instructions; `smlal2` and its like are steps too."""
    return sum(line.startswith(loop.step) for line in body)


def disassembled(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction, by function."""
    text = run(["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)])
    functions: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = functions.setdefault(heading[1], [])
        elif found := re.match(r"\s*([0-9a-f]+):\t(.*)", line):
            instruction = found[2].split("//")[0].replace("\t", " ").strip()
            lines.append((int(found[1], 16), instruction))
    return functions


def inner_loop(functions: dict[str, list[tuple[int, str]]], loop: Loop) -> list[str]:
    """Instructions of the loop with most steps that has no other branch in it, without the branch that closes it."""
    (lines,) = (found for name, found in functions.items() if f"::{loop.function}(" in name)
    best: list[str] = []
    for end, (address, text) in enumerate(lines):
        branch = re.match(r"(?:b\.\w+|cbn?z \w+,|tbn?z .*,) ?([0-9a-f]+) <", text)
        if branch is None or int(branch[1], 16) >= address:
            continue
        body = [line for at, line in lines[:end] if at >= int(branch[1], 16)]
        straight = not any(re.match(r"(b|b\.\w+|cbn?z|tbn?z|bl|ret)\b", line) for line in body)
        if straight and steps_in(body, loop) > steps_in(best, loop):
            best = body
    if not best:
        raise SystemExit(f"{loop.source}: {loop.function} has no loop with {loop.step}")
    return best


def cycles(assembly: str, cpu: str) -> float:
    """Cycles of one round of the instructions."""
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", FEATURES, f"-iterations={ITERATIONS}"]
    found = re.search(r"Total Cycles:\s+(\d+)", run(command, assembly))
    if found is None:
        raise SystemExit("llvm-mca prints no cycles")
    return int(found[1]) / ITERATIONS


def run(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    print_model()
