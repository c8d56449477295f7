"""What a run says while it goes: metrics.jsonl, optional TensorBoard scalars and services, a progress bar."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edgeqat.files import FileError, reason_of, write_text
from edgeqat.terminal import printable
from qat.runs.log import read_log

log = logging.getLogger("edgeqat")


class Tracker:
    """Appends one JSON object per `log` to metrics.jsonl (flushed, so that a killed run keeps its history)."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        tensorboard: bool = False,
        resume_at: int = 0,
        writes: bool = True,
        services: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        """writes: False for the processes of a run that leave it to another; then nothing is written or shown.
        services: takes the scalars of a step too, such as accelerate's `log`."""
        self.path = folder / "metrics.jsonl" if writes else Path(os.devnull)
        tensorboard, resume_at = tensorboard and writes, resume_at if writes else 0
        if resume_at:
            self._forget_after(resume_at)
        self.file = self.path.open("a" if resume_at else "w")
        self.writer = _summary_writer(folder) if tensorboard else None
        self.services = services
        self.steps, self.began = steps, time.monotonic()
        self.status = self.validation = ""
        self.console = Console(stderr=True)
        # A file or a pipe gets plain lines instead of a bar
        self.has_bar = writes and self.console.is_terminal
        self.has_lines = writes and not self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.has_bar,
        )
        self.task = self.progress.add_task(
            "step", total=steps, completed=resume_at, status=""
        )

    def __enter__(self) -> "Tracker":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def log(self, step: int, values: Mapping[str, float | Mapping[str, float]]) -> None:
        """Append an entry. Raises FileError when it cannot be written, as on a full disk."""
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise FileError(
                f"{self.path}: cannot be written ({reason_of(error)})"
            ) from error
        scalars = _flat(values)
        if self.writer is not None:
            for name, scalar in scalars.items():
                self.writer.add_scalar(name, scalar, step)
        if self.services is not None:
            self.services(scalars, step)

    def show(
        self, step: int, *, loss: float, accuracy: float, images_per_second: float
    ) -> None:
        """Show step, loss, accuracy (a share) and images per second in the progress bar."""
        self.status = f"loss {loss:.3f}  accuracy {accuracy:.1%}  {images_per_second:.0f} images/s"
        status = f"{self.status}{self.validation}"
        self.progress.update(self.task, completed=step, status=status)

    def measuring(self, what: str) -> None:
        """Say in the progress bar that images are being measured."""
        self.progress.update(
            self.task, status=f"{self.status}  measuring {printable(what)}"
        )

    def measured(self, step: int, accuracy: float) -> None:
        """Show the mean held-out accuracy, a share: in the bar from now on, or as a line of a log."""
        self.validation = f"  held out {accuracy:.1%}"
        status = f"{self.status}{self.validation}"
        self.progress.update(self.task, status=status)
        if self.has_lines:
            elapsed = time.monotonic() - self.began
            line = f"step {step} of {self.steps}  {status}  {elapsed:.0f} s"
            self.console.print(line, markup=False, highlight=False)

    def _forget_after(self, step: int) -> None:
        """Drop entries a resumed run will write again."""
        if self.path.exists():
            kept = [
                json.dumps(entry)
                for entry in read_log(self.path)
                if entry["step"] <= step
            ]
            write_text(self.path, "".join(f"{line}\n" for line in kept))


def _flat(values: Mapping[str, float | Mapping[str, float]]) -> dict[str, float]:
    """Scalars by name; those of a table as table/name."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(value, Mapping):
            flat[name] = value
            continue
        for key, scalar in value.items():
            flat[f"{name}/{key}"] = scalar
    return flat


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
