"""An ordinary folder of images: which of three layouts it has, how it is split, and what about it may surprise.

    flat      <root>/<class>/*                     one random split, stratified by class
    split     <root>/{train,val,test}/<class>/*    "val" selects and "test" is tested; only "train" must be there
    domains   <root>/<domain>/<class>/*            one domain is left out (`qat.domains.splits`)

"valid", "validation", "training" and "testing" are read as such names too. Images are JPEG, PNG and WebP files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeqat.images import SUFFIXES
from edgeqat.terminal import printable
from qat.domains.balance import class_counts, imbalance_note
from qat.domains.folders import (
    DataError,
    Domain,
    FolderImages,
    check_readable,
    files_by_class,
    folder_domain,
    folders_in,
    is_image_file,
    read_domains,
    some,
)
from qat.domains.splits import Split, Subset, leave_one_domain_out, seed_hash
from qat.domains.survey import file_notes

Layout = Literal["flat", "split", "domains"]

PART_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
EXPECTED = "expected <root>/<class>/*, <root>/{train,val,test}/<class>/* or <root>/<domain>/<class>/*"


@dataclass(frozen=True)
class ImageFolders:
    """A folder of images as training takes it. notes: one line for each thing that its owner should know."""

    layout: Layout
    split: Split
    notes: tuple[str, ...]


def read_image_folders(
    root: Path,
    *,
    test_domain: str | None = None,
    holdout: float = 0.2,
    trial_seed: int = 0,
    check_images: bool = True,
) -> ImageFolders:
    """Recognise the layout of `root` and split its images.

    test_domain: the domain to leave out; for the layout "domains" alone, which needs it.
    holdout: share of the images, of each class, that selects the checkpoint where there is no "val". Where there is no
    "test" either, the reported accuracy is that of the images that selected, and a note says so.
    trial_seed: draws the split. check_images: decode every image first, so that a broken one stops the run before it starts.
    Raises DataError naming the folder, class or file at fault.
    """
    layout = recognised_layout(root)
    if layout == "domains":
        split = _leave_out(root, test_domain, holdout, trial_seed)
        notes: list[str] = []
    elif test_domain is not None:
        raise DataError(
            f"--test-domain {test_domain}: {printable(root)} holds no domains but {_in_words(layout)}; leave the flag out"
        )
    elif layout == "flat":
        split, notes = _split_flat(root, holdout, trial_seed)
    else:
        split, notes = _split_parts(root, holdout, trial_seed)
    paths = _paths(split)
    if check_images:
        check_readable(paths)
    labels = [part.domain.labels[part.indices] for part in split.train]
    counts = class_counts(labels, len(split.classes))
    imbalance = imbalance_note(counts, split.classes)
    if imbalance is not None:
        notes.append(imbalance)
    if check_images:
        notes += file_notes(paths)
    return ImageFolders(layout, split, tuple(notes))


def recognised_layout(root: Path) -> Layout:
    """Which layout the folders in `root` have. Raises DataError, which says what is wrong, where they have none."""
    if not root.is_dir():
        raise DataError(f"--data-root {printable(root)}: no such folder; {EXPECTED}")
    folders = folders_in(root)
    with_images = []
    with_classes = []
    for folder in folders:
        if _has_images(folder):
            with_images.append(folder.name)
        if _has_classes(folder):
            with_classes.append(folder.name)
    if not with_images and not with_classes:
        raise _nothing_found(root, folders)
    if with_images and with_classes:
        raise DataError(
            f"--data-root {printable(root)}: {some(with_images)} hold(s) images, {some(with_classes)} hold(s) folders of "
            f"images; {EXPECTED}, not several at once"
        )
    if with_images:
        return _checked_flat(root, with_images)
    return _with_classes(root, with_classes)


def stratified_indices(
    labels: NDArray[np.int64], holdout: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(held out, rest), in order: of each class a random share `holdout`, rounded. A class of two images or more is in both
    parts, a class of one in the rest."""
    held: list[NDArray[np.int64]] = []
    rest: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        np.random.RandomState(seed_hash(seed, int(label))).shuffle(of_class)
        wanted = round(holdout * len(of_class))
        count = min(max(wanted, 1), len(of_class) - 1)
        held.append(of_class[:count])
        rest.append(of_class[count:])
    return np.sort(np.concatenate(held)), np.sort(np.concatenate(rest))


def _leave_out(
    root: Path, test_domain: str | None, holdout: float, trial_seed: int
) -> Split:
    domains = read_domains(root, check_images=False)
    if test_domain is None:
        names = ", ".join(printable(domain.name) for domain in domains)
        raise DataError(
            f"--test-domain: say which domain of {printable(root)} to leave out: {names}"
        )
    return leave_one_domain_out(
        domains, test_domain, holdout_fraction=holdout, trial_seed=trial_seed
    )


def _split_flat(root: Path, holdout: float, trial_seed: int) -> tuple[Split, list[str]]:
    images = _read_classes(root)
    validation, train = _stratified(images, holdout, trial_seed)
    notes = [
        f"{len(validation):,} of {len(images):,} images, drawn at random from each class, select the checkpoint"
    ]
    if _is_part(root.name) and len(_beside(root)) > 1:
        notes.append(
            f"{printable(root)} lies beside {some(_beside(root))}; pass --data-root {printable(root.parent)} to use all"
        )
    return _without_test(train, validation, notes)


