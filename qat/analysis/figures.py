"""The report's pictures, each a function from recorded data to SVG text; those of the scale log are in `scale_figures`.

Long curves are thinned to POINTS before they are drawn, text stays text, and what is dense is embedded as pixels. Names come
from files and folders: they pass through `shown` on their way into a picture.
"""

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from edgeqat.terminal import printable
from qat.analysis.weight_errors import WeightError
from qat.quantizers.biper import quantization_error
from qat.runs.scale_log import QUANTIZER_KINDS, kind_of, layer_of

BASELINE, RUN, THIRD = "#8a8f98", "#1f6f8b", "#c8553d"
# Of runs and curves, in turn
COLOURS = (RUN, THIRD, "#5b8c3a", "#8e5aa8", "#d39a1e", "#3d4a9e", "#b0487f", "#4f7f7a")
POINTS = 500  # of a curve
PIXELS = 150  # per inch of embedded pixels
ROW = 0.128  # inches of a layer in a list of them
LONGEST = 40  # characters of a name; a longer one would leave no room for the picture


class LayerCost(NamedTuple):
    """What one layer costs: multiply-adds of one image, bytes of its weight codes, and their bits (None: float32)."""

    name: str
    macs: int
    bytes: float
    bits: int | None


def accuracy_bars(
    domains: Sequence[str], runs: Mapping[str, Sequence[float]], colours: Sequence[str]
) -> str:
    """Accuracy in percent per domain, one bar a run; runs: name -> percent per domain."""
    count = len(runs)
    figure, axes = new_figure(9 if count > 2 else 7, 2.8)
    places = np.arange(len(domains))
    width = 0.8 / max(count, 2)
    number_format = "%.1f" if count <= 4 else "%.0f"
    number_size = 8 if count <= 2 else 6
    middle = (count - 1) / 2
    for index, (name, colour) in enumerate(zip(runs, colours, strict=True)):
        bars = axes.bar(
            places + (index - middle) * width,
            runs[name],
            0.94 * width,
            color=colour,
            label=shown(name),
        )
        axes.bar_label(bars, fmt=number_format, fontsize=number_size)
    axes.set_xticks(places, [shown(domain) for domain in domains])
    axes.set_ylim(0, 112)
    axes.set_ylabel("top-1 accuracy, %")
    axes.legend(
        frameon=False,
        ncols=min(count, 4),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        fontsize=8,
    )
    says = []
    for name, percents in runs.items():
        values = [
            f"{domain} {percent:.1f}"
            for domain, percent in zip(domains, percents, strict=True)
        ]
        says.append(f"{name}: {', '.join(values)}")
    return svg(figure, f"Bars of top-1 accuracy in percent. {'; '.join(says)}.")


