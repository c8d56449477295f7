"""The certificate: the codes in a file are the trained ones, and the runtime computes what the integer definition says.

Checked for one file against the lowered model of its run:
* stored: weight codes, scales and biases in the file, element by element;
* computed: codes of every quantizer on real images, per optimisation level, each computed by the reference from the
  runtime's own codes before it, so that a difference names the operation it arose in;
* the kernels: the optimised graph runs an integer kernel for every quantized layer;
* the predictions: accuracy and agreement of the fake-quantized net, the integer reference and the runtime.
"""

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from export import session
from export.across import Elsewhere, certify_elsewhere
from export.elsewhere import PLATFORMS
from export.lowered import ExportError, LoweredModel, Tried
from export.metadata import codes_of, missing_options
from export.native_file import KERNELS, quantizer_names
from export.reference import IntegerReference, same_order
from export.skeleton import quantizers_in_order
from export.stress import adversarial, culprit, settings_that_differ

INTEGER_KERNELS = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", *KERNELS}
EXACT_LEVELS = ("EXTENDED", "ALL")
# At DISABLE and BASIC the runtime adds floats in another order. That decides results near a tie: about 3 codes in a million,
# more where an image repeats one value, but none that is farther from a tie than float sums can be off.
FLOAT_LEVEL_LIMIT = 1e-5
TIE_WIDTH = 1e-3  # codes
BATCH = 32
SETTINGS_IMAGES = 8
IMAGES_ELSEWHERE = 8  # emulated processors are slow

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
        return sum(self.mismatches.values())

    @property
    def passed(self) -> bool:
        if self.level in EXACT_LEVELS:
            return self.total == 0
        return self.total <= FLOAT_LEVEL_LIMIT * self.codes or self.farthest_from_tie <= TIE_WIDTH


@dataclass(frozen=True)
class Certificate:
    """The whole proof for one file. `stored` lists the layers whose parameters in the file are not the trained ones."""

    file: str
    sha256: str
    runtime: str
    images: int
    layers: int
    weight_codes: int
    stored: dict[str, str]
    levels: tuple[LevelResult, ...]
    integer_kernels: int
    float_layers: tuple[str, ...]
    fake_quantized_mismatch_rate: float
    top1_agreement: float
    different_settings: dict[str, int]
    adversarial: dict[str, dict[str, int]]
    accuracy: dict[str, float]
    notes: tuple[str, ...]
    tried: tuple[Tried, ...] = ()
    machine: str = ""
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def passed(self) -> bool:
        exact = not (self.stored or self.float_layers or self.different_settings or self.adversarial)
        return exact and all(level.passed for level in self.levels) and all(there.passed for there in self.elsewhere)

    @property
    def mismatches(self) -> int:
        """Wrong codes at the exact levels plus layers whose stored parameters differ."""
        return len(self.stored) + sum(level.total for level in self.levels if level.level in EXACT_LEVELS)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{self.file}: {'certified' if self.passed else 'NOT CERTIFIED'} on ONNX Runtime {self.runtime}"]
        lines.append(
            f"  stored     {self.weight_codes:,} weight codes in {self.layers} layers: {self._stored_verdict()}"
        )
        lines += [f"             {layer}: {what}" for layer, what in self.stored.items()]
        lines.append(
            f"  kernels    {self.integer_kernels} of {self.layers} layers run integer kernels{self._kernel_names()}"
        )
        for level in self.levels:
            worst = "".join(f"; {name} {count}" for name, count in list(level.mismatches.items())[:3])
            verdict = "ok" if level.passed else "FAILED"
            worst += f"; mended without {', '.join(level.culprit)}" if level.culprit else ""
            if level.mismatches:
                worst += f"; within {level.farthest_from_tie:.0e} codes of a tie"
            lines.append(f"  {level.level:<10} codes: {level.total} mismatches of {level.codes:,}{worst}  [{verdict}]")
        lines.append(f"  settings   2 threads, batches of 1: {_listed(self.different_settings) or 'the same codes'}")
        lines.append(
            f"  adversarial all-max, all-min, alternating, random codes: {_listed(self.adversarial) or '0 mismatches'}"
        )
        accuracies = ", ".join(f"{name} {value:.2%}" for name, value in self.accuracy.items())
        lines.append(f"  accuracy   {accuracies} on {self.images} images; top-1 agreement {self.top1_agreement:.2%}")
        lines.append(f"  training   {self.fake_quantized_mismatch_rate:.2e} of the fake-quantized net's codes differ")
        lines.append(f"  rounding   {self._rounding()}")
        lines += [str(there) for there in self.elsewhere]
        untried = self._untried()
        if untried:
            lines.append(f"  not tried  {', '.join(untried)}: codes there are not proven (--on {','.join(untried)})")
        return "\n".join([*lines, *(f"  note       {note}" for note in self.notes)])

    def _rounding(self) -> str:
        """What was done so that no runtime's way of rounding decides a code."""
        if not self.tried:
            return "no sums, products, pools or requantizations of codes"
        moved = [abs(tried.ppm) for tried in self.tried if tried.ppm]
        inputs = sum(tried.inputs for tried in self.tried)
        text = f"{len(self.tried)} operations on codes, all {inputs:,} inputs alike in every known arithmetic"
        if left := [tried for tried in self.tried if tried.remaining]:
            count = sum(tried.remaining for tried in left)
            text = f"{count} of {inputs:,} inputs of {len(left)} operations are at ties that runtimes may round differently"
        if moved:
            text += f"; scales moved: {len(moved)}, by at most {max(moved)} ppm (median {median(moved):g})"
        return text

    def _untried(self) -> list[str]:
        """Platforms on which nothing ran, and the machines that are missing of those on which something did."""
        ran = {there.machine for there in self.elsewhere if not there.not_run}
        untried: list[str] = []
        for platform_name, machines in PLATFORMS.items():
            missing = [machine for machine in machines if machine not in ran]
            untried += [platform_name] if len(missing) == len(machines) else missing
        return untried

    def proven(self) -> list[dict[str, object]]:
        """Where the codes were proven, for the file's own record."""
        codes = next(level.codes for level in self.levels if level.level == "ALL")
        here = {
            "machine": self.machine,
            "runtime": f"ONNX Runtime {self.runtime}",
            "images": self.images,
            "codes": codes,
        }
        return [here] + [
            {"machine": there.machine, "runtime": there.runtime, "images": there.images, "codes": there.codes}
            for there in self.elsewhere
            if there.passed
        ]

    def _stored_verdict(self) -> str:
        return "all as trained" if not self.stored else f"{len(self.stored)} layers differ"

    def _kernel_names(self) -> str:
        return f"; in float: {', '.join(self.float_layers)}" if self.float_layers else ""


