"""The report's pictures, each a function from recorded data to SVG text."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qat.quantizers.biper import quantization_error

BASELINE, RUN, THIRD = "#8a8f98", "#1f6f8b", "#c8553d"


def accuracy_bars(domains: Sequence[str], run: Sequence[float], baseline: Sequence[float] | None) -> str:
    """Accuracy in percent per domain, the full-precision baseline beside the run."""
    figure, axes = _figure(7, 2.8)
    places = np.arange(len(domains))
    if baseline is not None:
        _bars(axes, places - 0.2, baseline, BASELINE, "full precision")
    _bars(axes, places + (0.2 if baseline is not None else 0), run, RUN, "this run")
    axes.set_xticks(places, domains)
    axes.set_ylim(0, 112)
    axes.set_ylabel("top-1 accuracy, %")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return _svg(figure)


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss (smoothed over about 2 % of the run) and held-out source accuracy over steps."""
    figure, axes = _figure(7, 2.8)
    accuracy_axes = axes.twinx()
    for (name, entries), colour in zip(runs.items(), (RUN, BASELINE, THIRD), strict=False):
        steps, loss = _series(entries, "loss")
        axes.plot(steps, _smooth(loss), color=colour, label=f"loss, {name}")
        steps, accuracy = _series(entries, "source_mean")
        accuracy_axes.plot(steps, 100 * accuracy, color=colour, linestyle="--", marker=".", label=f"accuracy, {name}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    accuracy_axes.set_ylabel("held-out source accuracy, %")
    handles = [*axes.get_lines(), *accuracy_axes.get_lines()]
    axes.legend(handles=handles, frameon=False, ncols=len(runs), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8)
    return _svg(figure)


def step_curves(entries: Sequence[Mapping[str, Any]]) -> str:
    """Every quantizer's step relative to its first recorded value, over training: weights, inputs, stream."""
    recorded = [(e["step"], e["steps"]) for e in entries if e.get("steps")]
    figure, axes_row = _figure(9, 2.8, columns=3)
    for axes, kind in zip(axes_row, ("weight", "input", "stream"), strict=True):
        names = [n for n in recorded[0][1] if _kind(n) == kind] if recorded else []
        for index, name in enumerate(names):
            values = np.array([steps[name] for _, steps in recorded])
            shade = 0.25 + 0.6 * index / max(len(names) - 1, 1)
            axes.plot(
                [s for s, _ in recorded],
                values / values[0],
                linewidth=0.9,
                color=(0.12, shade, 0.85 - 0.5 * shade),
            )
        axes.set_title(f"{kind} steps ({len(names)})", fontsize=9)
        axes.set_xlabel("step")
    axes_row[0].set_ylabel("relative to the first evaluation")
    return _svg(figure)


def step_profile(steps: Mapping[str, float]) -> str:
    """The learned mean step of every quantizer, in layer order, logarithmic."""
    figure, axes = _figure(9, 2.6)
    for kind, colour in (("weight", RUN), ("input", THIRD), ("stream", BASELINE)):
        values = [v for n, v in steps.items() if _kind(n) == kind]
        axes.semilogy(range(len(values)), values, marker="o", markersize=3, linewidth=0.8, color=colour, label=kind)
    axes.set_xlabel("quantizer, in layer order")
    axes.set_ylabel("step")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return _svg(figure)


def weight_histogram(name: str, scaled: NDArray[np.float32], qmin: int, qmax: int) -> str:
    """Latent weights in units of their step, over the grid of their codes."""
    figure, axes = _figure(4.4, 2.4)
    reach = (qmin - 1.5, qmax + 1.5)
    axes.hist(np.clip(scaled, *reach), bins=160, range=reach, color=RUN)
    if qmax - qmin <= 32:
        for code in range(qmin, qmax + 1):
            axes.axvline(code, color=THIRD, linewidth=0.6, zorder=0)
    axes.set_xlabel("weight / step (lines: codes)")
    axes.set_yticks([])
    axes.set_title(name, fontsize=9)
    return _svg(figure)


def frequency_error(layers: Mapping[str, tuple[float, float]]) -> str:
    """BiPer's quantization error over a = frequency · mean |w|: the closed form for Laplacian weights as a line, and a dot,
    (a, measured error), for every layer."""
    figure, axes = _figure(6, 2.8)
    a = np.geomspace(0.05, 20, 300)
    axes.plot(
        a, [quantization_error(float(value)) for value in a], color=BASELINE, label="closed form, Laplacian weights"
    )
    where, errors = zip(*layers.values(), strict=True)
    axes.scatter(where, errors, color=RUN, s=18, zorder=3, label="layers")
    axes.set_xscale("log")
    axes.set_xlabel("frequency × mean |weight|")
    axes.set_ylabel("mean squared error")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def size_and_latency(latencies: Sequence[Mapping[str, Any]]) -> str:
    """File size in MB and median latency in ms, one bar a file."""
    figure, (size, speed) = _figure(7, 2.0, columns=2)
    names = [entry["name"] for entry in latencies]
    colours = [BASELINE, RUN, THIRD][: len(names)]
    for axes, values, label in (
        (size, [entry["size"] / 1e6 for entry in latencies], "file size, MB"),
        (speed, [entry["median_ms"] for entry in latencies], "median latency, ms (batch 1, 1 thread)"),
    ):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_xlim(0, max(values) * 1.2)
        axes.set_xlabel(label)
        axes.invert_yaxis()
    return _svg(figure)


def size_accuracy_latency(rows: Sequence[Mapping[str, Any]], accuracy: Mapping[str, float]) -> str:
    """One disc a file: size across, accuracy up, area as its median latency."""
    figure, axes = _figure(6, 3.4)
    slowest = max(row["median_ms"] for row in rows)
    for row in rows:
        x, y = row["size"] / 1e6, accuracy[row["name"]]
        axes.scatter(x, y, s=1500 * row["median_ms"] / slowest, color=RUN, alpha=0.5)
        axes.annotate(f"{row['name']}, {row['median_ms']:.2f} ms", (x, y), xytext=(0, -24), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.margins(0.35)
    axes.set_xlabel("file size, MB (disc area: median latency)")
    axes.set_ylabel("target accuracy, %")
    return _svg(figure)


def _kind(name: str) -> str:
    return "stream" if "#" in name else name.rsplit(".", 1)[-1]


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    found = [(e["step"], e[key]) for e in entries if key in e]
    return np.array([s for s, _ in found], np.int64), np.array([v for _, v in found], np.float64)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a centred window of about 2 % of the curve that shrinks at both ends."""
    half = max(len(values) // 100, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _bars(axes: Axes, places: NDArray[np.floating[Any]], values: Sequence[float], colour: str, label: str) -> None:
    bars = axes.bar(places, values, 0.38, color=colour, label=label)
    axes.bar_label(bars, fmt="%.1f", fontsize=8)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """SVG without the XML header; ids are made unique so that several pictures share one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    unique = f"f{abs(hash(text)) % 10**10}"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{unique}-", text)
