"""What a run logs of its scales: their gradients every step, their values at every evaluation."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer, Seen, beyond
from qat.surgery.swap import quantizers

Floats = NDArray[np.float64]


def scale_scalars(
    seen: Seen, freezer: ScaleFreezer
) -> dict[str, float | dict[str, float]]:
    """What one step is worth logging: means of conflict, cosine and frozen over all scales, over "weights" and over
    "activations" (inputs and stream); at a window's end also of disorder, and below_threshold, the share of scales beyond
    the rule's threshold, both without the scales that got no gradient.

    Within a window disorder counts few flips and says nothing.
    """
    found = {
        name: getattr(seen, name).double().cpu().numpy()
        for name in ("conflict", "cosine", "frozen")
    }
    is_weight = freezer.is_weight.cpu().numpy()
    if freezer.step % freezer.rule.window == 0:
        disorder = seen.disorder.double().cpu().numpy()
        comparisons = np.array(freezer.sizes, np.int64) * (freezer.rule.window - 1)
        below = beyond_threshold(disorder, comparisons, is_weight, freezer.rule)
        heard = (disorder > 0) | (found["cosine"] != 0)
        found |= {
            "disorder": np.where(heard, disorder, np.nan),
            "below_threshold": np.where(heard, below, np.nan),
        }
    values: dict[str, float | dict[str, float]] = _means(found, np.ones_like(is_weight))  # type: ignore[assignment]
    for group, members in (("weights", is_weight), ("activations", ~is_weight)):
        if members.any():
            values[group] = _means(found, members)
    return values


def beyond_threshold(
    disorder: Floats,
    comparisons: NDArray[np.int64],
    is_weight: NDArray[np.bool_],
    rule: FreezeRule,
) -> NDArray[np.bool_]:
    """The freezer's own decision (..., scales), in its own float32 so that ties fall alike; False for NaN."""
    plain = np.nan if rule.threshold is None else rule.threshold
    threshold = np.where(
        is_weight,
        plain if rule.weight_threshold is None else rule.weight_threshold,
        plain,
    )
    values, counts, limits = (
        torch.from_numpy(x).float() for x in (disorder, comparisons, threshold)
    )
    return beyond(values, counts, limits, rule).numpy()


def _means(found: dict[str, Floats], members: NDArray[np.bool_]) -> dict[str, float]:
    """Means over `members`, NaN left out, to six significant digits; without those that are NaN throughout."""
    kept = {
        name: of_all[members][~np.isnan(of_all[members])]
        for name, of_all in found.items()
    }
    return {
        name: float(f"{values.mean():.6g}")
        for name, values in kept.items()
        if len(values)
    }


def mean_scales(model: nn.Module) -> dict[str, float]:
    """Mean scale of every quantizer by name, for the report."""
    return {name: float(q.scale.mean()) for name, q in quantizers(model).items()}
