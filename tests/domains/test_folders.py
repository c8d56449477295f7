"""Reading folders of domains: what is found, and every way it can be wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.domains.folders import DataError, FolderImages, read_domains
from tests.real_data import FOLDER, needs

COUNTS = {  # dog elephant giraffe guitar horse house person (docs/algorithms.md, DomainBed protocol)
    "art_painting": [379, 255, 285, 184, 201, 295, 449],
    "cartoon": [389, 457, 346, 135, 324, 288, 405],
    "photo": [189, 202, 182, 186, 199, 280, 432],
    "sketch": [772, 740, 753, 608, 816, 80, 160],
}


def tree(root: Path, files: list[str]) -> Path:
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (number, 2 * number, 7)).save(path)
    return root


GOOD = ["b/cat/1.jpg", "b/dog/2.PNG", "b/dog/10.webp", "a/cat/3.jpeg", "a/dog/4.jpg"]


def test_domains_and_classes_come_in_alphabetical_order(tmp_path: Path) -> None:
    (tree(tmp_path, GOOD) / "a/cat/notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("stray")
    first, second = read_domains(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.classes == second.classes == ("cat", "dog")
    assert first.labels.tolist() == [0, 1] and second.labels.tolist() == [0, 1, 1]
    assert second.images[2].size == (5, 4) and second.images[2].mode == "RGB"


def remove(name: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for path in sorted((root / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if name.count("/") or name == "":
            (root / name).rmdir()

    return act


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("a/dog"), r"domain 'a' .* class folders missing: dog"),
        (remove("a"), r"domain 'a' .* has no images"),
        (lambda root: (root / "a/dog/4.jpg").unlink(), r"domain 'a' .* no images in class dog"),
        (lambda root: (root / "b/dog/2.PNG").write_bytes(b"broken"), r"1 unreadable image\(s\): .*2\.PNG"),
        (
            lambda root: (root / "b/cat/1.jpg").write_bytes((root / "b/cat/1.jpg").read_bytes()[:300]),
            r"1\.jpg; remove or replace",
        ),
    ],
)
def test_each_fault_gives_one_error_that_names_it(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(tree(tmp_path, GOOD))
    with pytest.raises(DataError, match=message):
        read_domains(tmp_path)


def test_a_root_one_folder_off_is_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", GOOD)
    with pytest.raises(
        DataError, match=rf"domain 'cat' in .* has no images; .*; if {root}/b is one domain, .* {root}$"
    ):
        read_domains(root / "b")
    with pytest.raises(DataError, match=rf"domain 'pets' .* one folder deeper: pass --data-root {root}$"):
        read_domains(tmp_path)


def test_missing_and_empty_roots(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-root .*nowhere: no such folder"):
        read_domains(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no domain folders"):
        read_domains(tmp_path)


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path, GOOD) / "a/cat/3.jpeg"
    images = FolderImages((path,))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"3\.jpeg: not a readable image"):
        images[0]


@needs("pacs96")
def test_pacs_counts() -> None:
    domains = read_domains(FOLDER / "pacs96", check_images=False)
    assert {d.name: np.bincount(d.labels).tolist() for d in domains} == COUNTS
    assert domains[0].classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
