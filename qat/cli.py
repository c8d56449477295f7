"""`qat export | certify | compare | report`: parse, call, print. No logic lives here."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand


@dataclass(frozen=True)
class Export:
    """Write the ONNX file of a trained run."""

    run: Positional[Path]
    """Run folder."""
    target: str = "ort-int8"
    """ort-int8: a byte per weight code; ort-packed: 1 to 7 bits each; ort-packed-int4: INT4 tensors; fp32: the float
    baseline; and the device targets of export/targets.py. All run on an unmodified ONNX Runtime."""
    out: Path | None = None
    """File to write; by default model.onnx in the run folder."""


@dataclass(frozen=True)
class Certify:
    """Prove that a file holds the trained codes and that ONNX Runtime computes them. Exits 1 when it does not."""

    run: Positional[Path]
    """Run folder the file was exported from."""
    model: Positional[Path]
    """The ONNX file."""


@dataclass(frozen=True)
class Compare:
    """Accuracy of a run against its full-precision baseline. Exits 1 when it lost more than --max-drop points."""

    baseline: Positional[Path]
    """Full-precision run folder."""
    run: Positional[Path]
    """Run folder to judge."""
    max_drop: float = 1.0
    """Percentage points that the target domain, and the mean of the source domains, may lose."""


@dataclass(frozen=True)
class Report:
    """Write report.html into a run folder."""

    run: Positional[Path]
    """Run folder."""
    baseline: Path | None = None
    """Full-precision run folder to show beside it; by default the run it started from."""


Command = (
    Annotated[Export, subcommand("export")]
    | Annotated[Certify, subcommand("certify")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Report, subcommand("report")]
)


def main() -> None:
    """Console entry point: exit 0 when all is well, 1 when a check failed, 2 when the input was unusable."""
    command = tyro.cli(Command, prog="qat", description=__doc__)
    sys.exit(guarded(lambda: execute(command)))


def guarded(action: Callable[[], int]) -> int:
    """Run `action`; unusable input becomes one line on stderr and exit code 2."""
    try:
        return action()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def execute(command: Export | Certify | Compare | Report) -> int:
    from qat import deploy
    from qat.training.compare import compare_runs

    match command:
        case Export(run, target, out):
            print(deploy.export_run(run, target, out))
            return 0
        case Certify(run, model):
            certificate = deploy.certify_run(run, model)
            print(certificate)
            return 0 if certificate.passed else 1
        case Compare(baseline, run, max_drop):
            comparison = compare_runs(baseline, run, max_drop)
            print(comparison)
            return 0 if comparison.passed else 1
        case Report(run, baseline):
            print(deploy.write_report(run, baseline))
            return 0


if __name__ == "__main__":
    main()
