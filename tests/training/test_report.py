"""The report and the other pages: names from files are text in them, and a file of the wrong kind is one error naming it."""

import copy
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import qat
from edgeqat.files import FileError
from edgeqat.processor import processor
from edgeqat.terminal import printable
from qat.analysis import figures, report
from qat.analysis.compare import compare_predictions, load_measured, write_baseline
from qat.analysis.results import table
from qat.analysis.weight_errors import weight_error, weight_errors
from qat.cli import Report, execute, guarded
from qat.deploy import write_report
from qat.domains.synthetic import synthetic_domains
from qat.quantizers.lsq import LSQWeight
from qat.quantizers.spec import QuantSpec
from qat.runs.build import load_run
from qat.runs.parts import RecipeError
from qat.runs.provenance import commit
from qat.runs.recipe import recipe_of
from qat.runs.records import CERTIFICATE, LATENCIES, classes_of, metrics_of, optional, results_of
from qat.runs.run_folder import RunFolder
from qat.train.loop import run

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "{{7*7}}",
    "{% raw %}",
    "a & b &lt; &#60;script&#62;",
    "a | b ` c ` **d** _e_ [f](javascript:g) ~~h~~ @i #1 www.j.k http://l.m",
    "</title></svg></pre><b>x</b>",
    "]]> --> <!-- x",
    "$x$ $y$",
    r"$\frac{$",
    "url(#a) id=\"b\" href=\"#c\"",
    "写真 é",
    "line\nfeed \x1b[31m \x00 \u202e \udcff",
    "_hidden",
    "n" * 400,
    "",
]  # fmt: skip
CLEAN = [f"name{i}" for i in range(len(NAMES))]
VOID = {"meta", "img", "br", "hr", "input", "link", "use", "path", "image"}


