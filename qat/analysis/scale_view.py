"""A scale log by windows: disorder against a fair coin, frozen spans, conflict of the two branches.

A window of K steps compares K − 1 neighbouring signs a channel, so a scale of C channels has n = C·(K − 1) comparisons.
Were they fair coins,

    δ ~ Binomial(n, ½) / n        mean ½, standard deviation ½/√n

A layer's channels share their images, so their flips are not independent: with C > 1 the true band lies between
½ ± 2·½/√n and one channel's, ½ ± 2·½/√(K − 1), which is the one the pictures draw.

A scale whose gradients are exactly zero is *silent*: it never flips, which is not calm. It is told apart by a cosine of
zero in every step of a window, and left out of what is said about disorder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qat.objectives.scale_freeze import FreezeRule
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.run_folder import RunFolder
from qat.runs.scale_log import ScaleHistory, kind_of, read_scales
from qat.train.from_recipe import freezer_of
from qat.train.scale_scalars import Floats, beyond_threshold

# A share of fewer comparisons than this is rounded to float16 by less than half a flip
FLOAT16_COUNTS = 2048


@dataclass(frozen=True)
class ScaleView:
    """A scale log beside what its scales are. channels: int64 (scales,); is_weight: bool (scales,)."""

    history: ScaleHistory
    channels: NDArray[np.int64]
    is_weight: NDArray[np.bool_]
    rule: FreezeRule

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantizers, in the log's order."""
        return self.history.names

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each: weight, input or stream."""
        return tuple(kind_of(name) for name in self.names)

    @property
    def steps(self) -> int:
        """Steps in the log."""
        return len(self.history.values)

    @property
    def width(self) -> int:
        """Steps a window: K, or the whole of a run that is shorter than one."""
        return min(self.history.window, self.steps)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Steps (counted from 1) at which windows end."""
        return np.arange(self.width, self.steps + 1, self.width)

    @property
    def comparisons(self) -> NDArray[np.int64]:
        """n of every scale (scales,)."""
        return self.channels * (self.width - 1)

    @cached_property
    def silent(self) -> NDArray[np.bool_]:
        """(windows, scales): no gradient in any step of the window."""
        heard = self.history.column("cosine")[: self.ends[-1]] != 0
        return ~heard.reshape(len(self.ends), self.width, -1).any(axis=1)

    @cached_property
    def disorder(self) -> Floats:
        """(windows, scales): at each window's end, as the counted flips where float16 resolves them; NaN where silent."""
        logged = self.history.column("disorder")[self.ends - 1].astype(np.float64)
        n = np.maximum(self.comparisons, 1)
        flips = np.rint(logged * n)
        counted = np.where(n < FLOAT16_COUNTS, flips / n, logged)
        return np.where(self.silent, np.nan, counted)

    @cached_property
    def frozen(self) -> Floats:
        """(windows, scales): share of channels frozen in each window, constant within it."""
        return self.history.column("frozen")[self.ends - 1].astype(np.float64)

    def window_means(self, column: str) -> Floats:
        """(windows, scales): mean of a column over each window's steps."""
        whole = self.history.column(column)[: self.ends[-1]].astype(np.float64)
        return whole.reshape(len(self.ends), self.width, -1).mean(axis=1)

    def mean(self, column: str) -> Floats:
        """(scales,): mean of a column over all steps."""
        return self.history.column(column).mean(axis=0, dtype=np.float64)

    def below(self) -> NDArray[np.bool_]:
        """(windows, scales): whose pooled disorder lies beyond the rule's threshold, whether or not anything freezes."""
        return beyond_threshold(
            self.disorder, self.comparisons, self.is_weight, self.rule
        )

    def share_below(self, scales: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(windows,) each: share of `scales` beyond the threshold, and the share that independent fair coins would give; of
        those that are not silent, NaN in a window where all are."""
        limits = bounds(self.rule, self.comparisons, self.is_weight)
        coin = coin_below(self.comparisons, limits)
        coin_in_windows = np.broadcast_to(coin, self.silent.shape)
        share = self._share(self.below(), scales)
        share_of_coins = self._share(coin_in_windows, scales)
        return share, share_of_coins

    def share_frozen(self, scales: NDArray[np.int64]) -> Floats:
        """(windows,): share of `scales` (and their channels) frozen; of those that are not silent."""
        return self._share(self.frozen, scales)

    def _share(self, values: NDArray[Any], scales: NDArray[np.int64]) -> Floats:
        """(windows,): mean of `values` over those of `scales` that are not silent; NaN where all are."""
        is_heard = ~self.silent[:, scales]
        count = is_heard.sum(axis=1)
        total = (values[:, scales] * is_heard).sum(axis=1)
        return total / np.where(count > 0, count, np.nan)

    def of_kind(self, kind: str) -> NDArray[np.int64]:
        """Indices of the scales of a kind, in network order."""
        return np.flatnonzero([k == kind for k in self.kinds])


def open_view(path: Path, model: nn.Module | None = None) -> ScaleView:
    """The scale log of a run folder; model: the run's, where it is at hand. Raises RecipeError where the run kept none, or
    another model's."""
    recipe = RunFolder.open(path).recipe()
    history = read_scales(path)
    if history is None:
        raise RecipeError(
            f"{path}: holds no scale log (scales.json). Scales have two gradients to compare under sagm-lsq, gaqat and its "
            f"controls; this run's method is {recipe.method}"
        )
    if len(history.values) < 2:
        raise RecipeError(
            f"{path / 'scales.f16'}: holds {len(history.values)} steps; sign flips need 2"
        )
    if model is None:
        _, _, built = load_run(path)
        model = built.model
    freezer = freezer_of(recipe.freezing, model, recipe.optimization.seed)
    if freezer is None or freezer.names != history.names:
        raise RecipeError(
            f"{path / 'scales.json'}: names other scales than this run's model has"
        )
    channels = np.array(freezer.sizes, np.int64)
    return ScaleView(history, channels, freezer.is_weight.numpy(), freezer.rule)


def bounds(
    rule: FreezeRule, comparisons: NDArray[np.int64], is_weight: NDArray[np.bool_]
) -> Floats:
    """(scales,): the disorder below which the rule freezes a scale: r, or ½ − z·½/√n."""
    limits = 0.5 - rule.z * 0.5 / np.sqrt(np.maximum(comparisons, 1))
    if rule.threshold is not None:
        limits[:] = rule.threshold
    if rule.weight_threshold is not None:
        limits[is_weight] = rule.weight_threshold
    return limits


def coin_below(comparisons: Sequence[int] | NDArray[np.int64], bound: Floats) -> Floats:
    """P(Binomial(n, ½) / n < bound) for each n and bound (scales,), summed exactly in float64."""
    factors = np.arange(1, max(comparisons) + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(factors))])
    known: dict[tuple[int, float], float] = {}
    chances = []
    for n, b in zip(np.asarray(comparisons).tolist(), bound.tolist(), strict=True):
        if (n, b) not in known:
            strictly_below = min(int(np.ceil(b * n - 1e-9)), n + 1)
            k = np.arange(strictly_below)
            log_ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
            known[n, b] = float(np.exp(log_ways - n * np.log(2)).sum())
        chances.append(known[n, b])
    return np.array(chances)


def frozen_spans(
    frozen: NDArray[np.floating], width: int
) -> list[tuple[int, int, int]]:
    """Maximal runs of windows in which at least half of a scale's channels are frozen, as (scale, first step, last step);
    frozen: (windows, scales) shares, window w covers steps w·width + 1 … (w + 1)·width."""
    is_frozen = np.pad(frozen >= 0.5, ((1, 1), (0, 0))).astype(np.int8)
    change = np.diff(is_frozen, axis=0)
    spans: list[tuple[int, int, int]] = []
    for scale in range(frozen.shape[1]):
        starts = np.flatnonzero(change[:, scale] == 1)
        stops = np.flatnonzero(change[:, scale] == -1)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            spans.append((scale, start * width + 1, stop * width))
    return spans
