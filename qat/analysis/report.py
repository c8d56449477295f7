"""report.html: one self-contained page for a run, made from what its folder holds."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray
from torch import nn

from edgeqat.files import read_json
from edgeqat.terminal import printable
from qat import __version__
from qat.analysis import figures, scale_figures
from qat.analysis.compare import (
    Comparison,
    Predictions,
    compare_predictions,
    require_same_classes,
)
from qat.analysis.inspection import conflicted, threshold_text
from qat.analysis.scale_view import open_view
from qat.analysis.verdict import class_accuracies, class_losses_of, judge
from qat.quantizers.contract import Quantizer
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe
from qat.runs.records import (
    CERTIFICATE,
    LATENCIES,
    RECIPE,
    metrics_of,
    optional,
    require,
    results_of,
)
from qat.runs.run_folder import RunFolder
from qat.runs.scale_log import QUANTIZER_KINDS
from qat.surgery.binarize import periodic_weights
from qat.surgery.swap import quantized_weights
from qat.train.scale_scalars import mean_scales

HISTOGRAMS = 4
MOST_CONFLICTED = 10
MOST_CLASSES = 12

TEMPLATE = "report.html.j2"
MAX_DROP = 1.0  # percentage points


def render(
    folder: RunFolder,
    baseline: RunFolder | None,
    beside: Sequence[RunFolder] = (),
    max_drop: float = MAX_DROP,
) -> str:
    """The page as text. What the folder does not hold (scale log, certificate, latency) is left out.

    beside: more runs, shown side by side with this one and the baseline. Raises RecipeError when any of them was tested on
    another domain, or is not finished.
    max_drop: percentage points that the verdict allows against the baseline.
    """
    _, recipe, built = load_run(folder.path)
    results, first = results_of(folder), results_of(baseline) if baseline else None
    baselines = [baseline] if baseline else []
    for other in [*baselines, *beside]:
        _require_same_domain(folder, other)
    rows = _accuracy_rows(results, first)
    latencies = optional(folder, "latency.json", LATENCIES) or []
    certificate = optional(folder, "certificate.json", CERTIFICATE)
    scales = mean_scales(built.model)
    pairs = _predictions(folder, baseline)
    classes = results.get("classes") or ()
    recipe_values = read_json(folder / "recipe.json")
    require(recipe_values, RECIPE, folder / "recipe.json")
    method = [recipe_values["method"], *recipe.precision.split()]
    # Whatever a file says is text; only pictures, which are Markup, are HTML.
    environment = Environment(autoescape=True, trim_blocks=True, finalize=_shown)
    shown = ({"full precision": baseline} if baseline else {}) | {"this run": folder}
    colours = (figures.BASELINE, figures.RUN) if baseline else (figures.RUN,)
    return environment.from_string(
        files("qat.analysis").joinpath(TEMPLATE).read_text()
    ).render(
        title=f"{recipe_values['backbone']} · {' '.join(method)} · target {results['test_domain']}",
        version=__version__,
        verdict=judge(
            results,
            recipe_values,
            _comparison(pairs, results, max_drop),
            certificate,
            latencies,
            built.table.float_share if built.table else None,
            class_losses_of(*pairs, results["test_domain"], classes) if pairs else (),
        ),
        class_figure=_class_figure(pairs, results, colours),
        recipe=recipe_values,
        results=results,
        baseline=first,
        rows=rows,
        accuracy_figure=_accuracy_figure(shown, colours),
        loss_figure=Markup(
            figures.loss_curves(
                {name: metrics_of(run) for name, run in shown.items()}, colours
            )
        ),
        beside=_side_by_side([*baselines, folder, *beside]) if beside else None,
        profile_figure=Markup(figures.scale_profile(scales)) if scales else "",
        scales_figure=Markup(figures.scale_curves(metrics_of(folder)))
        if scales
        else "",
        scales=_scales(folder, built.model),
        histograms=_histograms(built.model),
        frequency_figure=_frequency_figure(built.model),
        latencies=latencies,
        latency_figure=Markup(figures.size_and_latency(latencies)) if latencies else "",
        certificate=certificate,
        table=str(built.table) if built.table else "",
        recipe_text=json.dumps(recipe_values, indent=2),
    )


def _predictions(
    folder: RunFolder, baseline: RunFolder | None
) -> tuple[Predictions, Predictions] | None:
    """Those of the baseline and of the run; None where there is no baseline, or other images were tested."""
    if baseline is None:
        return None
    first, second = baseline.predictions(), folder.predictions()
    if first.keys() != second.keys():
        return None
    for name in first:
        if not np.array_equal(first[name][1], second[name][1]):
            return None
    return first, second


def _comparison(
    pairs: tuple[Predictions, Predictions] | None,
    results: Mapping[str, Any],
    max_drop: float,
) -> Comparison | None:
    if pairs is None:
        return None
    return compare_predictions(*pairs, results["test_domain"], max_drop)


def _class_figure(
    pairs: tuple[Predictions, Predictions] | None,
    results: Mapping[str, Any],
    colours: Sequence[str],
) -> Markup:
    """Accuracy per class on the target; empty without a baseline, and for more classes than a picture can name."""
    classes = results.get("classes") or ()
    domain = results["test_domain"]
    if pairs is None or not 0 < len(classes) <= MOST_CLASSES or domain not in pairs[0]:
        return Markup("")
    percents = {}
    for name, predictions in zip(("full precision", "this run"), pairs, strict=True):
        found = class_accuracies(predictions, domain, len(classes))
        percents[name] = [0.0 if value is None else value for value in found]
    return Markup(figures.accuracy_bars(classes, percents, colours))


def _shown(value: Any) -> Any:
    """What the page shows of a value: text without characters that a page cannot hold."""
    return (
        printable(value, newlines=True)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def _require_same_domain(folder: RunFolder, other: RunFolder) -> None:
    ours, theirs = results_of(folder), results_of(other)
    for name, a, b in (
        ("test domain", ours["test_domain"], theirs["test_domain"]),
        (
            "source domains",
            sorted(ours["source_validation"]),
            sorted(theirs["source_validation"]),
        ),
    ):
        if a != b:
            raise RecipeError(
                f"{other.path}: its {name} is {b}, {folder.path} has {a}; show like with like"
            )
    require_same_classes(
        ours.get("classes"), theirs.get("classes"), str(folder.path), str(other.path)
    )


def _percents(results: dict[str, Any]) -> dict[str, float]:
    """Domain -> accuracy in percent, the target last."""
    target = f"{results['test_domain']} (target)"
    return {d: 100 * a for d, a in results["source_validation"].items()} | {
        target: 100 * results["target"]
    }


def _accuracy_rows(
    results: dict[str, Any], baseline: dict[str, Any] | None
) -> list[dict[str, Any]]:
    first = _percents(baseline) if baseline else {}
    return [
        {"name": name, "run": value, "baseline": first.get(name)}
        for name, value in _percents(results).items()
    ]


def _accuracy_figure(runs: Mapping[str, RunFolder], colours: Sequence[str]) -> Markup:
    found = {name: _percents(results_of(run)) for name, run in runs.items()}
    domains = list(next(iter(found.values())))
    percents = {
        name: [values[domain] for domain in domains] for name, values in found.items()
    }
    return Markup(figures.accuracy_bars(domains, percents, colours))


def _side_by_side(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Table and pictures of several runs; a column or colour each."""
    runs = labelled(folders)
    colours = [figures.COLOURS[i % len(figures.COLOURS)] for i in range(len(runs))]
    percents = [_percents(results_of(run)) for run in runs.values()]
    metrics = {name: metrics_of(run) for name, run in runs.items()}
    quantized = any(
        entry.get("scales") for entries in metrics.values() for entry in entries
    )
    return {
        "names": list(runs),
        "rows": [(domain, [p[domain] for p in percents]) for domain in percents[0]],
        "means": [float(np.mean(list(p.values())[:-1])) for p in percents],
        "accuracy_figure": _accuracy_figure(runs, colours),
        "loss_figure": Markup(figures.loss_curves(metrics, colours)),
        "scales_figure": Markup(figures.scale_medians(metrics, colours))
        if quantized
        else "",
    }


