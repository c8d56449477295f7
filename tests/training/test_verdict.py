"""The words of a report: each rule on runs made by hand, on either side of its threshold."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qat.analysis.compare import Comparison, Predictions, compare_predictions
from qat.analysis.verdict import Verdict, class_accuracies, class_losses_of, judge, undecided

CLASSES = ["cat", "dog", "owl"]
RESULTS: dict[str, Any] = {
    "test_domain": "sketch", "target": 0.9, "selected_step": 80, "source_validation": {"photo": 0.9}, "classes": CLASSES,
}  # fmt: skip
RECIPE = {"steps": 100}
CERTIFICATE = {
    "passed": True, "file": "model.onnx", "weight_codes": 1234, "images": 4, "layers": 5, "stored": {},
    "levels": [{"codes": 1000}, {"codes": 2000}],
}  # fmt: skip


def latencies(speedup: float) -> list[dict[str, Any]]:
    return [{"name": "fp32", "size": 4000, "speedup": 1.0}, {"name": "quantized", "size": 1000, "speedup": speedup}]


def pair(images: int, wrong: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Predictions and labels of so many images, the last `wrong` of which are taken for the next class."""
    labels = np.arange(images) % len(CLASSES)
    predicted = labels.copy()
    if wrong:
        predicted[-wrong:] = (labels[-wrong:] + 1) % len(CLASSES)
    return predicted, labels


def compared(images: int, wrong: int, max_drop: float = 1.0) -> Comparison:
    first = {"photo": pair(images, 0), "sketch": pair(images, 0)}
    second = {"photo": pair(images, 0), "sketch": pair(images, wrong)}
    return compare_predictions(first, second, "sketch", max_drop)


def verdict_of(**changed: Any) -> Verdict:
    given: dict[str, Any] = {
        "results": RESULTS, "recipe": RECIPE, "comparison": compared(1000, 0), "certificate": CERTIFICATE,
        "latencies": latencies(1.5), "float_share": 0.01,
    }  # fmt: skip
    return judge(**given | changed)


def test_a_good_run_passes_with_its_figures_and_leaves_nothing_to_do() -> None:
    verdict = verdict_of()
    assert verdict.passed and verdict.bad == verdict.to_do == []
    good = " ".join(verdict.good)
    for figure in ("n = 1000", "1,234 weight codes", "3,000 activation codes", "1.50 times", "25%", "99.0%"):
        assert figure in good, figure


@pytest.mark.parametrize(
    ("changed", "passed", "headline", "bad", "next_step"),
    [
        ({"comparison": compared(1000, 60)}, False, "Failed", "-6.00 points", "Win accuracy back"),
        ({"comparison": compared(100, 2)}, None, "too few images", "cannot decide", "more images"),
        ({"comparison": compared(100, 1)}, None, "too few images", "", "more images"),
        ({"comparison": None}, None, "Undecided", "No full-precision baseline", "qat train fp"),
        ({"certificate": CERTIFICATE | {"passed": False, "stored": {"conv1": "x"}}}, False, "Do not ship",
         "1 of 5 layers", "Export the run again"),
        ({"certificate": None}, None, "no exported file", "", "qat certify"),
        ({"latencies": latencies(0.8)}, True, "Passed", "Slower than full precision: 0.80", "ort-native"),
        ({"latencies": latencies(1.0)}, True, "Passed", "No faster", ""),
        ({"latencies": []}, True, "Passed", "", "qat bench"),
        ({"float_share": 0.2}, True, "Passed", "20.0% of the multiplications", ""),
        ({"recipe": {"steps": 80}}, True, "Passed", "", "The last step was the best"),
        ({"results": RESULTS | {"target": 0.4}}, True, "Passed", "right on 40.0 %", "--pretrained"),
        ({"results": RESULTS | {"settled": {"source_validation_before": {"photo": 0.92}}}}, True, "Passed",
         "cost 2.00 points", ""),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_what_to_do(
    changed: dict[str, Any], passed: bool | None, headline: str, bad: str, next_step: str
) -> None:
    verdict = verdict_of(**changed)
    assert verdict.passed is passed
    assert headline in verdict.headline
    assert bad in " ".join(verdict.bad)
    assert bool(verdict.bad) == bool(bad)
    assert next_step in " ".join(verdict.to_do)
    assert bool(verdict.to_do) == bool(next_step)


def test_full_precision_is_a_baseline_and_no_failure() -> None:
    verdict = verdict_of(float_share=None, comparison=None, certificate=None, latencies=[])
    assert verdict.passed is None and verdict.headline.startswith("Full precision")
    assert verdict.bad == []


def test_one_image_of_a_hundred_does_not_decide_and_none_of_a_thousand_does() -> None:
    assert undecided(compared(100, 1)) == ["sketch (target)"]
    assert undecided(compared(1000, 0)) == []


def test_the_class_that_lost_most_comes_first_with_what_it_is_taken_for() -> None:
    labels = np.repeat(np.arange(3), 20)
    right: Predictions = {"sketch": (labels.copy(), labels)}
    predicted = labels.copy()
    predicted[:3] = 1  # 3 cats are dogs: 15 points
    predicted[20:30] = 2  # 10 dogs are owls: 50 points
    predicted[40] = 0  # 1 owl: 5 points, too little to name
    losses = class_losses_of(right, {"sketch": (predicted, labels)}, "sketch", CLASSES)
    assert [line.split(":")[0] for line in losses] == ["Class dog of sketch", "Class cat of sketch"]
    assert "100.0 % to 50.0 % of 20 images; most often taken for owl (10 times)" in losses[0]


def test_a_class_without_images_has_no_accuracy() -> None:
    labels = np.array([0, 0, 1])
    assert class_accuracies({"sketch": (np.array([0, 1, 1]), labels)}, "sketch", 3) == [50.0, 100.0, None]
