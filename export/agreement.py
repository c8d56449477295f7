"""How far a runtime's results are from the integer definition, for files whose arithmetic the runtime chooses (`export.qdq`).

A certificate demands exact codes of integer kernels. A plain QDQ file may run in floating point, on integers, or both; so
here the codes that are stored in the file are proven, and the codes that are computed from it are *compared*: for every
quantizer, those of the runtime with those that the definition gives for the runtime's own codes before it, so that a
difference names the operation it arose in. Nothing but equality is called exact.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeqat.terminal import in_lines
from export import session
from export.certificate import (
    BATCH,
    FLOAT_LEVEL_LIMIT,
    accuracies,
    compare_stored,
    require_quantizers,
)
from export.feeds import Given
from export.fidelity import Trained
from export.lowered import LoweredModel, LoweredQuantizer
from export.onnx_file import read
from export.reference import IntegerReference

StoredCodes = dict[str, NDArray[np.uint8]]
Logits = NDArray[np.float32]
ROUNDED_BIASES = (
    "from BASIC on, ONNX Runtime rounds float biases to integers in units of input scale times weight scale "
    "(WeightBiasQuantization); files of the ort targets hold finer integer biases, and ONNX Runtime computes them exactly"
)
ROUNDING_LEVELS = tuple(
    f"ONNX Runtime {level}" for level in ("BASIC", "EXTENDED", "ALL")
)


@dataclass(frozen=True)
class Runtime:
    """One way to run a file; `version` is that of the software.

    codes:  images -> storage codes of every quantizer, from the file with those tensors exposed.
    logits: images -> logits of the file as it ships; exposing tensors can keep a runtime from fusing across them.
    """

    name: str
    version: str
    codes: Callable[[Given], StoredCodes]
    logits: Callable[[Given], Logits]


@dataclass(frozen=True)
class QuantizerResult:
    """Codes of one quantizer: how many there were, how many differ from the definition's, by how many codes at most."""

    quantizer: str
    codes: int
    different: int
    largest: int

    def __str__(self) -> str:
        if not self.different:
            return "exact"
        return f"{self.different} (±{self.largest})"


@dataclass(frozen=True)
class RuntimeResult:
    """One runtime against the integer definition.

    top1:              share of images with the definition's answer, of the file as it ships, computed end to end; None for a
                       net without classes.
    logit_difference:  the largest, relative to the largest logit of the definition.
    top1_trained:      share of images with the answer of the trained, fake-quantized net.
    """

    runtime: str
    version: str
    quantizers: tuple[QuantizerResult, ...]
    top1: float | None
    logit_difference: float
    top1_trained: float | None

    @property
    def codes(self) -> int:
        """Codes compared."""
        return sum(row.codes for row in self.quantizers)

    @property
    def different(self) -> int:
        """Codes that differ."""
        return sum(row.different for row in self.quantizers)

    @property
    def largest(self) -> int:
        """The largest difference, in codes."""
        return max((row.largest for row in self.quantizers), default=0)

    @property
    def is_exact(self) -> bool:
        """Whether no code differs."""
        return self.different == 0

    @property
    def is_at_ties(self) -> bool:
        """Whether differences are as few and as small as float sums near a rounding boundary make them."""
        return self.largest <= 1 and self.different <= FLOAT_LEVEL_LIMIT * self.codes

    def __str__(self) -> str:
        inexact = [row for row in self.quantizers if row.different]
        if inexact:
            share = self.different / self.codes
            found = (
                f"NOT EXACT: {self.different:,} of {self.codes:,} codes differ ({share:.1e}), by {self.largest} at most, "
                f"in {len(inexact)} of {len(self.quantizers)} quantizers"
            )
            if self.is_at_ties:
                found += " (float sums at ties)"
        elif self.quantizers:
            found = f"exact: all {self.codes:,} codes as defined"
        else:
            found = "computes in floating point (weight-only)"
        answers = ""
        if self.top1 is not None and self.top1_trained is not None:
            answers = f"top-1 as defined {self.top1:.2%}, as trained {self.top1_trained:.2%}; "
        return f"{self.runtime} ({self.version}): {found}; {answers}logits differ by {self.logit_difference:.1e}"