class Elements(HTMLParser):
    """Every element as (tag, its attributes' names), and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.comments: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def outside_pictures(self) -> list[str]:
        return [
            tag for tag, _ in self.found if tag in ("h1", "h2", "h3", "p", "table", "tr", "td", "th", "span", "pre")
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gaqat"
    tiny = {"backbone": "test_resnet", "image_size": 32, "steps": 4, "batch_size": 4, "evaluate_every": 2, "workers": 0}
    run(recipe_of("gaqat", **tiny, window=2, out=out), synthetic_domains(per_class=6, image_size=32, seed=0))
    return out


def certificate(names: list[str]) -> dict[str, Any]:
    return {
        "passed": False, "file": names[0], "runtime": names[1], "images": 3, "layers": 4, "weight_codes": 5,
        "integer_kernels": 6, "stored": {name: name for name in names}, "said": {name: name for name in names},
        "levels": [{"level": name, "codes": 7, "mismatches": {name: 8}} for name in names],
        "accuracy": dict.fromkeys(names, 0.5), "notes": names,
        "fidelity": {
            "codes": 1, "at_ties": 2, "same": 3, "answers": 4, "on_integers": 5, "unexplained": dict.fromkeys(names, 1),
            "in_float": dict.fromkeys(names, 2), "biases": {name: name for name in names},
        },
    }  # fmt: skip


def latencies(names: list[str]) -> list[dict[str, Any]]:
    return [{"name": name, "size": 10**6, "median_ms": 1.5, "p95_ms": 2.5, "speedup": 1.0} for name in names[:5]]


def with_names(run: Path, out: Path, names: list[str]) -> Path:
    """A copy of a run's folder whose files hold `names` wherever they hold names of the user's."""
    shutil.copytree(run, out)
    results = json.loads((out / "results.json").read_text())
    results |= {
        "test_domain": names[0], "selection": names[1], "target": 0.5, "classes": names,
        "source_validation": dict.fromkeys(names[1:], 0.25),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results))
    (out / "certificate.json").write_text(json.dumps(certificate(names)))
    (out / "latency.json").write_text(json.dumps(latencies(names)))
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        if entry.get("scales"):
            entry["scales"] |= {f"{name}.weight": float(entry["step"] + 1) for name in names}
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return out


def test_names_are_text_in_the_report(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, loaded = [], load_run(trained)
    for names, tail in ((CLEAN, "plain"), (NAMES, '"><img src=x onerror=alert(1)>')):
        place = tmp_path / f"of {tail}"
        folder = RunFolder(with_names(trained, place / "a", names))
        recipe = json.loads((trained / "recipe.json").read_text()) | {"backbone": names[0], "method": names[1]}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        beside = RunFolder(with_names(trained, place / f"b {tail}", names))
        with monkeypatch.context() as patch:
            patch.setattr(report, "load_run", lambda path: loaded)
            patch.setattr(RunFolder, "recipe", lambda folder: loaded[1])
            pages.append(report.render(folder, None, [beside]))
    clean, hostile = map(Elements, pages)
    assert set(hostile.found) <= set(clean.found)
    assert hostile.outside_pictures() == clean.outside_pictures()
    further = set(hostile.comments) - set(clean.comments)
    assert all("mathdefault" in comment for comment in further), (
        further
    )  # of numbers at axes, where matplotlib writes them
    for name in NAMES[:-5]:
        assert hostile.text.count(name) >= 10, name
    assert "49" not in {piece for piece in re.split(r"\W+", hostile.text) if piece} - set(re.split(r"\W+", clean.text))
    assert not set("\x00\x1b\u202e") & set(pages[1])
    pages[1].encode()


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_an_image_of_the_name_and_nothing_else(name: str) -> None:
    other = "plain"
    rows = [{"name": n, "size": 10**6, "median_ms": 1.0} for n in (name, other)]
    accuracy = {name: 50.0, other: 60.0}
    found, plain = (ElementTree.fromstring(text) for text in (
        figures.size_accuracy_latency(rows, accuracy),
        figures.size_accuracy_latency([rows[0] | {"name": "one"}, rows[1]], {"one": 50.0, other: 60.0}),
    ))  # fmt: skip
    allowed = {(element.tag, attribute) for element in plain.iter() for attribute in element.attrib}
    assert {(element.tag, attribute) for element in found.iter() for attribute in element.attrib} <= allowed
    texts = ["".join(element.itertext()) for element in found.iter("{http://www.w3.org/2000/svg}text")]
    visible = name.replace("\n", r"\x0a").replace("\x1b", r"\x1b").replace("\x00", r"\x00")
    visible = visible.replace("\u202e", r"\u202e").replace("\udcff", r"\udcff")
    visible = visible or "(no name)"
    if len(visible) <= figures.LONGEST:
        assert f"{visible}, 1.00 ms" in [text.strip() for text in texts]
    else:
        ends = [text.removesuffix(", 1.00 ms").split("…") for text in texts if "…" in text]
        assert len(ends) == 1 and visible.startswith(ends[0][0]) and visible.endswith(ends[0][1]), texts
    for draw in (
        lambda: figures.accuracy_bars([name, other], {name: [1.0, 2.0], other: [3.0, 4.0]}, ["red", "blue"]),
        lambda: figures.loss_curves({name: [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}, ["red"]),
        lambda: figures.size_and_latency(latencies([name, other])),
        lambda: figures.weight_histogram(name, np.zeros(3, np.float32), -2, 1),
    ):
        ElementTree.fromstring(draw())


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_the_name_in_its_cell(name: str) -> None:
    label = np.arange(4) % 2
    predictions = {"plain": (label, label), name: (label, 1 - label)}
    compared = compare_predictions({"plain": (label, label), name: (1 - label, 1 - label)}, predictions, name, 1.0)
    text = compared.markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(row.count("|") == 7 for row in rows)
    cells = rows[-1].split("|")[1], text.splitlines()[-1].partition("failed: ")[2]
    for cell in cells:
        assert (
            not set(cell) & set("<>`\\*[]{}~@\"'!") and "&#" in cell + "&#" and "://" not in cell and "www." not in cell
        )
        assert re.sub(r"&#\d+;", "", cell).count("&") == 0 and re.sub(r"&#\d+;", "", cell).count("#") == 0
    shown = Elements(cells[0]).text.strip()
    assert shown.endswith("(target)") and (not name.isprintable() or shown == f"{name} (target)".strip())


VALUES: list[Any] = ["x", None, True, -1.5, [], {}, [1], {"a": "b"}, float("nan"), float("inf"), 10**400]
MISSING = object()


def mutants(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, `value` with one entry of another kind or gone), for every entry."""
    for path in list(places(value)):
        for new in (*VALUES, MISSING):
            changed = copy.deepcopy(value)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if new is MISSING:
                del holder[path[-1]]
            else:
                holder[path[-1]] = new
            yield f"{path} {'gone' if new is MISSING else new!r}", changed


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def refused(action: Any, path: Path, done: str) -> bool:
    try:
        action()
    except (RecipeError, FileError) as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message, f"{done}: {message}"
        return True
    return False


