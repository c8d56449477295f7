"""Runs the cells of a sweep: some at a time on this machine, or as jobs of submitit. What is done is not done again.

A cell is a run folder: done when it has results.json, resumed when it has last.pt. A cell that fails leaves `failure.txt` and
does not stop the others; it is tried again when the sweep is. Each runs in a process of its own, by `qat train`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeqat.files import read_json, write_json, write_text
from qat.runs.given import OF_ONE_RUN
from qat.runs.parts import RecipeError
from qat.runs.recipe import from_json, to_json
from qat.sweep.spec import Cell, Sweep

Engine = Literal["here", "submitit-local", "slurm"]
FAILURE, LOG, CELL = "failure.txt", "train.log", "cell.json"
SECONDS_BETWEEN_LOOKS = 0.2
# A run ends its step and saves when it is told to stop; beyond that it is killed
SECONDS_TO_SAVE = 60
WAITS_ARE_OVER = (
    0,
    1,
)  # exit codes of a run that came to its end: compared well, or not
STOPPED = 143


@dataclass
class Progress:
    """Cells by what became of them."""

    done: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[Cell] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.done)} of {len(self.done) + len(self.failed) + len(self.left)} cells done"
        if self.failed:
            text += f", {len(self.failed)} failed"
        if self.left:
            text += f", {len(self.left)} left; the same command goes on"
        lines = [f"  {name}: {reason}" for name, reason in self.failed.items()]
        return "\n".join([text, *lines])


def run_sweep(
    sweep: Sweep,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    engine: Engine = "here",
    say: Callable[[str], None] = print,
) -> Progress:
    """Run the cells of `sweep` that are not done yet.

    jobs:    cells at a time. minutes: stop cleanly after so many, with what runs saved; None: when all is done.
    engine:  "here": processes of this machine; "submitit-local" and "slurm": jobs of submitit, with `sweep.slurm`.
    Raises RecipeError for a cell folder that holds another recipe, before anything runs.
    """
    cells = sweep.cells()
    for cell in cells:
        _prepare(sweep, cell)
    started = _Here() if engine == "here" else _Submitit(sweep.out, engine, sweep.slurm)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    progress = _all(sweep, cells, started, jobs, deadline, say)
    summary = {"done": [c.name for c in progress.done], "failed": progress.failed}
    write_json(sweep.out / "sweep.json", summary)
    return progress


def is_done(sweep: Sweep, name: str) -> bool:
    """Whether the cell `name` has its results."""
    return (sweep.out / name / "results.json").exists()


def command_of(sweep: Sweep, cell: Cell) -> list[str]:
    """The command line that trains a cell, or goes on with it."""
    folder = sweep.out / cell.name
    words = [sys.executable, "-m", "qat.cli", "train", cell.method]
    words += ["--config", str(folder / CELL), "--out", str(folder)]
    return [*words, "--resume"] if (folder / "last.pt").exists() else words


def _prepare(sweep: Sweep, cell: Cell) -> None:
    """Write the cell's recipe, where it has none. Raises RecipeError where the folder holds another one."""
    folder = sweep.out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(json.dumps(to_json(cell.recipe)))  # as the file has them
    for name in OF_ONE_RUN:
        del values[name]
    file = folder / CELL
    if not file.exists():
        write_json(file, values)
        return
    # Entries that came after the file have the values they were run with by default
    before = to_json(from_json(read_json(file), file))
    before = json.loads(json.dumps(before))
    different = sorted(n for n in values if before.get(n) != values[n])
    if different:
        name = different[0]
        raise RecipeError(
            f"{file}: was begun with {name} = {before.get(name)!r}, {sweep.source} has {values[name]!r}; "
            "name another `out`, or remove the folder"
        )


