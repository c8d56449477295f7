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
    files_of: dict[str, dict[str, list[Path]]] = {}
    for folder in folders_in(root):
        files_of[folder.name] = files_by_class(folder)
    if not files_of:
        raise DataError(
            f"--data-root {root}: holds no domain folders; expected <root>/<domain>/<class>/*.jpg"
        )
    _check_classes(root, files_of)
    domains = []
    paths = []
    for name, files in sorted(files_of.items()):
        domains.append(folder_domain(name, sorted(files), files))
        for of_class in files.values():
            paths += of_class
    if check_images:
        check_readable(paths)
    return domains


def folders_in(path: Path) -> list[Path]:
    """Subfolders in order of their names, hidden ones left out."""
    folders = []
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            folders.append(child)
    return folders


def images_in(folder: Path) -> list[Path]:
    """Files of a folder that are images by their suffix, in order, hidden ones left out."""
    return [path for path in sorted(folder.iterdir()) if is_image_file(path)]


def is_image_file(path: Path) -> bool:
    """By its suffix; hidden files are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, for all class folders of one domain."""
    files = {}
    for of_class in folders_in(folder):
        files[of_class.name] = images_in(of_class)
    return files


def class_files(folder: Path) -> dict[str, list[Path]]:
    """As `files_by_class`, without the classes that have no images."""
    files = files_by_class(folder)
    return {name: paths for name, paths in files.items() if paths}


def folder_domain(
    name: str, classes: Sequence[str], files: dict[str, list[Path]]
) -> Domain:
    """One domain from the image files of each class; labels are positions in `classes`."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, of in enumerate(classes):
        paths += files[of]
        labels += [label] * len(files[of])
    images = FolderImages(tuple(paths))
    return Domain(name, tuple(classes), images, np.array(labels, np.int64))


def _check_classes(root: Path, files_of: dict[str, dict[str, list[Path]]]) -> None:
    """Raises DataError naming a domain without images, or one that lacks a class which another one has."""
    every: set[str] = set()
    for files in files_of.values():
        every.update(files)
    for name, files in sorted(files_of.items()):
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
    broken = []
    reasons = []
    with ThreadPoolExecutor(8) as pool:
        for path, fault in zip(paths, pool.map(_fault, paths), strict=True):
            if fault is not None:
                broken.append(str(path))
                reasons.append(fault)
    if broken:
        raise DataError(
            f"{len(broken)} unreadable image(s): {some(broken)}; remove or replace them ({reasons[0]})"
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
