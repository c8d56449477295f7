"""The certificate: the codes in a file are the trained ones, and the runtime computes what the trained net computes.

Checked for one file:
* stored: weight codes, scales and biases in the file, element by element, and what the file says of itself;
* computed: codes of every quantizer on real images, per optimisation level, each computed by the integer definition from the
  runtime's own codes before it, so that a difference names the operation it arose in;
* the kernels: the optimised graph runs an integer kernel for every quantized layer;
* the trained net, run by PyTorch: the definition against its codes, the file's answers against its answers, the file's
  multiply-adds against its own (`export/fidelity.py`).
"""

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeqat.terminal import in_lines
from export import session
from export.across import Elsewhere, certify_elsewhere
from export.elsewhere import PLATFORMS
from export.feeds import Feeds, Given
from export.fidelity import Fidelity, Outputs, Trained, fidelity
from export.lowered import ExportError, LoweredLayer, LoweredModel, Tried
from export.metadata import (
    codes_of,
    different_descriptions,
    missing_options,
    read_metadata,
)
from export.names import bias_of, weight_scale_of
from export.native_file import quantizer_names
from export.onnx_file import read
from export.reference import IntegerReference
from export.runtime_checks import INTEGER_KERNELS, layer_kernels, settings_that_differ
from export.skeleton import quantizers_in_order
from export.stress import adversarial, culprit

EXACT_LEVELS = ("EXTENDED", "ALL")
# At DISABLE and BASIC the runtime adds floats in another order. That decides results near a tie: about 3 codes in a million,
# more where an image repeats one value, but none that is farther from a tie than float sums can be off.
FLOAT_LEVEL_LIMIT = 1e-5
TIE_WIDTH = 1e-3  # codes
ABSENT = np.zeros((0, 0))  # of no layer's shape
BATCH = 32
SETTINGS_IMAGES = 8
IMAGES_ELSEWHERE = 8  # emulated processors are slow

WEIGHT_ONLY = (
    "weight-only: the stored codes are proven, the layers compute in floating point"
)
NOT_COMPARED = "what the file says of classes and preprocessing was compared with nothing: a model without a run has neither"

SCHEMA, VERSION = "edgeqat.certificate", 2

Images = NDArray[np.float32]


@dataclass(frozen=True)
class LevelResult:
    """Code differences at one optimisation level; `mismatches` lists the quantizers that have any, in graph order.

    farthest_from_tie: how far the results that differ lie from a tie at most, in codes.
    """

    level: str
    codes: int
    mismatches: dict[str, int]
    logits_equal: bool
    culprit: tuple[str, ...] = ()
    farthest_from_tie: float = 0.0

    @property
    def total(self) -> int:
        """Codes that differ at this level."""
        return sum(self.mismatches.values())

    def faults(self) -> list[str]:
        """Where the differing codes of a level that fails arose."""
        if self.passed:
            return []
        first = dict(list(self.mismatches.items())[:3])
        text = f"           {self.level}: {_listed(first)}; within {self.farthest_from_tie:.0e} codes of a tie"
        if self.culprit:
            text += f"; mended without {', '.join(self.culprit)}"
        return [text]

    @property
    def passed(self) -> bool:
        """No difference at an exact level; at others few, or all next to ties."""
        if self.level in EXACT_LEVELS:
            return self.total == 0
        are_few = self.total <= FLOAT_LEVEL_LIMIT * self.codes
        are_ties = self.farthest_from_tie <= TIE_WIDTH
        return are_few or are_ties


@dataclass(frozen=True)
class Certificate:
    """The whole proof for one file.

    stored: layers whose parameters in the file are not the trained ones, and how.
    said:   what the file says of itself (classes, preprocessing, target) that the run would not say, and how.
    """

    file: str
    sha256: str
    runtime: str
    machine: str
    images: int
    layers: int
    weight_codes: int
    stored: dict[str, str]
    said: dict[str, str]
    levels: tuple[LevelResult, ...]
    integer_kernels: int
    float_layers: tuple[str, ...]
    fidelity: Fidelity
    different_settings: dict[str, int]
    adversarial: dict[str, dict[str, int]]
    accuracy: dict[str, float]
    notes: tuple[str, ...]
    tried: tuple[Tried, ...] = ()
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that the certificate checks failed."""
        faults = (
            self.stored,
            self.said,
            self.float_layers,
            self.different_settings,
            self.adversarial,
        )
        if any(faults) or not self.fidelity.passed:
            return False
        measured: tuple[LevelResult | Elsewhere, ...] = (*self.levels, *self.elsewhere)
        return all(result.passed for result in measured)

    @property
    def mismatches(self) -> int:
        """Wrong codes at the exact levels plus layers whose stored parameters differ."""
        count = len(self.stored)
        for level in self.levels:
            if level.level in EXACT_LEVELS:
                count += level.total
        return count

    def to_json(self) -> dict[str, object]:
        """As `docs/certificate.schema.json` describes it."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "passed": self.passed,
        } | dataclasses.asdict(self)

    def __str__(self) -> str:
        verdict = "certified" if self.passed else "NOT CERTIFIED"
        lines = [
            f"{self.file}: {verdict} on ONNX Runtime {self.runtime}, {self.machine}, with {self.images} images",
            f"  stored   {self.weight_codes:,} weight codes, scales and biases of {self.layers} layers: "
            f"{_verdict(self.stored, 'as trained')}; {self._said()}",
        ]
        for name, what in (self.stored | self.said).items():
            lines.append(f"           {name}: {what}")
        lines.append(f"  computed {self._levels()}")
        for level in self.levels:
            lines += level.faults()
        lines += [
            f"  stressed 2 threads, batches of 1, extreme codes: {self._stressed()}",
            f"  kernels  {self._kernels()}",
            *f"  against  {self.fidelity}".split("\n"),
            f"  accuracy {self._accuracies()}",
            f"  ties     {self._ties()}",
        ]
        for there in self.elsewhere:
            lines.append(str(there))
        lines.append(f"  unproven other images, speed, {self._untried()}")
        for note in self.notes:
            lines.append(f"  note     {note}")
        return in_lines(lines)

    def _said(self) -> str:
        """What became of the file's claims about itself."""
        if NOT_COMPARED in self.notes:
            return f"target and layers: {_verdict(self.said, 'as in the model')}"
        return f"classes, preprocessing, target: {_verdict(self.said, 'as in the run')}"

    def _levels(self) -> str:
        """All levels in one line; `LevelResult.faults` says more of those that fail."""
        counts = []
        verdict = "ok"
        for level in self.levels:
            counts.append(f"{level.level} {level.total}")
            if not level.passed:
                verdict = "FAILED"
        return (
            f"codes that differ from the integer definition, of {self.levels[0].codes:,}: {', '.join(counts)}  "
            f"[{verdict}]"
        )

    def _stressed(self) -> str:
        differing: dict[str, object] = {**self.different_settings, **self.adversarial}
        return _listed(differing) or "the same codes"

    def _kernels(self) -> str:
        on_integers = self.fidelity.on_integers
        by_node = self.fidelity.in_float
        in_float = sum(by_node.values())
        total = max(on_integers + in_float, 1)
        text = f"{self.integer_kernels} of {self.layers} layers run integer kernels; {on_integers / total:.2%} of {total:,} "
        text += "multiply-adds an image on integers"
        if self.float_layers:
            text += f"; in float though quantized: {', '.join(self.float_layers)}"
        if by_node:
            largest = sorted(by_node, key=lambda name: -by_node[name])[:3]
            text += f", {in_float / total:.2%} in floating point ({', '.join(largest)})"
        return text

    def _accuracies(self) -> str:
        if not self.accuracy:
            return "no labels"
        return ", ".join(f"{name} {share:.2%}" for name, share in self.accuracy.items())

    def _ties(self) -> str:
        """What was done so that no runtime's way of rounding decides a code."""
        if not self.tried:
            return "no sums, products, pools or requantizations of codes"
        inputs = 0
        at_ties = 0
        with_ties = 0
        moved = []
        for tried in self.tried:
            inputs += tried.inputs
            if tried.remaining:
                at_ties += tried.remaining
                with_ties += 1
            if tried.ppm:
                moved.append(abs(tried.ppm))
        text = f"{len(self.tried)} operations on codes, all {inputs:,} inputs alike in every known arithmetic"
        if with_ties:
            text = f"{at_ties} of {inputs:,} inputs of {with_ties} operations are at ties that runtimes may round differently"
        if moved:
            text += f"; scales moved: {len(moved)}, by at most {max(moved)} ppm (median {median(moved):g})"
        return text

    def _untried(self) -> str:
        """Platforms on which nothing ran, and the machines that are missing of those on which something did."""
        ran = {there.machine for there in self.elsewhere if not there.not_run}
        untried: list[str] = []
        for platform_name, machines in PLATFORMS.items():
            missing = [machine for machine in machines if machine not in ran]
            untried += [platform_name] if len(missing) == len(machines) else missing
        if not untried:
            return "processors not named above"
        return f"other processors ({','.join(untried)}; --on or on= tries them)"

    def proven(self) -> list[dict[str, object]]:
        """Where the codes were proven, for the file's own record."""
        codes = next(level.codes for level in self.levels if level.level == "ALL")
        runtime = f"ONNX Runtime {self.runtime}"
        proofs = [_proof(self.machine, runtime, self.images, codes)]
        for there in self.elsewhere:
            if there.passed:
                proofs.append(
                    _proof(there.machine, there.runtime, there.images, there.codes)
                )
        return proofs