def _listed(found: Mapping[str, object]) -> str:
    return "; ".join(f"{name} {what}" for name, what in found.items())


def certify(
    model: LoweredModel,
    file: Path,
    images: Images,
    labels: NDArray[np.int64],
    fake_quantized: Callable[[Images], tuple[dict[str, NDArray[np.uint8]], Images]],
    on: tuple[str, ...] = (),
) -> Certificate:
    """Prove `file` against the canonical `model` on real `images` (N_3_H_W float32, normalised).

    fake_quantized: the trained net itself: images -> (carrier codes per quantizer, logits). on: machines to run it on
    besides this one (`export/elsewhere.py`), on the first images.
    Raises ExportError when the file is not an edgeqat file of this run.
    """
    proto = read(file)
    names = list(model.quantizers)
    tensors = {o for node in proto.graph.node for o in node.output} | quantizer_names(proto)
    missing = [n for n in names if n not in tensors]
    if missing:
        raise ExportError(f"{file}: has no tensor {missing[0]!r}; it was exported from another run or by another tool")
    stored = compare_stored(model, proto)
    reference = IntegerReference(model, session.FloatOperators())
    levels = tuple(_level(reference, proto, names, images, level) for level in session.LEVELS)
    kernels = layer_kernels(model.layer_names, proto)
    runtime_logits = _logits(session.load(proto), images)
    agreement, rate, logits = _against_training(reference, images, fake_quantized)
    predictions = {
        "fake-quantized": logits[0],
        "integer reference": logits[1],
        "ONNX Runtime": runtime_logits,
    }
    return Certificate(
        file=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        runtime=session.version(),
        images=len(images),
        layers=len(model.layers),
        weight_codes=sum(layer.codes.size for layer in model.layers.values()),
        stored=stored,
        levels=levels,
        integer_kernels=sum(kernel in INTEGER_KERNELS for kernel in kernels.values()),
        float_layers=tuple(
            name
            for name, kernel in kernels.items()
            if kernel not in INTEGER_KERNELS and model.layers[f"{name}.weight"].input_quantizer
        ),
        fake_quantized_mismatch_rate=rate,
        top1_agreement=agreement,
        different_settings=settings_that_differ(proto, images[:SETTINGS_IMAGES]),
        adversarial=adversarial(model, proto),
        accuracy={name: float((p.argmax(1) == labels).mean()) for name, p in predictions.items()},
        notes=(*model.notes, *_weight_only_note(model), *missing_options(proto)),
        tried=tuple(model.tried),
        machine=platform.machine(),
        elsewhere=certify_elsewhere(model, proto, file.name, images[:IMAGES_ELSEWHERE], on),
    )


def _weight_only_note(model: LoweredModel) -> tuple[str, ...]:
    return (
        () if model.quantizers else ("weight-only: the stored codes are proven, the layers compute in floating point",)
    )


def read(file: Path) -> onnx.ModelProto:
    """Parse an ONNX file. Raises ExportError naming it when it is missing or damaged."""
    if not file.is_file():
        raise ExportError(f"{file}: no such file")
    try:
        proto = onnx.load(str(file))
        onnx.checker.check_model(proto)
    except Exception as error:
        raise ExportError(f"{file}: not a valid ONNX file ({str(error).splitlines()[0]})") from error
    return proto


