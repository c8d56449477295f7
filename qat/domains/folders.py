"""Folders of domains in the DomainBed layout: <root>/<domain>/<class>/*.{jpg,jpeg,png,webp} (`docs/algorithms.md`)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeqat.images import SUFFIXES, ImageError, check_image, open_image
from edgeqat.terminal import printable

NAMED = 5  # how many offenders a message lists


class DataError(ValueError):
    """The data on disk cannot be used; the message names the folder, class or file and what to do.

    A data loader's worker sends its traceback as the message; what is left of it here is its last error, which is ours.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(f"Caught {type(self).__name__} in "):
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class ImageSource(Protocol):
    """Images by index, as RGB."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory: uint8 N_H_W_3."""

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@dataclass(frozen=True)
class FolderImages:
    """Images on disk, decoded when asked for."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return open_image(self.paths[index])
        except ImageError as error:
            raise DataError(f"{error}; remove or replace it") from error


@dataclass(frozen=True)
class Domain:
    """One domain: class names in alphabetical order, images, and their labels (int64, index into `classes`)."""

    name: str
    classes: tuple[str, ...]
    images: ImageSource = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


def read_domains(root: Path, *, check_images: bool = True) -> list[Domain]:
    """The domains under `root` in alphabetical order, the DomainBed numbering of environments.

    check_images: open every file's header first, so that a broken file stops the run before it starts.
    Raises DataError for a missing root, no or empty domains, class folders missing in one domain, unreadable images.
    """
    if not root.is_dir():
        raise DataError(
            f"--data-root {root}: no such folder; expected <root>/<domain>/<class>/*.jpg"
        )
    found = {
        d.name: {c.name: images_in(c) for c in folders_in(d)} for d in folders_in(root)
    }
    if not found:
        raise DataError(
            f"--data-root {root}: holds no domain folders; expected <root>/<domain>/<class>/*.jpg"
        )
    _check_classes(root, found)
    classes = tuple(sorted(next(iter(found.values()))))
    domains = [
        folder_domain(name, classes, files) for name, files in sorted(found.items())
    ]
    if check_images:
        check_readable([p for d in domains for p in d.images.paths])  # type: ignore[attr-defined]
    return domains


def folders_in(path: Path) -> list[Path]:
    """Subfolders in order of their names, hidden ones left out."""
    return sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")
    )


def images_in(folder: Path) -> list[Path]:
    """Files of a folder that are images by their suffix, in order, hidden ones left out."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, for the class folders of one domain that hold some."""
    files = {c.name: images_in(c) for c in folders_in(folder)}
    return {name: paths for name, paths in files.items() if paths}


def folder_domain(
    name: str, classes: Sequence[str], files: dict[str, list[Path]]
) -> Domain:
    """One domain from the image files of each class; labels are positions in `classes`."""
    paths = [path for c in classes for path in files[c]]
    labels = np.repeat(np.arange(len(classes)), [len(files[c]) for c in classes])
    return Domain(
        name, tuple(classes), FolderImages(tuple(paths)), labels.astype(np.int64)
    )


def _check_classes(root: Path, found: dict[str, dict[str, list[Path]]]) -> None:
    every = {c for files in found.values() for c in files}
    for name, files in sorted(found.items()):
        if not any(files.values()):
            raise DataError(
                f"domain {name!r} in {root}: has no images; expected {root / name}/<class>/*.jpg{_one_folder_off(root, name)}"
            )
        missing = sorted(every - files.keys())
        if missing:
            raise DataError(
                f"domain {name!r} in {root}: class folders missing: {some(missing)}; every domain needs the same classes"
            )
        empty = sorted(c for c, paths in files.items() if not paths)
        if empty:
            raise DataError(
                f"domain {name!r} in {root}: no images in class {some(empty)}"
            )


def _one_folder_off(root: Path, name: str) -> str:
    """What to pass instead, where the images lie one folder higher or deeper than those of a domain."""
    folder = root / name
    if images_in(folder):
        return f"; if {root} is one domain, pass --data-root {root.parent}"
    for child in folders_in(folder):
        if any(images_in(grandchild) for grandchild in folders_in(child)):
            return f"; its images lie one folder deeper: pass --data-root {folder}"
    return ""


def check_readable(paths: Sequence[Path]) -> None:
    """Decode every image. Raises DataError that names the unreadable ones and what is wrong with the first."""
    with ThreadPoolExecutor(8) as pool:
        broken = {
            str(p): fault
            for p, fault in zip(paths, pool.map(_fault, paths), strict=True)
            if fault is not None
        }
    if broken:
        first = next(iter(broken.values()))
        raise DataError(
            f"{len(broken)} unreadable image(s): {some(list(broken))}; remove or replace them ({first})"
        )


def _fault(path: Path) -> str | None:
    try:
        check_image(path)
    except ImageError as error:
        return str(error)
    return None


def some(names: Sequence[str]) -> str:
    """The first names in a list for a message, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(printable, names[:NAMED])) + more