def test_results_of_the_wrong_kind_are_one_error_that_names_file_and_entry(trained: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder / "results.json"
    results = json.loads((trained / "results.json").read_text())
    results["settled"] = {
        "biases": 3, "shifts": {"a": 0.1}, "left": {"b": "c"}, "source_validation_before": {"x": 0.5},
    }  # fmt: skip
    count = 0
    for done, mutant in mutants(results):
        path.write_text(json.dumps(mutant))
        count += refused(lambda: table(folder), path, done)
        refused(lambda: classes_of(folder), path, done)
    assert count > 100
    others: tuple[object, ...] = ("x", [], None, 3)
    for top in others:
        path.write_text(json.dumps(top))
        assert refused(lambda: results_of(folder), path, repr(top))
    results["target"] = "50 %"
    path.write_text(json.dumps(results))
    with pytest.raises(RecipeError, match=r'results\.json: entry target is "50 %", expected a number'):
        results_of(folder)


def test_certificates_and_latencies_of_the_wrong_kind_are_refused_or_shown(trained: Path, tmp_path: Path) -> None:
    from jinja2 import Environment

    source = Path(report.__file__).with_name(report.TEMPLATE).read_text()
    start, end = source.index("{% if latency_figure %}"), source.index("{% if table %}")
    part = Environment(autoescape=True).from_string(source[start:end])
    folder = RunFolder(tmp_path)
    for file, shape, value in (
        ("certificate.json", CERTIFICATE, certificate(["a", "b"])),
        ("latency.json", LATENCIES, latencies(["a", "b"])),
    ):
        count = 0
        for done, mutant in mutants(value):
            (tmp_path / file).write_text(json.dumps(mutant))

            def show(file: str = file, shape: Any = shape) -> None:
                found = optional(folder, file, shape)
                given = {"certificate": found} if file == "certificate.json" else {"latencies": found}
                part.render(latency_figure="x", **given)

            count += refused(show, tmp_path / file, done)
        assert count > 50
        (tmp_path / file).unlink()


def test_metrics_of_the_wrong_kind_are_refused_or_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    folder = RunFolder(tmp_path)
    good = [
        {"step": s, "loss": 1.0, "source_mean": 0.5, "scales": {"a.weight": 1.0 + s, "b.input": 2.0}} for s in (1, 2)
    ]
    count = 0
    for done, mutant in mutants(good[1]):
        path.write_text(f"{json.dumps(good[0])}\n{json.dumps(mutant)}\n")
        wrong = refused(lambda: metrics_of(folder), path, done)
        count += wrong
        if not wrong:
            figures.relative_scales([e for e in metrics_of(folder) if e.get("scales")], "weight")
            figures.series(metrics_of(folder), "loss")
    assert count > 25


def test_a_stored_baseline_of_the_wrong_kind_is_one_error(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(trained, path)
    good = json.loads(path.read_text())
    good["domains"] = {name: [both[0][:2], both[1][:2]] for name, both in list(good["domains"].items())[:2]}
    good["recipe"] = {}
    count = sum(_refused_baseline(path, done, mutant) for done, mutant in mutants(good))
    assert count > 60


def _refused_baseline(path: Path, done: str, mutant: Any) -> bool:
    path.write_text(json.dumps(mutant))

    def compare() -> None:
        found = load_measured(path)
        compare_predictions(found.predictions, found.predictions, found.target, 1.0, names=f"{path}: the two")

    return refused(compare, path, done)


def test_the_command_says_which_entry_and_writes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "report.html").unlink(missing_ok=True)
    (folder / "certificate.json").write_text(json.dumps(certificate(["a", "b"]) | {"weight_codes": "many"}))
    assert guarded(lambda: execute(Report(folder))) == 2
    assert 'certificate.json: entry weight_codes is "many", expected a whole number' in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    (folder / "certificate.json").unlink()
    assert write_report(folder).exists()


def test_the_head_says_when_with_what_and_where_it_was_trained(trained: Path) -> None:
    made = json.loads((trained / "results.json").read_text())["made"]
    # Without the name of the build, such as +cpu
    version = torch.__version__.partition("+")[0]
    assert made["versions"]["torch"].partition("+")[0] == version and made["processor"] == processor()
    page = Elements(write_report(trained).read_text()).text
    assert f"Trained until {made['date']}" in page and made["processor"] in page
    assert f"torch {version}" in page
    assert made["commit"] is None or f"with commit {made['commit']}" in page


def test_a_commit_has_a_mark_where_tracked_files_were_changed(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    assert commit(tmp_path) is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    whole = git("rev-parse", "HEAD")
    name = commit(tmp_path)
    assert name is not None and whole.startswith(name) and len(name) >= 10
    (tmp_path / "new").write_text("not tracked")
    assert commit(tmp_path) == name
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{name}+"


def test_every_picture_of_a_page_says_what_it_shows(trained: Path) -> None:
    page = write_report(trained).read_text()
    pictures = re.findall(r"<svg[^<>]*>", page)
    assert len(pictures) > 8
    says = []
    for picture in pictures:
        assert 'role="img"' in picture
        (text,) = re.findall(r'aria-label="([^"]*)"', picture)
        says.append(text)
    assert all(len(text) > 20 for text in says)
    assert any(text.startswith("Answers by class") for text in says)
    assert any(text.startswith("SQNR and clipping") for text in says)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_picture_says_holds_names_as_text(name: str) -> None:
    drawn = figures.accuracy_bars([name], {"run": [12.5]}, ["red"])
    element = ElementTree.fromstring(drawn)
    expected = " ".join(f"run: {printable(name)} 12.5".split())
    assert expected in element.attrib["aria-label"]
    assert element.attrib["role"] == "img"


def test_answers_are_counted_by_class() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2, 1])
    predicted = np.array([0, 2, 1, 2, 0, 2, 0])
    counts = report.answers_by_class(predicted, labels, 3)
    for row in range(3):
        for column in range(3):
            pairs = list(zip(labels, predicted, strict=True))
            assert counts[row, column] == pairs.count((row, column))
    drawn = figures.confusion(["a", "b", "c"], counts)
    assert "4 of 7 right" in drawn and "Most often a is taken for c: 1 of 2 images." in drawn


