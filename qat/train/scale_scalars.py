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
    "activations" (inputs and stream); at a window's end also of disorder, and below_threshold, the share of scales that lie
    on the freezing side of the rule's threshold (which is above it for some rules), both without the scales that got no
    gradient.

    Within a window disorder counts few flips and says nothing.
    """
    by_name = {}
    for name in ("conflict", "cosine", "frozen"):
        by_name[name] = getattr(seen, name).double().cpu().numpy()
    is_weight = freezer.is_weight.cpu().numpy()
    if freezer.step % freezer.rule.window == 0:
        disorder = seen.disorder.double().cpu().numpy()
        comparisons = np.array(freezer.sizes, np.int64) * (freezer.rule.window - 1)
        below = beyond_threshold(disorder, comparisons, is_weight, freezer.rule)
        has_gradient = (disorder > 0) | (by_name["cosine"] != 0)
        by_name["disorder"] = np.where(has_gradient, disorder, np.nan)
        by_name["below_threshold"] = np.where(has_gradient, below, np.nan)
    everything = np.ones_like(is_weight)
    values: dict[str, float | dict[str, float]] = {}
    values.update(_means(by_name, everything))
    for group, members in (("weights", is_weight), ("activations", ~is_weight)):
        if members.any():
            values[group] = _means(by_name, members)
    return values


def beyond_threshold(
    disorder: Floats,
    comparisons: NDArray[np.int64],
    is_weight: NDArray[np.bool_],
    rule: FreezeRule,
) -> NDArray[np.bool_]:
    """Whether each scale lies on the freezing side of the threshold (..., scales), in the freezer's own float32 so that ties
    fall alike; False for NaN. Which scales then freeze also depends on the rule's policy, targets and start."""
    of_others = np.nan if rule.threshold is None else rule.threshold
    of_weights = of_others
    if rule.weight_threshold is not None:
        of_weights = rule.weight_threshold
    thresholds = np.where(is_weight, of_weights, of_others)
    return beyond(
        torch.from_numpy(disorder).float(),
        torch.from_numpy(comparisons).float(),
        torch.from_numpy(thresholds).float(),
        rule,
    ).numpy()


def _means(by_name: dict[str, Floats], members: NDArray[np.bool_]) -> dict[str, float]:
    """Means over `members`, NaN left out, to six significant digits; without those that are NaN throughout."""
    means = {}
    for name, of_all in by_name.items():
        values = of_all[members]
        values = values[~np.isnan(values)]
        if len(values):
            means[name] = float(f"{values.mean():.6g}")
    return means


def mean_scales(model: nn.Module) -> dict[str, float]:
    """Mean scale of every quantizer by name, for the report."""
    return {name: float(q.scale.mean()) for name, q in quantizers(model).items()}