def _proof(machine: str, runtime: str, images: int, codes: int) -> dict[str, object]:
    """One entry of a file's record of its proofs."""
    return {"machine": machine, "runtime": runtime, "images": images, "codes": codes}


def _verdict(wrong: Mapping[str, str], right: str) -> str:
    return f"{len(wrong)} DIFFER" if wrong else right


def _listed(found: Mapping[str, object]) -> str:
    return "; ".join(f"{name} {what}" for name, what in found.items())


def certify(
    model: LoweredModel,
    file: Path,
    images: Given,
    labels: NDArray[np.int64],
    trained: Trained,
    on: tuple[str, ...] = (),
    described: Mapping[str, Any] | None = None,
) -> Certificate:
    """Prove `file` against the canonical `model` and the trained net on real `images`: N_3_H_W float32, normalised, or
    what else the net takes; `Feeds` where that is more than one tensor.

    labels: (N,) classes of the images; no accuracy is given where the first output is not N_C. trained: the trained net:
    images -> (storage codes per quantizer, outputs by name). on: machines to run the file on besides this one
    (`export/elsewhere.py`), on the first images. described: what the run would say of the file (`export/metadata.py`), to
    compare with what the file says; an empty `input` in it is compared with nothing, and the certificate says so.
    Raises ExportError when the file is not an edgeqat file of this run.
    """
    proto = read(file)
    require_quantizers(model, proto, file)
    reference = IntegerReference(model, session.FloatOperators())
    found = _outputs(session.load(proto, name=str(file)), images)
    levels = [_level(reference, proto, images, level) for level in session.LEVELS]
    kernels = layer_kernels(model.layer_names, proto)
    on_integers, in_float = _layers_by_kernel(model, kernels)
    judged, of_training = fidelity(reference, images, trained, found, BATCH)
    predictions = {
        "trained net": next(iter(of_training.values())),
        "ONNX Runtime": next(iter(found.values())),
    }
    return Certificate(
        file=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        runtime=session.version(),
        machine=platform.machine(),
        images=len(images),
        layers=len(model.layers),
        weight_codes=model.weight_codes,
        stored=compare_stored(model, proto),
        said=_wrongly_said(proto, file, described),
        levels=tuple(levels),
        integer_kernels=on_integers,
        float_layers=in_float,
        fidelity=judged,
        different_settings=settings_that_differ(proto, images[:SETTINGS_IMAGES]),
        adversarial=adversarial(model, proto),
        accuracy=accuracies(predictions, labels),
        notes=_notes(model, proto, described),
        tried=tuple(model.tried),
        elsewhere=_elsewhere(model, proto, file.name, images[:IMAGES_ELSEWHERE], on),
    )


