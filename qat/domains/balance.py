"""Unbalanced classes: what to say of them, and weights that draw every class as often as another."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qat.domains.folders import some

NOTEWORTHY = 3.0  # images of the largest class for one of the smallest


def class_counts(
    labels: Sequence[NDArray[np.int64]], classes: int
) -> NDArray[np.int64]:
    """Images of each class over several sets of labels: int64, of length `classes`."""
    counts = np.zeros(classes, np.int64)
    for of_set in labels:
        counts += np.bincount(of_set, minlength=classes)
    return counts


def imbalance_note(counts: NDArray[np.int64], classes: Sequence[str]) -> str | None:
    """One line with numbers where the largest class has three times the images of the smallest or more, else None."""
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] < NOTEWORTHY * counts[smallest]:
        return None
    upward = np.argsort(counts, kind="stable")
    sizes = [f"{classes[i]} {counts[i]:,}" for i in upward]
    if counts[smallest] == 0:
        times = "and others have none"
    else:
        ratio = counts[largest] / counts[smallest]
        times = f"{ratio:.1f} times as many as {classes[smallest]}"
    return (
        f"unbalanced classes: {classes[largest]} has {counts[largest]:,} training images, {times}; "
        f"a class with few is seldom learned. Fewest first: {some(sizes)}"
    )


def balanced_weights(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probability of each image, float64 of the labels' shape, that makes all classes present equally likely.

    w_i = 1 / (C · n_c), with C classes present and n_c images in the class of image i: DomainBed's `class_balanced`.
    Raises ValueError without labels.
    """
    if not len(labels):
        raise ValueError("no labels to balance")
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1.0 / (len(counts) * counts[place])
    return weights