def loss_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Sequence[str],
    selected: Mapping[str, int] | None = None,
) -> str:
    """Training loss (smoothed over about 2 % of the run) and held-out source accuracy over steps, a colour a run.

    selected: by run, the step that was chosen; a dotted line marks it.
    """
    figure, (left, right) = new_figure(9, 2.9, columns=2)
    for (name, entries), colour in zip(runs.items(), colours, strict=True):
        steps, loss = series(entries, "loss")
        left.plot(
            *thinned(steps, smooth(loss)),
            color=colour,
            linewidth=1.1,
            label=shown(name),
        )
        steps, accuracy = series(entries, "source_mean")
        right.plot(
            steps, 100 * accuracy, color=colour, linewidth=1.1, marker=".", markersize=4
        )
        if selected and name in selected:
            right.axvline(selected[name], color=colour, linewidth=0.9, linestyle=":")
    left.set_title("training loss, smoothed", fontsize=9)
    right.set_title("held-out source accuracy, %", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    left.set_ylim(bottom=0)
    figure.legend(
        frameon=False, ncols=min(len(runs), 4), loc="outside upper left", fontsize=8
    )
    says = f"Curves over training steps of {', '.join(runs)}: training loss, and held-out source accuracy."
    for name, step in (selected or {}).items():
        says += f" Step {step} of {name} was chosen."
    return svg(figure, says)


def scale_curves(entries: Sequence[Mapping[str, Any]]) -> str:
    """Every quantizer's scale relative to its first recorded value, over training: weights, inputs, stream. The three that
    moved furthest are named."""
    figure, axes_row = new_figure(9, 3.2, columns=3)
    for axes, kind in zip(axes_row, QUANTIZER_KINDS, strict=True):
        steps, names, ratios = relative_scales(entries, kind)
        axes.set_title(f"{kind} scales ({len(names)})", fontsize=9)
        if names:
            _draw_scales(axes, steps, names, ratios)
        _axes_over_training(axes, bool(names))
        if names:
            axes.legend(
                frameon=False,
                loc="upper left",
                bbox_to_anchor=(-0.05, -0.2),
                fontsize=7,
            )
    axes_row[0].set_ylabel("scale / first recorded")
    return svg(
        figure,
        "Curves over training steps of every quantizer's scale relative to its first: weights, inputs, stream.",
    )


def _draw_scales(
    axes: Axes,
    steps: NDArray[np.int64],
    names: Sequence[str],
    ratios: NDArray[np.float64],
) -> None:
    """A thin line for each quantizer, and a coloured one for each of the three that moved furthest."""
    lines = []
    for of_quantizer in ratios.T:
        lines.append(np.column_stack(thinned(steps, of_quantizer)))
    axes.add_collection(
        LineCollection(
            lines, linewidths=0.5, colors=BASELINE, alpha=0.6, rasterized=True
        )
    )
    moved = np.abs(np.log(ratios[-1]))
    furthest = np.argsort(-moved)[:3].tolist()
    for index, colour in zip(furthest, COLOURS, strict=False):
        axes.plot(
            *thinned(steps, ratios[:, index]),
            linewidth=1.2,
            color=colour,
            label=shown(layer_of(names[index])),
        )


def scale_medians(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Sequence[str]
) -> str:
    """Median over quantizers, with the 5th to 95th percentile, of the relative scale over training; a colour a run."""
    figure, axes_row = new_figure(9, 2.9, columns=3)
    by_label = {}
    for axes, kind in zip(axes_row, QUANTIZER_KINDS, strict=True):
        drawn = False
        for name, colour in zip(runs, colours, strict=True):
            steps, names, ratios = relative_scales(runs[name], kind)
            if not names:
                continue
            low, middle, high = np.percentile(ratios, (5, 50, 95), axis=1)
            thin_steps, thin_low = thinned(steps, low)
            _, thin_middle = thinned(steps, middle)
            _, thin_high = thinned(steps, high)
            axes.fill_between(
                thin_steps, thin_low, thin_high, color=colour, alpha=0.12, linewidth=0
            )
            (line,) = axes.plot(
                thin_steps, thin_middle, color=colour, linewidth=1.2, label=shown(name)
            )
            by_label[line.get_label()] = line
            drawn = True
        axes.set_title(f"{kind} scales", fontsize=9)
        _axes_over_training(axes, drawn)
    axes_row[0].set_ylabel("scale / first recorded")
    figure.legend(
        handles=list(by_label.values()),
        frameon=False,
        ncols=4,
        loc="outside upper left",
        fontsize=8,
    )
    return svg(
        figure,
        f"Curves over training steps of the median relative scale of {', '.join(runs)}: weights, inputs, stream.",
    )


def relative_scales(
    entries: Sequence[Mapping[str, Any]], kind: str
) -> tuple[NDArray[np.int64], list[str], NDArray[np.float64]]:
    """(training steps, names, scales relative to the first that were recorded, (steps, names)) of the quantizers of a kind.

    entries: of a run's log; those without scales are passed over.
    """
    names: list[str] = []
    steps: list[int] = []
    values = []
    for entry in entries:
        scales = entry.get("scales")
        if not scales:
            continue
        if not steps:
            names = [name for name in scales if kind_of(name) == kind]
        steps.append(entry["step"])
        values.append([scales[name] for name in names])
    shape = (len(steps), len(names))
    scales_over_steps = np.array(values, np.float64).reshape(shape)
    ratios = scales_over_steps / scales_over_steps[:1]
    return np.array(steps, np.int64), names, ratios


def _axes_over_training(axes: Axes, drawn: bool) -> None:
    """Logarithmic, with plain numbers; or a word where there is nothing to draw."""
    if not drawn:
        axes.set_axis_off()
        axes.text(
            0.5,
            0.5,
            "none in this run",
            ha="center",
            va="center",
            color=BASELINE,
            transform=axes.transAxes,
        )
        return
    axes.set_xlabel("step")
    low, high = axes.get_ylim()
    if high > 3 * max(low, 1e-9):
        axes.set_yscale("log")


def scale_profile(scales: Mapping[str, float]) -> str:
    """The learned mean scale of every quantizer, in layer order, logarithmic."""
    figure, axes = new_figure(9, 2.6)
    for kind, colour in (("weight", RUN), ("input", THIRD), ("stream", BASELINE)):
        values = []
        for name, scale in scales.items():
            if kind_of(name) == kind:
                values.append(scale)
        axes.semilogy(
            range(len(values)),
            values,
            marker="o",
            markersize=3,
            linewidth=0.8,
            color=colour,
            label=kind,
        )
    axes.set_xlabel("quantizer, in layer order")
    axes.set_ylabel("scale")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return svg(
        figure,
        f"Learned scales of {len(scales)} quantizers in layer order, from {min(scales.values()):.3g} to "
        f"{max(scales.values()):.3g}.",
    )


def weight_histogram(
    name: str, scaled: NDArray[np.float32], qmin: int, qmax: int
) -> str:
    """Latent weights in units of their scale, over the grid of their codes."""
    figure, axes = new_figure(4.4, 2.4)
    reach = (qmin - 1.5, qmax + 1.5)
    axes.hist(np.clip(scaled, *reach), bins=160, range=reach, color=RUN)
    if qmax - qmin <= 32:
        for code in range(qmin, qmax + 1):
            axes.axvline(code, color=THIRD, linewidth=0.6, zorder=0)
    axes.set_xlabel("weight / scale (lines: codes)")
    axes.set_yticks([])
    axes.set_title(shown(name), fontsize=9)
    beyond = float(((scaled < qmin) | (scaled > qmax)).mean())
    return svg(
        figure,
        f"Histogram of the weights of {name} over their codes {qmin} to {qmax}; {100 * beyond:.1f} % lie beyond.",
    )


def frequency_error(layers: Mapping[str, tuple[float, float]]) -> str:
    """BiPer's quantization error over a = frequency · mean |w|: the closed form for Laplacian weights as a line, and a dot,
    (a, measured error), for every layer."""
    figure, axes = new_figure(6, 2.8)
    a = np.geomspace(0.05, 20, 300)
    expected = [quantization_error(float(value)) for value in a]
    axes.plot(a, expected, color=BASELINE, label="closed form, Laplacian weights")
    measured_at, errors = zip(*layers.values(), strict=True)
    axes.scatter(measured_at, errors, color=RUN, s=18, zorder=3, label="layers")
    axes.set_xscale("log")
    axes.set_xlabel("frequency × mean |weight|")
    axes.set_ylabel("mean squared error")
    axes.legend(frameon=False, fontsize=8)
    return svg(
        figure,
        f"Quantization errors of {len(layers)} layers, from {min(errors):.3g} to {max(errors):.3g}, beside the closed form "
        "over the frequency.",
    )


def size_and_latency(latencies: Sequence[Mapping[str, Any]]) -> str:
    """File size in MB and median latency in ms, one bar a file."""
    figure, (left, right) = new_figure(7, 2.0, columns=2)
    names = []
    megabytes = []
    milliseconds = []
    for entry in latencies:
        names.append(shown(entry["name"], 20))
        megabytes.append(entry["size"] / 1e6)
        milliseconds.append(entry["median_ms"])
    _bars_by_file(left, names, megabytes, "file size, MB")
    _bars_by_file(right, names, milliseconds, "median latency, ms (batch 1, 1 thread)")
    says = []
    for name, size, latency in zip(names, megabytes, milliseconds, strict=True):
        says.append(f"{name}: {size:.2f} MB, {latency:.2f} ms")
    return svg(figure, f"Bars of file size and median latency. {'; '.join(says)}.")


def _bars_by_file(
    axes: Axes, names: Sequence[str], values: Sequence[float], label: str
) -> None:
    """Bars from the left, the first file on top."""
    places = np.arange(len(names))
    palette = (BASELINE, RUN, THIRD)
    colours = [palette[place % len(palette)] for place in places]
    bars = axes.barh(places, values, color=colours)
    axes.set_yticks(places, names, fontsize=8)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, max(values) * 1.2)
    axes.set_xlabel(label)
    axes.invert_yaxis()


