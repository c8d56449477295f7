"""The runs of a DomainBed sweep: targets × hyper-parameter draws × trials (domainbed/scripts/sweep.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qat.domains.splits import seed_hash

DRAWS = 20  # of hyper-parameters
TRIALS = 3


@dataclass(frozen=True)
class SweepRun:
    """One run. targets: the one domain left out, or two for cross-validation. seed: of the run's initial weights and
    batches; hyperparameter_seed and trial_seed draw its hyper-parameters and splits."""

    targets: tuple[str, ...]
    hyperparameter_seed: int
    trial_seed: int
    seed: int


def sweep_runs(
    data_set: str,
    algorithm: str,
    domains: Sequence[str],
    *,
    draws: int = DRAWS,
    trials: int = TRIALS,
    cross_validation: bool = False,
) -> Iterator[SweepRun]:
    """Every run of a sweep in DomainBed's order, with its seeds.

    data_set, algorithm: DomainBed's names ("PACS", "ERM"); the seeds depend on them. domains: in order of their folders.
    cross_validation: also leave out every pair of domains, which `LEAVE_ONE_OUT` needs.
    Raises ValueError for fewer domains than that takes.
    """
    least = 3 if cross_validation else 2
    if len(domains) < least:
        raise ValueError(
            f"a sweep needs at least {least} domains, got {', '.join(domains) or 'none'}"
        )
    for trial_seed in range(trials):
        for environments in _left_out(len(domains), cross_validation):
            for hyperparameter_seed in range(draws):
                yield SweepRun(
                    tuple(domains[i] for i in environments),
                    hyperparameter_seed,
                    trial_seed,
                    seed_hash(
                        data_set,
                        algorithm,
                        environments,
                        hyperparameter_seed,
                        trial_seed,
                    ),
                )


def _left_out(count: int, pairs: bool) -> Iterator[list[int]]:
    for first in range(count):
        yield [first]
        if pairs:
            for second in range(first + 1, count):
                yield [first, second]