def _all(
    sweep: Sweep,
    cells: list[Cell],
    engine: "_Here | _Submitit",
    jobs: int,
    deadline: float | None,
    say: Callable[[str], None],
) -> Progress:
    progress = Progress()
    waiting = [cell for cell in cells if not is_done(sweep, cell.name)]
    progress.done = [cell for cell in cells if is_done(sweep, cell.name)]
    running: dict[str, tuple[Cell, Any]] = {}
    try:
        while waiting or running:
            is_over = deadline is not None and time.monotonic() >= deadline
            if is_over:
                break
            for cell in _ready(sweep, waiting, progress, jobs - len(running)):
                waiting.remove(cell)
                say(f"{cell.name}: begins")
                running[cell.name] = (cell, engine.start(sweep, cell))
            _drop_hopeless(waiting, progress)
            for name, (cell, job) in list(running.items()):
                code = engine.code(job)
                if code is not None:
                    del running[name]
                    _note(sweep, cell, code, progress, say)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        engine.stop([job for _, job in running.values()])
        for cell, _ in running.values():
            if is_done(sweep, cell.name):
                progress.done.append(cell)
            else:
                progress.left.append(cell)
    progress.left += waiting
    return progress


def _ready(
    sweep: Sweep, waiting: Iterable[Cell], progress: Progress, free: int
) -> list[Cell]:
    """The first `free` cells whose start is done."""
    able = [c for c in waiting if not c.after or is_done(sweep, c.after)]
    return able[: max(free, 0)]


def _drop_hopeless(waiting: list[Cell], progress: Progress) -> None:
    """Cells that start from one that failed have failed, too."""
    for cell in list(waiting):
        if cell.after in progress.failed:
            waiting.remove(cell)
            progress.failed[cell.name] = f"starts from {cell.after}, which failed"


def _note(
    sweep: Sweep, cell: Cell, code: int, progress: Progress, say: Callable[[str], None]
) -> None:
    folder = sweep.out / cell.name
    if code in WAITS_ARE_OVER and is_done(sweep, cell.name):
        (folder / FAILURE).unlink(missing_ok=True)
        progress.done.append(cell)
        say(f"{cell.name}: done")
        return
    reason = _last_line(folder / LOG) or f"exit code {code}"
    write_text(folder / FAILURE, reason + "\n")
    progress.failed[cell.name] = reason
    say(f"{cell.name}: FAILED: {reason}")


def _last_line(path: Path) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


class _Here:
    """Processes of this machine."""

    def start(self, sweep: Sweep, cell: Cell) -> "subprocess.Popen[bytes]":
        with (sweep.out / cell.name / LOG).open("ab") as log:
            return subprocess.Popen(
                command_of(sweep, cell),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def code(self, job: "subprocess.Popen[bytes]") -> int | None:
        return job.poll()

    def stop(self, jobs: list["subprocess.Popen[bytes]"]) -> None:
        for job in jobs:
            job.terminate()
        for job in jobs:
            try:
                job.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()


class _Submitit:
    """Jobs of submitit, each of which runs one cell's command."""

    def __init__(self, out: Path, engine: str, parameters: dict[str, Any]) -> None:
        from edgeqat.extras import require

        require("submitit")
        import submitit

        cluster = "local" if engine == "submitit-local" else "slurm"
        self.executor = submitit.AutoExecutor(out / "submitit", cluster=cluster)
        self.executor.update_parameters(name="edgeqat", **parameters)

    def start(self, sweep: Sweep, cell: Cell) -> Any:
        log = sweep.out / cell.name / LOG
        return self.executor.submit(run_command, command_of(sweep, cell), str(log))

    def code(self, job: Any) -> int | None:
        if not job.done():
            return None
        error = job.exception()
        return int(job.result()) if error is None else STOPPED

    def stop(self, jobs: list[Any]) -> None:
        for job in jobs:
            job.cancel()
        for job in jobs:
            job.wait()


def run_command(words: list[str], log: str) -> int:
    """What a submitit job does: run a command line, its output appended to a file; returns its exit code."""
    with Path(log).open("ab") as file:
        return subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
