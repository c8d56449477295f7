"""Draws of hyper-parameters against a transcription of the two registries."""

import hashlib
from typing import Any, get_args

import numpy as np
import pytest

from qat.domains.hyperparameters import Algorithm, hyperparameters


def hashed(*values: object) -> int:
    return int(hashlib.md5(str(values).encode()).hexdigest(), 16) % 2**31


def domainbed(seed: int, trial: int, data_set: str) -> dict[str, Any]:
    run = hashed(seed, trial)
    return {
        "lr": 10 ** np.random.RandomState(hashed(run, "lr")).uniform(-5, -3.5),
        "batch_size": int(
            2 ** np.random.RandomState(hashed(run, "batch_size")).uniform(3, 5 if data_set == "DomainNet" else 5.5)
        ),
        "weight_decay": 10 ** np.random.RandomState(hashed(run, "weight_decay")).uniform(-6, -2),
        "dropout": np.random.RandomState(hashed(run, "resnet_dropout")).choice([0.0, 0.1, 0.5]),
    }


def swad(seed: int, trial: int, data_set: str, algorithm: str) -> dict[str, Any]:
    state = np.random.RandomState(hashed(seed, trial))
    drawn = {"dropout": state.choice([0.0, 0.1, 0.5]), "lr": 10 ** state.uniform(-5, -3.5)}
    drawn["batch_size"] = int(2 ** state.uniform(3, 5 if data_set == "DomainNet" else 5.5))
    drawn["weight_decay"] = 10 ** state.uniform(-6, -2)
    if algorithm != "erm":
        drawn["rho"] = state.choice([0.01, 0.02, 0.05, 0.1])
    if algorithm == "sagm":
        drawn["alpha"] = state.choice([0.01, 0.02, 0.05, 0.1])
    return drawn


@pytest.mark.parametrize("data_set", ["PACS", "DomainNet"])
def test_draws_are_the_transcriptions(data_set: str) -> None:
    sizes = set()
    for seed in range(1, 21):
        for trial in range(3):
            found = hyperparameters(seed, data_set=data_set, trial_seed=trial)
            assert found == domainbed(seed, trial, data_set)
            sizes.add(found["batch_size"])
            for algorithm in get_args(Algorithm):
                drawn = hyperparameters(seed, algorithm=algorithm, data_set=data_set, trial_seed=trial, registry="swad")
                assert drawn == swad(seed, trial, data_set, algorithm)
    assert min(sizes) >= 8 and max(sizes) <= (31 if data_set == "DomainNet" else 45)
    assert max(sizes) > (28 if data_set == "DomainNet" else 32)


def test_draw_0_is_the_defaults() -> None:
    erm = {"lr": 5e-5, "batch_size": 32, "weight_decay": 0.0, "dropout": 0.0}
    assert hyperparameters(0) == hyperparameters(0, trial_seed=2, registry="swad") == erm
    assert hyperparameters(0, algorithm="sam") == {**erm, "rho": 0.05}
    assert hyperparameters(0, algorithm="sagm") == {**erm, "rho": 0.05, "alpha": 1e-3}
    with pytest.raises(ValueError, match="0 or more, got -1"):
        hyperparameters(-1)


def test_sagm_in_domainbeds_way_seeds_its_own_values_by_name() -> None:
    found = hyperparameters(5, algorithm="sagm")
    alpha = np.random.RandomState(hashed(hashed(5, 0), "alpha")).choice([0.01, 0.02, 0.05, 0.1])
    assert found["alpha"] == alpha and {k: found[k] for k in ("lr", "dropout")} == {
        k: domainbed(5, 0, "PACS")[k] for k in ("lr", "dropout")
    }
