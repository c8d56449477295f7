"""DomainBed's leave-one-domain-out split (`docs/algorithms.md`, DomainBed protocol; facebookresearch/DomainBed)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qat.domains.folders import DataError, Domain


@dataclass(frozen=True)
class Subset:
    """Some images of one domain: `indices` int64 into it."""

    domain: Domain = field(repr=False)
    indices: NDArray[np.int64] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the domain that the images are of."""
        return self.domain.name

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Split:
    """What a run trains on, what selects its checkpoint, and what it is tested on.

    Leaving one domain out: sources' "in" parts train, their "out" parts validate; the target's "in" is tested, its "out"
    serves the oracle. A data set with a test set of its own has one source and no oracle (None).
    also_left_out: the "in" part of a second domain that is left out, for cross-validation; it is measured as the target is.
    """

    train: tuple[Subset, ...]
    validation: tuple[Subset, ...]
    target_in: Subset
    target_out: Subset | None
    classes: tuple[str, ...]
    also_left_out: Subset | None = None


def seed_hash(*values: object) -> int:
    """DomainBed's seed of several values: md5 of their tuple's text, modulo 2^31."""
    return int(hashlib.md5(str(values).encode()).hexdigest(), 16) % (2**31)


def split_indices(
    count: int, holdout: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(held out, rest) of range(count), shuffled by NumPy's RandomState as DomainBed's split_dataset does."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return order[:holdout], order[holdout:]


def leave_one_domain_out(
    domains: Sequence[Domain],
    test_domain: str,
    *,
    also_left_out: str | None = None,
    holdout_fraction: float = 0.2,
    trial_seed: int = 0,
) -> Split:
    """Split every domain, then set `test_domain` aside, and `also_left_out` for a run of leave-one-domain-out
    cross-validation.

    Raises DataError for unknown domains, too few domains to train on, or too few images.
    """
    names = [d.name for d in domains]
    left_out = _left_out(names, test_domain, also_left_out)
    parts: dict[str, tuple[Subset, Subset]] = {}
    for environment, domain in enumerate(domains):
        held, rest = split_indices(
            len(domain),
            int(holdout_fraction * len(domain)),
            seed_hash(trial_seed, environment),
        )
        if not len(held) or not len(rest):
            raise DataError(
                f"domain {domain.name!r}: {len(domain)} images cannot be split with --holdout {holdout_fraction}"
            )
        parts[domain.name] = Subset(domain, held), Subset(domain, rest)
    sources = [name for name in names if name not in left_out]
    target_out, target_in = parts[test_domain]
    return Split(
        tuple(parts[n][1] for n in sources),
        tuple(parts[n][0] for n in sources),
        target_in,
        target_out,
        domains[0].classes,
        None if also_left_out is None else parts[also_left_out][1],
    )


def _left_out(
    names: Sequence[str], test_domain: str, also_left_out: str | None
) -> list[str]:
    """The domains that do not train. Raises DataError where they are unknown, the same, or leave nothing to train on."""
    if test_domain not in names:
        raise DataError(
            f"--test-domain {test_domain}: no such domain; there are {', '.join(names)}"
        )
    left_out = [test_domain]
    if also_left_out is not None:
        if also_left_out not in names or also_left_out == test_domain:
            raise DataError(
                f"{also_left_out!r} cannot be left out beside --test-domain {test_domain}; there are {', '.join(names)}"
            )
        left_out.append(also_left_out)
    if len(names) == 1:
        raise DataError(
            f"only one domain ({names[0]}): leaving it out leaves nothing to train on"
        )
    if len(names) <= len(left_out):
        raise DataError(
            f"only {len(names)} domains: leaving out {' and '.join(left_out)} leaves nothing to train on"
        )
    return left_out
