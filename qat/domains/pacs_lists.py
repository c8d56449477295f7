"""PACS's own split: the lists `<domain>_{train,crossval,test}_kfold.txt` of its release (Li et al., ICCV 2017).

Lines are "cartoon/dog/pic_001.jpg 1", labels from 1. DomainBed ignores the lists and draws its splits, and so does
`leave_one_domain_out`; results with the official split cannot be compared with DomainBed's. `official_split` uses them as
the release means them: the sources' "train" images train, their "crossval" images select, and the target's "test" list,
which is all of its images, is tested. There is no oracle.

The release slips for three images of art_painting:
* dog/pic_225.jpg has label 0 in "crossval". It is a dog here.
* dog/pic_248.jpg is in "crossval" twice. It counts once.
* dog/pic_249.jpg is in neither. It is tested alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from edgeqat.terminal import printable
from qat.domains.folders import (
    DataError,
    Domain,
    FolderImages,
    folders_in,
    images_in,
    some,
)
from qat.domains.splits import Split, Subset

PARTS = ("train", "crossval", "test")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
MISLABELLED = "art_painting/dog/pic_225"  # in the release's crossval list, with label 0


@dataclass(frozen=True)
class DomainLists:
    """Images of one domain in each list, as "domain/class/stem": copies of PACS differ in the suffix of files."""

    train: tuple[str, ...]
    crossval: tuple[str, ...]
    test: tuple[str, ...]


def official_split(domains: Sequence[Domain], lists: Path, test_domain: str) -> Split:
    """PACS as its release splits it, `test_domain` left out. domains: from `read_benchmark`. lists: the folder of the lists.

    Raises DataError for an unknown domain, a missing or malformed list, and images that are listed but not there.
    """
    names = [domain.name for domain in domains]
    if test_domain not in names:
        raise DataError(
            f"--test-domain {test_domain}: no such domain; there are {', '.join(names)}"
        )
    train: list[Subset] = []
    validation: list[Subset] = []
    target = None
    for domain in domains:
        listed = read_lists(lists, domain.name)
        places = _places(domain)
        if domain.name == test_domain:
            target = Subset(domain, _indices(domain, places, listed.test))
            continue
        train.append(Subset(domain, _indices(domain, places, listed.train)))
        validation.append(Subset(domain, _indices(domain, places, listed.crossval)))
    assert target is not None
    return Split(tuple(train), tuple(validation), target, None, domains[0].classes)


def read_lists(folder: Path, domain: str) -> DomainLists:
    """The three lists of one domain. Raises DataError naming file and line for what is missing, malformed or mislabelled."""
    parts = [_images(folder / f"{domain}_{part}_kfold.txt", domain) for part in PARTS]
    lists = DomainLists(*parts)
    both = sorted(set(lists.train) & set(lists.crossval))
    if both:
        raise DataError(
            f"{folder}: {len(both)} image(s) of {domain} both train and select: {some(both)}; remove them from one list"
        )
    return lists


def absent_images(folder: Path, domain: str) -> tuple[str, ...]:
    """Images that the "test" list in `folder`, which names all, has and the disk has not; none without such a list."""
    path = folder / f"{domain}_test_kfold.txt"
    if not path.is_file():
        return ()
    there = {
        f"{domain}/{file.parent.name}/{file.stem}"
        for class_folder in folders_in(folder / domain)
        for file in images_in(class_folder)
    }
    return tuple(sorted(set(_images(path, domain)) - there))


def _images(path: Path, domain: str) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; the official split of PACS needs {domain}_{{{','.join(PARTS)}}}_kfold.txt"
        )
    found: dict[str, None] = {}
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            image = _image(f"{path}:{number}", line.strip(), domain)
            found[image] = None
    return tuple(found)


def _image(where: str, line: str, domain: str) -> str:
    name, _, label = line.rpartition(" ")
    parts = PurePosixPath(name).parts
    if len(parts) != 3 or parts[0] != domain or parts[1] not in CLASSES:
        raise DataError(
            f"{where}: {printable(line)!r}; expected '{domain}/<class>/<file> <label>', classes {', '.join(CLASSES)}"
        )
    image = str(PurePosixPath(name).with_suffix(""))
    expected = CLASSES.index(parts[1]) + 1
    if label != str(expected) and image != MISLABELLED:
        raise DataError(
            f"{where}: label {printable(label)!r}; {parts[1]} has label {expected}, counted from 1"
        )
    return image


def _places(domain: Domain) -> dict[str, int]:
    """ "domain/class/stem" -> index of the image."""
    if not isinstance(domain.images, FolderImages):
        raise DataError(
            f"domain {domain.name!r}: the official split needs files, not images in memory"
        )
    places = {}
    for index, path in enumerate(domain.images.paths):
        places[f"{domain.name}/{path.parent.name}/{path.stem}"] = index
    return places


def _indices(
    domain: Domain, places: Mapping[str, int], images: Sequence[str]
) -> NDArray[np.int64]:
    missing = [image for image in images if image not in places]
    if missing:
        raise DataError(
            f"domain {domain.name!r}: {len(missing)} listed image(s) are not on disk: {some(missing)}"
        )
    return np.asarray([places[image] for image in images], np.int64)
