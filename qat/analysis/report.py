"""report.html: one self-contained page for a run, made from what its folder holds."""

import json
import re
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
from qat.analysis.hardest import lost_images
from qat.analysis.inspection import conflicted, threshold_text
from qat.analysis.scale_view import open_view
from qat.analysis.verdict import class_accuracies, class_losses_of, judge
from qat.analysis.weight_errors import weight_errors
from qat.quantizers.contract import Quantizer
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import KNOWN, Recipe, to_json
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
from qat.surgery.table import QuantizationTable
from qat.train.scale_scalars import mean_scales

HISTOGRAMS = 4
MOST_CONFLICTED = 10
MOST_CLASSES = 12
MOST_CONFUSED = 20  # classes in a picture of answers by class

TEMPLATE = "report.html.j2"
MAX_DROP = 1.0  # percentage points
HEADING = re.compile("<h2>(.*?)</h2>")
CONTENTS = "<nav></nav>"


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
    results = results_of(folder)
    baseline_results = None if baseline is None else results_of(baseline)
    baselines = [] if baseline is None else [baseline]
    for other in [*baselines, *beside]:
        _require_same_domain(folder, other)
    recipe_values = read_json(folder / "recipe.json")
    require(recipe_values, RECIPE, folder / "recipe.json")
    latencies = optional(folder, "latency.json", LATENCIES) or []
    certificate = optional(folder, "certificate.json", CERTIFICATE)
    pairs = _predictions(folder, baseline)
    verdict = judge(
        results,
        recipe_values,
        _comparison(pairs, results, max_drop),
        certificate,
        latencies,
        built.table.float_share if built.table else None,
        _class_losses(pairs, results),
    )
    method = " ".join([recipe_values["method"], *recipe.precision.split()])
    page: dict[str, Any] = {
        "title": f"{recipe_values['backbone']} · {method} · target {results['test_domain']}",
        "version": __version__,
        "recipe": recipe_values,
        "recipe_text": json.dumps(recipe_values, indent=2),
        "changed": _changed(recipe, recipe_values),
        "results": results,
        "baseline": baseline_results,
        "rows": _accuracy_rows(results, baseline_results),
        "beside": None,
        "latencies": latencies,
        "latency_figure": "",
        "certificate": certificate,
        "verdict": verdict,
        "table": str(built.table) if built.table else "",
        "cost_figure": _cost_figure(built.table),
        "lost": _lost(baseline, folder),
    }
    page |= _curves(folder, baseline)
    colours = _colours(baseline)
    page["class_figure"] = _class_figure(pairs, results, colours)
    page["confusion_figure"] = _confusion_figure(folder, results)
    page |= _pictures_of_model(folder, built.model)
    if beside:
        page["beside"] = _side_by_side([*baselines, folder, *beside])
    if latencies:
        page["latency_figure"] = Markup(figures.size_and_latency(latencies))
    # Whatever a file says is text; only pictures, which are Markup, are HTML.
    environment = Environment(autoescape=True, trim_blocks=True, finalize=_shown)
    environment.filters["with_code"] = _with_code
    template = files("qat.analysis").joinpath(TEMPLATE).read_text()
    return _with_contents(environment.from_string(template).render(page))


def _with_contents(page: str) -> str:
    """`page` with links to its headings where the template leaves their place. Names are escaped: no heading is one."""
    links: list[str] = []

    def numbered(heading: re.Match[str]) -> str:
        links.append(f'<a href="#part{len(links)}">{heading[1]}</a>')
        return f'<h2 id="part{len(links) - 1}">{heading[1]}</h2>'

    page = HEADING.sub(numbered, page)
    return page.replace(CONTENTS, f"<nav>{' '.join(links)}</nav>")


