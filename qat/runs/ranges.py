"""The range of every number that a user can give, in one place. nan lies in none."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an end that is open does not belong to it. Infinities never do."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = "more than" if self.open_low else "at least"
        high = "less than" if self.open_high else "at most"
        ends = []
        if self.low > -math.inf:
            ends.append(f"{low} {self.low:.16g}")
        if self.high < math.inf:
            ends.append(f"{high} {self.high:.16g}")
        return " and ".join(ends) or "finite"


COUNT = Range(1)
COUNT_OR_NONE = Range(0)
BITS = Range(2, 8)
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
BETWEEN_0_AND_1 = Range(0, 1, open_low=True, open_high=True)
SHARE = Range(0, 1)
SEED = Range(0, 2**32 - 1)  # what NumPy's generators take

# Of a recipe's fields, by name.
RECIPE: dict[str, Range] = {
    "accumulate": COUNT,
    "alpha": NOT_NEGATIVE,
    "and_mask": SHARE,
    "batch_size": Range(1, 2**20),
    "bits": BITS,
    "calibration_batches": COUNT,
    "clip": POSITIVE,
    "damping": NOT_NEGATIVE,
    "distill_weight": SHARE,
    "dropout": Range(0, 1, open_high=True),
    "edge_bits": Range(2, 32),  # above 8: 32, of 1-bit nets alone
    "ema_decay": BETWEEN_0_AND_1,
    "epochs": COUNT_OR_NONE,
    "evaluate_every": COUNT,
    "freeze_oscillating": BETWEEN_0_AND_1,
    "frequency": POSITIVE,
    "frequency_start": POSITIVE,
    "holdout": BETWEEN_0_AND_1,
    "image_size": Range(0, 4096),  # 0: the backbone's own
    "label_smoothing": Range(0, 1, open_high=True),
    "lr": POSITIVE,
    "mixup": NOT_NEGATIVE,
    "norm_batches": COUNT_OR_NONE,
    "per_class": Range(1, 10**6),
    "quant_start_step": COUNT,
    "reg_tau": NOT_NEGATIVE,
    "rho": NOT_NEGATIVE,
    "seed": SEED,
    "stage": Range(1, 2),
    "stage2_epochs": COUNT,
    "stage2_lr": POSITIVE,
    "stage2_steps": COUNT,
    "stage2_weight_decay": NOT_NEGATIVE,
    "start_step": COUNT_OR_NONE,
    "scale_lr_ratio": NOT_NEGATIVE,
    "steps": COUNT_OR_NONE,
    "threshold": SHARE,
    "trial_seed": SEED,
    "warmup": COUNT_OR_NONE,
    "weight_bits": BITS,
    "weight_decay": NOT_NEGATIVE,
    "weight_threshold": SHARE,
    "window": Range(2),
    "workers": Range(0, 1024),
    "z": Range(),
}
# Of the flags of `qat` and the quickstart, by name.
COMMAND: dict[str, Range] = RECIPE | {
    "alpha": BETWEEN_0_AND_1,
    "batch": Range(1, 2**20),
    "image_size": Range(8, 4096),
    "images": Range(1, 10**6),
    "jobs": Range(1, 1024),
    "minutes": POSITIVE,
    "max_drop": Range(0, 100),
    "rounds": Range(1, 10**6),
    "threads": Range(1, 1024),
    "top": COUNT,
}


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return f"--{name.replace('_', '-')}"


def out_of_range(values: Any, ranges: dict[str, Range]) -> str | None:
    """Which number of the dataclass `values` lies outside its range, as an error's text; None where all are within."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if value not in ranges[field.name]:
            return f"{flag(field.name)} must be {ranges[field.name]}, got {value:.16g}"
    return None
