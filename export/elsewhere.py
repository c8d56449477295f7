"""Other processors than this one: under QEMU, ONNX Runtime's own builds for x86-64 and 64-bit ARM; in Node, for WebAssembly.

A machine runs a *bundle* (`export/bundle.py`): a folder with a file, images and what is expected. What comes back is the
codes it computed. `tools/arm64/make_root.py` and `tools/wasm/install.sh` set the machines up.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeqat.compiled import cache_folder, distrust
from export.lowered import ExportError

ARM64_VARIABLE, WASM_VARIABLE = "EDGEQAT_ARM64", "EDGEQAT_WASM"
BASE_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
DOT_FEATURES = f"{BASE_FEATURES} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
UNKNOWN_TO_QEMU = "-x2apic,-tsc-deadline,-invpcid,-spec-ctrl"


@dataclass(frozen=True)
class Cpu:
    """An emulated processor.

    architecture: "aarch64" or "x86_64". qemu: its name for QEMU. stands_for: devices of its kind.
    part, features: of an ARM processor, how /proc/cpuinfo describes it.
    """

    name: str
    architecture: str
    qemu: str
    stands_for: str
    part: str = ""
    features: str = ""

    def cpuinfo(self) -> str:
        """What /proc/cpuinfo says on such a processor: ONNX Runtime reads it to choose kernels."""
        return (
            f"processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {self.part}\nCPU revision\t: 1\n\n"
        )


CPUS: dict[str, Cpu] = {
    cpu.name: cpu
    for cpu in (
        Cpu(
            "cortex-a72",
            "aarch64",
            "cortex-a72",
            "no dot product, as Raspberry Pi 4",
            "0xd08",
            BASE_FEATURES,
        ),
        Cpu(
            "neoverse-n1",
            "aarch64",
            "neoverse-n1",
            "dot product, as Raspberry Pi 5",
            "0xd0c",
            DOT_FEATURES,
        ),
        Cpu(
            "max",
            "aarch64",
            "max,sve=off,pauth-impdef=on",
            "i8mm, as new phones",
            "0xd40",
            f"{DOT_FEATURES} i8mm bf16",
        ),
        Cpu(
            "haswell",
            "x86_64",
            f"Haswell-v4,{UNKNOWN_TO_QEMU}",
            "AVX2 and FMA, no VNNI",
        ),
        Cpu(
            "sandybridge",
            "x86_64",
            f"SandyBridge,{UNKNOWN_TO_QEMU}",
            "AVX, neither AVX2 nor FMA",
        ),
    )
}
WASM = "wasm"
# What `--on` takes, and the machines it stands for. This machine itself always runs the certificate.
PLATFORMS: dict[str, tuple[str, ...]] = {
    "arm64": tuple(name for name, cpu in CPUS.items() if cpu.architecture == "aarch64"),
    "x86": tuple(name for name, cpu in CPUS.items() if cpu.architecture == "x86_64"),
    "wasm": (WASM,),
}


def machines_of(names: str) -> tuple[str, ...]:
    """The machines that a comma-separated list of platforms or machines names. Raises ExportError for an unknown word."""
    known = PLATFORMS | {cpu: (cpu,) for cpu in CPUS}
    found: list[str] = []
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name not in known:
            raise ExportError(f"on {name!r}: unknown; there are {', '.join(known)}")
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
    """Why `machine` with ONNX Runtime `version` cannot be used here, with the command that helps, or None if it can."""
    if machine == WASM:
        if shutil.which("node") is None:
            return "node is not installed: apt-get install nodejs"
        if not (wasm_modules() / "onnxruntime-web").is_dir():
            return "onnxruntime-web is not installed: bash tools/wasm/install.sh (in the source repository)"
        return None if os.environ.get(WASM_VARIABLE) else distrust(wasm_modules())
    cpu = CPUS[machine]
    if cpu.architecture == "x86_64" and platform.machine() not in ("x86_64", "AMD64"):
        return "its Python is this machine's, which is not an x86-64 one"
    if shutil.which(f"qemu-{cpu.architecture}") is None:
        return f"qemu-{cpu.architecture} is not installed: apt-get install qemu-user"
    if cpu.architecture == "aarch64" and not arm64_root(version).is_dir():
        return (
            f"there is no ARM system with ONNX Runtime {version}: uv run tools/arm64/make_root.py --onnxruntime {version} "
            "(in the source repository)"
        )
    if cpu.architecture == "aarch64" and not os.environ.get(ARM64_VARIABLE):
        return distrust(arm64_root(version))
    return None


def python_command(
    cpu: Cpu, version: str, arguments: list[str], *, count: bool = False
) -> list[str]:
    """The command that runs Python with `arguments` on the emulated `cpu`, in `environment_of(cpu, version)`.

    count: whether QEMU prints the number of executed instructions at the end, of the whole process (ARM).
    """
    if cpu.architecture == "x86_64":
        return ["qemu-x86_64", "-cpu", cpu.qemu, sys.executable, *arguments]
    root = arm64_root(version)
    view = root / "cpu" / cpu.name
    (python,) = (
        p
        for p in (root / "usr/bin").glob("python3.*")
        if p.name.removeprefix("python3.").isdigit()
    )
    plugin = ["-plugin", str(root / "count_instructions.so")] if count else []
    return [
        "qemu-aarch64",
        "-L",
        str(view),
        "-cpu",
        cpu.qemu,
        *plugin,
        str(python),
        *arguments,
    ]


def environment_of(cpu: Cpu, version: str) -> dict[str, str]:
    """Environment variables of a Python process on the emulated processor."""
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # It names this machine's processor, if any
    environment.pop("OPENBLAS_CORETYPE", None)
    if cpu.architecture == "aarch64":
        root = arm64_root(version)
        environment |= {
            "PYTHONHOME": str(root / "usr"),
            "PYTHONPATH": str(root / "site"),
        }
    return environment


def run_python(
    cpu: Cpu, version: str, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` on the emulated `cpu`."""
    command = python_command(cpu, version, arguments)
    return subprocess.run(
        command, env=environment_of(cpu, version), capture_output=True, text=True
    )


def run_node(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Node with `arguments`, onnxruntime-web in reach."""
    environment = os.environ | {WASM_VARIABLE: str(wasm_modules().parent)}
    return subprocess.run(
        ["node", *arguments], env=environment, capture_output=True, text=True
    )


def _cache() -> Path:
    folder = cache_folder()
    if folder is None:
        raise ExportError(
            f"there is no home folder for emulated machines; set HOME, or {ARM64_VARIABLE} and {WASM_VARIABLE}"
        )
    return folder
