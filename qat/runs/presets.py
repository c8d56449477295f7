"""Presets: values of flags by name, for `qat train --preset NAME` and the presets of a sweep.

domainbed   DomainBed's defaults for ERM (its draw 0), ResNet-50.
swad        the lineage of SWAD and SAGM on PACS, with SWAD's dense average as in its public code.
sagm        SAGM's published values for PACS (arXiv 2303.10353).
authors     choices of GAQAT's first author in an earlier study (public code, March 2024); that GAQAT kept them is a guess.
            Weights have a scale per output channel there, as ours have by default; sums between layers stay in floating
            point there, and have 8 bits here.

`docs/algorithms.md` has where each comes from.
"""

from typing import Any

from qat.runs.parts import RecipeError

DOMAINBED: dict[str, Any] = {
    "backbone": "resnet50.tv_in1k",
    "image_size": 224,
    "optimizer": "adam",
    "lr": 5e-5,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "batch_size": 32,
    "steps": 5001,
    "schedule": "constant",
    "evaluate_every": 300,
    "norms": "frozen-statistics",
}
SAGM: dict[str, Any] = DOMAINBED | {
    "lr": 3e-5,
    "weight_decay": 1e-4,
    "dropout": 0.5,
    "rho": 0.05,
    "alpha": 1e-3,
    "evaluate_every": 200,
}
SWAD: dict[str, Any] = DOMAINBED | {
    "averaging": "swad-published",
    "evaluate_every": 100,
}
AUTHORS: dict[str, Any] = {
    "optimizer": "nesterov",
    "lr": 5e-3,
    "schedule": "constant",
    "gradient_count": "numel",
    "edges": "image",
    "input_scales": "one",
    "scale_lr_ratio": 1.0,
    "scale_lr_unit": "absolute",
}
PRESETS: dict[str, dict[str, Any]] = {
    "domainbed": DOMAINBED,
    "swad": SWAD,
    "sagm": SAGM,
    "authors": AUTHORS,
}


def preset(name: str) -> dict[str, Any]:
    """The values of preset `name`. Raises RecipeError for an unknown one."""
    if name not in PRESETS:
        raise RecipeError(
            f"--preset {name}: no such preset; known: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
