"""A miniature of DomainNet in its own layout: folders of JPEG files, lists and duplicates, rendered in a second.

A few duplicates lie among the images of every domain but quickdraw, named in the list of duplicates and in no other, as in
the release; `read_domainnet` reads all of it as it reads the real data.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from qat.domains.domainnet_lists import DOMAINS, DUPLICATES
from qat.domains.inventory import Counts
from qat.domains.splits import seed_hash
from qat.domains.synthetic import render

CLASSES = ("circle", "square", "star", "triangle")  # DomainNet has all four
STYLE = {
    "clipart": "cartoon", "infograph": "cartoon", "painting": "art_painting", "quickdraw": "sketch", "real": "photo",
    "sketch": "sketch",
}  # fmt: skip
PER_CLASS = 6
TRAIN = 4  # of those; the rest are in the test list
SIZE = 40
INK = 128  # quickdraw's drawings are black on white: lighter than this is paper

MINIATURE = Counts(
    len(CLASSES),
    {d: len(CLASSES) * PER_CLASS + (d != "quickdraw") for d in DOMAINS},
    {d: len(CLASSES) * PER_CLASS for d in DOMAINS},
)


def write_miniature(root: Path) -> Path:
    """Render the miniature into `root`, which appears complete or not at all; one that is there stays. Returns `root`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.parent, prefix=".miniature-") as name:
        if not root.exists():
            temporary = Path(name) / root.name
            temporary.mkdir()
            duplicates = [
                image
                for domain in DOMAINS
                for image in _write_domain(temporary, domain)
            ]
            _write_lines(temporary / DUPLICATES[0], duplicates)
            try:
                temporary.rename(root)
            except OSError:
                if not root.is_dir():  # else a run beside this one was faster
                    raise
    return root


def _write_domain(root: Path, domain: str) -> list[str]:
    """Images and lists of one domain; returns its duplicates."""
    train: list[str] = []
    test: list[str] = []
    for label, name in enumerate(CLASSES):
        (root / domain / name).mkdir(parents=True)
        for number in range(1, PER_CLASS + 1):
            image = f"{domain}/{name}/{domain}_{label + 1:03}_{number:06}.jpg"
            _picture(domain, name, number).save(root / image, quality=90)
            (train if number <= TRAIN else test).append(f"{image} {label}")
    _write_lines(root / f"{domain}_train.txt", train)
    _write_lines(root / f"{domain}_test.txt", test)
    if domain == "quickdraw":
        return []
    original = root / train[0].rpartition(" ")[0]
    duplicate = original.with_stem(f"{original.stem[:-6]}{PER_CLASS + 1:06}")
    shutil.copyfile(original, duplicate)
    return [duplicate.relative_to(root).as_posix()]


def _picture(domain: str, name: str, number: int) -> Image.Image:
    rng = np.random.default_rng(seed_hash("miniature", domain, name, number))
    if domain == "quickdraw":
        drawing = Image.fromarray(render(STYLE[domain], name, SIZE, rng)).convert("L")
        return drawing.point(lambda grey: 255 if grey > INK else 0).convert("RGB")
    # A small figure in the corner of a page with lines of text
    if domain == "infograph":
        page = np.full((SIZE, SIZE, 3), 245, np.uint8)
        page[4::5, 4:-4] = rng.integers(60, 200, 3)
        half = SIZE * 5 // 8
        page[:half, :half] = render(STYLE[domain], name, half, rng)
        return Image.fromarray(page)
    return Image.fromarray(render(STYLE[domain], name, SIZE, rng))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
