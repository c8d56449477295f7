"""Which of a test's parameters run always; the others are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, slow where they are not in `quick`. A tuple is several parameters."""
    made = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        made.append(pytest.param(*values, marks=[] if case in quick else pytest.mark.slow))
    return made
