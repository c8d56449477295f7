"""The model card beside an exported file: what it is, what it was trained on, how well it does, and what was proven.

What only people know (licence, intended use, limits) is left to fill in. Whoever fills it in deletes the card's marked line,
and the card is not written again.
"""

import math
from pathlib import Path
from typing import Any

from edgeqat.files import write_text
from qat import __version__
from qat.analysis.compare import markdown_text
from qat.runs.records import CERTIFICATE, optional, results_of
from qat.runs.run_folder import RunFolder

MARK = "# Written by edgeqat with the file. Delete this line once you edit the card: it is not written again then."


def card_of(model: Path) -> Path:
    """Where the card of the file `model` is: beside it."""
    return model.with_suffix(".md")


def write_card(
    folder: RunFolder, model: Path, target: str, *, certified: bool = False
) -> None:
    """Write the card of `model`, a file of the run `folder` for `target`, unless somebody has made it their own.

    certified: whether the run's certificate.json is of this very file.
    """
    path = card_of(model)
    if path.exists() and MARK not in path.read_text(errors="replace"):
        return
    certificate = optional(folder, "certificate.json", CERTIFICATE)
    write_text(
        path, card_text(folder, model, target, certificate if certified else None)
    )


def card_text(
    folder: RunFolder, model: Path, target: str, certificate: dict[str, Any] | None
) -> str:
    """The card as Markdown with the head that model hubs read. certificate: that of the file, as certificate.json has it."""
    recipe = folder.recipe()
    results = results_of(folder)
    precision = recipe.precision or "full precision"
    name = markdown_text(f"{recipe.model.backbone}, {recipe.method}, {precision}")
    lines = [
        "---",
        MARK,
        "license: other  # fill in: that of the weights, which the images may limit",
        "pipeline_tag: image-classification",
        "tags: [edgeqat, onnx, quantization]",
        "---",
        "",
        f"# {name}",
        "",
        "| | |",
        "|---|---|",
        f"| file | {markdown_text(model.name)}, {model.stat().st_size / 1e6:.2f} MB, target {target} |",
        f"| input | {recipe.model.image_size} × {recipe.model.image_size} pixels, RGB |",
        f"| classes | {len(results.get('classes') or ())}, named in the file |",
        f"| trained | {recipe.method}, {results['selected_step']} steps, seed {recipe.optimization.seed}, chosen by "
        f"{markdown_text(results['selection'])} |",
        f"| written by | edgeqat {__version__} |",
        "",
        "## Use",
        "",
        "```",
        f"qat predict {model.name} photo.jpg",
        "```",
        "",
        "Size, normalisation and labels are in the file's metadata, under `edgeqat`.",
        "",
        "## Accuracy",
        "",
        *_accuracy(folder, results),
        "",
        "## Proof",
        "",
        *_proof(certificate),
        "",
        "## To fill in",
        "",
        "* Licence of the weights and of the images.",
        "* What the model is for, and what it must not be used for.",
        "* Who is missing from the images, and what happens when the model is wrong.",
        "",
    ]
    return "\n".join(lines)


def _accuracy(folder: RunFolder, results: dict[str, Any]) -> list[str]:
    """A table: a row per domain, with the standard error over its images."""
    target = results["test_domain"]
    shares = {**results["source_validation"], target: results["target"]}
    counts = {
        domain: len(labels) for domain, (_, labels) in folder.predictions().items()
    }
    lines = [
        "| domain | top-1, % | ± standard error | images |",
        "|---|---:|---:|---:|",
    ]
    for domain, share in shares.items():
        note = " (never trained on)" if domain == target else ""
        images = counts.get(domain)
        error = "–" if images is None else f"{100 * standard_error(share, images):.2f}"
        shown = "–" if images is None else str(images)
        lines.append(
            f"| {markdown_text(domain)}{note} | {100 * share:.2f} | {error} | {shown} |"
        )
    lines += [
        "",
        "The error is that of drawing other images; one run says nothing of other seeds.",
    ]
    return lines


def standard_error(share: float, images: int) -> float:
    """Of the share of right answers among `images` independent ones: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / images)


def _proof(certificate: dict[str, Any] | None) -> list[str]:
    """What the certificate says, where there is one."""
    if certificate is None:
        return ["None yet: `qat certify RUN FILE` writes one, and this section."]
    verdict = "passed" if certificate["passed"] else "**failed**"
    mismatches = sum(
        sum(level["mismatches"].values()) for level in certificate["levels"]
    )
    runtime = markdown_text(certificate["runtime"])
    images, layers = certificate["images"], certificate["layers"]
    changed = len(certificate["stored"])
    return [
        f"Certificate: {verdict}, on ONNX Runtime {runtime} with {images} images.",
        f"{changed} of {layers} layers are not stored as trained; {mismatches} activation codes differ from the integer",
        "definition, over all optimisation levels.",
    ]
