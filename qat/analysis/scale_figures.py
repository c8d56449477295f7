"""The report's pictures of a scale log: where disorder left the fair coin's band, what was frozen, which branches oppose.

Heat maps are embedded as pixels, whose size does not grow with the run; labels and lines stay vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qat.analysis.figures import (
    BASELINE,
    COLOURS,
    ROW,
    RUN,
    THIRD,
    new_figure,
    shown,
    smooth,
    svg,
    thinned,
)
from qat.analysis.scale_view import ScaleView, frozen_spans
from qat.runs.scale_log import QUANTIZER_KINDS, layer_of

COLUMNS = 240  # of a heat map; more windows than these are drawn as means of neighbours
TITLES = {
    "weight": "weight scales",
    "input": "input (activation) scales",
    "stream": "stream scales",
}
SILENT = "#b9c2a0"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeatMap:
    """One kind's disorder. labels: layers in network order; edges: steps (columns + 1,); values: (scales, columns) mean
    disorder of the column's windows, NaN where the scale got no gradient; spans: frozen, as (row, first, last step);
    cosine: (scales,) mean of cosine(task, smooth) over all steps, NaN for a scale that never got a gradient."""

    labels: tuple[str, ...]
    edges: NDArray[np.int64]
    values: Floats
    spans: list[tuple[int, int, int]]
    cosine: Floats


def heat_map(view: ScaleView, kind: str) -> HeatMap:
    """What `disorder_map` draws of the scales of a kind."""
    chosen = view.of_kind(kind)
    together = -(-len(view.ends) // COLUMNS)  # windows a column
    starts = np.arange(0, len(view.ends), together)
    values = view.disorder[:, chosen]
    heard = np.add.reduceat(~np.isnan(values), starts, axis=0)
    sums = np.add.reduceat(np.nan_to_num(values), starts, axis=0)
    means = np.where(heard > 0, sums / np.maximum(heard, 1), np.nan)
    always_silent = view.silent[:, chosen].all(axis=0)
    cosine = np.where(always_silent, np.nan, view.mean("cosine")[chosen])
    return HeatMap(
        labels=tuple(layer_of(view.names[index]) for index in chosen),
        edges=np.append(view.width * starts, view.ends[-1]),
        values=means.T,
        spans=frozen_spans(view.frozen[:, chosen], view.width),
        cosine=cosine,
    )


def disorder_map(view: ScaleView, kind: str) -> str:
    """Layers × time: disorder at each window's end in colour, frozen spans hatched; each layer's mean cosine beside it.
    Empty where the run has no scale of the kind."""
    if not len(view.of_kind(kind)):
        return ""
    disorder = heat_map(view, kind)
    rows = len(disorder.labels)
    figure = Figure(figsize=(9, max(ROW * rows, 0.5) + 1.0), layout="constrained")
    map_axes, cosine_axes = figure.subplots(1, 2, width_ratios=(6, 1), sharey=True)
    image = _draw_heat_map(map_axes, disorder, view.width)
    title = f"{TITLES[kind]} ({rows}): disorder over windows of {view.width} steps"
    map_axes.set_title(title, fontsize=9)
    _cosine_bars(cosine_axes, disorder.cosine)
    bar = figure.colorbar(
        image,
        ax=[map_axes, cosine_axes],
        shrink=min(1.0, 2.6 / (ROW * rows + 0.4)),
        pad=0.01,
    )
    for bound in coin_band(view.width):
        bar.ax.axhline(bound, color="black", linewidth=0.8)
    bar.set_label("disorder (lines: fair coin ± 2σ)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return svg(
        figure,
        f"Map of gradient disorder of {rows} {TITLES[kind]}, layers down and steps across, with what was frozen.",
    )


def _draw_heat_map(axes: Axes, disorder: HeatMap, width: int) -> QuadMesh:
    """A row for each layer, the first on top; width: steps per window."""
    rows = len(disorder.labels)
    colours, norm = _coin_colours(disorder.values, width)
    image = axes.pcolormesh(
        disorder.edges,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(disorder.values),
        cmap=colours,
        norm=norm,
        rasterized=True,
    )
    _hatch(axes, disorder.spans)
    labels = [shown(label) for label in disorder.labels]
    axes.set_facecolor(SILENT)
    axes.set_yticks(range(rows), labels, fontsize=6.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("step")
    return image


def disorder_curves(view: ScaleView) -> str:
    """Over windows, a column a kind. Above, median and 5th to 95th percentile of disorder, and the fair coin's band; below,
    the share of scales beyond the threshold beside fair coins' share, and the share frozen."""
    kinds = [kind for kind in QUANTIZER_KINDS if len(view.of_kind(kind))]
    figure, axes = new_figure(9, 4.6, columns=len(kinds), rows=2)
    grid = np.asarray(axes).reshape(2, len(kinds))
    for column, kind in enumerate(kinds):
        _median_axes(grid[0, column], view, kind)
        _share_axes(grid[1, column], view, kind)
        for one in grid[:, column]:
            one.set_xlim(0, view.ends[-1] + view.width * 0.5)
    grid[0, 0].set_ylabel("disorder")
    grid[1, 0].set_ylabel("share of scales, %")
    upper = grid[0, 0].get_legend_handles_labels()
    lower = grid[1, 0].get_legend_handles_labels()
    figure.legend(*upper, frameon=False, ncols=4, loc="outside upper left", fontsize=8)
    figure.legend(*lower, frameon=False, ncols=4, loc="outside lower left", fontsize=8)
    return svg(
        figure,
        f"Curves over windows of {view.width} steps of the scales' disorder, and of the shares that are settled or frozen.",
    )


