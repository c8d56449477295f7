"""From a finished run to a file, its certificate, its latency and its report: what `qat` and the recipes call.

`export` is imported inside the functions: training needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.training.checkpoint import RunFolder, load_run, write_atomically, write_json, write_text
from qat.training.recipe import LsqRecipe, RecipeError

if TYPE_CHECKING:
    from export.certificate import Certificate
    from export.latency import Latency


def export_run(run: Path, target: str = "ort-int8", out: Path | None = None) -> Path:
    """Write the ONNX file of `run` for `target`; returns its path. Nothing is left behind when the export fails."""
    import onnx

    from export.graph import emit_qdq
    from export.lower import lower, lower_float
    from export.passes import to_integers
    from export.targets import target_named

    folder, recipe, built = load_run(run)
    example = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
    if target == "fp32":
        proto = lower_float(built.model, example)
    else:
        chosen = target_named(target)
        if built.table is None:
            raise RecipeError(
                f"{run}: is a full-precision run; --target {target} needs a quantized one (or use --target fp32)"
            )
        proto = emit_qdq(to_integers(lower(built.model, example), chosen), chosen)
    onnx.checker.check_model(proto)
    path = out or folder / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: onnx.save(proto, str(p)))
    return path


def certify_run(run: Path, model: Path) -> Certificate:
    """Check `model` against the run it came from, on the run's real images; also writes certificate.json into the run."""
    from export.certificate import certify
    from export.lower import lower, trained_codes
    from export.passes import to_integers

    folder, recipe, built = load_run(run)
    if built.table is None:
        raise RecipeError(f"{run}: is a full-precision run, there are no codes to certify")
    samples = folder.samples()
    lowered = to_integers(lower(built.model, torch.zeros(1, 3, recipe.image_size, recipe.image_size)))
    certificate = certify(
        lowered, model, samples.images, samples.labels, lambda images: trained_codes(built.model, images)
    )
    write_json(folder / "certificate.json", certificate.to_json())
    return certificate


def measure_run(run: Path, model: Path) -> list[Latency]:
    """Latency and size of `model` against its own net in full precision; also writes latency.json into the run."""
    from export.certificate import read
    from export.latency import compare
    from export.lower import lower_float

    folder, recipe, built = load_run(run)
    images = folder.samples().images[:1]
    fp32 = lower_float(built.model, torch.zeros(1, 3, recipe.image_size, recipe.image_size))
    latencies = compare({"fp32": fp32, "quantized": read(model)}, images)
    write_json(folder / "latency.json", [dataclasses.asdict(entry) for entry in latencies])
    return latencies


def write_report(run: Path, baseline: Path | None = None) -> Path:
    """Write `report.html` into the run folder, from what the folder holds; returns its path."""
    from qat.training.report import render

    folder = RunFolder.open(run)
    recipe = folder.recipe()
    if baseline is None and isinstance(recipe, LsqRecipe):
        baseline = recipe.init_from
    path = folder / "report.html"
    html = render(folder, RunFolder.open(baseline) if baseline else None)
    write_text(path, html)
    return path
