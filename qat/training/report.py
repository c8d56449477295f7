"""report.html: one self-contained page for a run, made from what its folder holds."""

import json
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from numpy.typing import NDArray
from torch import nn

from qat import __version__
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.training import figures
from qat.training.checkpoint import RunFolder, load_run
from qat.training.loop import mean_steps

HISTOGRAMS = 4

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2228; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .15rem .9rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #999; font-weight: 600 }
svg { max-width: 100%; height: auto } .row { display: flex; flex-wrap: wrap } .ok { color: #1d7a3c } .bad { color: #b3261e }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: 12px; line-height: 1.35 } .dim { color: #667 }
</style>
<h1>{{ title }}</h1>
<p class="dim">edgeqat {{ version }} · selection: {{ results.selection }} · step {{ results.selected_step }} of
{{ recipe.steps }} · {{ "%.0f"|format(results.train_seconds) }} s of training at
{{ "%.0f"|format(results.images_per_second) }} images/s · seed {{ recipe.seed }}, split seed {{ recipe.trial_seed }}</p>
<h2>Accuracy</h2>
{{ accuracy_figure }}
<table><tr><th>domain</th>{% if baseline %}<th>full precision, %</th>{% endif %}<th>this run, %</th>{% if baseline %}<th>change</th>{% endif %}</tr>
{% for row in rows %}<tr><td>{{ row.name }}</td>{% if baseline %}<td>{{ "%.2f"|format(row.baseline) }}</td>{% endif %}<td>{{ "%.2f"|format(row.run) }}</td>{% if baseline %}<td>{{ "%+.2f"|format(row.run - row.baseline) }}</td>{% endif %}</tr>
{% endfor %}</table>
<h2>Training</h2>
{{ loss_figure }}
{% if profile_figure %}<h2>Learned steps</h2>
{{ profile_figure }}
{{ steps_figure }}
<h2>Weights on their grid</h2>
<div class="row">{% for histogram in histograms %}{{ histogram }}{% endfor %}</div>{% endif %}
{% if latency_figure %}<h2>Size and latency</h2>
{{ latency_figure }}
<table><tr><th>file</th><th>size, MB</th><th>median, ms</th><th>p95, ms</th><th>speed-up</th></tr>
{% for entry in latencies %}<tr><td>{{ entry.name }}</td><td>{{ "%.2f"|format(entry.size / 1e6) }}</td><td>{{ "%.2f"|format(entry.median_ms) }}</td><td>{{ "%.2f"|format(entry.p95_ms) }}</td><td>{{ "%.2f"|format(entry.speedup) }}×</td></tr>
{% endfor %}</table>
<p class="dim">ONNX Runtime, batch 1, one thread, runs interleaved in one process: the ratio counts, the milliseconds are this machine's.</p>{% endif %}
{% if certificate %}<h2>Certificate: <span class="{{ 'ok' if certificate.passed else 'bad' }}">{{ "passed" if certificate.passed else "FAILED" }}</span></h2>
<p>{{ certificate.file }} · ONNX Runtime {{ certificate.runtime }} · {{ certificate.images }} images · {{ "{:,}".format(certificate.weight_codes) }} weight codes in
{{ certificate.layers }} layers{% if certificate.stored %}, <span class="bad">{{ certificate.stored|length }} layers not as trained</span>{% else %}, all as trained{% endif %} ·
{{ certificate.integer_kernels }} integer kernels</p>
{% for layer, what in certificate.stored.items() %}<p class="bad">{{ layer }}: {{ what }}</p>{% endfor %}
<table><tr><th>optimisation level</th><th>codes compared</th><th>mismatches</th></tr>
{% for level in certificate.levels %}<tr><td>{{ level.level }}</td><td>{{ "{:,}".format(level.codes) }}</td><td>{{ level.mismatches.values()|sum }}</td></tr>
{% endfor %}</table>
<table><tr><th>on the certificate's images</th><th>accuracy, %</th></tr>
{% for name, value in certificate.accuracy.items() %}<tr><td>{{ name }}</td><td>{{ "%.2f"|format(100 * value) }}</td></tr>
{% endfor %}</table>
<p class="dim">Fake-quantized net against the integer definition: {{ "%.1e"|format(certificate.fake_quantized_mismatch_rate) }} of the codes differ (bias rounding), top-1 agreement {{ "%.2f"|format(100 * certificate.top1_agreement) }} %.</p>
{% for note in certificate.notes %}<p class="dim">{{ note }}</p>{% endfor %}{% endif %}
{% if table %}<h2>Layers</h2><pre>{{ table }}</pre>{% endif %}
<h2>Recipe</h2><pre>{{ recipe_text }}</pre>
</html>
"""


def render(folder: RunFolder, baseline: RunFolder | None) -> str:
    """The page as text. What the folder does not hold (certificate, latency) is left out."""
    _, recipe, built = load_run(folder.path)
    results, first = folder.results(), baseline.results() if baseline else None
    rows = _accuracy_rows(results, first)
    runs = {"this run": folder.metrics()} | ({"full precision": baseline.metrics()} if baseline else {})
    latencies = _optional(folder, "latency.json") or []
    steps = mean_steps(built.model)
    recipe_values = json.loads((folder / "recipe.json").read_text())
    environment = Environment(autoescape=False, trim_blocks=True)  # pictures are HTML; texts are our own or escaped below
    return environment.from_string(PAGE).render(
        title=f"{recipe_values['backbone']} · {recipe_values['method']} · target {results['test_domain']}",
        version=__version__,
        recipe=recipe_values,
        results=results,
        baseline=first,
        rows=rows,
        accuracy_figure=figures.accuracy_bars(
            [r["name"] for r in rows], [r["run"] for r in rows], [r["baseline"] for r in rows] if first else None
        ),
        loss_figure=figures.loss_curves(runs),
        profile_figure=figures.step_profile(steps) if steps else "",
        steps_figure=figures.step_curves(folder.metrics()) if steps else "",
        histograms=_histograms(built.model),
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


def _histogram(layer: QuantConv2d | QuantLinear) -> str:
    quantizer = layer.weight_quantizer
    step = quantizer.step.view(-1, *[1] * (layer.weight.dim() - 1)) if quantizer.step.dim() else quantizer.step
    scaled: NDArray[np.float32] = (layer.weight.detach() / step).flatten().to(torch.float32).numpy()
    title = f"{quantizer.name} ({quantizer.spec.bits} bits)"
    return figures.weight_histogram(title, scaled, quantizer.spec.qmin, quantizer.spec.qmax)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
