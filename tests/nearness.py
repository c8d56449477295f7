"""Comparisons of floats that are computed in two ways, on a scale that means something.

A sum whose terms cancel is rounding and nothing else: 6e-18 in one order of its terms, -2e-18 in another. Its own size says
nothing about how far two such sums may lie apart; the size of what was added does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = 2.0**-24  # of one float32 operation, as a share of its result


def array_of(values: Any) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, np.float64)


def largest(values: Any) -> float:
    return float(np.abs(array_of(values)).max(initial=0.0))


def assert_near(found: Any, expected: Any, share: float, *, of: float | None = None, name: str = "") -> None:
    """|found - expected| <= share * of, element by element; `of` is the largest magnitude expected unless it is given (the
    sum of the sizes of a sum's terms, say). Shapes are equal; NaN is near nothing."""
    ours, theirs = array_of(found), array_of(expected)
    assert ours.shape == theirs.shape, f"{name}: {ours.shape} is not {theirs.shape}"
    scale = largest(theirs) if of is None else of
    allowed = share * scale
    apart = np.abs(ours - theirs)
    assert bool((apart <= allowed).all()), f"{name}: {apart.max()} apart, {allowed} allowed ({share} of {scale})"


def assert_all_near(found: Mapping[str, Any], expected: Mapping[str, Any], share: float) -> None:
    """`assert_near` of every entry; the scale is the largest magnitude expected among the entries of its kind, which is the
    last part of its name: weights with weights, scales with scales, biases with biases."""
    assert found.keys() == expected.keys()
    scales: dict[str, float] = {}
    for name, value in expected.items():
        kind = name.rpartition(".")[2]
        scales[kind] = max(scales.get(kind, 0.0), largest(value))
    for name, value in expected.items():
        assert_near(found[name], value, share, of=scales[name.rpartition(".")[2]], name=name)
