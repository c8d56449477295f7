"""The code blocks of the README and of docs/ run as they stand, and what the pages name is there."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from tests.surgery.nets import TinyNet, with_random_norms

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
NAMED_FILE = re.compile(r"`((?:qat|export|edgeqat|docs|examples|recipes|tests|tools)/[\w./]+\.\w+)`")
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 5
# What a page takes for granted: the reader's layers, by the names that the tests' net has for them.
LAYERS = {'"conv1"': '"stem"', '["fc"]': '["head"]', "layer1.0#add0": "block#add0"}


def blocks_of(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text())


def pages_with_code() -> list[Path]:
    return [path for path in PAGES if blocks_of(path)]


def code_of(block: str) -> str:
    for theirs, ours in LAYERS.items():
        block = block.replace(theirs, ours)
    return block


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages read: a photo, and a net exported for two targets."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (40, 30), "teal").save(folder / "photo.jpg")
    model = with_random_norms(TinyNet())
    qat.quantize_(model, qat.uniform_rules(4), X)
    qat.calibrate(model, [X])
    model.eval()
    for name, target in (("model.onnx", "ort-packed"), ("native.onnx", "ort-native")):
        said: dict[str, Any] = {"classes": list("abcde"), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        qat.export_onnx(model, folder / name, target=target, **said)
    return folder


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda path: path.name)
def test_the_code_of_a_page_runs(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "example": X, "loader": loader}
    for number, block in enumerate(blocks_of(page), 1):
        names["model"] = with_random_norms(TinyNet())
        exec(compile(code_of(block), f"{page.name}, block {number}", "exec"), names)


def test_the_loop_of_the_readme_is_fifteen_lines() -> None:
    (block,) = blocks_of(ROOT / "README.md")
    training_loop = 4
    assert len(block.strip().splitlines()) <= 15 + training_loop
    assert block in blocks_of(ROOT / "docs" / "own-model.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_in_the_repository(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    if page.parent.name == "docs":  # pages of the root are pages of the site, see tools/docs_hooks.py
        assert not [link for link in links if link.startswith("../") and link.count("/") > 1]
    assert not missing, f"{page.name} names {missing}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert [page.name for page in PAGES[1:] if page.name not in nav] == []


def test_readmes_first_commands_are_the_two() -> None:
    first = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert first.splitlines() == ["pip install uv && uv run recipes/quickstart.py", "uv run pytest"]
