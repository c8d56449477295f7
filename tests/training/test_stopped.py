"""Signals and full disks: what a stopped run keeps, says and returns."""

import errno
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor, nn

from edgeqat.files import FileError, write_text
from edgeqat.interrupts import SIGNALS, Interrupted, StopRequest
from qat import cli
from qat.domains.synthetic import synthetic_domains
from qat.runs.build import load_run
from qat.runs.log import read_log
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, recipe_of
from qat.runs.run_folder import RunFolder
from qat.surgery.backbones import clip_gradients
from qat.train import loop
from qat.train import step as step_module
from qat.train.loop import run
from tests.quick import slow_but
from tests.training.test_run import TINY, same_model

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
LONGER: dict[str, Any] = TINY | {"steps": 7, "evaluate_every": 3}


class Ending(NamedTuple):
    """How a run ended that got a signal: the exception's name and words, Interrupted's number, and whether the handlers of
    signals were then those of before."""

    error: str
    words: str
    number: int | None
    handlers_are_back: bool


def signalled(recipe: Recipe, at: int, number: int, times: int = 1) -> Ending:
    """Run `recipe` in a process of its own, which sends itself a signal within step `at`.

    Its own, since on a virtual machine with AMX processes that had used it were seen to die when a signal came.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=send_itself, args=(recipe, at, number, times, theirs))
    process.start()
    theirs.close()
    try:
        return Ending(*ours.recv())
    finally:
        process.join()


def send_itself(recipe: Recipe, at: int, number: int, times: int, ending: Connection) -> None:
    whole = loop._Trainer._train

    def train(self: loop._Trainer, *args: object) -> None:
        if self.progress.step == at - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        whole(self, *args)  # type: ignore[arg-type]

    loop._Trainer._train = train  # type: ignore[assignment, method-assign]
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        run(recipe, DOMAINS)
    except (Interrupted, KeyboardInterrupt) as error:
        back = [signal.getsignal(number) for number in SIGNALS] == before
        ending.send((type(error).__name__, str(error), getattr(error, "number", None), back))


QUICK = {(1, signal.SIGINT)}
STOPS = [(at, number) for at in (1, 2, 3, 5) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(("at", "number"), slow_but(QUICK, STOPS))
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_bit_for_bit(at: int, number: int, tmp_path: Path) -> None:
    """Steps 1, 2 and 5 lie between evaluations, 3 is followed by one."""
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "cut", calibration_batches=2)
    ending = signalled(recipe, at, number)
    assert re.search(rf"after step {at} of 7, all saved; .* --resume --out .*cut", ending.words)
    assert ending.number == number and ending.handlers_are_back
    assert RunFolder.open(tmp_path / "cut").load("last.pt")["progress"]["step"] == at
    resumed = run(recipe.changed(resume=True), DOMAINS)
    straight = run(recipe.changed(out=tmp_path / "straight"), DOMAINS)
    assert same_model(straight, resumed)
    assert [e["step"] for e in resumed.metrics() if "loss" in e] == [1, 2, 3, 4, 5, 6, 7]
    evaluated = [[e for e in folder.metrics() if "source_mean" in e] for folder in (straight, resumed)]
    assert [e["source_mean"] for e in evaluated[0]] == [e["source_mean"] for e in evaluated[1]]


@pytest.mark.slow
def test_the_second_signal_acts_at_once(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "cut", calibration_batches=2)
    assert signalled(recipe, 2, signal.SIGINT, times=2).error == "KeyboardInterrupt"
    assert not RunFolder(tmp_path / "cut").has_run
    run(recipe, DOMAINS)  # nothing was saved, so the same command begins anew


def test_outside_the_main_thread_no_signal_is_taken() -> None:
    found: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            found.append(stop.wanted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def raises(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Interrupted(signal.SIGINT, "stopped"), 130, "stopped"),
        (Interrupted(signal.SIGTERM, "stopped"), 143, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RecipeError("--lr must be"), 2, "error: --lr must be"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), 2, "error: a.json: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (KeyError("classes"), 2, "error: KeyError: 'classes'; --debug shows where it came from"),
        (MemoryError(), 2, "error: out of memory; use a smaller --batch-size"),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (ValueError("a \x1b[31mname"), 2, r"error: a \x1b[31mname"),
    ],
)
def test_every_end_is_one_line_and_a_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["qat", "compare"])
    assert cli.guarded(raises(error)) == code
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qat", "compare", "a", "b", "--debug"])
    with pytest.raises(KeyError):
        cli.guarded(raises(KeyError("classes")))
    assert cli.arguments() == ["compare", "a", "b"]


def test_sigterm_ends_a_command_with_143_and_its_temporary_files_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qat.cli import guarded\n"
        "from edgeqat.files import write_atomically\n"
        "def write(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "def action():\n"
        f"    write_atomically(Path({str(tmp_path / 'a.json')!r}), write)\n"
        "    return 0\n"
        "sys.exit(guarded(action))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from qat import cli; sys.exit(cli.guarded(lambda: cli.say('x' * 9) or 0))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write begins, and fails in the middle."""
    path = tmp_path / "a.json"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(FileError, match=r"a\.json: cannot be written \(File too large\)"):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_written_files_follow_links_make_folders_and_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    write_text(tmp_path / "deep/er/a.json", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "deep/er/a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_half_written_last_line_is_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    with caplog.at_level(logging.WARNING, "edgeqat"):
        assert read_log(path) == [{"step": 1}, {"step": 2}]
    assert "its last line, 3, was half-written" in caplog.text
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(FileError, match="line 2 is not JSON"):
        read_log(path)


@pytest.mark.slow
def test_a_killed_run_whose_last_line_is_half_written_resumes(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "cut", calibration_batches=2)
    assert signalled(recipe, 4, signal.SIGINT).error == "Interrupted"
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = run(recipe.changed(resume=True), DOMAINS)
    assert [e["step"] for e in resumed.metrics() if "loss" in e] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_flipped_bit_in_last_pt_is_found(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "cut", calibration_batches=2)
    assert signalled(recipe, 4, signal.SIGINT).error == "Interrupted"
    content = bytearray((tmp_path / "cut/last.pt").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "cut/last.pt").write_bytes(content)
    with pytest.raises(RecipeError, match=r"last\.pt: is damaged|last\.pt: is not a readable"):
        run(recipe.changed(resume=True), DOMAINS)


@pytest.mark.parametrize("what", ["gradient", "parameter"])
@pytest.mark.parametrize("at", [4, 7])
def test_nan_at_a_finite_loss_ends_the_run_and_leaves_the_last_good_state(
    what: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step within a run, and at its last, after which no loss would show it."""
    calls = 0

    def spoil(parameters: Sequence[nn.Parameter], *others: Any) -> Tensor:
        nonlocal calls
        calls += 1
        norm = clip_gradients(parameters, *others)
        if calls == at and what == "gradient":
            return norm * float("nan")
        if calls == at:
            parameters[0].data.fill_(float("inf"))
        return norm

    monkeypatch.setattr(step_module, "clip_gradients", spoil)
    words = (
        rf"step {at}: the loss is finite, and the norm of its gradient is nan" if what == "gradient" else r"step \d: "
    )
    with pytest.raises(RecipeError, match=words + r".*The last good state is .*last\.pt"):
        run(recipe_of("fp", **LONGER, out=tmp_path / "run"), DOMAINS)
    saved = RunFolder.open(tmp_path / "run").load("last.pt")
    assert saved["progress"]["step"] == (at - 1) // 3 * 3
    assert all(bool(value.isfinite().all()) for value in saved["model"].values() if value.is_floating_point())


def test_training_that_diverged_is_no_finished_run(tmp_path: Path) -> None:
    """Plain descent far above the stable rate: the loss grows to 1e9 and more without ever being nan."""
    recipe = recipe_of("fp", **LONGER, out=tmp_path / "wild", optimizer="sgd", lr=3e3)
    with pytest.raises(RecipeError, match=r"step \d+: (training has diverged|the loss is)"):
        run(recipe, DOMAINS)
    assert not (tmp_path / "wild/results.json").exists()


def test_a_resumed_run_must_be_the_one_that_was_begun(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "cut", calibration_batches=2)
    assert signalled(recipe, 2, signal.SIGINT).error == "Interrupted"
    written = (tmp_path / "cut/recipe.json").read_text()
    refused = (
        ({"lr": 0.5}, r"--lr 0\.0005 \(now 0\.5\)"),
        ({"steps": 6}, "--steps 7, which may grow but not become 6"),
    )
    for change, words in refused:
        with pytest.raises(RecipeError, match=words):
            run(recipe.changed(resume=True, **change), DOMAINS)
    assert json.loads((tmp_path / "cut/recipe.json").read_text()) == json.loads(written)
    run(recipe.changed(resume=True, workers=1), DOMAINS)


@pytest.mark.slow
def test_a_resumed_run_may_go_on_for_longer(tmp_path: Path) -> None:
    recipe = recipe_of("lsq", **LONGER, out=tmp_path / "run", calibration_batches=2)
    before = run(recipe, DOMAINS).results()["train_seconds"]
    longer = run(recipe.changed(resume=True, steps=9), DOMAINS)
    rates = {e["step"]: e["learning_rate"] for e in longer.metrics() if "learning_rate" in e}
    assert list(rates) == list(range(1, 10))
    # The last two steps follow the cosine of nine steps
    for step in (8, 9):
        assert rates[step] == pytest.approx(5e-4 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 9)), rel=1e-6)
    assert longer.recipe().optimization.steps == 9 and load_run(longer.path)[1].optimization.steps == 9
    assert longer.results()["train_seconds"] > before


@pytest.mark.parametrize("damage", ["rules", "optimizer", "schedule"])
def test_a_run_that_could_not_begin_leaves_no_folder(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes: dict[str, dict[str, Any]] = {
        "rules": {"rules": tmp_path / "absent.toml"},
        "optimizer": {"optimizer": "adamant"},
        "schedule": {"schedule": "refined", "refine_from": tmp_path},
    }
    with pytest.raises(ValueError, match=r"absent|adamant|metrics"):
        run(recipe_of("lsq", **LONGER, out=out, calibration_batches=2, **changes[damage]), DOMAINS)
    assert not out.exists()
