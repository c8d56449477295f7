"""Recipes: every choice of a run as a frozen dataclass; command lines are made from them, run folders record them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qat.quantizers.lsq import Init


@dataclass(frozen=True)
class Recipe:
    """Full-precision training, leave one domain out (DomainBed; `specs/algorithms.md` §5)."""

    data_root: Path | None = None
    """Folder of domains, <root>/<domain>/<class>/*.jpg; without it the built-in synthetic domains are rendered."""
    test_domain: str = "sketch"
    """The domain that training never sees."""
    backbone: str = "mobilenetv2_100"
    """Any timm model name."""
    weights: Path | None = None
    """Local checkpoint for the backbone (safetensors or torch)."""
    pretrained: bool = False
    """Download timm's own weights for the backbone."""
    pad_type: Literal["", "same"] = ""
    """"same" for weights that were trained with TensorFlow's padding (timm's efficientnet family)."""
    normalization: Literal["model", "imagenet", "half"] = "model"
    """Input normalisation: timm's record of the model, ImageNet mean and std, or mean 0.5 and std 0.5."""
    image_size: int = 224
    """Side of the square input, pixels."""
    steps: int = 5001
    """Optimizer steps."""
    batch_size: int = 32
    """Images of each source domain in a step."""
    lr: float = 1e-3
    """Learning rate of Adam at the start."""
    weight_decay: float = 0.0
    """Weight decay of weights; biases, norms and quantizer steps have none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule over the run (DomainBed itself: constant)."""
    evaluate_every: int = 100
    """Steps between evaluations on the source domains' held-out images, which select the checkpoint."""
    holdout: float = 0.2
    """Share of each domain that is held out (DomainBed: 0.2)."""
    trial_seed: int = 0
    """Seed of the DomainBed split."""
    seed: int = 0
    """Seed of initialisation, batches and augmentation."""
    per_class: int = 150
    """Images per class and domain of the synthetic domains."""
    workers: int = 2
    """Data-loading processes."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, as accelerate names it."""
    tensorboard: bool = False
    """Also write TensorBoard scalars into the run folder."""
    resume: bool = False
    """Continue the interrupted run in --out."""
    out: Path | None = None
    """Run folder; by default runs/<method>-<test domain>-<backbone>-s<seed>, numbered when it exists."""

    @property
    def method(self) -> str:
        return "fp"


@dataclass(frozen=True)
class LsqRecipe(Recipe):
    """LSQ quantization-aware training (arXiv 1902.08153), best started from a full-precision run."""

    bits: int = 4
    """Bits of weights and activations."""
    weight_bits: int | None = None
    """Bits of weights where they differ from --bits."""
    edge_bits: int = 8
    """Bits of the first and the last layer."""
    init_from: Path | None = None
    """Full-precision run folder to start from."""
    init: Init = "mse"
    """How steps start: LSQ's mean magnitude, or least squared error."""
    calibration_batches: int = 8
    """Training batches for calibration."""
    lr: float = 5e-4
    step_lr_ratio: float = 0.1
    """Learning rate of quantizer steps relative to --lr. Adam moves a parameter by about its learning rate whatever the
    gradient's scale, and steps are some hundredths in size."""

    @property
    def method(self) -> str:
        return "lsq"


METHODS: dict[str, type[Recipe]] = {"fp": Recipe, "lsq": LsqRecipe}


class RecipeError(ValueError):
    """A flag, file or folder of a run is unusable; the message names it."""


def check(recipe: Recipe) -> None:
    """Raise RecipeError naming the flag of the first impossible value."""
    positive = ("image_size", "steps", "batch_size", "evaluate_every", "lr", "per_class")
    for name in positive:
        if getattr(recipe, name) <= 0:
            raise RecipeError(f"--{name.replace('_', '-')} must be positive, got {getattr(recipe, name)}")
    if not 0 < recipe.holdout < 1:
        raise RecipeError(f"--holdout must lie between 0 and 1, got {recipe.holdout}")
    if isinstance(recipe, LsqRecipe):
        for name in ("bits", "weight_bits", "edge_bits"):
            value = getattr(recipe, name)
            if value is not None and not 2 <= value <= 8:
                raise RecipeError(f"--{name.replace('_', '-')} must be 2 to 8, got {value}")


def to_json(recipe: Recipe) -> dict[str, Any]:
    fields = dataclasses.asdict(recipe)
    return {"method": recipe.method} | {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def from_json(values: dict[str, Any], source: Path) -> Recipe:
    """The recipe recorded in a run folder. Raises RecipeError when `source` holds something else."""
    cls = METHODS.get(values.get("method", ""))
    if cls is None:
        raise RecipeError(f"{source}: unknown method {values.get('method')!r}; known: {', '.join(METHODS)}")
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := values.keys() - fields.keys() - {"method"}:
        raise RecipeError(f"{source}: unknown entries {', '.join(sorted(unknown))}; was it written by a newer version?")
    paths = {name for name, kind in fields.items() if "Path" in str(kind)}
    given: dict[str, Any] = {
        k: Path(v) if k in paths and v is not None else v for k, v in values.items() if k in fields
    }
    return cls(**given)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; is {path.parent} a finished run folder?") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not JSON ({error})") from None
