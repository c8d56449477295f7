"""What files say cannot steer the terminal: no command prints a control character that a name holds."""

import ast
import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from edgeqat.terminal import in_lines, printable, say
from qat import cli
from qat.analysis.compare import compare_predictions
from qat.analysis.ensemble import Answers, compare_ensemble
from qat.cli import guarded
from qat.domains.folders import DataError, read_domains
from qat.domains.inventory import PUBLISHED, Found, Inventory

ROOT = Path(__file__).parent.parent
HOSTILE = "a\x1b[2J\x1b]0;title\x07\r\n\x9b31m\x7f\u202egnp\u2028\u2066x\ufeff[bold]x[/]"
FEEDS = "\n"


def steers(letter: str) -> bool:
    """By Unicode's own tables: control, format, surrogate, line and paragraph separator; joiners within words may stay."""
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in "\u00ad\u200c\u200d"


def test_every_character_that_steers_is_shown_as_an_escape() -> None:
    named = [*range(0x20), *range(0x7F, 0xA0), 0x61C, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0xDC80]
    for code in [*named, *(code for code in range(0x11_0000) if steers(chr(code)))]:
        shown = printable(chr(code))
        assert shown != chr(code) and shown.isascii(), hex(code)
        assert shown.encode().decode("unicode_escape") == chr(code), hex(code)
    for text in ("plain", "café", "写真", "שלום", "नमस्ते", "👩\u200d🔬", "a·b × c → d", ""):
        assert printable(text) == text


def test_line_feeds_stay_only_where_asked() -> None:
    assert printable("a\nb\x1b") == "a\\x0ab\\x1b" and printable("a\nb\x1b", newlines=True) == "a\nb\\x1b"
    assert printable("a\r\nb", newlines=True) == "a\\x0d\nb" and printable(Path("x\ty")) == "x\\x09y"
    assert in_lines(["a\nb", "c"]) == "a\\x0ab\nc"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_a_character_gets_an_escape(encoding: str) -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding=encoding)
    say("é → x\n\x1b", file=terminal)
    expected = {"ascii": "\\xe9 \\u2192 x\n\\x1b\n", "latin-1": "é \\u2192 x\n\\x1b\n", "utf-8": "é → x\n\\x1b\n"}
    assert raw.getvalue().decode(encoding) == expected[encoding]


def test_commands_and_recipes_print_through_say_alone() -> None:
    for path in [ROOT / "qat/cli.py", *(ROOT / "recipes").glob("*.py")]:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], path


def test_an_error_that_quotes_a_file_does_not_steer(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        raise ValueError(f"class {HOSTILE}")

    assert guarded(action) == 2
    shown = capsys.readouterr().err
    assert not [letter for letter in shown if steers(letter) and letter != FEEDS] and "\\x1b[2J" in shown


def only_its_own_lines(text: str, lines: int) -> None:
    assert text.count("\n") == lines - 1, text
    assert not [letter for letter in text if steers(letter) and letter != FEEDS]


def test_tables_have_a_line_a_row_whatever_domains_are_called() -> None:
    label = np.arange(6) % 2
    predictions = {HOSTILE: (label, label), "b": (label, label)}
    comparison = compare_predictions(predictions, predictions, HOSTILE, 1.0)
    only_its_own_lines(str(comparison), 5)
    logits = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    answers = {name: Answers(logits, label) for name in predictions}
    only_its_own_lines(str(compare_ensemble([HOSTILE, "m"], answers, HOSTILE, "logits")), 7)


def test_an_inventory_has_a_line_a_problem_whatever_folders_are_called() -> None:
    found = {"clipart": Found(1, 0, 1, (f"clipart/{HOSTILE}/1.jpg",), (HOSTILE,))}
    inventory = Inventory(Path(HOSTILE), PUBLISHED, found, {"clipart": (HOSTILE,)}, None, {}, (HOSTILE,))
    problems = list(inventory.problems())
    only_its_own_lines(printable(str(inventory), newlines=True), 1 + 7 + len(problems))


def test_folders_of_hostile_names_are_named_on_one_line(tmp_path: Path) -> None:
    for folder in ("a/cat", f"a/{HOSTILE.replace('/', '')}", "b/cat"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="class folders missing") as error:
        read_domains(tmp_path)
    only_its_own_lines(str(error.value), 1)


def test_a_label_from_a_files_metadata_does_not_steer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export import predict
    from export.predict import Prediction

    monkeypatch.setattr(predict, "predict", lambda model, images: [Prediction(Path("x.jpg"), HOSTILE, 0.5)])
    assert cli.execute(cli.Predict(Path("m.onnx"), (Path("x.jpg"),))) == 0
    only_its_own_lines(capsys.readouterr().out.removesuffix("\n"), 1)


def test_a_certificate_has_a_line_a_fact_whatever_layers_are_called() -> None:
    from export.verify import FileCheck

    check = FileCheck("m.onnx", HOSTILE, 1, {HOSTILE: HOSTILE}, 1, 1, {HOSTILE: 3}, (HOSTILE,), (HOSTILE,))
    only_its_own_lines(str(check), 8)


def test_a_status_with_brackets_is_no_markup(tmp_path: Path) -> None:
    from rich.progress import TextColumn

    from qat.train.tracking import Tracker

    with Tracker(tmp_path, steps=3) as tracker:
        columns = [column for column in tracker.progress.columns if type(column) is TextColumn]
        assert len(columns) == 2 and not any(column.markup for column in columns)
        tracker.progress.update(tracker.task, status="[/]", description="[bold]")
        tracker.progress.refresh()