def size_accuracy_latency(
    rows: Sequence[Mapping[str, Any]], accuracy: Mapping[str, float]
) -> str:
    """One disc a file: size across, accuracy up, area as its median latency."""
    figure, axes = new_figure(6, 3.4)
    slowest = max(row["median_ms"] for row in rows)
    for row in rows:
        name = row["name"]
        latency = row["median_ms"]
        place = (row["size"] / 1e6, accuracy[name])
        axes.scatter(*place, s=1500 * latency / slowest, color=RUN, alpha=0.5)
        axes.annotate(
            f"{shown(name)}, {latency:.2f} ms",
            place,
            xytext=(0, -24),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.margins(0.35)
    axes.set_xlabel("file size, MB (disc area: median latency)")
    axes.set_ylabel("target accuracy, %")
    says = []
    for row in rows:
        name = row["name"]
        says.append(f"{name}: {row['size'] / 1e6:.2f} MB, {accuracy[name]:.1f} %")
    return svg(figure, f"Files by size and target accuracy. {'; '.join(says)}.")


def confusion(classes: Sequence[str], counts: NDArray[np.int64]) -> str:
    """How the images of each class were answered: counts (C, C), row: class, column: answer; shown in % of the row."""
    number = len(classes)
    side = 1.6 + 0.42 * number
    figure, axes = new_figure(side + 0.6, side)
    of_class = np.maximum(counts.sum(1, keepdims=True), 1)
    percents = 100 * counts / of_class
    axes.imshow(percents, cmap="Blues", vmin=0, vmax=100)
    for row in range(number):
        for column in range(number):
            percent = percents[row, column]
            if counts[row, column]:
                colour = "white" if percent > 55 else "#1c2228"
                axes.text(
                    column,
                    row,
                    f"{percent:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=colour,
                )
    names = [shown(name, 20) for name in classes]
    axes.set_xticks(range(number), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(number), names, fontsize=8)
    axes.set_xlabel("answer, % of the class")
    axes.set_ylabel("class")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    says = f"Answers by class, {counts.trace()} of {counts.sum()} right."
    if wrong.any():
        row, column = divmod(int(wrong.argmax()), number)
        says += f" Most often {classes[row]} is taken for {classes[column]}: {wrong.max()} of {counts[row].sum()} images."
    return svg(figure, says)


def weight_error_bars(errors: Sequence[WeightError]) -> str:
    """SQNR in dB and clipped share in percent of each layer's weights, the first layer on top."""
    ratios = []
    clipped = []
    names = []
    for error in errors:
        ratios.append(error.sqnr if np.isfinite(error.sqnr) else np.nan)
        clipped.append(100 * error.clipped)
        names.append(f"{shown(error.name, 30)} ({error.bits})")
    figure = _bars_by_layer(
        names,
        {"SQNR of the weights, dB": ratios, "weights beyond the grid, %": clipped},
    )
    known = [error for error in errors if np.isfinite(error.sqnr)]
    says = f"SQNR and clipping of the weights of {len(errors)} layers."
    if known:
        worst = min(known, key=lambda error: error.sqnr)
        says += f" Lowest SQNR: {worst.sqnr:.1f} dB, {worst.name}."
    return svg(figure, says)


def cost_bars(costs: Sequence[LayerCost]) -> str:
    """Millions of multiply-adds an image, and kilobytes of weight codes, of each layer, the first layer on top."""
    names = []
    for cost in costs:
        bits = "float" if cost.bits is None else str(cost.bits)
        names.append(f"{shown(cost.name, 30)} ({bits})")
    figure = _bars_by_layer(
        names,
        {
            "multiply-adds an image, millions": [cost.macs / 1e6 for cost in costs],
            "weights, kB": [cost.bytes / 1e3 for cost in costs],
        },
    )
    dearest = max(costs, key=lambda cost: cost.macs)
    largest = max(costs, key=lambda cost: cost.bytes)
    says = f"Multiply-adds and bytes of {len(costs)} layers."
    says += f" Most multiply-adds: {dearest.macs / 1e6:.1f} million, {dearest.name}."
    says += f" Most bytes: {largest.bytes / 1e3:.1f} kB, {largest.name}."
    return svg(figure, says)


def _bars_by_layer(
    names: Sequence[str], columns: Mapping[str, Sequence[float]]
) -> Figure:
    """Two columns of bars, by what they show, with a row for each layer."""
    height = max(ROW * len(names), 0.5) + 0.8
    figure, both = new_figure(9, height, columns=2)
    places = np.arange(len(names))
    for axes, colour, (label, lengths) in zip(
        both, (RUN, THIRD), columns.items(), strict=True
    ):
        axes.barh(places, lengths, 0.75, color=colour)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks([])
        axes.set_xlabel(label)
    both[0].set_yticks(places, names, fontsize=6.5)
    return figure


def series(
    entries: Sequence[Mapping[str, Any]], key: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(steps, values of `key`) of the log entries that have it."""
    steps = []
    values = []
    for entry in entries:
        if key in entry:
            steps.append(entry["step"])
            values.append(entry[key])
    return np.array(steps, np.int64), np.array(values, np.float64)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a centred window of about 2 % of the curve. It shrinks to the first value at the start; at the end its left
    half stays."""
    half = max(len(values) // 100, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    left = np.minimum(index, half)
    right = np.minimum(left, len(values) - 1 - index)
    return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


def thinned(
    steps: NDArray[Any], values: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """At most about POINTS of a curve, first and last kept."""
    if len(steps) <= POINTS:
        return steps, values
    spaced = np.linspace(0, len(steps) - 1, POINTS).astype(int)
    indices = np.unique(spaced)
    return steps[indices], values[indices]


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, Any]:
    """Inches; axes as `Figure.subplots` gives them, without their upper and right spines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in np.atleast_1d(axes).flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shown(name: str, longest: int = LONGEST) -> str:
    """A name as text of a picture: on one line, at most `longest` characters of its two ends, and no formula between dollar
    signs. Matplotlib hides labels that are empty or begin with an underscore."""
    text = printable(name) or "(no name)"
    if text.startswith("_"):
        text = f" {text}"
    if len(text) > longest:
        head, tail = (longest - 1) // 2, longest // 2
        text = f"{text[:head]}…{text[-tail:]}"
    return text.replace("$", r"\$")


def svg(figure: Figure, says: str) -> str:
    """SVG without the XML header; ids are made unique so that several pictures share one page.

    says: what the picture shows, for who does not see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        # The reader's fonts draw the text; those here only measure it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", dpi=PIXELS, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    unique = f"f{abs(hash(text)) % 10**10}"

    def with_unique_ids(tag: re.Match[str]) -> str:
        return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{unique}-", tag[0])

    # Within tags alone: a name may read like an id
    text = re.sub("<[^<>]*>", with_unique_ids, text)
    label = html.escape(" ".join(printable(says).split()))
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
