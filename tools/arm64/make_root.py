"""A 64-bit ARM Linux with Python, NumPy and ONNX Runtime's own arm64 build in a folder, for QEMU's user mode.

    uv run tools/arm64/make_root.py                             # the ONNX Runtime version installed here
    uv run tools/arm64/make_root.py --onnxruntime 1.23.2 --numpy 2.3.5

Everything comes from Debian's (or Ubuntu's) and PyPI's packages; it takes about a minute and 250 MB. `export/elsewhere.py`
finds the folder by its default place, which the variable EDGEQAT_ARM64 moves. Python on the emulated processor is then

    uv run tools/arm64/run.py neoverse-n1 script.py arguments...
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.elsewhere import CPUS, PLATFORMS, arm64_root

HERE = Path(__file__).parent
NEEDED = {
    "apt-get": "a Debian or Ubuntu system, whose package lists name the arm64 packages",
    "dpkg": "apt-get install dpkg",
    "qemu-aarch64": "apt-get install qemu-user",
    "uv": "pip install uv",
    "cc": "apt-get install gcc",
}
# What ONNX Runtime imports; its other requirements serve tools that are not used here.
COMPANIONS = ("protobuf", "flatbuffers", "packaging")
LINKED = ("usr", "lib", "etc", "site")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--onnxruntime", default=importlib.metadata.version("onnxruntime"), help="version")
    parser.add_argument("--numpy", default=importlib.metadata.version("numpy"), help="version")
    arguments = parser.parse_args()
    for command, remedy in NEEDED.items():
        if shutil.which(command) is None:
            sys.exit(f"{command} is not installed: {remedy}")
    root = arm64_root(arguments.onnxruntime)
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "root"
        unpack_debian(Path(work), made)
        install_wheels(made, [f"onnxruntime=={arguments.onnxruntime}", f"numpy=={arguments.numpy}", *COMPANIONS])
        describe_processors(made)
        counter = HERE / "count_instructions.c"
        run(["cc", "-shared", "-fPIC", "-O2", str(counter), "-o", str(made / "count_instructions.so")])
        if root.exists():
            shutil.rmtree(root)
        root.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, root)
    print(root)


def unpack_debian(work: Path, root: Path) -> None:
    """Python with the libraries it needs, resolved by apt against a machine on which nothing is installed."""
    lists, cache, status = work / "lists", work / "cache", work / "status"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True)
    status.touch()
    apt = [
        "apt-get",
        "-qq",
        "-oAPT::Architecture=arm64",
        "-oAPT::Architectures=arm64",
        f"-oDir::State::Lists={lists}",
        f"-oDir::State::Status={status}",
        f"-oDir::Cache={cache}",
        "-oDebug::NoLocking=1",
        "-oAPT::Sandbox::User=root",
    ]
    run([*apt, "update"])
    run([*apt, "--yes", "--download-only", "--no-install-recommends", "install", "python3", "libstdc++6"])
    for package in sorted((cache / "archives").glob("*.deb")):
        run(["dpkg", "--extract", str(package), str(root)])


def install_wheels(root: Path, requirements: Sequence[str]) -> None:
    (python,) = {path.name for path in (root / "usr/bin").glob("python3.*") if path.name[len("python3.") :].isdigit()}
    run(
        [
            "uv", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:",
            "--python-platform", "aarch64-manylinux_2_28", "--python-version", python.removeprefix("python"),
            "--target", str(root / "site"), *requirements,
        ]
    )  # fmt: skip


def describe_processors(root: Path) -> None:
    """A view of the root for each processor, with the files in which ONNX Runtime looks up what the processor can do.

    QEMU shows the host's files to the program unless the root has its own.
    """
    for name in PLATFORMS["arm64"]:
        cpu = CPUS[name]
        view = root / "cpu" / cpu.name
        (view / "proc").mkdir(parents=True)
        (view / "proc/cpuinfo").write_text(cpu.cpuinfo())
        system = view / "sys/devices/system/cpu"
        system.mkdir(parents=True)
        for file in ("possible", "present", "online"):
            (system / file).write_text("0\n")
        for folder in LINKED:
            if (root / folder).exists():
                (view / folder).symlink_to(Path("../..") / folder)


def run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip() or done.stdout.strip()}")


if __name__ == "__main__":
    main()