@dataclass(frozen=True)
class Agreement:
    """What is proven of a plain QDQ file, and how runtimes compare. `stored` lists the layers that are not as trained."""

    file: str
    sha256: str
    target: str
    images: int
    layers: int
    weight_codes: int
    stored: dict[str, str]
    results: tuple[RuntimeResult, ...]
    accuracy: dict[str, float]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the stored codes are the trained ones and every runtime computes the definition's."""
        return not self.stored and all(result.is_exact for result in self.results)

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{self.file}: {self._verdict()}"]
        stored = "all as trained"
        if self.stored:
            stored = f"{len(self.stored)} layers differ"
        lines.append(
            f"  stored     {self.weight_codes:,} weight codes in {self.layers} layers: {stored}"
        )
        for layer, difference in self.stored.items():
            lines.append(f"             {layer}: {difference}")
        for result in self.results:
            lines.append(f"  computed   {result}")
        for line in self.table():
            lines.append(f"             {line}")
        if self.accuracy:
            shares = [f"{name} {share:.2%}" for name, share in self.accuracy.items()]
            lines.append(f"  accuracy   {', '.join(shares)} on {self.images} images")
        for note in self.notes:
            lines.append(f"  note       {note}")
        return in_lines(lines)

    def _verdict(self) -> str:
        if self.passed:
            return "certified: stored codes as trained, computed codes exact in every runtime below"
        stored = "NOT the trained ones" if self.stored else "as trained"
        inexact = [result.runtime for result in self.results if not result.is_exact]
        computed = "exact in every runtime below"
        if inexact:
            computed = f"not exact in {', '.join(inexact)}"
        return f"NOT CERTIFIED (target {self.target}, plain QDQ): stored codes {stored}; computed codes {computed}"

    def table(self) -> list[str]:
        """Layer by layer: codes that differ in each runtime, and by how many codes at most."""
        names = [result.runtime for result in self.results]
        of_runtimes = [result.quantizers for result in self.results]
        exact = 0
        shown = []
        width = 0
        for row in zip(*of_runtimes, strict=True):
            if any(cell.different for cell in row):
                shown.append(row)
                width = max(width, len(row[0].quantizer))
            else:
                exact += 1
        if not shown:
            return []
        lines = ["  ".join([f"{'quantizer':<{width}}  {'codes':>12}", *names])]
        for row in shown:
            cells = [f"{row[0].quantizer:<{width}}  {row[0].codes:>12,}"]
            for cell, name in zip(row, names, strict=True):
                cells.append(str(cell).rjust(len(name)))
            lines.append("  ".join(cells))
        if exact:
            lines.append(f"and {exact} quantizers whose codes are exact in all of them")
        return lines


def agree(
    model: LoweredModel,
    file: Path,
    target: str,
    images: Given,
    labels: NDArray[np.int64],
    trained: Trained,
    further: Sequence[Runtime] = (),
) -> Agreement:
    """Prove what `file` stores against the canonical `model`, and compare what ONNX Runtime computes from it at every level,
    and `further` runtimes, with the integer definition.

    trained: the trained net: images -> (storage codes per quantizer, outputs by name).
    Raises ExportError when the file is not an edgeqat file of this run.
    """
    proto = read(file)
    require_quantizers(model, proto, file)
    reference = IntegerReference(model, session.FloatOperators())
    from_training = _in_batches(lambda batch: _first(trained(batch)[1]), images)
    defined = _in_batches(lambda batch: _first(reference.run(batch)[1]), images)
    predictions = {"trained net": from_training, "integer definition": defined}
    runtimes = [onnx_runtime(proto, model, level) for level in session.LEVELS]
    runtimes += further
    results = []
    for runtime in runtimes:
        logits = _in_batches(runtime.logits, images)
        predictions[runtime.name] = logits
        difference = np.abs(logits - defined).max() / np.abs(defined).max()
        results.append(
            RuntimeResult(
                runtime=runtime.name,
                version=runtime.version,
                quantizers=compare_codes(reference, runtime, images),
                top1=_same_answer(logits, defined),
                logit_difference=float(difference),
                top1_trained=_same_answer(logits, from_training),
            )
        )
    return Agreement(
        file=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        target=target,
        images=len(images),
        layers=len(model.layers),
        weight_codes=model.weight_codes,
        stored=compare_stored(model, proto),
        results=tuple(results),
        accuracy=accuracies(predictions, labels),
        notes=(*model.notes, *_causes(results)),
    )


