"""The report's pictures of a scale log: where disorder left the fair coin's band, what was frozen, which branches oppose.

Heat maps are embedded as pixels, whose size does not grow with the run; labels and lines stay vectors.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qat.analysis.figures import (
    BASELINE,
    COLOURS,
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
ROW = 0.128  # inches
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
    return HeatMap(
        tuple(layer_of(view.names[i]) for i in chosen),
        np.append(view.width * starts, view.ends[-1]),
        means.T,
        frozen_spans(view.frozen[:, chosen], view.width),
        np.where(
            view.silent[:, chosen].all(axis=0), np.nan, view.mean("cosine")[chosen]
        ),
    )


def disorder_map(view: ScaleView, kind: str) -> str:
    """Layers × time: disorder at each window's end in colour, frozen spans hatched; each layer's mean cosine beside it.
    Empty where the run has no scale of the kind."""
    if not len(view.of_kind(kind)):
        return ""
    found = heat_map(view, kind)
    rows = len(found.labels)
    figure = Figure(figsize=(9, max(ROW * rows, 0.5) + 1.0), layout="constrained")
    map_axes, cosine_axes = figure.subplots(1, 2, width_ratios=(6, 1), sharey=True)
    colours, norm = _coin_colours(found.values, view.width)
    image = map_axes.pcolormesh(
        found.edges,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(found.values),
        cmap=colours,
        norm=norm,
        rasterized=True,
    )
    _hatch(map_axes, found)
    map_axes.set_facecolor(SILENT)
    map_axes.set_yticks(
        range(rows), [shown(label) for label in found.labels], fontsize=6.5
    )
    map_axes.set_ylim(rows - 0.5, -0.5)
    map_axes.set_xlabel("step")
    map_axes.set_title(
        f"{TITLES[kind]} ({rows}): disorder over windows of {view.width} steps",
        fontsize=9,
    )
    _cosine_bars(cosine_axes, found.cosine)
    bar = figure.colorbar(
        image,
        ax=[map_axes, cosine_axes],
        shrink=min(1.0, 2.6 / (ROW * rows + 0.4)),
        pad=0.01,
    )
    low, high = coin_band(view.width)
    bar.ax.axhline(low, color="black", linewidth=0.8)
    bar.ax.axhline(high, color="black", linewidth=0.8)
    bar.set_label("disorder (lines: fair coin ± 2σ)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return svg(figure)


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
    above, under = (one.get_legend_handles_labels() for one in grid[:, 0])
    figure.legend(*above, frameon=False, ncols=4, loc="outside upper left", fontsize=8)
    figure.legend(*under, frameon=False, ncols=4, loc="outside lower left", fontsize=8)
    return svg(figure)


def conflict_curves(view: ScaleView, names: int = 6) -> str:
    """cosine(task, smooth) over time of the scales where it is lowest on average, mean over windows and smoothed; in grey
    the mean over all scales of each kind."""
    figure, axes = new_figure(9, 3.0)
    heard = np.flatnonzero(~view.silent.all(axis=0))
    cosine, middle = view.window_means("cosine"), view.ends - view.width / 2
    lowest = heard[np.argsort(view.mean("cosine")[heard], kind="stable")[:names]]
    for kind, style in zip(QUANTIZER_KINDS, ("-", "--", ":"), strict=True):
        group = np.intersect1d(view.of_kind(kind), heard)
        if len(group):
            line = thinned(middle, smooth(cosine[:, group].mean(axis=1)))
            axes.plot(
                *line,
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
    reach = max(
        0.3, *(float(np.abs(line.get_ydata()).max()) for line in axes.get_lines())
    )
    axes.set_ylim(-1.05 * reach, 1.05 * reach)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine(task, smooth)")
    figure.legend(frameon=False, loc="outside right upper", fontsize=7)
    return svg(figure)


def coin_band(width: int) -> tuple[float, float]:
    """½ ± 2·½/√(K − 1): two standard deviations of one fair coin's disorder over a window of K steps."""
    spread = 1 / np.sqrt(width - 1)
    return 0.5 - spread, 0.5 + spread


def _coin_colours(values: Floats, width: int) -> tuple[ListedColormap, Normalize]:
    """Blue below, red above ½, pale within the fair coin's band; the range holds the values and half the band again."""
    low, high = coin_band(width)
    furthest = np.nanmax(np.abs(values - 0.5)) if not np.isnan(values).all() else 0.0
    reach = min(max(furthest, 1.5 * (high - 0.5)), 0.5)
    at = np.linspace(0.5 - reach, 0.5 + reach, 256)
    colours = colormaps["RdBu_r"](np.linspace(0.02, 0.98, 256))
    within = (at > low) & (at < high)
    colours[within, :3] = 0.35 * colours[within, :3] + 0.65 * 0.96
    return ListedColormap(colours), Normalize(0.5 - reach, 0.5 + reach)


def _hatch(axes: Axes, found: HeatMap) -> None:
    corners = [
        [(a - 1, r - 0.5), (b, r - 0.5), (b, r + 0.5), (a - 1, r + 0.5)]
        for r, a, b in found.spans
    ]
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
    axes.barh(
        np.arange(len(cosine)),
        cosine,
        0.75,
        color=np.where(cosine < 0, THIRD, RUN).tolist(),
    )
    axes.axvline(0, color="black", linewidth=0.5)
    reach = max(
        float(np.nanmax(np.abs(cosine))) if not np.isnan(cosine).all() else 0.0, 0.05
    )
    axes.set_xlim(-1.1 * reach, 1.1 * reach)
    axes.tick_params(labelsize=6.5, axis="x")
    axes.tick_params(left=False, labelleft=False, axis="y")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("mean cosine", fontsize=7)


def _median_axes(axes: Axes, view: ScaleView, kind: str) -> None:
    values = view.disorder[:, view.of_kind(kind)]
    heard = ~np.isnan(values).all(axis=1)
    low, middle, high = (
        np.nanpercentile(values[heard], (5, 50, 95), axis=1)
        if heard.any()
        else np.empty((3, 0))
    )
    ends = view.ends[heard]
    band = coin_band(view.width)
    axes.axhspan(
        *band,
        color=BASELINE,
        alpha=0.22,
        linewidth=0,
        label="fair coin ± 2σ, one channel",
    )
    _pooled_band(axes, view, kind)
    below, above = thinned(ends, low), thinned(ends, high)
    axes.fill_between(
        below[0],
        below[1],
        above[1],
        color=RUN,
        alpha=0.25,
        linewidth=0,
        label="5th to 95th percentile",
    )
    axes.plot(*thinned(ends, middle), color=RUN, linewidth=1.3, label="median")
    axes.set_title(f"{TITLES[kind]} ({values.shape[1]})", fontsize=9)
    lowest, highest = (low.min(), high.max()) if heard.any() else band
    axes.set_ylim(
        max(0, min(lowest, band[0]) - 0.04), min(1, max(highest, band[1]) + 0.04)
    )


def _pooled_band(axes: Axes, view: ScaleView, kind: str) -> None:
    """Two lines: the band of a per-channel scale of median width, were its channels independent."""
    channels = float(np.median(view.channels[view.of_kind(kind)]))
    label = "fair coin ± 2σ, channels independent"
    for side in (-1, 1) if channels > 1 else ():
        bound = 0.5 + side / np.sqrt(channels * (view.width - 1))
        axes.axhline(
            bound,
            color="black",
            linestyle=":",
            linewidth=0.9,
            zorder=3,
            label=label if side > 0 else None,
        )


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
