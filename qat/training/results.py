"""A finished run's accuracies as a table for the terminal."""

from qat.training.checkpoint import RunFolder


def table(folder: RunFolder) -> str:
    """Per-domain accuracy of the selected checkpoint, in percent."""
    results = folder.results()
    rows = [(f"{name} (source, held out)", value) for name, value in results["source_validation"].items()]
    rows.append(("source mean", sum(results["source_validation"].values()) / len(results["source_validation"])))
    rows.append((f"{results['test_domain']} (target)", results["target"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>7.2%}" for name, value in rows]
    speed = f"{results['train_seconds']:.0f} s, {results['images_per_second']:.0f} images/s"
    return "\n".join([f"{folder.path}: step {results['selected_step']} of training ({speed})", *lines])