def labelled(folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Each run by its method and bits, and by its folder's name too where that leaves two alike. The same folder twice counts
    once."""
    once = list({folder.path.resolve(): folder for folder in folders}.values())
    names = [_label(folder.recipe()) for folder in once]
    tails = [
        f" ({folder.path.name})" if names.count(n) > 1 else ""
        for n, folder in zip(names, once, strict=True)
    ]
    full = [n + t for n, t in zip(names, tails, strict=True)]
    return {
        (f"{name} #{i + 1}" if full.count(name) > 1 else name): folder
        for i, (name, folder) in enumerate(zip(full, once, strict=True))
    }


def _label(recipe: Recipe) -> str:
    return f"{recipe.method} {recipe.precision}".strip()


def _scales(folder: RunFolder, model: nn.Module) -> dict[str, Any] | None:
    """Pictures of the run's scale log, where it kept one."""
    if not (folder / "scales.json").exists():
        return None
    view = open_view(folder.path, model)
    return {
        "window": view.width,
        "windows": len(view.ends),
        "threshold": threshold_text(view.rule),
        "silent": int(view.silent.all(axis=0).sum()),
        "count": len(view.names),
        "curves": Markup(scale_figures.disorder_curves(view)),
        "maps": [
            Markup(scale_figures.disorder_map(view, kind)) for kind in QUANTIZER_KINDS
        ],
        "conflict": Markup(scale_figures.conflict_curves(view)),
        "rows": conflicted(view, metrics_of(folder), MOST_CONFLICTED),
    }


def _histograms(model: nn.Module) -> list[Markup]:
    found = quantized_weights(model)
    picked = (
        set(np.linspace(0, len(found) - 1, HISTOGRAMS).astype(int)) if found else set()
    )
    return [_histogram(*found[i]) for i in sorted(picked)]


@torch.no_grad()
def _frequency_figure(model: nn.Module) -> Markup:
    """BiPer's error by layer against its closed form; empty for a model without it."""
    layers: dict[str, tuple[float, float]] = {}
    for quantizer, weight in periodic_weights(model):
        magnitudes = quantizer.before_sign(weight.detach()).abs()
        error = (magnitudes - magnitudes.mean()).square().mean()
        layers[quantizer.name] = (
            float(quantizer.frequency) * float(weight.detach().abs().mean()),
            float(error),
        )
    return Markup(figures.frequency_error(layers)) if layers else Markup("")


def _histogram(weight: nn.Parameter, quantizer: Quantizer) -> Markup:
    scale = (
        quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
        if quantizer.scale.dim()
        else quantizer.scale
    )
    scaled: NDArray[np.float32] = (
        (weight.detach() / scale).flatten().to(torch.float32).numpy()
    )
    title = f"{quantizer.name} ({quantizer.spec.bits} bits)"
    return Markup(
        figures.weight_histogram(
            title, scaled, quantizer.spec.qmin, quantizer.spec.qmax
        )
    )