def require_quantizers(model: LoweredModel, proto: onnx.ModelProto, file: Path) -> None:
    """Raises ExportError when the codes of a quantizer of `model` are no tensor of the file."""
    tensors = quantizer_names(proto)
    for node in proto.graph.node:
        tensors |= set(node.output)
    missing = [name for name in model.quantizers if name not in tensors]
    if missing:
        raise ExportError(
            f"{file}: has no tensor {missing[0]!r}; it was exported from another run or by another tool"
        )


def _layers_by_kernel(
    model: LoweredModel, kernels: Mapping[str, str]
) -> tuple[int, tuple[str, ...]]:
    """How many layers run an integer kernel, and the names of those that read codes and run none."""
    on_integers = 0
    in_float = []
    for name, kernel in kernels.items():
        if kernel in INTEGER_KERNELS:
            on_integers += 1
        elif model.layer(name).input_quantizer:
            in_float.append(name)
    return on_integers, tuple(in_float)


def _wrongly_said(
    proto: onnx.ModelProto, file: Path, described: Mapping[str, Any] | None
) -> dict[str, str]:
    """What the file says of itself that the run would not say."""
    if described is None:
        return {}
    return different_descriptions(read_metadata(proto, str(file)), described)


def _notes(
    model: LoweredModel,
    proto: onnx.ModelProto,
    described: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    notes = list(model.notes)
    if not model.quantizers:
        notes.append(WEIGHT_ONLY)
    notes += missing_options(proto)
    if described is not None and not described["input"]:
        notes.append(NOT_COMPARED)
    return tuple(notes)


def _elsewhere(
    model: LoweredModel,
    proto: onnx.ModelProto,
    name: str,
    images: Given,
    on: tuple[str, ...],
) -> tuple[Elsewhere, ...]:
    if isinstance(images, Feeds):
        if on:
            raise ExportError(
                f"on {','.join(on)}: a model with several inputs is proven on this machine alone"
            )
        return ()
    return certify_elsewhere(model, proto, name, images, on)


def accuracies(
    predictions: Mapping[str, NDArray[np.floating]], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Accuracies by what predicts, without those of predictions that have none (`accuracy_of`)."""
    found: dict[str, float] = {}
    for name, values in predictions.items():
        accuracy = accuracy_of(values, labels)
        if accuracy is not None:
            found[name] = accuracy
    return found


def accuracy_of(
    predictions: NDArray[np.floating], labels: NDArray[np.int64]
) -> float | None:
    """Share of images whose largest value is at their label; None where predictions are not N_C, or have no labels."""
    if predictions.ndim != 2 or len(predictions) != len(labels):
        return None
    return float((predictions.argmax(1) == labels).mean())


def compare_stored(model: LoweredModel, proto: onnx.ModelProto) -> dict[str, str]:
    """Layers whose codes, scales or biases in the file differ from the lowered ones, and how."""
    tensors = {}
    for tensor in proto.graph.initializer:
        tensors[tensor.name] = numpy_helper.to_array(tensor)
    different: dict[str, str] = {}
    for layer in model.layers.values():
        difference = _stored_difference(layer, tensors)
        if difference:
            different[layer.name] = difference
    return different


def _stored_difference(
    layer: LoweredLayer, tensors: Mapping[str, NDArray[np.generic]]
) -> str:
    """How a layer in the file differs from the lowered one; empty where it does not."""
    codes = codes_of(layer, tensors)
    if codes is None:
        return "its weight is not in the file"
    wrong = layer.codes.size
    if codes.shape == layer.codes.shape:
        wrong = int((codes != layer.codes).sum())
    if wrong:
        return f"{wrong} of {layer.codes.size} weight codes differ"
    scale = tensors.get(weight_scale_of(layer.name), ABSENT)
    if not np.array_equal(scale, layer.stored_scale):
        return "its weight scale differs"
    bias = tensors.get(bias_of(layer.name), ABSENT)
    lowered = layer.float_bias if layer.bias_codes is None else layer.bias_codes
    if not np.array_equal(bias, lowered):
        return "its bias differs"
    return ""


def _level(
    reference: IntegerReference,
    proto: onnx.ModelProto,
    images: Given,
    level: str,
) -> LevelResult:
    """Run the file at `level` and compare its codes with those that the definition computes from the file's own."""
    names = list(reference.model.quantizers)
    instrumented = session.load(session.with_outputs(proto, names), level=level)
    plain = session.load(proto, level=level)
    wrong = dict.fromkeys(names, 0)
    codes = 0
    outputs_equal = True
    farthest = 0.0
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        computed = instrumented.run(batch)
        expected, outputs = _defined(reference, batch, computed)
        farthest = max(farthest, reference.farthest_from_tie)
        for name in names:
            wrong[name] += int((expected[name] != computed[name]).sum())
            codes += expected[name].size
        for name, values in plain.run(batch).items():
            outputs_equal &= np.array_equal(values, computed[name])
            outputs_equal &= np.array_equal(values, outputs[name])
    mismatches = {}
    for name in quantizers_in_order(reference.model):
        if wrong[name]:
            mismatches[name] = wrong[name]
    responsible: tuple[str, ...] = ()
    if mismatches and level in EXACT_LEVELS:
        responsible = _culprit(reference, proto, images[:BATCH], level)
    return LevelResult(
        level=level,
        codes=codes,
        mismatches=mismatches,
        logits_equal=outputs_equal,
        culprit=responsible,
        farthest_from_tie=farthest,
    )


def _defined(
    reference: IntegerReference,
    images: Given,
    computed: Mapping[str, NDArray[np.generic]],
) -> tuple[Mapping[str, NDArray[np.uint8]], Outputs]:
    """(codes, outputs) of the definition, each computed from the codes before it that the runtime computed."""
    given = {name: computed[name] for name in reference.model.quantizers}
    return reference.run(images, given=given)


def _culprit(
    reference: IntegerReference,
    proto: onnx.ModelProto,
    images: Given,
    level: str,
) -> tuple[str, ...]:
    """The runtime's rewriting without which the codes are the expected ones, as `stress.culprit` looks for it."""
    names = list(reference.model.quantizers)
    instrumented = session.with_outputs(proto, names)

    def differs(without: tuple[str, ...]) -> bool:
        loaded = session.load(instrumented, level=level, without=without)
        computed = loaded.run(images)
        expected, _ = _defined(reference, images, computed)
        wrong = 0
        codes = 0
        for name in names:
            wrong += int((expected[name] != computed[name]).sum())
            codes += expected[name].size
        return wrong > FLOAT_LEVEL_LIMIT * codes

    return culprit(differs)


def _outputs(loaded: session.Session, images: Given) -> Outputs:
    """What the file computes for all images, float32, by name."""
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(loaded.run(images[start : start + BATCH]))
    outputs: dict[str, NDArray[np.float32]] = {}
    for name in loaded.output_names:
        whole = np.concatenate([part[name] for part in parts])
        outputs[name] = whole.astype(np.float32)
    return outputs
