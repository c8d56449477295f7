"""DomainBed's rules of model selection and its error bars, over the records of many runs (`docs/algorithms.md`, DomainBed
protocol; domainbed/model_selection.py and scripts/collect_results.py).

A run is one draw of hyper-parameters, trained for one target domain (cross-validation: for two) and one trial seed. With
"in" and "out" the larger and the held-out part of a domain:

    training-domain        over draws and checkpoints, the best mean of the sources' "out" accuracies
    leave-one-domain-out   over draws and steps, the best mean over the sources v of v's "in" accuracy in the run that left
                           out v and the target
    oracle                 over draws, at the last checkpoint, the best "out" accuracy of the target

Each reports the accuracy on the target's "in" part. Among equal draws the one of the highest seed wins, among equal
checkpoints the earliest, as in DomainBed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Record:
    """Accuracies in [0, 1] of one checkpoint of one run.

    targets: the domains left out: one, or two in a run for cross-validation.
    accuracy_in, accuracy_out: by domain, on its larger and on its held-out part, as far as they were measured.
    Raises ValueError for other numbers of targets, and for accuracies that are none.
    """

    step: int
    targets: tuple[str, ...]
    accuracy_in: Mapping[str, float]
    accuracy_out: Mapping[str, float]
    hyperparameter_seed: int = 0
    trial_seed: int = 0

    def __post_init__(self) -> None:
        if len(self.targets) not in (1, 2) or len(set(self.targets)) != len(
            self.targets
        ):
            raise ValueError(
                f"step {self.step}: a run leaves out one domain or two, got {self.targets}"
            )
        for part, accuracies in (("in", self.accuracy_in), ("out", self.accuracy_out)):
            for domain, accuracy in accuracies.items():
                if not 0 <= accuracy <= 1:  # nan is not
                    raise ValueError(
                        f"step {self.step}: accuracy of {domain!r} ({part}) must lie in [0, 1], got {accuracy}"
                    )

    def measured_in(self, domain: str) -> float:
        """Accuracy on the larger part of `domain`. Raises ValueError where it was not measured."""
        return self._measured(self.accuracy_in, domain, "in")

    def measured_out(self, domain: str) -> float:
        """Accuracy on the held-out part of `domain`. Raises ValueError where it was not measured."""
        return self._measured(self.accuracy_out, domain, "out")

    def _measured(
        self, accuracies: Mapping[str, float], domain: str, part: str
    ) -> float:
        if domain not in accuracies:
            raise ValueError(
                f"run of targets {', '.join(self.targets)}, draw {self.hyperparameter_seed}, trial {self.trial_seed}, "
                f"step {self.step}: the {part!r} part of {domain!r} was not measured"
            )
        return accuracies[domain]


@dataclass(frozen=True)
class Choice:
    """A checkpoint that a rule chose for `target`; validation: the accuracy that it was chosen by."""

    record: Record
    target: str
    validation: float

    @property
    def accuracy(self) -> float:
        """On the target's "in" part, the number that is reported."""
        return self.record.measured_in(self.target)


@dataclass(frozen=True)
class SelectionRule:
    """One rule. name: as DomainBed prints it. choose_in_draw: the checkpoint of the records of one draw, or None."""

    name: str
    choose_in_draw: Callable[[Sequence[Record], str], Choice | None]

    def choose(self, records: Iterable[Record], target: str) -> dict[int, Choice]:
        """Trial seed -> the checkpoint chosen for `target` among all draws, for the trials in which the rule finds one.

        records: of one method on one data set; those that do not leave `target` out are ignored.
        """
        by_trial: dict[int, dict[int, list[Record]]] = {}
        for record in records:
            if target in record.targets:
                by_draw = by_trial.setdefault(record.trial_seed, {})
                by_draw.setdefault(record.hyperparameter_seed, []).append(record)
        chosen: dict[int, Choice] = {}
        for trial_seed, by_draw in sorted(by_trial.items()):
            for _, of_draw in sorted(by_draw.items()):
                choice = self.choose_in_draw(of_draw, target)
                best = chosen.get(trial_seed)
                if choice is None:
                    continue
                if best is None or choice.validation >= best.validation:
                    chosen[trial_seed] = choice
        return chosen


def _by_training_domains(records: Sequence[Record], target: str) -> Choice | None:
    choices = []
    for record in _in_steps(records):
        if len(record.targets) == 1:
            choices.append(Choice(record, target, source_mean(record)))
    return _first_best(choices)


def _by_last_step(records: Sequence[Record], target: str) -> Choice | None:
    alone = [record for record in _in_steps(records) if len(record.targets) == 1]
    if not alone:
        return None
    return Choice(alone[-1], target, alone[-1].measured_out(target))