@pytest.mark.parametrize("axis", [None, 0])
def test_noise_and_clipping_of_weights(axis: int | None) -> None:
    weight = torch.randn(7, 3, 3, 3) * torch.linspace(0.1, 2.0, 7).view(-1, 1, 1, 1)
    quantizer = LSQWeight(QuantSpec(3, signed=True, axis=axis), weight, name="layer.weight")
    with torch.no_grad():
        quantizer.raw_scale.mul_(0.7)
    scales = quantizer.scale.numpy().reshape(-1)
    signal = noise = 0.0
    beyond = []
    for channel in range(7):
        scale = float(scales[channel if axis == 0 else 0])
        for value in weight[channel].flatten().tolist():
            code = min(max(round(value / scale), -4), 3)
            signal += value**2
            noise += (value - code * scale) ** 2
            beyond.append(not -4 <= value / scale <= 3)
    found = weight_error(weight, quantizer)
    assert found.name == "layer" and found.bits == 3
    # In dB; single precision moves a difference by about 1e-7 of the weight
    assert found.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert 0 < found.clipped == pytest.approx(sum(beyond) / len(beyond), abs=1e-7)


def test_weights_on_the_grid_lose_nothing_and_one_bit_has_no_noise_to_speak_of() -> None:
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0]])
    quantizer = LSQWeight(QuantSpec(2, signed=True), weight)
    with torch.no_grad():
        quantizer.raw_scale.fill_(1.0)
    found = weight_error(weight, quantizer)
    assert math.isinf(found.sqnr) and found.clipped == 0
    assert "<svg" in figures.weight_error_bars([found])
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    qat.quantize_(net, qat.binary_rules(net, ("0",)), torch.randn(1, 3, 8, 8))
    assert [(error.name, error.bits) for error in weight_errors(net)] == [("0", 8)]