def _causes(results: Sequence[RuntimeResult]) -> list[str]:
    """What is known of why a runtime's codes differ."""
    for result in results:
        if result.runtime in ROUNDING_LEVELS and not result.is_at_ties:
            return [ROUNDED_BIASES]
    return []


def compare_codes(
    reference: IntegerReference, runtime: Runtime, images: Given
) -> tuple[QuantizerResult, ...]:
    """The codes of every quantizer in `runtime` against the definition's, which starts from the runtime's own codes at
    every operation. In the order of the graph."""
    counts: Counter[str] = Counter()
    different: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        computed = runtime.codes(batch)
        expected, _ = reference.run(batch, given=computed)
        for name, codes in expected.items():
            distance = np.abs(codes.astype(np.int16) - computed[name])
            counts[name] += codes.size
            different[name] += int(np.count_nonzero(distance))
            farthest = int(distance.max(initial=0))
            largest[name] = max(largest.get(name, 0), farthest)
    results = []
    for name, count in counts.items():
        results.append(QuantizerResult(name, count, different[name], largest[name]))
    return tuple(results)


def onnx_runtime(proto: onnx.ModelProto, model: LoweredModel, level: str) -> Runtime:
    """ONNX Runtime on the CPU at one optimisation level."""
    with_codes = session.with_outputs(proto, list(model.quantizers))
    exposed = session.load(with_codes, level=level)
    plain = session.load(proto, level=level)

    def codes(images: Given) -> StoredCodes:
        outputs = exposed.run(images)
        stored = {}
        for name, grid in model.quantizers.items():
            stored[name] = to_storage(outputs[name], grid)
        return stored

    def logits(images: Given) -> Logits:
        return _first(plain.run(images)).astype(np.float32)

    return Runtime(f"ONNX Runtime {level}", session.version(), codes, logits)


def to_storage(codes: NDArray[np.generic], grid: LoweredQuantizer) -> NDArray[np.uint8]:
    """Codes as a file holds them, uint8 with the quantizer's zero point or int8 with zero point 0, in uint8 storage."""
    shift = grid.zero_point if codes.dtype == np.int8 else 0
    return (codes.astype(np.int16) + shift).astype(np.uint8)


def from_reals(
    values: NDArray[np.float32], grid: LoweredQuantizer
) -> NDArray[np.uint8]:
    """Storage codes of the values that come out of DequantizeLinear, for runtimes that show no codes."""
    return (np.rint(values / grid.scale) + grid.zero_point).astype(np.uint8)


def with_real_outputs(
    proto: onnx.ModelProto, quantizers: Mapping[str, object]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy of `proto` that also returns, for every quantizer, the floats that its first DequantizeLinear gives; and the
    names of those outputs by quantizer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    outputs: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantizers:
            outputs.setdefault(node.input[0], node.output[0])
    known = {value.name for value in proto.graph.output}
    for name in outputs.values():
        if name not in known:
            output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            copy.graph.output.append(output)
    return copy, outputs


def _in_batches(compute: Callable[[Given], Logits], images: Given) -> Logits:
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(compute(images[start : start + BATCH]))
    return np.concatenate(parts)


def _first(outputs: Mapping[str, NDArray[np.generic]]) -> Logits:
    return np.asarray(next(iter(outputs.values())), np.float32)


def _same_answer(first: Logits, second: Logits) -> float | None:
    """Share of equal classes, per image, or per place where a net answers for each; None for outputs without classes."""
    if first.ndim < 2:
        return None
    return float((first.argmax(1) == second.argmax(1)).mean())