def conflict_curves(view: ScaleView, names: int = 6) -> str:
    """cosine(task, smooth) over time of the scales where it is lowest on average, mean over windows and smoothed; in grey
    the mean over all scales of each kind."""
    figure, axes = new_figure(9, 3.0)
    heard = np.flatnonzero(~view.silent.all(axis=0))
    cosine = view.window_means("cosine")
    middle = view.ends - view.width / 2
    in_order = np.argsort(view.mean("cosine")[heard], kind="stable")
    lowest = heard[in_order[:names]]
    for kind, style in zip(QUANTIZER_KINDS, ("-", "--", ":"), strict=True):
        group = np.intersect1d(view.of_kind(kind), heard)
        if len(group):
            mean = cosine[:, group].mean(axis=1)
            axes.plot(
                *thinned(middle, smooth(mean)),
                color=BASELINE,
                linestyle=style,
                linewidth=1.4,
                label=f"mean of {kind} scales",
            )
    for index, colour in zip(lowest, COLOURS, strict=False):
        axes.plot(
            *thinned(middle, smooth(cosine[:, index])),
            color=colour,
            linewidth=1.1,
            label=shown(view.names[index]),
        )
    axes.axhline(0, color="black", linewidth=0.5)
    reach = 0.3
    for line in axes.get_lines():
        reach = max(reach, float(np.abs(line.get_ydata()).max()))
    axes.set_ylim(-1.05 * reach, 1.05 * reach)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine(task, smooth)")
    figure.legend(frameon=False, loc="outside right upper", fontsize=7)
    says = [view.names[index] for index in lowest]
    return svg(
        figure,
        f"Curves over steps of the cosine between task and smoothing gradient; lowest on average: {', '.join(says)}.",
    )


def coin_band(width: int) -> tuple[float, float]:
    """½ ± 2·½/√(K − 1): two standard deviations of one fair coin's disorder over a window of K steps."""
    spread = 1 / np.sqrt(width - 1)
    return 0.5 - spread, 0.5 + spread


def _coin_colours(values: Floats, width: int) -> tuple[ListedColormap, Normalize]:
    """Blue below, red above ½, pale within the fair coin's band; the range holds the values and half the band again."""
    low, high = coin_band(width)
    furthest = _largest(values - 0.5)
    reach = min(max(furthest, 1.5 * (high - 0.5)), 0.5)
    at = np.linspace(0.5 - reach, 0.5 + reach, 256)
    colours = colormaps["RdBu_r"](np.linspace(0.02, 0.98, 256))
    within = (at > low) & (at < high)
    colours[within, :3] = 0.35 * colours[within, :3] + 0.65 * 0.96
    return ListedColormap(colours), Normalize(0.5 - reach, 0.5 + reach)


