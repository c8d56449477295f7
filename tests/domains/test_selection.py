"""DomainBed's selection rules and tables against a transcription that works on flat dictionaries, as its code does."""

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest

from qat.domains.selection import (
    LEAVE_ONE_OUT,
    ORACLE,
    RULES,
    TRAINING_DOMAIN,
    Estimate,
    Record,
    mean_and_standard_error,
    tabulate,
)
from qat.domains.sweep import sweep_runs

DOMAINS = ("art", "cartoon", "photo")
STEPS = (0, 100, 200)

Row = dict[str, Any]


def sweep(seed: int, *, levels: int = 12) -> list[Row]:
    """Records of a sweep as DomainBed's results.jsonl has them. Few levels of accuracy: there are ties."""
    generator = np.random.default_rng(seed)
    rows = []
    for trial, draw in itertools.product(range(3), range(4)):
        for left_out in [[0], [0, 1], [0, 2], [1], [1, 2], [2]]:
            for step in STEPS:
                row: Row = {"trial": trial, "draw": draw, "test_envs": left_out, "step": step}
                for environment in range(3):
                    for part in ("in", "out"):
                        row[f"env{environment}_{part}_acc"] = int(generator.integers(levels)) / (levels - 1)
                rows.append(row)
    return rows


def as_records(rows: list[Row]) -> list[Record]:
    records = []
    for row in rows:
        inside = {name: row[f"env{i}_in_acc"] for i, name in enumerate(DOMAINS)}
        outside = {name: row[f"env{i}_out_acc"] for i, name in enumerate(DOMAINS)}
        targets = tuple(DOMAINS[i] for i in row["test_envs"])
        records.append(Record(row["step"], targets, inside, outside, row["draw"], row["trial"]))
    return records


def best_of_draw(rule: str, rows: list[Row], target: int) -> tuple[float, float] | None:
    """(validation, test) of one draw's rows; the first of equals."""
    alone = [row for row in rows if row["test_envs"] == [target]]
    found: list[tuple[float, float]] = []
    if rule == "training-domain":
        for row in alone:
            sources = [row[f"env{i}_out_acc"] for i in range(3) if i != target]
            found.append((float(np.mean(sources)), row[f"env{target}_in_acc"]))
    if rule == "oracle" and alone:
        last = sorted(alone, key=lambda row: row["step"])[-1]
        found.append((last[f"env{target}_out_acc"], last[f"env{target}_in_acc"]))
    if rule == "leave-one-domain-out":
        for step in STEPS:
            tests = [row for row in alone if row["step"] == step]
            values = [-1.0, -1.0, -1.0]
            for row in rows:
                if row["step"] == step and len(row["test_envs"]) == 2 and target in row["test_envs"]:
                    other = next(i for i in row["test_envs"] if i != target)
                    values[other] = row[f"env{other}_in_acc"]
            del values[target]
            if len(tests) == 1 and -1 not in values:
                found.append((np.sum(values) / 2, tests[0][f"env{target}_in_acc"]))
    best = None
    for one in found:
        if best is None or one[0] > best[0]:
            best = one
    return best


def sweep_accuracy(rule: str, rows: list[Row], trial: int, target: int) -> float | None:
    """Test accuracy of the best draw; DomainBed sorts them upward and reverses: the last of equals."""
    ranked = []
    for draw in sorted({row["draw"] for row in rows}):
        best = best_of_draw(rule, [r for r in rows if r["trial"] == trial and r["draw"] == draw], target)
        if best is not None:
            ranked.append(best)
    ranked.sort(key=lambda one: one[0])
    return ranked[-1][1] if ranked else None


def printed(values: list[float]) -> str:
    if not values:
        return "X"
    mean = 100 * sum(values) / len(values)
    squares = sum((100 * value - mean) ** 2 for value in values)
    return f"{mean:.1f} +/- {math.sqrt(squares / len(values)) / math.sqrt(len(values)):.1f}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_tables_are_those_of_the_transcription(rule: str, seed: int) -> None:
    rows = sweep(seed)
    np.random.default_rng(seed).shuffle(rows)
    if seed == 3:  # one draw lacks a run, one run lacks a step
        rows = [row for row in rows if row["draw"] != 1 or row["test_envs"] != [0, 2]]
        rows = [row for row in rows if row["draw"] != 2 or row["test_envs"] != [1] or row["step"] != 100]
    rows.sort(key=lambda row: row["step"])
    table = tabulate(as_records(rows), RULES[rule], DOMAINS)
    by_trial: dict[int, list[float]] = {}
    means = []
    for target, name in enumerate(DOMAINS):
        accuracies = []
        for trial in range(3):
            accuracy = sweep_accuracy(rule, rows, trial, target)
            if accuracy is not None:
                accuracies.append(accuracy)
                by_trial.setdefault(trial, []).append(accuracy)
        assert table.by_target[name].accuracies == tuple(accuracies)
        assert str(table.by_target[name]) == printed(accuracies)
        means.append(100 * float(np.mean(accuracies)))
    assert table.average_percent == sum(means) / 3
    averages = [sum(found) / len(found) for _, found in sorted(by_trial.items())]
    assert str(table.over_trials) == printed(averages)
    assert str(table).splitlines()[-2].split() == ["Avg", f"{sum(means) / 3:.1f}"]