def _changed(recipe: Recipe, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(flag, value) of all that differs from the method's defaults."""
    if recipe.method not in KNOWN:
        return []
    defaults = to_json(KNOWN[recipe.method])
    changed = []
    for name, default in defaults.items():
        if name in values and values[name] != default:
            flag = f"--{name.replace('_', '-')}"
            changed.append((flag, json.dumps(values[name])))
    return changed


def _cost_figure(table: QuantizationTable | None) -> Markup:
    """Multiply-adds and bytes by layer; empty for a net in full precision."""
    costs = []
    for row in () if table is None else table.rows:
        bits = None if row.weight is None else row.weight.bits
        size = row.weights * (32 if bits is None else bits) / 8
        costs.append(figures.LayerCost(row.name, row.macs, size, bits))
    return Markup(figures.cost_bars(costs)) if costs else Markup("")


def _lost(baseline: RunFolder | None, folder: RunFolder) -> dict[str, Any] | None:
    """Images that the baseline answers rightly and the run does not, or the reason why they cannot be shown."""
    if baseline is None:
        return None
    try:
        return {"images": lost_images(baseline, folder), "reason": ""}
    except RecipeError as error:
        return {"images": [], "reason": str(error)}


def _curves(folder: RunFolder, baseline: RunFolder | None) -> dict[str, Markup]:
    """Accuracy and loss of the run, beside those of its baseline if it has one."""
    runs = {"this run": folder}
    if baseline is not None:
        runs = {"full precision": baseline, "this run": folder}
    colours = _colours(baseline)
    selected = {name: results_of(run)["selected_step"] for name, run in runs.items()}
    losses = figures.loss_curves(_metrics(runs), colours, selected)
    return {
        "accuracy_figure": _accuracy_figure(runs, colours),
        "loss_figure": Markup(losses),
    }


def _colours(baseline: RunFolder | None) -> list[str]:
    """Of the baseline, if there is one, and of the run."""
    return [figures.RUN] if baseline is None else [figures.BASELINE, figures.RUN]


def _pictures_of_model(folder: RunFolder, model: nn.Module) -> dict[str, Any]:
    """Scales, weights and frequencies; those figures are empty that the model has nothing for."""
    profile = Markup("")
    over_training = Markup("")
    scales = mean_scales(model)
    if scales:
        profile = Markup(figures.scale_profile(scales))
        over_training = Markup(figures.scale_curves(metrics_of(folder)))
    return {
        "profile_figure": profile,
        "scales_figure": over_training,
        "scales": _scales(folder, model),
        "histograms": _histograms(model),
        "weight_error_figure": _weight_error_figure(model),
        "frequency_figure": _frequency_figure(model),
    }


def _metrics(runs: Mapping[str, RunFolder]) -> dict[str, list[dict[str, Any]]]:
    """By name of the run, the entries of its log."""
    metrics = {}
    for name, run in runs.items():
        metrics[name] = metrics_of(run)
    return metrics


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


def _class_losses(
    pairs: tuple[Predictions, Predictions] | None, results: Mapping[str, Any]
) -> list[str]:
    """A sentence for each class of the target that lost much against the baseline; none without one."""
    if pairs is None:
        return []
    classes = results.get("classes") or ()
    return class_losses_of(*pairs, results["test_domain"], classes)


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


def _confusion_figure(folder: RunFolder, results: Mapping[str, Any]) -> Markup:
    """Answers by class on the target; empty for more classes than a picture can name, and for a run without predictions."""
    classes = results.get("classes") or ()
    domain = results["test_domain"]
    if (
        not 1 < len(classes) <= MOST_CONFUSED
        or not (folder / "predictions.npz").exists()
    ):
        return Markup("")
    predictions = folder.predictions()
    if domain not in predictions:
        return Markup("")
    predicted, labels = predictions[domain]
    counts = answers_by_class(predicted, labels, len(classes))
    return Markup(figures.confusion(classes, counts))


def answers_by_class(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """int64 (classes, classes): how many images of the class of a row were answered as the class of a column."""
    counts = np.zeros((classes, classes), np.int64)
    is_known = (labels < classes) & (predicted < classes)
    np.add.at(counts, (labels[is_known], predicted[is_known]), 1)
    return counts


def _shown(value: Any) -> Any:
    """What the page shows of a value: text without characters that a page cannot hold."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, newlines=True)
    return value


def _with_code(sentence: str) -> Markup:
    """`sentence` with what stands between backticks as code."""
    page = Markup("")
    for index, part in enumerate(sentence.split("`")):
        shown = printable(part, newlines=True)
        page += Markup("<code>{}</code>").format(shown) if index % 2 else shown
    return page


def _require_same_domain(folder: RunFolder, other: RunFolder) -> None:
    ours = results_of(folder)
    theirs = results_of(other)
    our_sources = sorted(ours["source_validation"])
    their_sources = sorted(theirs["source_validation"])
    compared = (
        ("test domain", ours["test_domain"], theirs["test_domain"]),
        ("source domains", our_sources, their_sources),
    )
    for name, here, there in compared:
        if here != there:
            raise RecipeError(
                f"{other.path}: its {name} is {there}, {folder.path} has {here}; show like with like"
            )
    require_same_classes(
        ours.get("classes"), theirs.get("classes"), str(folder.path), str(other.path)
    )


def _percents(results: dict[str, Any]) -> dict[str, float]:
    """Domain -> accuracy in percent, the target last."""
    percents = {}
    for domain, accuracy in results["source_validation"].items():
        percents[domain] = 100 * accuracy
    percents[f"{results['test_domain']} (target)"] = 100 * results["target"]
    return percents


def _accuracy_rows(
    results: dict[str, Any], baseline: dict[str, Any] | None
) -> list[dict[str, Any]]:
    of_baseline = {} if baseline is None else _percents(baseline)
    rows = []
    for name, percent in _percents(results).items():
        rows.append({"name": name, "run": percent, "baseline": of_baseline.get(name)})
    return rows


def _accuracy_figure(runs: Mapping[str, RunFolder], colours: Sequence[str]) -> Markup:
    """Bars in the order of the first run's domains."""
    domains: list[str] = []
    percents = {}
    for name, run in runs.items():
        by_domain = _percents(results_of(run))
        domains = domains or list(by_domain)
        percents[name] = [by_domain[domain] for domain in domains]
    return Markup(figures.accuracy_bars(domains, percents, colours))


def _side_by_side(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Table and pictures of several runs; a column or colour each."""
    runs = labelled(folders)
    colours = []
    for index in range(len(runs)):
        colours.append(figures.COLOURS[index % len(figures.COLOURS)])
    percents = []
    means = []
    for run in runs.values():
        by_domain = _percents(results_of(run))
        *of_sources, _ = by_domain.values()
        percents.append(by_domain)
        means.append(float(np.mean(of_sources)))
    rows = []
    for domain in percents[0]:
        rows.append((domain, [by_domain[domain] for by_domain in percents]))
    metrics = _metrics(runs)
    scales_figure = Markup("")
    if any(_has_scales(entries) for entries in metrics.values()):
        scales_figure = Markup(figures.scale_medians(metrics, colours))
    return {
        "names": list(runs),
        "rows": rows,
        "means": means,
        "accuracy_figure": _accuracy_figure(runs, colours),
        "loss_figure": Markup(figures.loss_curves(metrics, colours)),
        "scales_figure": scales_figure,
    }


def _has_scales(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a log has the scales of a quantized net."""
    return any(entry.get("scales") for entry in entries)


def labelled(folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Each run by its method and bits, and by its folder's name too where that leaves two alike. The same folder twice counts
    once."""
    by_path = {}
    for folder in folders:
        by_path[folder.path.resolve()] = folder
    different = list(by_path.values())
    labels = []
    for folder in different:
        recipe = folder.recipe()
        labels.append(f"{recipe.method} {recipe.precision}".strip())
    longer = []
    for label, folder in zip(labels, different, strict=True):
        is_alone = labels.count(label) == 1
        longer.append(label if is_alone else f"{label} ({folder.path.name})")
    runs = {}
    for number, (label, folder) in enumerate(zip(longer, different, strict=True), 1):
        is_alone = longer.count(label) == 1
        runs[label if is_alone else f"{label} #{number}"] = folder
    return runs


def _scales(folder: RunFolder, model: nn.Module) -> dict[str, Any] | None:
    """Pictures of the run's scale log, where it kept one."""
    if not (folder / "scales.json").exists():
        return None
    view = open_view(folder.path, model)
    maps = []
    for kind in QUANTIZER_KINDS:
        maps.append(Markup(scale_figures.disorder_map(view, kind)))
    return {
        "window": view.width,
        "windows": len(view.ends),
        "threshold": threshold_text(view.rule),
        "silent": int(view.silent.all(axis=0).sum()),
        "count": len(view.names),
        "curves": Markup(scale_figures.disorder_curves(view)),
        "maps": maps,
        "conflict": Markup(scale_figures.conflict_curves(view)),
        "rows": conflicted(view, metrics_of(folder), MOST_CONFLICTED),
    }


def _histograms(model: nn.Module) -> list[Markup]:
    """Of HISTOGRAMS layers, spread over the depth of the net."""
    weights = quantized_weights(model)
    if not weights:
        return []
    places = np.linspace(0, len(weights) - 1, HISTOGRAMS).astype(int)
    histograms = []
    for place in np.unique(places):
        weight, quantizer = weights[place]
        histograms.append(_histogram(weight, quantizer))
    return histograms


@torch.no_grad()
def _frequency_figure(model: nn.Module) -> Markup:
    """BiPer's error by layer against its closed form; empty for a model without it."""
    layers: dict[str, tuple[float, float]] = {}
    for quantizer, weight in periodic_weights(model):
        magnitudes = quantizer.before_sign(weight.detach()).abs()
        error = (magnitudes - magnitudes.mean()).square().mean()
        mean_magnitude = float(weight.detach().abs().mean())
        mean_argument = float(quantizer.frequency) * mean_magnitude
        layers[quantizer.name] = (mean_argument, float(error))
    if not layers:
        return Markup("")
    return Markup(figures.frequency_error(layers))


def _weight_error_figure(model: nn.Module) -> Markup:
    """Empty for a model without weights of 2 bits or more."""
    errors = weight_errors(model)
    return Markup(figures.weight_error_bars(errors)) if errors else Markup("")


def _histogram(weight: nn.Parameter, quantizer: Quantizer) -> Markup:
    scale = quantizer.scale
    if scale.dim():
        ones = [1] * (weight.dim() - 1)
        scale = scale.view(-1, *ones)
    in_scales = (weight.detach() / scale).flatten()
    scaled: NDArray[np.float32] = in_scales.to(torch.float32).numpy()
    spec = quantizer.spec
    title = f"{quantizer.name} ({spec.bits} bits)"
    return Markup(figures.weight_histogram(title, scaled, spec.qmin, spec.qmax))
