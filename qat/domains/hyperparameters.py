"""Hyper-parameters as DomainBed draws them, and as the code of SWAD and SAGM does (`docs/algorithms.md`, DomainBed
protocol; hparams_registry.py of facebookresearch/DomainBed, khanrc/swad and Wang-pengfei/SAGM).

    learning rate   default 5e-5   drawn 10^U(-5, -3.5)
    batch size      default 32     drawn floor(2^U(3, 5.5)), of each source domain; DomainNet floor(2^U(3, 5))
    weight decay    default 0      drawn 10^U(-6, -2)
    dropout         default 0      drawn from 0, 0.1, 0.5
    SAM, SAGM: ρ    default 0.05   drawn from 0.01, 0.02, 0.05, 0.1
    SAGM: α         default 0.001  drawn from 0.01, 0.02, 0.05, 0.1

The distributions are the same in all three. The random numbers are not: DomainBed seeds every value by its name; the other
two, which stem from an earlier DomainBed, draw all values in a row from one generator. SAM and SAGM are not in DomainBed.
"""

from typing import Literal

import numpy as np

from qat.domains.splits import seed_hash

Registry = Literal["domainbed", "swad"]
Algorithm = Literal["erm", "sam", "sagm"]

DROPOUTS = [0.0, 0.1, 0.5]
RADII = [0.01, 0.02, 0.05, 0.1]

Value = float | int


def hyperparameters(
    seed: int,
    *,
    algorithm: Algorithm = "erm",
    data_set: str = "PACS",
    trial_seed: int = 0,
    registry: Registry = "domainbed",
) -> dict[str, Value]:
    """Hyper-parameters of draw `seed`; draw 0 is the defaults.

    data_set: "DomainNet" has smaller batches, all others are alike. trial_seed: the draws differ between trials.
    registry: whose random numbers; "swad" is SAGM's too.
    Returns "lr", "batch_size" (images of each source domain), "weight_decay", "dropout"; SAM: "rho"; SAGM: also "alpha".
    """
    if seed < 0:
        raise ValueError(f"a draw of hyper-parameters is 0 or more, got {seed}")
    if seed == 0:
        return _defaults(algorithm)
    run_seed = seed_hash(seed, trial_seed)
    most = 5.0 if data_set == "DomainNet" else 5.5  # exponent of the batch size
    if registry == "domainbed":
        return _drawn_by_name(algorithm, run_seed, most)
    return _drawn_in_a_row(algorithm, run_seed, most)


def _defaults(algorithm: Algorithm) -> dict[str, Value]:
    values: dict[str, Value] = {
        "lr": 5e-5,
        "batch_size": 32,
        "weight_decay": 0.0,
        "dropout": 0.0,
    }
    if algorithm in ("sam", "sagm"):
        values["rho"] = 0.05
    if algorithm == "sagm":
        values["alpha"] = 1e-3
    return values


def _drawn_by_name(
    algorithm: Algorithm, run_seed: int, most: float
) -> dict[str, Value]:
    def named(name: str) -> np.random.RandomState:
        return np.random.RandomState(seed_hash(run_seed, name))

    values: dict[str, Value] = {
        "lr": float(10 ** named("lr").uniform(-5, -3.5)),
        "batch_size": int(2 ** named("batch_size").uniform(3, most)),
        "weight_decay": float(10 ** named("weight_decay").uniform(-6, -2)),
        "dropout": float(named("resnet_dropout").choice(DROPOUTS)),
    }
    if algorithm in ("sam", "sagm"):
        values["rho"] = float(named("rho").choice(RADII))
    if algorithm == "sagm":
        values["alpha"] = float(named("alpha").choice(RADII))
    return values


def _drawn_in_a_row(
    algorithm: Algorithm, run_seed: int, most: float
) -> dict[str, Value]:
    state = np.random.RandomState(run_seed)
    # The order of the draws decides their values.
    dropout = float(state.choice(DROPOUTS))
    lr = float(10 ** state.uniform(-5, -3.5))
    batch_size = int(2 ** state.uniform(3, most))
    weight_decay = float(10 ** state.uniform(-6, -2))
    values: dict[str, Value] = {
        "lr": lr,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "dropout": dropout,
    }
    if algorithm in ("sam", "sagm"):
        values["rho"] = float(state.choice(RADII))
    if algorithm == "sagm":
        values["alpha"] = float(state.choice(RADII))
    return values
