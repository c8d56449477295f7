"""What a report says in words: what is good, what is bad, and what to do next, each with its figure.

The rules are few and every threshold is named here. A finding is plain text; who shows it escapes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qat.analysis.compare import Comparison, Predictions

NEAR_CHANCE = (
    1.5  # times the accuracy of guessing, below which a net has learned little
)
SLOWER = 0.95  # of full precision's speed; between it and 1.05 the two are alike
FASTER = 1.05
MUCH_IN_FLOAT = 0.10  # share of multiplications
LOST_BY_SETTLING = 0.5  # percentage points
CLASS_DROP = 10.0  # percentage points of one class
FEWEST_IMAGES = 20  # of a class, to speak about it


@dataclass
class Verdict:
    """The findings of a report, in the order in which they were made. headline: the outcome in one sentence; passed: whether
    it is good, None where the folder does not hold enough to say."""

    headline: str = ""
    passed: bool | None = None
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)


def judge(
    results: Mapping[str, Any],
    recipe: Mapping[str, Any],
    comparison: Comparison | None,
    certificate: Mapping[str, Any] | None,
    latencies: Sequence[Mapping[str, Any]],
    float_share: float | None,
    class_losses: Sequence[str] = (),
) -> Verdict:
    """The verdict of a run.

    results, recipe, certificate, latencies: what the folder's files hold. comparison: with the full-precision baseline, None
    without one. float_share: of the multiplications, None for a net in full precision. class_losses: see `class_losses_of`.
    """
    verdict = Verdict()
    quantized = float_share is not None
    _judge_accuracy(verdict, results, comparison, quantized)
    verdict.bad.extend(class_losses)
    _judge_training(verdict, results, recipe)
    if quantized:
        _judge_certificate(verdict, certificate)
        _judge_speed(verdict, latencies)
        _judge_float_share(verdict, float_share or 0.0)
    _conclude(verdict, comparison, certificate, quantized)
    return verdict


def _conclude(
    verdict: Verdict,
    comparison: Comparison | None,
    certificate: Mapping[str, Any] | None,
    quantized: bool,
) -> None:
    if not quantized:
        verdict.headline = "Full precision: the baseline that quantized runs of this net are compared with."
    elif certificate is not None and not certificate["passed"]:
        verdict.passed = False
        verdict.headline = (
            "Do not ship: the file does not compute what the trained net computes."
        )
    elif comparison is not None and not comparison.passed:
        verdict.passed = False
        verdict.headline = (
            f"Failed: more accuracy was lost than {points(comparison.max_drop)}."
        )
    elif comparison is None:
        verdict.headline = (
            "Undecided: no full-precision baseline to compare accuracy with."
        )
    elif certificate is None:
        verdict.headline = "Accuracy passed; no exported file is certified yet."
    elif undecided(comparison):
        verdict.headline = (
            "Passed, but on too few images to be sure of the allowed drop."
        )
    else:
        verdict.passed = True
        verdict.headline = f"Passed: certified, and within {points(comparison.max_drop)} of full precision."


def points(number: float) -> str:
    """`number` with its unit."""
    return "1 point" if number == 1 else f"{number:g} points"


def undecided(comparison: Comparison) -> list[str]:
    """Names of the rows whose images show neither that the drop is within the allowance nor that it is beyond."""
    return [
        row.name
        for row in comparison.gated
        if comparison.alpha <= row.beyond < 1 - comparison.alpha
    ]


def _judge_accuracy(
    verdict: Verdict,
    results: Mapping[str, Any],
    comparison: Comparison | None,
    quantized: bool,
) -> None:
    classes = results.get("classes") or ()
    if classes and results["target"] < NEAR_CHANCE / len(classes):
        verdict.bad.append(
            f"On {results['test_domain']} the net is right on {100 * results['target']:.1f} % of the images; guessing among "
            f"{len(classes)} classes gives {100 / len(classes):.1f} %."
        )
        verdict.to_do.append(
            "Train for longer, or begin from pretrained weights (--pretrained)."
        )
    if comparison is None:
        if quantized:
            verdict.bad.append(
                "No full-precision baseline: nothing says what quantization cost."
            )
            verdict.to_do.append(
                "Train the same net with `qat train fp` and name it: `qat report RUN --baseline FP_RUN`."
            )
        return
    for row in comparison.gated:
        figures = (
            f"{row.name}: {row.baseline:.2f} % to {row.run:.2f} % ({-row.drop:+.2f} points, n = {row.images}, "
            f"p(drop <= {comparison.max_drop:g}) = {row.beyond:.3f})"
        )
        if row.failed:
            verdict.bad.append(f"{figures}. More was lost than is allowed.")
        elif row.name not in undecided(comparison):
            verdict.good.append(f"{figures}. Within what is allowed.")
        elif row.drop <= comparison.max_drop:
            verdict.good.append(
                f"{figures}. Within what is allowed, but not beyond doubt."
            )
        else:
            verdict.bad.append(
                f"{figures}. That is more than is allowed, and so few images cannot decide whether it is chance."
            )
    if not comparison.passed:
        verdict.to_do.append(
            "Win accuracy back: train for longer (--epochs, --steps), teach it with the baseline (--teacher FP_RUN), or take "
            "one bit more."
        )
    elif undecided(comparison):
        verdict.to_do.append(
            "Test on more images, or allow a drop that so many images can resolve (--max-drop)."
        )


def _judge_training(
    verdict: Verdict, results: Mapping[str, Any], recipe: Mapping[str, Any]
) -> None:
    if results["selected_step"] == (results.get("steps") or recipe["steps"]):
        verdict.to_do.append(
            "The last step was the best one, so accuracy may still be rising: train for longer."
        )
    settled = results.get("settled") or {}
    before = settled.get("source_validation_before")
    now = results["source_validation"]
    if before and before.keys() == now.keys():
        after = [now[name] for name in before]
        lost = 100 * float(np.mean(list(before.values())) - np.mean(after))
        if lost > LOST_BY_SETTLING:
            verdict.bad.append(
                f"Rounding the biases as integer kernels have them cost {lost:.2f} points on the source domains' held-out "
                "images. They chose the step before it was rounded, so chance has a share in that."
            )


def _judge_certificate(verdict: Verdict, certificate: Mapping[str, Any] | None) -> None:
    if certificate is None:
        verdict.to_do.append(
            "Export the run (`qat export RUN --target ort-packed --out model.onnx`) and prove the file "
            "(`qat certify RUN model.onnx`)."
        )
        return
    if certificate["passed"]:
        compared = sum(level["codes"] for level in certificate["levels"])
        verdict.good.append(
            f"{certificate['file']} is certified: {certificate['weight_codes']:,} weight codes are as trained, and "
            f"{compared:,} activation codes of {certificate['images']} images were compared."
        )
        return
    differing = len(certificate["stored"])
    verdict.bad.append(
        f"{certificate['file']} is not certified: {differing} of {certificate['layers']} layers are not stored as trained; "
        "the section Certificate names what differs."
    )
    verdict.to_do.append(
        "Export the run again and certify the new file; report the layer named below if it fails again."
    )


def _judge_speed(verdict: Verdict, latencies: Sequence[Mapping[str, Any]]) -> None:
    if len(latencies) < 2:
        verdict.to_do.append(
            "Measure size and speed on your processor: `qat bench RUN`."
        )
        return
    full, small = latencies[0], latencies[-1]
    figures = (
        f"{small['speedup']:.2f} times the speed of {full['name']} at {small['size'] / full['size']:.0%} of its size "
        f"({small['size'] / 1e6:.2f} MB)"
    )
    if small["speedup"] < SLOWER:
        verdict.bad.append(f"Slower than full precision: {figures}.")
        verdict.to_do.append(
            "Try `--target ort-native`, whose kernels gain from few bits; on stock kernels few bits save space alone."
        )
    elif small["speedup"] < FASTER:
        verdict.bad.append(f"No faster than full precision: {figures}.")
    else:
        verdict.good.append(f"Faster: {figures}.")


def _judge_float_share(verdict: Verdict, share: float) -> None:
    if share > MUCH_IN_FLOAT:
        verdict.bad.append(
            f"{share:.1%} of the multiplications stay in floating point; the section Layers names them."
        )
    else:
        verdict.good.append(f"{1 - share:.1%} of the multiplications are quantized.")


def class_accuracies(
    predictions: Predictions, domain: str, classes: int
) -> list[float | None]:
    """Accuracy in percent per class on one domain; None for a class without images."""
    predicted, labels = predictions[domain]
    found: list[float | None] = []
    for index in range(classes):
        of_class = labels == index
        right = predicted[of_class] == index
        found.append(100 * float(right.mean()) if of_class.any() else None)
    return found


def class_losses_of(
    baseline: Predictions, run: Predictions, domain: str, classes: Sequence[str]
) -> list[str]:
    """A sentence per class of `domain` that lost CLASS_DROP points or more, the worst first, with what it is taken for."""
    found = []
    first = class_accuracies(baseline, domain, len(classes))
    second = class_accuracies(run, domain, len(classes))
    predicted, labels = run[domain]
    for index, name in enumerate(classes):
        before, after = first[index], second[index]
        of_class = labels == index
        if before is None or after is None or of_class.sum() < FEWEST_IMAGES:
            continue
        if before - after < CLASS_DROP:
            continue
        wrong = predicted[of_class & (predicted != index)]
        counts = np.bincount(wrong, minlength=len(classes))
        mistaken = int(counts.argmax())
        sentence = (
            f"Class {name} of {domain}: {before:.1f} % to {after:.1f} % of {of_class.sum()} images; most often taken for "
            f"{classes[mistaken]} ({counts[mistaken]} times)."
        )
        found.append((after - before, sentence))
    return [sentence for _, sentence in sorted(found)]
