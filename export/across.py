"""The certificate on other processors: the codes that a file computes there, against the integer definition.

Every machine runs the file's bundle (`export/bundle.py`). Where its codes are not the expected ones, each operation is
computed again by the definition from the codes that the machine had before it, so that a difference names where it arises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export import elsewhere, session
from export.bundle import Expected, write_bundle
from export.elsewhere import CPUS, WASM
from export.kernels.library import library_for
from export.lowered import ExportError, LoweredModel
from export.native_file import is_native
from export.reference import IntegerReference
from export.ties import float_quantizers

# Codes: what floating point in its last bit may change, where it decides a tie
FLOAT_LIMIT = 1


@dataclass(frozen=True)
class Elsewhere:
    """What a file computes on another machine.

    machine, runtime:   where. images: how many it ran. codes: how many were compared.
    mismatches:         quantizer -> codes that integer operators computed wrongly from the codes before them.
    float_differences:  quantizer -> codes that floating point, computed otherwise in its last bits, put on the other side
                        of a tie; `float_codes` were read from floating point altogether.
    largest:            largest of those differences, codes.
    differing:          codes that are not the definition's in the end, all consequences included.
    answers_changed:    images with another top-1 answer than the definition's.
    not_run:            why nothing could be run.
    """

    machine: str
    runtime: str = ""
    images: int = 0
    codes: int = 0
    mismatches: dict[str, int] = field(default_factory=dict)
    float_differences: dict[str, int] = field(default_factory=dict)
    float_codes: int = 0
    largest: int = 0
    differing: int = 0
    answers_changed: int = 0
    not_run: str = ""

    @property
    def total(self) -> int:
        """Codes that differ."""
        return sum(self.mismatches.values())

    @property
    def passed(self) -> bool:
        """Whether the file ran, all codes agree, and outputs do within what floats may be off."""
        return not self.not_run and not self.mismatches and self.largest <= FLOAT_LIMIT

    def __str__(self) -> str:
        name = f"{self.machine:<11}"
        if self.not_run:
            return f"  {name} NOT RUN: {self.not_run}"
        text = f"codes: {self.total} mismatches of {self.codes:,}"
        for quantizer, count in list(self.mismatches.items())[:3]:
            text += f"; {quantizer} {count}"
        if self.float_differences:
            count = sum(self.float_differences.values())
            reach = f"which end in {self.differing:,} other codes and {self.answers_changed} of {self.images} other answers"
            text += f"; {count} of {self.float_codes:,} codes read from floating point differ by {self.largest}, {reach}"
        elif self.answers_changed:
            text += f"; {self.answers_changed} of {self.images} answers differ"
        return f"  {name} {text}  [{'ok' if self.passed else 'FAILED'}]"


def certify_elsewhere(
    model: LoweredModel,
    proto: onnx.ModelProto,
    name: str,
    images: NDArray[np.float32],
    machines: tuple[str, ...],
) -> tuple[Elsewhere, ...]:
    """Run the file `proto` of the canonical `model` on every one of `machines`, on `images` (N_3_H_W float32)."""
    if not machines:
        return ()
    with TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        bundle.mkdir()
        expected = write_bundle(bundle, model, proto, name, images)
        native = is_native(proto)
        results = []
        for machine in machines:
            reason = elsewhere.unavailable(machine, session.version())
            if reason is None and machine == WASM and native:
                reason = "edgeqat's kernels do not run on WebAssembly"
            if reason is not None:
                results.append(Elsewhere(machine, not_run=reason))
                continue
            folder = Path(place) / machine
            runtime = run_bundle(machine, bundle, folder, native=native)
            results.append(compared(machine, runtime, folder, model, images, expected))
        return tuple(results)


def run_bundle(machine: str, bundle: Path, codes: Path, *, native: bool) -> str:
    """Run `bundle` on `machine`, its codes into the folder `codes`; returns the runtime's name and version.

    native: whether the file needs edgeqat's kernels. Raises ExportError when the machine cannot run the file.
    """
    arguments = [str(bundle), "--codes", str(codes)]
    if machine == WASM:
        done = elsewhere.run_node([str(bundle / "check.mjs"), *arguments])
    else:
        cpu = CPUS[machine]
        if native:
            arguments += ["--kernels", str(library_for(cpu.architecture))]
        script = [str(bundle / "check.py"), *arguments]
        done = elsewhere.run_python(cpu, session.version(), script)
    if done.returncode not in (0, 1) or not done.stdout:
        reason = done.stderr.strip() or done.stdout.strip() or "the emulator stopped"
        raise ExportError(f"{machine}: {reason}")
    first_line = done.stdout.splitlines()[0]
    _, runtime = first_line.split(", on ")[:2]
    return runtime


def compared(
    machine: str,
    runtime: str,
    folder: Path,
    model: LoweredModel,
    images: NDArray[np.float32],
    expected: Expected,
) -> Elsewhere:
    """The codes that `machine` wrote into `folder` beside the expected ones."""
    found = read_codes(folder, expected.codes)
    logits = np.fromfile(folder / "logits.bin", np.float32)
    answers = logits.reshape(expected.logits.shape).argmax(1)
    in_float = set(float_quantizers(model))
    codes = 0
    float_codes = 0
    differing = 0
    for name, of_images in expected.codes.items():
        for ours, theirs in zip(of_images, found[name], strict=True):
            codes += ours.size
            if name in in_float:
                float_codes += ours.size
            differing += int((ours != theirs).sum())
    wrong: dict[str, int] = {}
    largest: dict[str, int] = {}
    if differing:
        wrong, largest = _from_their_own_codes(model, images, found)
    mismatches: dict[str, int] = {}
    float_differences: dict[str, int] = {}
    for name, count in wrong.items():
        if count:
            by_origin = float_differences if name in in_float else mismatches
            by_origin[name] = count
    return Elsewhere(
        machine=machine,
        runtime=runtime,
        images=len(images),
        codes=codes,
        mismatches=mismatches,
        float_differences=float_differences,
        float_codes=float_codes,
        largest=max((largest[name] for name in float_differences), default=0),
        differing=differing,
        answers_changed=int((answers != expected.logits.argmax(1)).sum()),
    )


def _from_their_own_codes(
    model: LoweredModel,
    images: NDArray[np.float32],
    found: Mapping[str, list[NDArray[np.uint8]]],
) -> tuple[dict[str, int], dict[str, int]]:
    """By quantizer, how many codes the definition computes otherwise from the machine's codes before them, and the largest
    difference."""
    wrong = dict.fromkeys(found, 0)
    largest = dict.fromkeys(found, 0)
    reference = IntegerReference(model, session.FloatOperators())
    for index, image in enumerate(images):
        given = {name: of_images[index] for name, of_images in found.items()}
        computed, _ = reference.run(torch.from_numpy(image[None]), given=given)
        for name in found:
            distance = np.abs(computed[name].astype(np.int16) - given[name])
            wrong[name] += int((distance > 0).sum())
            largest[name] = max(largest[name], int(distance.max(initial=0)))
    return wrong, largest


def read_codes(
    folder: Path, like: dict[str, list[NDArray[np.uint8]]]
) -> dict[str, list[NDArray[np.uint8]]]:
    """What check.py wrote into `folder`, for each quantizer and image in the shape it has in `like`."""
    found: dict[str, list[NDArray[np.uint8]]] = {}
    for index, (name, of_images) in enumerate(like.items()):
        values = np.fromfile(folder / f"{index}.bin", np.uint8)
        ends = np.cumsum([codes.size for codes in of_images])
        if values.size != ends[-1]:
            raise ExportError(
                f"{name}: the machine computed {values.size} codes, not {ends[-1]}"
            )
        parts = np.split(values, ends[:-1])
        found[name] = []
        for part, codes in zip(parts, of_images, strict=True):
            found[name].append(part.reshape(codes.shape))
    return found
