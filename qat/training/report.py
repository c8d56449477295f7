"""report.html: one self-contained page for a run, made from what its folder holds."""

import json
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from numpy.typing import NDArray
from torch import nn

from qat import __version__
from qat.surgery.binarize import periodic_weights
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.training import figures
from qat.training.checkpoint import RunFolder, load_run
from qat.training.loop import mean_steps

HISTOGRAMS = 4

TEMPLATE = "report.html.j2"


def render(folder: RunFolder, baseline: RunFolder | None) -> str:
    """The page as text. What the folder does not hold (certificate, latency) is left out."""
    _, _, built = load_run(folder.path)
    results, first = folder.results(), baseline.results() if baseline else None
    rows = _accuracy_rows(results, first)
    runs = {"this run": folder.metrics()} | ({"full precision": baseline.metrics()} if baseline else {})
    latencies = _optional(folder, "latency.json") or []
    steps = mean_steps(built.model)
    recipe_values = json.loads((folder / "recipe.json").read_text())
    environment = Environment(
        autoescape=False, trim_blocks=True
    )  # pictures are HTML; texts are our own or escaped below
    return environment.from_string(files("qat.training").joinpath(TEMPLATE).read_text()).render(
        title=f"{recipe_values['backbone']} · {recipe_values['method']} · target {results['test_domain']}",
        version=__version__,
        recipe=recipe_values,
        results=results,
        baseline=first,
        rows=rows,
        accuracy_figure=figures.accuracy_bars(
            [r["name"] for r in rows],
            [r["run"] for r in rows],
            [r["baseline"] for r in rows] if first else None,
        ),
        loss_figure=figures.loss_curves(runs),
        profile_figure=figures.step_profile(steps) if steps else "",
        steps_figure=figures.step_curves(folder.metrics()) if steps else "",
        histograms=_histograms(built.model),
        frequency_figure=_frequency_figure(built.model),
        latencies=latencies,
        latency_figure=figures.size_and_latency(latencies) if latencies else "",
        certificate=_optional(folder, "certificate.json"),
        table=_escape(str(built.table)) if built.table else "",
        recipe_text=_escape(json.dumps(recipe_values, indent=2)),
    )


def _optional(folder: RunFolder, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def _accuracy_rows(results: dict[str, Any], baseline: dict[str, Any] | None) -> list[dict[str, Any]]:
    def percent(of: dict[str, Any] | None, domain: str) -> float | None:
        if of is None:
            return None
        return float(100 * (of["target"] if domain == of["test_domain"] else of["source_validation"][domain]))

    domains = [*results["source_validation"], results["test_domain"]]
    return [
        {
            "name": name + (" (target)" if name == results["test_domain"] else ""),
            "run": percent(results, name),
            "baseline": percent(baseline, name),
        }
        for name in domains
    ]


def _histograms(model: nn.Module) -> list[str]:
    layers = [m for m in model.modules() if isinstance(m, (QuantConv2d, QuantLinear))]
    picked = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, HISTOGRAMS).astype(int))] if layers else []
    return [_histogram(layer) for layer in picked]


@torch.no_grad()
def _frequency_figure(model: nn.Module) -> str:
    """BiPer's error by layer against its closed form; empty for a model without it."""
    layers: dict[str, tuple[float, float]] = {}
    for quantizer, weight in periodic_weights(model):
        magnitudes = quantizer.before_sign(weight.detach()).abs()
        error = (magnitudes - magnitudes.mean()).square().mean()
        layers[quantizer.name] = (float(quantizer.frequency) * float(weight.detach().abs().mean()), float(error))
    return figures.frequency_error(layers) if layers else ""


def _histogram(layer: QuantConv2d | QuantLinear) -> str:
    quantizer = layer.weight_quantizer
    step = quantizer.step.view(-1, *[1] * (layer.weight.dim() - 1)) if quantizer.step.dim() else quantizer.step
    scaled: NDArray[np.float32] = (layer.weight.detach() / step).flatten().to(torch.float32).numpy()
    title = f"{quantizer.name} ({quantizer.spec.bits} bits)"
    return figures.weight_histogram(title, scaled, quantizer.spec.qmin, quantizer.spec.qmax)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
