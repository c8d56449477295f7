"""Gate the file you ship in your own test suite: copy this file and name your folders.

Store the baseline once, and again only when you mean to:  qat compare baselines/resnet18.json runs/fp --update-baseline
The file then classifies the same images as the full-precision run did, and is compared with it image by image. A missing
file fails: a gate that is skipped lets everything through.
"""

from pathlib import Path

from qat.deploy import compare_file

BASELINE, FILE = Path("baselines/resnet18.json"), Path("runs/w4a4/model.onnx")


def test_quantized_model_keeps_its_accuracy() -> None:
    comparison = compare_file(BASELINE, FILE, max_drop=1.0)
    assert comparison.passed, str(comparison)
