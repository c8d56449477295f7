"""Gate your own model in your own test suite: copy this file and name your folders.

Store the baseline once, and again only when you mean to:  qat compare baselines/resnet18.json runs/fp --update-baseline
"""

from pathlib import Path

import pytest

from qat.training.compare import compare_runs

BASELINE, RUN = Path("baselines/resnet18.json"), Path("runs/w4a4")


@pytest.mark.skipif(not RUN.exists(), reason="no trained run yet")
def test_quantized_model_keeps_its_accuracy() -> None:
    comparison = compare_runs(BASELINE, RUN, max_drop=1.0)
    assert comparison.passed, str(comparison)