def _by_left_out_domains(records: Sequence[Record], target: str) -> Choice | None:
    by_step: dict[int, list[Record]] = {}
    for record in _in_steps(records):
        by_step.setdefault(record.step, []).append(record)
    choices = []
    for of_step in by_step.values():
        alone = [record for record in of_step if len(record.targets) == 1]
        accuracies = _of_pairs(of_step, target)
        if len(alone) == 1 and accuracies is not None:
            validation = float(np.sum(accuracies) / len(accuracies))
            choices.append(Choice(alone[0], target, validation))
    return _first_best(choices)


def _of_pairs(records: Sequence[Record], target: str) -> list[float] | None:
    """Of every other domain, its "in" accuracy in the run that left it out with `target`; None while one is missing."""
    others: set[str] = set()
    found: dict[str, float] = {}
    for record in records:
        others.update(record.accuracy_out, record.targets)
        if len(record.targets) == 2:
            (left_out,) = set(record.targets) - {target}
            found[left_out] = record.measured_in(left_out)
    others.discard(target)
    if not others or others != found.keys():
        return None
    return [found[domain] for domain in sorted(others)]


def source_mean(record: Record) -> float:
    """Mean "out" accuracy over the sources, unweighted. Raises ValueError where none was measured."""
    accuracies = []
    for domain, accuracy in record.accuracy_out.items():
        if domain not in record.targets:
            accuracies.append(accuracy)
    if not accuracies:
        raise ValueError(
            f"step {record.step}: no source's held-out part was measured; nothing can be selected by it"
        )
    return float(np.mean(accuracies))


def _in_steps(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.step)


def _first_best(choices: Sequence[Choice]) -> Choice | None:
    return max(choices, key=lambda choice: choice.validation, default=None)


TRAINING_DOMAIN = SelectionRule("training-domain validation set", _by_training_domains)
LEAVE_ONE_OUT = SelectionRule(
    "leave-one-domain-out cross-validation", _by_left_out_domains
)
ORACLE = SelectionRule("test-domain validation set (oracle)", _by_last_step)

RULES = {
    "training-domain": TRAINING_DOMAIN,
    "leave-one-domain-out": LEAVE_ONE_OUT,
    "oracle": ORACLE,
}


@dataclass(frozen=True)
class Estimate:
    """Accuracies in [0, 1], one of each trial. As text: mean and standard error in percent, or X without a trial."""

    accuracies: tuple[float, ...]

    def __str__(self) -> str:
        if not self.accuracies:
            return "X"
        mean, error = mean_and_standard_error(self.accuracies)
        return f"{100 * mean:.1f} +/- {100 * error:.1f}"


@dataclass(frozen=True)
class TargetTable:
    """What one rule finds for one method on one data set, as DomainBed tabulates it.

    by_target: for every target domain, over trials. over_trials: of each trial's mean over its targets.
    """

    rule: str
    by_target: Mapping[str, Estimate]
    over_trials: Estimate

    @property
    def average_percent(self) -> float | None:
        """Mean over the targets of their means over trials, in percent; None where a target has no trial.

        The means are averaged in percent, as DomainBed does: it decides the last printed digit of a tie.
        """
        percents = []
        for estimate in self.by_target.values():
            if not estimate.accuracies:
                return None
            mean, _ = mean_and_standard_error(estimate.accuracies)
            percents.append(100 * mean)
        return sum(percents) / len(percents)

    def __str__(self) -> str:
        percent = self.average_percent
        average = "X" if percent is None else f"{percent:.1f}"
        rows = [(domain, str(value)) for domain, value in self.by_target.items()]
        rows += [("Avg", average), ("over trials", str(self.over_trials))]
        width = max(len(name) for name, _ in rows)
        lines = [f"model selection method: {self.rule}"]
        lines += [f"{name:<{width}}  {text}" for name, text in rows]
        return "\n".join(lines)


def tabulate(
    records: Sequence[Record], rule: SelectionRule, domains: Sequence[str]
) -> TargetTable:
    """Apply `rule` to the records of one method on one data set, for each of `domains` as target."""
    by_target: dict[str, Estimate] = {}
    by_trial: dict[int, list[float]] = {}
    for domain in domains:
        accuracies = []
        for trial_seed, choice in rule.choose(records, domain).items():
            accuracies.append(choice.accuracy)
            by_trial.setdefault(trial_seed, []).append(choice.accuracy)
        by_target[domain] = Estimate(tuple(accuracies))
    means = [float(np.mean(found)) for _, found in sorted(by_trial.items())]
    return TargetTable(rule.name, by_target, Estimate(tuple(means)))


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and population standard deviation over sqrt(n), as DomainBed prints them. Raises ValueError for no values."""
    if not values:
        raise ValueError("no trials: there is no mean of no accuracies")
    errors = np.asarray(values) / np.sqrt(len(values))
    return float(np.mean(values)), float(np.std(errors))
