"""DomainBed's model selection and error bars, over the records of one run (`docs/algorithms.md`, DomainBed protocol)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Record:
    """Accuracies in [0, 1] of one checkpoint: held-out images of each source, and the target's two parts."""

    step: int
    source_out: Mapping[str, float]
    target_in: float = float("nan")
    target_out: float = float("nan")

    @property
    def source_mean(self) -> float:
        """Unweighted over domains."""
        return float(np.mean(list(self.source_out.values())))


def training_domain_validation(records: Sequence[Record]) -> Record:
    """The record with the best mean held-out source accuracy; the earliest of equals. Raises ValueError without records."""
    return max(records, key=lambda record: (record.source_mean, -record.step))


def oracle(records_by_run: Sequence[Sequence[Record]]) -> Record:
    """Test-domain validation: of the runs' last records, the one best on the target's held-out part (no early stopping)."""
    return max(
        (max(records, key=lambda r: r.step) for records in records_by_run),
        key=lambda r: r.target_out,
    )


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and population standard deviation over sqrt(n), as DomainBed prints them."""
    return float(np.mean(values)), float(np.std(values) / len(values) ** 0.5)