def record(step: int, **values: Any) -> Record:
    defaults: Row = {"targets": ("art",), "accuracy_in": {"art": 0.5}, "accuracy_out": {"photo": 0.5, "cartoon": 0.5}}
    return Record(step, **{**defaults, **values})


def test_a_target_without_a_finished_trial_is_an_x() -> None:
    table = tabulate([record(0)], TRAINING_DOMAIN, ("art", "photo"))
    assert str(table.by_target["photo"]) == "X" and table.average_percent is None
    assert str(table.by_target["art"]) == "50.0 +/- 0.0" and "Avg" in str(table)


def test_a_tie_of_the_last_digit_is_printed_as_domainbed_does() -> None:
    """43.75 % as a mean of percents, 43.7499... as a mean of shares."""
    domains = ("a", "b", "c", "d")
    records = []
    for domain, accuracy in zip(domains, (0.25, 2 / 3, 0.5, 1 / 3), strict=True):
        records.append(record(0, targets=(domain,), accuracy_in={domain: accuracy}))
    percents = [25.0, 100 * (2 / 3), 50.0, 100 * (1 / 3)]
    average = tabulate(records, TRAINING_DOMAIN, domains).average_percent
    assert average == sum(percents) / 4 and f"{average:.1f}" == "43.8"


def test_the_last_of_equal_draws_and_the_first_of_equal_steps_win() -> None:
    records = [record(step, hyperparameter_seed=draw) for draw in (0, 1) for step in (200, 100)]
    chosen = TRAINING_DOMAIN.choose(records, "art")[0].record
    assert (chosen.hyperparameter_seed, chosen.step) == (1, 100)


def test_the_oracle_does_not_stop_early() -> None:
    early = record(0, accuracy_out={"art": 1.0})
    late = record(300, accuracy_out={"art": 0.1}, accuracy_in={"art": 0.2})
    assert ORACLE.choose([early, late], "art")[0].accuracy == 0.2


def test_only_the_chosen_checkpoint_needs_its_target_measured() -> None:
    unmeasured = record(100, accuracy_in={})
    better = record(200, accuracy_out={"photo": 0.9})
    assert TRAINING_DOMAIN.choose([unmeasured, better], "art")[0].accuracy == 0.5
    with pytest.raises(
        ValueError, match=r"run of targets art, draw 0, trial 0, step 100: the 'in' part of 'art' was not"
    ):
        _ = TRAINING_DOMAIN.choose([unmeasured], "art")[0].accuracy
    with pytest.raises(ValueError, match="'out' part of 'art' was not measured"):
        ORACLE.choose([record(0)], "art")


def test_cross_validation_needs_every_pair() -> None:
    alone = record(0)
    with_photo = record(0, targets=("art", "photo"), accuracy_in={"photo": 0.3}, accuracy_out={"cartoon": 0.5})
    with_cartoon = record(0, targets=("cartoon", "art"), accuracy_in={"cartoon": 0.6}, accuracy_out={"photo": 0.5})
    assert LEAVE_ONE_OUT.choose([alone, with_photo], "art") == {}
    choice = LEAVE_ONE_OUT.choose([alone, with_photo, with_cartoon], "art")[0]
    assert choice.validation == pytest.approx(0.45) and choice.record is alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ()}, "one domain or two"),
        ({"targets": ("a", "a")}, "one domain or two"),
        ({"accuracy_in": {"art": float("nan")}}, r"accuracy of 'art' \(in\) must lie in \[0, 1\], got nan"),
        ({"accuracy_out": {"art": 93.0}}, r"accuracy of 'art' \(out\) must lie in \[0, 1\], got 93"),
    ],
)
def test_records_that_are_none_are_refused(values: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(7, **values)


def test_a_record_without_sources_selects_nothing() -> None:
    with pytest.raises(ValueError, match="no source's held-out part"):
        TRAINING_DOMAIN.choose([record(0, accuracy_out={"art": 0.5})], "art")


def test_standard_error_is_the_population_one() -> None:
    mean, error = mean_and_standard_error([80.0, 82.0, 87.0])
    assert mean == pytest.approx(83.0)
    assert error == pytest.approx(((9 + 1 + 16) / 3) ** 0.5 / 3**0.5)
    assert str(Estimate((0.8, 0.82, 0.87))) == "83.0 +/- 1.7"
    with pytest.raises(ValueError, match="no trials"):
        mean_and_standard_error([])


def test_a_sweep_has_domainbeds_runs_and_seeds() -> None:
    runs = list(sweep_runs("PACS", "ERM", DOMAINS, draws=2, trials=2, cross_validation=True))
    expected = []
    for trial in range(2):
        for left_out in [[0], [0, 1], [0, 2], [1], [1, 2], [2]]:
            for draw in range(2):
                text = f"('PACS', 'ERM', {left_out}, {draw}, {trial})"
                seed = int(hashlib.md5(text.encode()).hexdigest(), 16) % 2**31
                expected.append((tuple(DOMAINS[i] for i in left_out), draw, trial, seed))
    assert [(run.targets, run.hyperparameter_seed, run.trial_seed, run.seed) for run in runs] == expected
    assert len(list(sweep_runs("PACS", "ERM", DOMAINS))) == 3 * 20 * 3
    with pytest.raises(ValueError, match="at least 3 domains, got art, photo"):
        list(sweep_runs("PACS", "ERM", ("art", "photo"), cross_validation=True))
