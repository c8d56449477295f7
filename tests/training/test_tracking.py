"""What a run says while it goes, in a terminal and in a file."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from qat.train import tracking
from qat.train.tracking import Tracker


def output(is_terminal: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=160)
    monkeypatch.setattr(tracking, "Console", lambda stderr: console)
    with Tracker(folder, steps=8) as tracker:
        for step in (1, 2):
            tracker.show(step, loss=0.5, accuracy=0.25, images_per_second=12.0)
        tracker.measuring("photo\x1b[31m")
        tracker.measured(2, 0.6125)
        tracker.show(3, loss=0.4, accuracy=0.5, images_per_second=12.0)
    return file.getvalue()


def test_a_file_gets_one_plain_line_for_each_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = output(False, tmp_path, monkeypatch).splitlines()
    assert line == "step 2 of 8  loss 0.500  accuracy 25.0%  12 images/s  held out 61.3%  0 s"


def test_a_terminal_gets_a_bar_with_steps_times_and_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = output(True, tmp_path, monkeypatch)
    assert "3/8" in text and "held out 61.3%" in text and "0:00:00" in text
    assert "\x1b[31m" not in text.replace("photo", "")


def test_a_process_that_does_not_write_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, steps=8, writes=False) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.show(1, loss=0.5, accuracy=0.25, images_per_second=12.0)
        tracker.measured(1, 0.5)
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []
