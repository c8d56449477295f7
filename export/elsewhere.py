"""Other processors than this one: ONNX Runtime's arm64 build under QEMU, and its WebAssembly build in Node.

A machine runs a *bundle* (`export/bundle.py`): a folder with a file, images and what is expected. What comes back is the
codes it computed. `tools/arm64/make_root.py` and `tools/wasm/install.sh` set the machines up.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from export.lowered import ExportError

ARM64_VARIABLE, WASM_VARIABLE = "EDGEQAT_ARM64", "EDGEQAT_WASM"
BASE_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
DOT_FEATURES = f"{BASE_FEATURES} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"


@dataclass(frozen=True)
class Cpu:
    """An emulated 64-bit ARM processor.

    qemu: its name for QEMU. part, features: how /proc/cpuinfo describes it. stands_for: devices of its kind.
    """

    name: str
    qemu: str
    part: str
    features: str
    stands_for: str

    def cpuinfo(self) -> str:
        return (
            f"processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {self.part}\nCPU revision\t: 1\n\n"
        )


CPUS: dict[str, Cpu] = {
    cpu.name: cpu
    for cpu in (
        Cpu("cortex-a72", "cortex-a72", "0xd08", BASE_FEATURES, "no dot product, as Raspberry Pi 4"),
        Cpu("neoverse-n1", "neoverse-n1", "0xd0c", DOT_FEATURES, "dot product, as Raspberry Pi 5 and most phones"),
        Cpu("max", "max,sve=off,pauth-impdef=on", "0xd40", f"{DOT_FEATURES} i8mm bf16", "dot product and i8mm"),
    )
}
WASM = "wasm"
# What `--on` takes, and the machines it stands for.
PLATFORMS: dict[str, tuple[str, ...]] = {"arm64": tuple(CPUS), "wasm": (WASM,)}


def machines_of(names: str) -> tuple[str, ...]:
    """The machines that a comma-separated list of platforms or machines names. Raises ExportError for an unknown word."""
    known = PLATFORMS | {cpu: (cpu,) for cpu in CPUS} | {"x86": ()}
    found: list[str] = []
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name not in known:
            raise ExportError(f"--on {name}: unknown; there are {', '.join(known)}")
        found += known[name]
    return tuple(dict.fromkeys(found))


def arm64_root(version: str) -> Path:
    """Where the ARM system with ONNX Runtime `version` is, or is to be."""
    folder = os.environ.get(ARM64_VARIABLE)
    return (Path(folder) if folder else _cache() / "arm64") / f"onnxruntime-{version}"


def wasm_modules() -> Path:
    """The node_modules folder that holds onnxruntime-web, or is to hold it."""
    folder = os.environ.get(WASM_VARIABLE)
    return (Path(folder) if folder else _cache() / "wasm") / "node_modules"


def unavailable(machine: str, version: str) -> str | None:
    """Why `machine` cannot be used here, with the command that helps, or None if it can."""
    if machine == WASM:
        if shutil.which("node") is None:
            return "node is not installed: apt-get install nodejs"
        if not (wasm_modules() / "onnxruntime-web").is_dir():
            return "onnxruntime-web is not installed: bash tools/wasm/install.sh (in the source repository)"
        return None
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed: apt-get install qemu-user"
    if not arm64_root(version).is_dir():
        return (
            f"there is no ARM system with ONNX Runtime {version}: uv run tools/arm64/make_root.py --onnxruntime {version} "
            "(in the source repository)"
        )
    return None


def python_command(cpu: Cpu, version: str, arguments: list[str], *, count: bool = False) -> list[str]:
    """The command that runs the ARM system's Python with `arguments` on the emulated `cpu`, in `arm_environment(version)`.

    count: whether QEMU prints the number of executed instructions at the end, of the whole process.
    """
    root = arm64_root(version)
    view = root / "cpu" / cpu.name
    (python,) = (p for p in (root / "usr/bin").glob("python3.*") if p.name.removeprefix("python3.").isdigit())
    plugin = ["-plugin", str(root / "count_instructions.so")] if count else []
    return ["qemu-aarch64", "-L", str(view), "-cpu", cpu.qemu, *plugin, str(python), *arguments]


def arm_environment(version: str) -> dict[str, str]:
    root = arm64_root(version)
    environment = os.environ | {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": str(root / "site"),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    environment.pop("OPENBLAS_CORETYPE", None)  # names an x86 processor, if anything
    return environment


def run_python(cpu: Cpu, version: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the ARM system's Python with `arguments` on the emulated `cpu`."""
    command = python_command(cpu, version, arguments)
    return subprocess.run(command, env=arm_environment(version), capture_output=True, text=True)


def run_node(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Node with `arguments`, onnxruntime-web in reach."""
    environment = os.environ | {WASM_VARIABLE: str(wasm_modules().parent)}
    return subprocess.run(["node", *arguments], env=environment, capture_output=True, text=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeqat"
