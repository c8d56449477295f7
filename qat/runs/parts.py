"""The parts of a recipe: every choice of a run, by subject, each with its flags and its own check.

A flag has one name in all parts, so that a run folder and a command line need not say whose it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.objectives.controls import ControlName
from qat.runs.ranges import RECIPE, flag, out_of_range
from qat.words import AlphaInit, GradientCount, Init, NormMode

Kind = Literal["weights", "norms", "biases", "scales"]
TrackerName = Literal["wandb", "mlflow", "comet_ml", "aim", "clearml"]
PARAMETER_KINDS: tuple[Kind, ...] = ("weights", "norms", "biases", "scales")
SECOND_STAGE = ("stage2_epochs", "stage2_steps", "stage2_lr", "stage2_weight_decay")
# What only a sine wave before the sign has
PERIODIC = ("frequency", "frequency_start", "learn_frequency", "reg_tau", *SECOND_STAGE)  # fmt: skip


class RecipeError(ValueError):
    """A flag, file or folder of a run is unusable; the message names it."""


@dataclass(frozen=True)
class Part:
    """The choices of one subject."""

    def check(self) -> None:
        """Raises RecipeError naming the first flag whose number is out of its range, or which another one excludes."""
        problem = out_of_range(self, RECIPE)
        if problem:
            raise RecipeError(problem)


@dataclass(frozen=True)
class Images(Part):
    """The images: where they are, how they are split and augmented."""

    data_root: Path | None = None
    """Folder of domains, <root>/<domain>/<class>/*.jpg; without it the built-in synthetic domains are rendered."""
    data: Literal["auto", "domains", "folder", "cifar10"] = "domains"
    """What --data-root holds: domains of which one is left out; one folder of classes, or of train, val and test; CIFAR-10;
    auto looks which."""
    test_domain: str = "sketch"
    """The domain that training never sees."""
    also_left_out: str | None = None
    """A second domain that training never sees, for leave-one-domain-out cross-validation."""
    holdout: float = 0.2
    """Share of each domain that is held out (DomainBed: 0.2)."""
    trial_seed: int = 0
    """Seed of the DomainBed split."""
    per_class: int = 150
    """Images per class and domain of the synthetic domains."""
    official_lists: Path | None = None
    """Folder of PACS's own lists, which then split it instead of DomainBed's draw."""
    balanced: bool = False
    """Draw the images of rare classes as often as those of frequent ones."""
    augmentation: Literal["domainbed", "crop-flip", "randaugment"] = "domainbed"
    """Training augmentation: DomainBed's, CIFAR's random crop and flip, or DomainBed's crop and flip with RandAugment (arXiv
    1909.13719) in place of its colours."""
    workers: int = 2
    """Data-loading processes."""


@dataclass(frozen=True)
class Model(Part):
    """The backbone, its starting weights and what it takes."""

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
    """Side of the square input, pixels; 0: the backbone's own."""
    dropout: float = 0.0
    """Dropout before the classifier (SAGM's published runs: 0.5)."""
    norms: NormMode = "normal"
    """Batch norms: normal; running statistics that stay, gamma and beta learn; or frozen altogether."""
    channels_last: bool = True
    """Keep images and activations in N_H_W_C order in memory: convolutions are faster on CPUs and tensor cores."""


@dataclass(frozen=True)
class Optimization(Part):
    """How the parameters move: length, batches, optimizer, learning rate, clipping."""

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
    domain_loss: Literal["erm", "groupdro", "coral", "hessian"] = "erm"
    """What the closure minimises: mean cross entropy, or a loss that knows the domains."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""
    mixup: float = 0.0
    """Mix pairs of images and their labels by shares drawn from Beta(a, a), a this number (arXiv 1710.09412; 0.2 to 1); 0: do
    not. A pair's two images are mostly of different source domains."""
    and_mask: float | None = None
    """Move a parameter's element only where the signs of the source domains' gradients agree by this much, from 0 to 1
    (arXiv 2009.00329); one pass a domain."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, as accelerate names it."""
    seed: int = 0
    """Seed of initialisation, batches and augmentation."""

    def check(self) -> None:
        """Raises RecipeError naming the flag at fault."""
        super().check()
        if self.epochs is None and self.steps < 1:
            raise RecipeError(
                "--steps must be at least 1, got 0; --epochs 0 measures the starting weights"
            )
        if self.accumulate > 1 and self.domain_loss == "groupdro":
            raise RecipeError(
                "--accumulate: groupdro weighs domains by the losses of a whole batch; raise --batch-size instead"
            )
        if self.domain_loss != "erm":
            for name in ("label_smoothing", "mixup"):
                if getattr(self, name):
                    raise RecipeError(
                        f"{flag(name)} makes labels that --domain-loss {self.domain_loss} cannot read; use erm"
                    )
        if (self.schedule == "refined") != (self.refine_from is not None):
            raise RecipeError("--schedule refined and --refine-from belong together")


@dataclass(frozen=True)
class Averaging(Part):
    """Average of the weights, and batch norm statistics taken anew."""

    averaging: Literal["none", "ema", "swad", "swad-published"] = "none"
    """Average the weights: exponentially, by SWAD's algorithm, or as SWAD's public code does. Batch norm statistics are taken
    again for the average."""
    ema_decay: float = 0.999
    """Decay of --averaging ema, per step."""
    norm_batches: int = 0
    """Training batches that batch norm statistics are taken from anew after training, quantizers on; 0: none."""


@dataclass(frozen=True)
class Tracking(Part):
    """What is measured and kept while a run goes on."""

    evaluate_every: int = 100
    """Steps between evaluations on the source domains' held-out images, which select the checkpoint."""
    select: Literal["validation", "last"] = "validation"
    """The checkpoint: the best on held-out images, or the last step. (Starting weights that have seen the held-out images
    make their accuracy worthless for choosing.)"""
    tensorboard: bool = False
    """Also write TensorBoard scalars into the run folder."""
    trackers: tuple[TrackerName, ...] = ()
    """Also send scalars and the recipe to these services, through accelerate; their own settings apply (such as
    WANDB_MODE, MLFLOW_TRACKING_URI). Install the library that you name."""
    out: Path | None = None
    """Run folder; by default runs/<method>-<test domain>-<backbone>-s<seed>, numbered when it exists."""
    resume: bool = False
    """Continue the interrupted run in --out."""


@dataclass(frozen=True)
class Sharpness(Part):
    """An objective of two passes that seeks flat minima: SAGM (arXiv 2303.10353) or a relative (`docs/algorithms.md`)."""

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

    def check(self) -> None:
        """Raises RecipeError naming the flag at fault."""
        super().check()
        if self.perturb == "quantized" and "weights" not in self.perturb_kinds:
            raise RecipeError(
                "--perturb quantized perturbs weights after their quantizers: add weights to --perturb-kinds"
            )
        if self.per_domain and self.flatness == "gsam":
            raise RecipeError(
                "--per-domain mixes fixed shares of two branches, which gsam does not have; use sagm, sam or asam"
            )


@dataclass(frozen=True)
class Quantization(Part):
    """Where a quantized net starts from, and how its scales learn."""

    init_from: Path | None = None
    """Run folder to start from: a full-precision run; for BiPer's stage 2, its stage 1."""
    init: Literal["lsq", "mse", "cle", "gptq", "bias-correction"] = "mse"
    """How scales start: LSQ's mean magnitude, or least squared error; with it, a repair of the net before training:
    cross-layer equalization, GPTQ's weights or corrected biases (brevitas)."""
    edge_bits: int = 8
    """Bits of the first and the last layer."""
    input_scales: Literal["calibrated", "one"] = "calibrated"
    """Scales of layer inputs start as calibration finds them, or at 1 (GAQAT's first author, 2024)."""
    calibration_batches: int = 8
    """Training batches for calibration."""
    symmetric_weights: bool = True
    """8-bit weights have codes from -127 to 127, as runtimes want them, rather than from -128 (as in older runs)."""
    tables: bool = False
    """Let a GELU or another function of a linear's result read 8-bit codes of it, so that `ort-native` files hold it as a
    table."""
    fold_norms: bool = False
    """Fold batch norms into convolutions before quantization, with proof."""
    scale_lr_ratio: float = 1.0
    """Learning rate of quantizer scales relative to --lr."""
    scale_lr_unit: Literal["scale", "absolute"] = "scale"
    """Whether that rate counts in units of each scale's size at the start, for Adam and its kind, which move a parameter by
    about its learning rate whatever the gradient's scale; or is absolute, as in LSQ's own runs with SGD."""

    @property
    def scale_init(self) -> Init:
        """How scales start; brevitas's initializations move them later."""
        return "lsq" if self.init == "lsq" else "mse"


@dataclass(frozen=True)
class Grids(Part):
    """Bits and grids of layers of 2 bits and more (LSQ, arXiv 1902.08153)."""

    bits: int = 4
    """Bits of weights and activations."""
    weight_bits: int | None = None
    """Bits of weights where they differ from --bits."""
    weight_only: bool = False
    """Quantize weights alone; activations stay in floating point."""
    activation_only: bool = False
    """Quantize activations alone; weights stay in floating point."""
    activations: Literal["lsq", "lsq-plus"] = "lsq"
    """Quantizer of layer inputs: symmetric, or with a learned offset (arXiv 2004.09576)."""
    power_of_two: bool = False
    """Scales are powers of two, for hardware that shifts."""
    gradient_count: GradientCount = "per_sample"
    """N of the scales' gradient scale: elements that share a scale in one sample, or the whole tensor's."""
    edges: Literal["quantized", "image"] = "quantized"
    """The first and the last layer: quantized to --edge-bits; or in floating point, but for the image that the first one
    reads, which has --bits (GAQAT's first author, 2024). The latter has no form for integer kernels: export fp32 or qonnx."""
    rules: Path | None = None
    """TOML or JSON file of bit rules for single layers (`qat/surgery/rules.py`); they come before the flags' rules."""

    def check(self) -> None:
        """Raises RecipeError naming the flag at fault."""
        super().check()
        if self.weight_only and self.activation_only:
            raise RecipeError(
                "--weight-only and --activation-only exclude each other: nothing would be quantized"
            )
        if self.activations == "lsq-plus" and self.power_of_two:
            raise RecipeError("--power-of-two has no offsets; use --activations lsq")


@dataclass(frozen=True)
class Binarization(Part):
    """1-bit weights and activations: BiPer (arXiv 2404.01278) in two stages, or a baseline binarizer in one."""

    binarizer: Literal["biper", "sign", "recu"] = "biper"
    """Function applied before the weights' sign. The baselines, straight-through and ReCU, have one stage."""
    stage: Literal[1, 2] = 1
    """Where the run begins: at 1 both stages are run, 2 is one run from the stage-1 folder --init-from."""
    stage2_epochs: int = 300
    """Epochs of stage 2."""
    stage2_steps: int = 5001
    """Steps of stage 2 where --epochs is None and --steps counts stage 1."""
    stage2_lr: float = 0.0037
    """Learning rate at the start of stage 2."""
    stage2_weight_decay: float = 0.00016
    """Weight decay of stage 2."""
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
    published_deviation: bool = False
    """Take that variance as BiPer's public code does, unbiased and in training alone."""
    learn_thresholds: bool = False
    """Learn a threshold for each binarized channel (ReActNet's RSign)."""

    def check(self) -> None:
        """Raises RecipeError naming the flag at fault."""
        super().check()
        if self.binarizer != "biper":
            changed = self._changed(PERIODIC)
            if changed:
                raise RecipeError(
                    f"{flag(changed[0])} has no effect with --binarizer {self.binarizer}, which has one stage and no sine; "
                    "leave it out"
                )
        if self.stage == 2:
            changed = self._changed(SECOND_STAGE)
            if changed:
                plain = flag(changed[0].removeprefix("stage2_"))
                raise RecipeError(
                    f"{flag(changed[0])} has no effect with --stage 2, a run by itself; use {plain}"
                )
        if self.frequency_start is not None and self.learn_frequency:
            raise RecipeError(
                "--frequency-start: a learned frequency has no schedule; leave one of the two out"
            )

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that are not as they are by default."""
        default = Binarization()
        return [n for n in names if getattr(self, n) != getattr(default, n)]


@dataclass(frozen=True)
class Distillation(Part):
    """A full-precision teacher."""

    teacher: Path | None = None
    """Full-precision run folder to distil from."""
    distill_weight: float = 0.5
    """Share of the distillation term in the loss (LSQ: as much as the cross entropy)."""


@dataclass(frozen=True)
class Oscillation(Part):
    """Weights that swing between two codes (arXiv 2203.11086)."""

    oscillation: bool = False
    """Record the share of weights that swing between two codes (arXiv 2203.11086)."""
    damping: float = 0.0
    """Weight of the pull of latent weights to their grid points."""
    freeze_oscillating: float | None = None
    """Hold weights that swing back in more than this share of the steps (the paper: 0.01 to 0.02)."""


@dataclass(frozen=True)
class Freezing(Part):
    """GAQAT's decisions (arXiv 2412.05551): which scales lose their task gradient, and for how long."""

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


@dataclass(frozen=True)
class Delay(Part):
    """Quantizers that wait (QT-DoG, arXiv 2410.06020)."""

    quant_start_step: int = 2000
    """Step from which the quantizers are on; their parameters are in the optimizer from the beginning."""
