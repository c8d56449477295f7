"""`qat train` on somebody's own folder of images, as the README has it."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat import cli
from qat.runs.run_folder import RunFolder

SMALL = ["--steps", "2", "--batch-size", "4", "--workers", "0", "--evaluate-every", "2"]


def write_images(root: Path, *folders: str, each: int = 5) -> None:
    draw = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for index in range(each):
            pixels = draw.integers(0, 256, (40, 36, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


def qat(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["qat", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_flat_folder_becomes_a_certified_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), "cat", "dog")
    net = ["--backbone", "test_resnet", "--image-size", "32"]
    assert qat(monkeypatch, "train", "fp", "images", *net, *SMALL, "--out", "fp") == 0
    assert "drawn at random from each class, select the checkpoint" in capsys.readouterr().out
    words = ["train", "lsq", "--init-from", "fp", *SMALL, "--out", "w4a4", "--calibration-batches", "2"]
    assert qat(monkeypatch, *words, "--max-drop", "100") == 0
    recipe = RunFolder.open(Path("w4a4")).recipe()
    assert (recipe.model.backbone, recipe.model.image_size) == ("test_resnet", 32)
    assert recipe.images.data == "folder" and recipe.images.data_root == Path("images")
    assert RunFolder.open(Path("w4a4")).results()["classes"] == ["cat", "dog"]
    assert qat(monkeypatch, "export", "w4a4", "--out", "model.onnx") == 0
    assert qat(monkeypatch, "certify", "w4a4", "model.onnx") == 0
    capsys.readouterr()
    assert qat(monkeypatch, "predict", "model.onnx", "images/cat/0.png") == 0
    assert capsys.readouterr().out.startswith("images/cat/0.png: ")
    assert qat(monkeypatch, "compare", "fp", "model.onnx", "--max-drop", "100") == 0
    assert images_of_rows(capsys.readouterr().out) == {
        "images": 2,
        "source domains": 2,
        "images (selected on) (target)": 2,
    }
    assert qat(monkeypatch, "report", "w4a4") == 0
    page = Path("w4a4/report.html").read_text()
    assert "<code>qat bench RUN</code>" in page
    headings = re.findall(r'<h2 id="(.+?)">', page)
    assert len(headings) > 5 and re.findall(r'<a href="#(.+?)">', page) == headings
    flags = re.findall(r"<td>(--[a-z-]+)</td>", page)
    assert {"--steps", "--batch-size", "--init-from"} <= set(flags) and "--bits" not in flags
    assert "Right in full precision, wrong here" in page and "Step 2 of this run was chosen" in page


def test_a_part_is_called_as_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), "Training/cat", "Training/dog", "Testing/cat", "Testing/dog", each=5)
    net = ["--backbone", "test_resnet", "--image-size", "32"]
    assert qat(monkeypatch, "train", "fp", "images", *net, *SMALL, "--out", "fp") == 0
    capsys.readouterr()
    assert qat(monkeypatch, "compare", "fp", "fp") == 0
    assert images_of_rows(capsys.readouterr().out) == {"Training": 2, "source domains": 2, "Testing (target)": 10}
    epochs = ["train", "fp", "images", *net, "--epochs", "1", "--batch-size", "4", "--workers", "0", "--out", "epochs"]
    assert qat(monkeypatch, *epochs) == 0
    assert qat(monkeypatch, "report", "epochs") == 0
    page = Path("epochs/report.html").read_text()
    assert re.search(r"step 2 of\s2 ", page), "8 images in batches of 4 are 2 steps; --steps does not count"


def images_of_rows(table: str) -> dict[str, int]:
    """Row -> its number of images, of what `qat compare` prints."""
    rows = {}
    for line in table.splitlines():
        found = re.fullmatch(r"(.+?) +[\d.]+ +[\d.]+ +[+-][\d.]+ +(\d+) +[\d.]+.*", line)
        if found:
            rows[found[1]] = int(found[2])
    return rows


def test_domains_are_recognised_and_one_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), "day/cat", "day/dog", "night/cat", "night/dog")
    net = ["--backbone", "test_resnet", "--image-size", "32", *SMALL]
    assert qat(monkeypatch, "train", "fp", "images", *net, "--test-domain", "night", "--out", "fp") == 0
    results = RunFolder.open(Path("fp")).results()
    assert set(results["source_validation"]) == {"day"} and results["test_domain"] == "night"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "fp", "nowhere"], "no such folder"),
        (["train", "fp", "images", "--test-domain", "dusk"], "there are day, night"),
        (["train", "fp", "images", "--image-size", "4"], "--image-size must be at least 8"),
        (["train", "lsq", "--init-from", "nowhere"], "nowhere: no such run folder"),
        (["train", "lsq", "--init-from", "nowhere", "--epochs", "3"], "nowhere: no such run folder"),
        (["train", "fp", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_faults_are_one_line_and_exit_code_two(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), "day/cat", "day/dog", "night/cat", "night/dog", each=2)
    small = (
        ["--backbone", "test_resnet", "--per-class", "2"] if "images" not in words else ["--backbone", "test_resnet"]
    )
    assert qat(monkeypatch, *words, *small, "--out", "new") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path("new").exists()
