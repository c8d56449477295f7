"""Check an edgeqat file on this device: does ONNX Runtime compute the expected codes here?

    python check.py                          # needs onnxruntime and numpy
    python check.py --kernels edgeqat.so     # a file of target ort-native: the kernels built for this device

Every image of the bundle is run alone and every tensor of integer codes is compared with its expected SHA-256. Exit code
0: the codes are the expected ones, up to the last bit of what is computed in floating point; 1: they are not; 2: it could
not be run.
"""
# ruff: noqa: B905  devices may have Python 3.9, whose zip knows no `strict`

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FORMAT = 1
HERE = Path(__file__).parent


def main() -> int:
    """The command line; returns 0 where all codes agree, 1 where some differ, 2 for an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        default=HERE,
        help="folder with expected.json; by default this one",
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        help="library with edgeqat's operators, for a file of target ort-native",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime")
    parser.add_argument(
        "--codes", type=Path, help="folder to write the computed codes into"
    )
    given = parser.parse_args()
    try:
        expected = read_expected(given.bundle)
        computed = Computed(expected, given.codes)
        for outputs in run(given.bundle, expected, given.threads, given.kernels):
            computed.add(outputs)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # the runtime raises its own exceptions
        print(
            f"error: ONNX Runtime {ort.__version__} cannot run the file: {printable(error)}",
            file=sys.stderr,
        )
        return 2
    lines, passed = verdict(expected, computed)
    changed = changed_files(given.bundle, expected)
    print(
        f"{printable(expected['about'])}, on ONNX Runtime {ort.__version__}, {platform.machine()} {platform.system()}"
    )
    print("\n".join(map(printable, [*changed, *lines])))
    return 0 if passed and not changed else 1


def printable(text: object) -> str:
    """`text` without what would steer a terminal; escapes in its place."""
    letters = []
    for letter in str(text):
        letters.append(letter if letter.isprintable() else ascii(letter)[1:-1])
    return "".join(letters)


def read_expected(bundle: Path) -> dict[str, Any]:
    """The bundle's expected.json. Raises ValueError naming the file when it is missing or of another format."""
    path = bundle / "expected.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; name the folder that `qat bundle` wrote"
        )
    expected: dict[str, Any] = json.loads(path.read_text())
    if expected.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {expected.get('format')} is not {FORMAT}, which this script reads"
        )
    return expected


def changed_files(bundle: Path, expected: dict[str, Any]) -> list[str]:
    """Files of the bundle that are not the ones that were bundled."""
    lines = []
    for entry in (expected["model"], expected["images"]):
        digest = hashlib.sha256((bundle / entry["file"]).read_bytes()).hexdigest()
        if digest != entry["sha256"]:
            lines.append(
                f"  changed   {entry['file']} is not the file that was bundled"
            )
    return lines


def run(
    bundle: Path, expected: dict[str, Any], threads: int, kernels: Path | None
) -> Iterator[dict[str, np.ndarray]]:
    """The outputs for one image after the other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in expected["session_options"].items():
        options.add_session_config_entry(key, value)
    if expected["needs_kernels"]:
        library = kernels or next(iter(sorted(bundle.glob("*.so"))), None)
        if library is None:
            raise ValueError(
                "the file needs edgeqat's kernels: name the library for this device with --kernels"
            )
        options.register_custom_ops_library(str(library))
    model = str(bundle / expected["model"]["file"])
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [tensor["name"] for tensor in expected["tensors"]] + [expected["output"]]
    pixels = np.fromfile(bundle / expected["images"]["file"], np.float32)
    for image in pixels.reshape(expected["images"]["shape"]):
        outputs = session.run(names, {expected["input"]: image[None]})
        yield dict(zip(names, outputs))


class Computed:
    """What was computed: a digest for each tensor and image, and the logits. Codes are written where `folder` says."""

    def __init__(self, expected: dict[str, Any], folder: Path | None = None) -> None:
        self.names = [tensor["name"] for tensor in expected["tensors"]]
        self.output = expected["output"]
        self.digests: dict[str, list[str]] = {name: [] for name in self.names}
        self.logits: list[np.ndarray] = []
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.bin"):
                old.unlink()

    def add(self, outputs: dict[str, np.ndarray]) -> None:
        """outputs: of one image."""
        logits = np.ascontiguousarray(outputs[self.output], np.float32)
        self.logits.append(logits.ravel())
        self._write("logits", logits)
        for index, name in enumerate(self.names):
            codes = np.ascontiguousarray(outputs[name])
            self.digests[name].append(digest(codes))
            self._write(str(index), codes)

    def _write(self, name: str, values: np.ndarray) -> None:
        if self.folder is not None:
            with (self.folder / f"{name}.bin").open("ab") as file:
                file.write(values.tobytes())


def digest(codes: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of uint8 codes in row-major order."""
    return hashlib.sha256(codes.tobytes()).hexdigest()[:16]


def verdict(expected: dict[str, Any], computed: Computed) -> tuple[list[str], bool]:
    """Lines to print, and whether every tensor that integer operators compute is as expected.

    A tensor that differs is excused where one that it is computed from differs too, or where it is computed in floating
    point, which may differ between processors in the last bit: those are named, and what comes after them is not judged.
    """
    wrong, in_float, after = differing_tensors(expected, computed)
    images = len(computed.logits)
    count = len(expected["tensors"])
    same = count - len(wrong) - len(in_float) - len(after)
    lines = [
        f"  codes     {same} of {count} tensors are as expected on {images} images"
    ]
    for text in wrong:
        lines.append(f"  WRONG     {text}")
    for text in in_float:
        lines.append(
            f"  float     {text}: floating point, which may differ in the last bit"
        )
    if after:
        lines.append(
            f"  after     {len(after)} tensors that are computed from those differ too"
        )
    lines.append(compared_answers(expected, computed))
    if wrong:
        lines.append(
            f"NOT THE SAME CODES: {len(wrong)} operations compute other codes from the same inputs"
        )
    elif same < count:
        lines.append("THE SAME CODES, up to what is computed in floating point")
    else:
        lines.append("THE SAME CODES")
    return lines, not wrong


def differing_tensors(
    expected: dict[str, Any], computed: Computed
) -> tuple[list[str], list[str], list[str]]:
    """Tensors that differ, in words: wrong ones, those of floating point, and those that come after another one."""
    images = len(computed.logits)
    wrong = []
    in_float = []
    after = []
    differing: set[str] = set()
    for tensor in expected["tensors"]:
        name = tensor["name"]
        count = 0
        for ours, theirs in zip(computed.digests[name], tensor["sha256"]):
            count += ours != theirs
        if not count:
            continue
        text = f"{name} (computed by {tensor['made_by']}) on {count} of {images} images"
        if differing.intersection(tensor["sources"]):
            after.append(text)
        elif tensor["float"]:
            in_float.append(text)
        else:
            wrong.append(text)
        differing.add(name)
    return wrong, in_float, after


def compared_answers(expected: dict[str, Any], computed: Computed) -> str:
    """How many images get the expected answer, and how far the logits are off, in words."""
    images = len(computed.logits)
    same = 0
    for logits, answer in zip(computed.logits, expected["answers"]):
        same += int(logits.argmax()) == answer
    expected_logits = np.array(expected["logits"], np.float32)
    largest = float(np.abs(np.stack(computed.logits) - expected_logits).max())
    return f"  answers   {same} of {images} as expected; logits differ by at most {largest:.2g}"


if __name__ == "__main__":
    sys.exit(main())