def _largest(values: Floats) -> float:
    """Largest magnitude, 0 where all are NaN."""
    if np.isnan(values).all():
        return 0.0
    return float(np.nanmax(np.abs(values)))


def _hatch(axes: Axes, spans: Sequence[tuple[int, int, int]]) -> None:
    """Mark what is frozen: (row, first step, last step)."""
    corners = []
    for row, first, last in spans:
        left = first - 1
        top = row - 0.5
        bottom = row + 0.5
        corners.append([(left, top), (last, top), (last, bottom), (left, bottom)])
    axes.add_collection(
        PolyCollection(
            corners,
            facecolors="none",
            edgecolors="#222222",
            hatch="//////",
            linewidths=0.4,
            rasterized=True,
        ),
        autolim=False,
    )


def _cosine_bars(axes: Axes, cosine: Floats) -> None:
    places = np.arange(len(cosine))
    colours = np.where(cosine < 0, THIRD, RUN).tolist()
    axes.barh(places, cosine, 0.75, color=colours)
    axes.axvline(0, color="black", linewidth=0.5)
    reach = max(_largest(cosine), 0.05)
    axes.set_xlim(-1.1 * reach, 1.1 * reach)
    axes.tick_params(labelsize=6.5, axis="x")
    axes.tick_params(left=False, labelleft=False, axis="y")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("mean cosine", fontsize=7)


def _median_axes(axes: Axes, view: ScaleView, kind: str) -> None:
    values = view.disorder[:, view.of_kind(kind)]
    heard = ~np.isnan(values).all(axis=1)
    ends = view.ends[heard]
    lowest, highest = coin_band(view.width)
    axes.axhspan(
        lowest,
        highest,
        color=BASELINE,
        alpha=0.22,
        linewidth=0,
        label="fair coin ± 2σ, one channel",
    )
    _pooled_band(axes, view, kind)
    low = middle = high = np.empty(0)
    if heard.any():
        low, middle, high = np.nanpercentile(values[heard], (5, 50, 95), axis=1)
        lowest = min(lowest, low.min())
        highest = max(highest, high.max())
    thin_ends, thin_low = thinned(ends, low)
    _, thin_middle = thinned(ends, middle)
    _, thin_high = thinned(ends, high)
    axes.fill_between(
        thin_ends,
        thin_low,
        thin_high,
        color=RUN,
        alpha=0.25,
        linewidth=0,
        label="5th to 95th percentile",
    )
    axes.plot(thin_ends, thin_middle, color=RUN, linewidth=1.3, label="median")
    axes.set_title(f"{TITLES[kind]} ({values.shape[1]})", fontsize=9)
    axes.set_ylim(max(0, lowest - 0.04), min(1, highest + 0.04))


def _pooled_band(axes: Axes, view: ScaleView, kind: str) -> None:
    """Two lines: the band of a per-channel scale of median width, were its channels independent."""
    channels = float(np.median(view.channels[view.of_kind(kind)]))
    if channels <= 1:
        return
    spread = 1 / np.sqrt(channels * (view.width - 1))
    style: dict[str, Any] = {
        "color": "black",
        "linestyle": ":",
        "linewidth": 0.9,
        "zorder": 3,
    }
    axes.axhline(0.5 - spread, **style)
    label = "fair coin ± 2σ, channels independent"
    axes.axhline(0.5 + spread, **style, label=label)


def _share_axes(axes: Axes, view: ScaleView, kind: str) -> None:
    chosen = view.of_kind(kind)
    share, coin = view.share_below(chosen)
    frozen = view.share_frozen(chosen)
    axes.plot(
        *thinned(view.ends, 100 * share),
        color=RUN,
        linewidth=1.2,
        label="beyond the threshold",
    )
    axes.plot(
        *thinned(view.ends, 100 * coin),
        color="black",
        linestyle="--",
        linewidth=1,
        label="fair coins beyond it",
    )
    axes.plot(
        *thinned(view.ends, 100 * frozen),
        color=THIRD,
        linewidth=1,
        linestyle="-.",
        label="frozen",
    )
    top = np.nanmax([*share, *coin, *frozen, 0.02])
    axes.set_ylim(-3 * top, 108 * top)
    axes.set_xlabel("step")