def _split_parts(
    root: Path, holdout: float, trial_seed: int
) -> tuple[Split, list[str]]:
    folders = {}
    for folder in folders_in(root):
        if _is_part(folder.name):
            folders[PART_OF[folder.name.lower()]] = folder
    images = _read_classes(folders["train"])
    notes: list[str] = []
    if "val" in folders:
        train = _whole(images)
        validation = _whole(_read_part(folders["val"], images.classes, notes))
    else:
        validation, train = _stratified(images, holdout, trial_seed)
        notes.append(
            f"no folder val: {len(validation):,} of {len(images):,} training images, drawn at random from each class, "
            "select the checkpoint and do not train"
        )
    if "test" not in folders:
        return _without_test(train, validation, notes)
    target = _whole(_read_part(folders["test"], images.classes, notes))
    return Split((train,), (validation,), target, None, images.classes), notes


def _without_test(
    train: Subset, validation: Subset, notes: list[str]
) -> tuple[Split, list[str]]:
    notes.append(
        "no folder test: the reported accuracy is that of the images that select the checkpoint, which flatters it; add "
        "<root>/test/<class>/* for a number to publish"
    )
    # Results name parts by domain, so the same images need a second name.
    name = f"{validation.name} (selected on)"
    target = replace(validation, domain=replace(validation.domain, name=name))
    classes = train.domain.classes
    return Split((train,), (validation,), target, None, classes), notes


def _stratified(images: Domain, holdout: float, seed: int) -> tuple[Subset, Subset]:
    held, rest = stratified_indices(images.labels, holdout, seed)
    if not len(held):
        raise DataError(
            f"{printable(images.name)}: no class has two images, so none can be held out; add images, or a folder val"
        )
    return Subset(images, held), Subset(images, rest)


def _whole(images: Domain) -> Subset:
    return Subset(images, np.arange(len(images)))


def _read_classes(folder: Path) -> Domain:
    """Images of one folder of classes. Raises DataError for fewer than two classes and for empty ones."""
    files = files_by_class(folder)
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise DataError(
            f"{printable(folder)}: no images in class {some(empty)}; fill or remove the folder"
        )
    if len(files) < 2:
        raise DataError(
            f"{printable(folder)}: one class only ({some(list(files))}); a classifier needs two or more"
        )
    return folder_domain(folder.name, sorted(files), files)


def _read_part(folder: Path, classes: Sequence[str], notes: list[str]) -> Domain:
    """Images of "val" or "test", labelled as the training classes. Raises DataError for classes that are not trained."""
    files = files_by_class(folder)
    unknown = sorted(files.keys() - set(classes))
    if unknown:
        raise DataError(
            f"{printable(folder)}: class {some(unknown)} has no training images; there are {some(list(classes))}"
        )
    empty = []
    for name in classes:
        if not files.setdefault(name, []):
            empty.append(name)
    if empty:
        notes.append(f"{printable(folder)}: no images of {some(empty)}")
    return folder_domain(folder.name, classes, files)


def _checked_flat(root: Path, names: Sequence[str]) -> Layout:
    if all(_is_part(name) for name in names):
        first = root / names[0]
        raise DataError(
            f"{printable(first)}: holds images, but no folders of classes; expected {printable(first)}/<class>/*"
        )
    return "flat"


def _with_classes(root: Path, names: Sequence[str]) -> Layout:
    parts = [name for name in names if _is_part(name)]
    if not parts:
        if len(names) == 1:
            raise DataError(
                f"--data-root {printable(root)}: holds one folder, with the classes in it; pass --data-root "
                f"{printable(root / names[0])}"
            )
        return "domains"
    others = [name for name in names if name not in parts]
    if others:
        raise DataError(
            f"--data-root {printable(root)}: {some(others)} beside {some(parts)}: neither a part ({', '.join(PART_OF)}) nor, "
            "beside parts, a domain; move it elsewhere"
        )
    kinds = [PART_OF[name.lower()] for name in parts]
    for kind in ("train", "val", "test"):
        if kinds.count(kind) > 1:
            raise DataError(
                f"--data-root {printable(root)}: {some(parts)}: two folders for {kind}; keep one"
            )
    if "train" not in kinds:
        raise DataError(
            f"--data-root {printable(root)}: {some(parts)}, but no folder train to learn from"
        )
    return "split"


def _nothing_found(root: Path, folders: Sequence[Path]) -> DataError:
    """Why no folder of images was found at the two depths where they may lie."""
    here = f"--data-root {printable(root)}"
    if _has_images(root):
        return DataError(f"{here}: holds images, but no folders of classes; {EXPECTED}")
    for folder in folders:
        if any(_has_classes(child) for child in folders_in(folder)):
            return DataError(
                f"{here}: the images lie one folder deeper; pass --data-root {printable(folder)}"
            )
    kinds = sorted(SUFFIXES)
    return DataError(f"{here}: no images ({', '.join(kinds)}) in it; {EXPECTED}")


def _has_images(folder: Path) -> bool:
    return any(is_image_file(path) for path in folder.iterdir())


def _has_classes(folder: Path) -> bool:
    return any(_has_images(child) for child in folders_in(folder))


def _is_part(name: str) -> bool:
    return name.lower() in PART_OF


def _beside(root: Path) -> list[str]:
    """The parts that lie in the folder of `root`, itself included."""
    parts = []
    for folder in folders_in(root.parent):
        if _is_part(folder.name) and _has_classes(folder):
            parts.append(folder.name)
    return parts


def _in_words(layout: Layout) -> str:
    return "classes" if layout == "flat" else "train, val or test"


def _paths(split: Split) -> list[Path]:
    """Every file of a split, once."""
    paths: dict[Path, None] = {}  # in order
    parts = (*split.train, *split.validation, split.target_in)
    for part in parts:
        assert isinstance(part.domain.images, FolderImages)
        paths.update(dict.fromkeys(part.domain.images.paths))
    return list(paths)