def compare_stored(model: LoweredModel, proto: onnx.ModelProto) -> dict[str, str]:
    """Layers whose codes, scales or biases in the file differ from the lowered ones, and how."""
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    different: dict[str, str] = {}
    for layer in model.layers.values():
        weight = f"{layer.name}.weight"
        codes = codes_of(layer, found)
        if codes is None:
            different[layer.name] = "its weight is not in the file"
            continue
        wrong = int((codes != layer.codes).sum()) if codes.shape == layer.codes.shape else layer.codes.size
        if wrong:
            different[layer.name] = f"{wrong} of {layer.codes.size} weight codes differ"
        elif not np.array_equal(found[f"{weight}/s"], layer.stored_scale):
            different[layer.name] = "its weight scale differs"
        elif not np.array_equal(
            found[f"{layer.name}.bias"], layer.float_bias if layer.bias_codes is None else layer.bias_codes
        ):
            different[layer.name] = "its bias differs"
    return different


def layer_kernels(layers: Iterable[str], proto: onnx.ModelProto) -> dict[str, str]:
    """Layer name -> operator type that runs it in the runtime's optimised graph ("none" where it cannot be found).

    A layer is known by its weight, its first plane or, where the runtime renamed a weight that it widened, its scale.
    """
    readers = {i: node.op_type for node in session.optimized(proto).graph.node for i in node.input}
    kernels: dict[str, str] = {}
    for layer in layers:
        tensors = (f"{layer}.weight", f"{layer}.weight/p0", f"{layer}.weight/s")
        kernels[layer] = next((readers[tensor] for tensor in tensors if tensor in readers), "none")
    return kernels


def _level(
    reference: IntegerReference, proto: onnx.ModelProto, names: list[str], images: Images, level: str
) -> LevelResult:
    instrumented = session.load(session.with_outputs(proto, names), level=level)
    plain = session.load(proto, level=level)
    wrong = dict.fromkeys(names, 0)
    codes, equal, farthest = 0, True, 0.0
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        outputs = instrumented.run(batch)
        expected, logits = reference.run(torch.from_numpy(batch), given=outputs)
        farthest = max(farthest, reference.farthest_from_tie)
        for name in names:
            wrong[name] += int((expected[name] != outputs[name]).sum())
            codes += expected[name].size
        shipped = _only(plain.run(batch))
        equal &= np.array_equal(shipped, _logits_of(outputs, names)) and np.array_equal(shipped, logits.numpy())
    mismatches = {n: wrong[n] for n in quantizers_in_order(reference.model) if wrong[n]}
    found = _culprit(reference, proto, names, images[:BATCH], level) if mismatches and level in EXACT_LEVELS else ()
    return LevelResult(level, codes, mismatches, equal, found, farthest)


def _culprit(
    reference: IntegerReference, proto: onnx.ModelProto, names: list[str], images: Images, level: str
) -> tuple[str, ...]:
    instrumented = session.with_outputs(proto, names)

    def differs(without: tuple[str, ...]) -> bool:
        outputs = session.load(instrumented, level=level, without=without).run(images)
        expected, _ = reference.run(torch.from_numpy(images), given=outputs)
        wrong = sum(int((expected[n] != outputs[n]).sum()) for n in names)
        return wrong > FLOAT_LEVEL_LIMIT * sum(expected[n].size for n in names)

    return culprit(differs)


def _logits_of(outputs: dict[str, NDArray[np.generic]], names: list[str]) -> NDArray[np.generic]:
    return _only({k: v for k, v in outputs.items() if k not in names})


def _only(outputs: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    (value,) = outputs.values()
    return value


def _logits(loaded: session.Session, images: Images) -> Images:
    parts = [_only(loaded.run(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    return np.concatenate(parts).astype(np.float32)


def _against_training(
    reference: IntegerReference,
    images: Images,
    fake_quantized: Callable[[Images], tuple[dict[str, NDArray[np.uint8]], Images]],
) -> tuple[float, float, tuple[Images, Images]]:
    """Top-1 agreement, rate of differing codes when each operation starts from the trained net's own codes, logits."""
    wrong = total = 0
    trained, integer = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        codes, logits = fake_quantized(batch)
        expected, _ = reference.run(torch.from_numpy(batch), given=codes)
        same_place = [name for name in expected if same_order(expected[name].shape, codes[name].shape)]
        wrong += sum(int((expected[name].ravel() != codes[name].ravel()).sum()) for name in same_place)
        total += sum(expected[name].size for name in same_place)
        trained.append(logits)
        integer.append(reference.run(torch.from_numpy(batch))[1].numpy())
    first, second = np.concatenate(trained), np.concatenate(integer)
    return float((first.argmax(1) == second.argmax(1)).mean()), wrong / max(total, 1), (first, second)
