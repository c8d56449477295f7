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
    of_sources = results["source_validation"]
    shares = {}
    for name, share in of_sources.items():
        shares[f"{printable(name)} (source, held out)"] = share
    shares["source mean"] = _mean(of_sources)
    shares[f"{printable(results['test_domain'])} (target)"] = results["target"]
    speed = (
        f"{results['train_seconds']:.0f} s, {results['images_per_second']:.0f} images/s"
    )
    lines = [
        f"{printable(folder.path)}: step {results['selected_step']} of training ({speed})"
    ]
    width = max(map(len, shares))
    for name, share in shares.items():
        lines.append(f"{name:<{width}}  {share:>7.2%}")
    settled = results.get("settled")
    if settled:
        lines.append(f"settled: {_settled(settled, of_sources)}")
    return "\n".join(lines)


def _mean(accuracies: Mapping[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


def _settled(settled: Mapping[str, Any], accuracy: Mapping[str, float]) -> str:
    """What rounding biases to integers did to the net (`qat/settle.py`)."""
    if settled.get("reason") is not None:
        return f"no; {printable(settled['reason'])}"
    before = _mean(settled["source_validation_before"])
    after = _mean(accuracy)
    shifts = settled["shifts"]
    worst = max(shifts, key=lambda name: shifts[name], default="")
    text = f"{settled['biases']} layers' biases rounded as in the file; source mean {before:.2%} -> {after:.2%} "
    text += "on the images that chose the step, which flatter the first of the two"
    if worst:
        text += (
            f"; results moved by at most {shifts[worst]:.2g} codes ({printable(worst)})"
        )
    not_settled = []
    for name, reason in settled["left"].items():
        not_settled.append(printable(f"{name} ({reason})"))
    if not_settled:
        text += f"; not settled: {', '.join(not_settled)}"
    if worst and shifts[worst] > LARGE_SHIFT:
        text += (
            "; a scale there is out of proportion, of the layer's input or of a channel that images hardly ever "
            "switch on"
        )
    return text
