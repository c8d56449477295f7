"""Recipes: every choice of a run as a frozen dataclass; command lines are made from them, run folders record them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qat.objectives.controls import CONTROLS, ControlName
from qat.runs import earlier
from qat.runs.ranges import BINARY, RECIPE, out_of_range
from qat.words import AlphaInit, GradientCount, Init, NormMode

Kind = Literal["weights", "norms", "biases", "scales"]
PARAMETER_KINDS: tuple[Kind, ...] = ("weights", "norms", "biases", "scales")


@dataclass(frozen=True)
class Recipe:
    """Full-precision training, leave one domain out (DomainBed; `docs/algorithms.md`, DomainBed protocol)."""

    data_root: Path | None = None
    """Folder of domains, <root>/<domain>/<class>/*.jpg; without it the built-in synthetic domains are rendered."""
    data: Literal["domains", "cifar10"] = "domains"
    """What --data-root holds: domains of which one is left out, or CIFAR-10 with its own test set."""
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
    epochs: int | None = None
    """Passes over the training images, instead of --steps; every image once a pass, held-out images measured after each. 0:
    measure the starting weights."""
    batch_size: int = 32
    """Images of each source domain in a step; with --accumulate, in a microbatch."""
    accumulate: int = 1
    """Microbatches of --batch-size that share an optimizer step, for batches that do not fit into memory: the gradient is the
    mean over all their images, weights are quantized once for all. Batch norms see one microbatch at a time; so do coral and
    hessian."""
    augmentation: Literal["domainbed", "crop-flip"] = "domainbed"
    """Training augmentation: DomainBed's, or CIFAR's random crop and flip."""
    optimizer: str = "adam"
    """Any optimizer of timm's factory."""
    lr: float = 1e-3
    """Learning rate at the start."""
    weight_decay: float = 0.0
    """Weight decay of weights; biases, norms and quantizer scales have none."""
    decay_norms: bool = False
    """Weight decay of biases and norms too, as most CIFAR recipes have it; quantizer scales still have none."""
    schedule: Literal["cosine", "linear", "constant", "refined"] = "cosine"
    """Learning-rate schedule over the run (DomainBed itself: constant). "linear" is worst-case optimal for the last step;
    "refined" follows the gradient norms of --refine-from (arXiv 2310.07831)."""
    warmup: int = 0
    """Steps over which the learning rate rises from near 0 before the schedule begins; epochs when --epochs is given."""
    refine_from: Path | None = None
    """Run folder whose recorded gradient norms shape the refined schedule."""
    clip: float | None = None
    """Gradient clipping, in the sense of --clip-mode."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip the global norm, each value, or by the ratio of unit-wise norms (AGC)."""
    dropout: float = 0.0
    """Dropout before the classifier (SAGM's published runs: 0.5)."""
    domain_loss: Literal["erm", "groupdro", "coral", "hessian"] = "erm"
    """What the closure minimises: mean cross entropy, or a loss that knows the domains."""
    averaging: Literal["none", "ema", "swad"] = "none"
    """Average the weights; batch norm statistics are taken again for the average."""
    ema_decay: float = 0.999
    """Decay of --averaging ema, per step."""
    evaluate_every: int = 100
    """Steps between evaluations on the source domains' held-out images, which select the checkpoint."""
    select: Literal["validation", "last"] = "validation"
    """The checkpoint: the best on held-out images, or the last step. (Starting weights that have seen the held-out images
    make their accuracy worthless for choosing.)"""
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
    norms: NormMode = "normal"
    """Batch norms: normal; running statistics that stay, gamma and beta learn; or frozen altogether."""
    norm_batches: int = 0
    """Training batches that batch norm statistics are taken from anew after training, quantizers on; 0: none."""
    channels_last: bool = True
    """Keep images and activations in N_H_W_C order in memory: convolutions are faster on CPUs and tensor cores."""
    tensorboard: bool = False
    """Also write TensorBoard scalars into the run folder."""
    resume: bool = False
    """Continue the interrupted run in --out."""
    out: Path | None = None
    """Run folder; by default runs/<method>-<test domain>-<backbone>-s<seed>, numbered when it exists."""

    @property
    def method(self) -> str:
        """The word that names this recipe, a key of METHODS."""
        return "fp"


@dataclass(frozen=True)
class SagmRecipe(Recipe):
    """Full precision towards flat minima: SAGM (arXiv 2303.10353) or a relative (`docs/algorithms.md`)."""

    flatness: Literal["sagm", "sam", "asam", "gsam"] = "sagm"
    """Objective with two passes a step."""
    rho: float = 0.05
    """Radius of the perturbation."""
    alpha: float = 1e-3
    """SAGM: length of the step against the gradient in the second pass. GSAM: weight of the orthogonal part."""
    perturb: Literal["latent", "quantized"] = "latent"
    """Perturb weights before the quantizer, or after it (SAQ, arXiv 2111.12273)."""
    perturb_kinds: tuple[Kind, ...] = PARAMETER_KINDS
    """Which parameters are perturbed."""
    per_domain: bool = False
    """Perturb every source domain along its own gradient (two passes a domain)."""

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "sagm"


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
    weight_only: bool = False
    """Quantize weights alone; activations stay in floating point."""
    init: Literal["lsq", "mse", "cle", "gptq", "bias-correction"] = "mse"
    """How scales start: LSQ's mean magnitude, or least squared error; with it, a repair of the net before training:
    cross-layer equalization, GPTQ's weights or corrected biases (brevitas)."""
    activations: Literal["lsq", "lsq-plus"] = "lsq"
    """Quantizer of layer inputs: symmetric, or with a learned offset (arXiv 2004.09576)."""
    activation_only: bool = False
    """Quantize activations alone; weights stay in floating point."""
    symmetric_weights: bool = True
    """8-bit weights have codes from -127 to 127, as runtimes want them, rather than from -128 (as in older runs)."""
    power_of_two: bool = False
    """Scales are powers of two, for hardware that shifts."""
    gradient_count: GradientCount = "per_sample"
    """N of the scales' gradient scale: elements that share a scale in one sample, or the whole tensor's."""
    rules: Path | None = None
    """TOML or JSON file of bit rules for single layers (`qat/surgery/rules.py`); they come before the flags' rules."""
    fold_norms: bool = False
    """Fold batch norms into convolutions before quantization, with proof."""
    calibration_batches: int = 8
    """Training batches for calibration."""
    lr: float = 5e-4
    scale_lr_ratio: float = 1.0
    """Learning rate of quantizer scales relative to --lr."""
    scale_lr_unit: Literal["scale", "absolute"] = "scale"
    """Whether that rate counts in units of each scale's size at the start, for Adam and its kind, which move a parameter by
    about its learning rate whatever the gradient's scale; or is absolute, as in LSQ's own runs with SGD."""

    teacher: Path | None = None
    """Full-precision run folder to distil from."""
    distill_weight: float = 0.5
    """Share of the distillation term in the loss (LSQ: as much as the cross entropy)."""
    oscillation: bool = False
    """Record the share of weights that swing between two codes (arXiv 2203.11086)."""
    damping: float = 0.0
    """Weight of the pull of latent weights to their grid points."""
    freeze_oscillating: float | None = None
    """Hold weights that swing back in more than this share of the steps (the paper: 0.01 to 0.02)."""

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "lsq"

    @property
    def scale_init(self) -> Init:
        """How scales start; brevitas's initializations move them later."""
        return "lsq" if self.init == "lsq" else "mse"


@dataclass(frozen=True)
class SagmLsqRecipe(SagmRecipe, LsqRecipe):
    """SAGM on a quantized net: every scale gets the task's and the smoothing gradient, none is frozen."""

    lr: float = 5e-4

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "sagm-lsq"


@dataclass(frozen=True)
class GaqatRecipe(SagmLsqRecipe):
    """GAQAT (arXiv 2412.05551): scales whose task gradient has settled are frozen for it, and released when it stirs."""

    window: int = 100
    """K: steps between decisions, over which sign flips are counted."""
    threshold: float | None = None
    """r: freeze below this disorder; without it --z decides."""
    weight_threshold: float | None = None
    """r of weight scales where it differs from --threshold."""
    z: float = 3.0
    """Freeze when fewer flips came than a fair coin's, by this many standard deviations."""
    freeze_when: Literal["below", "above"] = "below"
    """Freeze what is calmer, or what is more disordered than the threshold."""
    freeze_scales: Literal["both", "weights", "activations"] = "both"
    """Which scales may freeze."""
    per_channel: bool = False
    """Decide for every channel of a scale by itself."""
    start_step: int = 0
    """First step at which anything may freeze."""
    rescale: bool = False
    """Give the branch that is left of a frozen scale the weight of both."""
    control: ControlName = "gaqat"
    """The method's own rule, or one of its controls."""

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "gaqat" if self.control == "gaqat" else f"gaqat-{self.control}"


@dataclass(frozen=True)
class QtdogRecipe(LsqRecipe):
    """QT-DoG (arXiv 2410.06020): full precision until a step, then weights alone on a 7-bit grid.

    The classifier is quantized too; the published code leaves it in floating point.
    """

    bits: int = 7
    edge_bits: int = 7
    weight_only: bool = True
    init: Init = "lsq"
    quant_start_step: int = 2000
    """Step from which the quantizers are on; their parameters are in the optimizer from the beginning."""

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "qtdog"


@dataclass(frozen=True)
class BiperRecipe(LsqRecipe):
    """1-bit weights and activations: BiPer (arXiv 2404.01278) in two stages, or a baseline binarizer in one."""

    bits: int = 1
    edge_bits: int = 8
    """Bits of the first, the last and weighted shortcut layers; 32 leaves them in floating point, as published."""
    backbone: str = "bireal_cifar_resnet18"
    batch_size: int = 256
    optimizer: str = "momentum"
    lr: float = 0.021
    weight_decay: float = 0.0016
    scale_lr_ratio: float = 1.0
    warmup: int = 5
    epochs: int | None = 600
    """Epochs of stage 1."""
    stage2_epochs: int = 300
    """Epochs of stage 2."""
    stage2_steps: int = 5001
    """Steps of stage 2 where --epochs is None and --steps counts stage 1."""
    stage2_lr: float = 0.0037
    """Learning rate at the start of stage 2."""
    stage2_weight_decay: float = 0.00016
    """Weight decay of stage 2."""
    stage: Literal[1, 2] = 1
    """Where the run begins: at 1 both stages are run, 2 is one run from the stage-1 folder --init-from."""
    binarizer: Literal["biper", "sign", "recu"] = "biper"
    """Function applied before the weights' sign. The baselines, straight-through and ReCU, have one stage."""
    frequency: float = 20.0
    """BiPer's frequency."""
    frequency_start: float | None = None
    """Frequency at the start of stage 1, from which it rises or falls linearly to --frequency."""
    learn_frequency: bool = False
    """Learn a frequency for each layer, from --frequency on."""
    reg_tau: float = 0.0
    """Weight of the published regulariser (CIFAR: 0.037, then 0.0468). It pulls sin(frequency · w) towards the decision
    boundary, hence off."""
    alpha_init: AlphaInit = "least-squares"
    """How the channels' scales start: least squared error, or uniform in [0, 1) as published."""
    standardize: bool = True
    """Take the activations' surrogate gradient at unit variance per sample; the codes are the same either way."""
    learn_thresholds: bool = False
    """Learn a threshold for each binarized channel (ReActNet's RSign)."""

    @property
    def method(self) -> str:
        """Name of the method, as flags and files have it."""
        return "biper"


METHODS: dict[str, Recipe] = {
    recipe.method: recipe
    for recipe in (
        Recipe(), SagmRecipe(), LsqRecipe(), SagmLsqRecipe(), QtdogRecipe(),
        *(GaqatRecipe(control=control) for control in CONTROLS),
    )
}  # fmt: skip


KNOWN: dict[str, Recipe] = METHODS | {"biper": BiperRecipe()}


class RecipeError(ValueError):
    """A flag, file or folder of a run is unusable; the message names it."""


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The same as plain data, for a JSON file."""
    fields = dataclasses.asdict(recipe)
    return {"method": recipe.method} | {
        k: str(v) if isinstance(v, Path) else v for k, v in fields.items()
    }


def from_json(values: Any, source: Path) -> Recipe:
    """The recipe recorded in a run folder. Raises RecipeError when `source` holds something else."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"{source}: holds no recipe, which has one entry for each flag"
        )
    values = earlier.recipe_entries(values)
    method = values.get("method", "")
    known = KNOWN.get(method) if isinstance(method, str) else None
    if known is None:
        raise RecipeError(
            f"{source}: unknown method {method!r}; known: {', '.join(KNOWN)}"
        )
    cls = type(known)
    fields = get_type_hints(cls)
    if unknown := values.keys() - fields.keys() - {"method"}:
        raise RecipeError(
            f"{source}: unknown entries {', '.join(sorted(unknown))}; was it written by a newer version?"
        )
    given = {
        name: _value(values[name], hint, name, source)
        for name, hint in fields.items()
        if name in values
    }
    if "symmetric_weights" in fields:
        # A run of before this entry was trained with code -128
        given.setdefault("symmetric_weights", False)
    recipe = cls(**given)
    if problem := number_problem(recipe):
        raise RecipeError(f"{source}: {problem}")
    return recipe


def number_problem(recipe: Recipe) -> str | None:
    """Which number of `recipe` lies outside its range, as an error's text; None where all are within."""
    return out_of_range(
        recipe, RECIPE | BINARY if isinstance(recipe, BiperRecipe) else RECIPE
    )


def _value(value: Any, hint: Any, name: str, source: Path) -> Any:
    """`value` of a JSON file as a field of type `hint` has it. Raises RecipeError naming the entry."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if (
            get_origin(option) is Literal
            and value in get_args(option)
            and type(value) in (str, int)
        ):
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and type(value) in (int, float):
            return value
        if option in (bool, int, str) and type(value) is option:
            return value
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(
                _value(item, get_args(option)[0], name, source) for item in value
            )
    raise RecipeError(f"{source}: entry {name!r} cannot be {json.dumps(value)[:60]}")
