"""A finished run's accuracies as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from edgeqat.terminal import printable
from qat.runs.records import results_of
from qat.runs.run_folder import RunFolder
from qat.settle import LARGE_SHIFT


def table(folder: RunFolder) -> str:
    """Per-domain accuracy of the selected checkpoint, in percent."""
    results = results_of(folder)
    rows = [
        (f"{printable(name)} (source, held out)", value)
        for name, value in results["source_validation"].items()
    ]
    rows.append(
        (
            "source mean",
            sum(results["source_validation"].values())
            / len(results["source_validation"]),
        )
    )
    rows.append((f"{printable(results['test_domain'])} (target)", results["target"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>7.2%}" for name, value in rows]
    if settled := results.get("settled"):
        lines.append(f"settled: {_settled(settled, results['source_validation'])}")
    speed = (
        f"{results['train_seconds']:.0f} s, {results['images_per_second']:.0f} images/s"
    )
    return "\n".join(
        [
            f"{printable(folder.path)}: step {results['selected_step']} of training ({speed})",
            *lines,
        ]
    )


def _settled(settled: Mapping[str, Any], accuracy: Mapping[str, float]) -> str:
    """What rounding biases to integers did to the net (`qat/settle.py`)."""
    if settled.get("reason") is not None:
        return f"no; {printable(settled['reason'])}"
    before, after = (
        sum(found.values()) / len(found)
        for found in (settled["source_validation_before"], accuracy)
    )
    shifts = settled["shifts"]
    worst = max(shifts, key=lambda name: shifts[name], default="")
    text = f"{settled['biases']} layers' biases rounded as in the file; source mean {before:.2%} -> {after:.2%}"
    if worst:
        text += (
            f"; results moved by at most {shifts[worst]:.2g} codes ({printable(worst)})"
        )
    if left := settled["left"]:
        text += f"; not settled: {', '.join(printable(f'{name} ({why})') for name, why in left.items())}"
    if worst and shifts[worst] > LARGE_SHIFT:
        text += "; its input's scale is out of proportion, as an outlier among the calibration images makes it"
    return text
