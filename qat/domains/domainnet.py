"""DomainNet (arXiv 1812.01754) in its official layout, with the duplicates dropped as DomainBed does
(`docs/algorithms.md`, DomainBed protocol).

    <root>/{clipart,infograph,painting,quickdraw,real,sketch}/<345 classes>/*.jpg      or <root>/domain_net/...
    <root>/<domain>_train.txt, <domain>_test.txt   optional: the release's lists, "clipart/axe/clipart_012_000001.jpg 11"
    <root>/domain_net_duplicates.txt               or duplicates.txt, DomainBed's list: "clipart/axe/clipart_012_000002.jpg"

A domain with lists holds the images they name, the two halves together: DomainBed splits every domain itself. Lists
number the classes in an order of their own; `Domain.labels` follow the alphabet (ImageFolder), as for every data set.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qat.domains.domainnet_lists import DOMAINS, read_duplicates, read_lists
from qat.domains.folders import (
    DataError,
    Domain,
    check_readable,
    class_files,
    folder_domain,
    folders_in,
)
from qat.domains.inventory import PUBLISHED, Counts, Found, Inventory
from qat.domains.roots import folder_of_domains

FOLDER = "domain_net"  # DomainBed's name for the folder of domains
LAYOUT = f"<root>/{{{','.join(DOMAINS)}}}/<class>/*.jpg"

Files = dict[str, list[Path]]  # class -> images


def read_domainnet(
    root: Path, *, published: Counts = PUBLISHED, check_images: bool = True
) -> tuple[list[Domain], Inventory]:
    """The domains under `root` in alphabetical order, and what was found of the `published` counts.

    An incomplete copy is read as far as it goes: classes are those with an image in any domain, a domain without images is
    left out; the inventory says what is missing.
    check_images: look for broken files first, so that they stop the run before it starts.
    Raises DataError when fewer than two domains are there, a list is malformed, or an image is broken.
    """
    folder = domainnet_folder(root)
    lists = read_lists(folder, published.classes)
    duplicates = read_duplicates(folder)
    used: dict[str, Files] = {}
    found: dict[str, Found] = {}
    for name in DOMAINS:
        if not (folder / name).is_dir():
            continue
        files = class_files(folder / name)
        selected, found[name] = _select(name, files, lists.get(name), duplicates)
        if selected:
            used[name] = selected
        elif files:
            raise DataError(
                f"domain {name!r} in {folder}: its {found[name].on_disk} images are all duplicates or unlisted"
            )
    if len(used) < 2:
        there = "no domain holds images"
        if used:
            there = f"only {', '.join(used)} holds images"
        raise DataError(f"--data-root {root}: {there}; expected {LAYOUT}")
    strangers = []
    for path in folders_in(folder):
        if path.name not in DOMAINS:
            strangers.append(path.name)
    inventory = Inventory(
        folder,
        published,
        found,
        classes={name: tuple(files) for name, files in used.items()},
        duplicates=None if duplicates is None else _count_by_domain(duplicates),
        listed={name: len(images) for name, images in lists.items()},
        strangers=tuple(strangers),
    )
    if check_images:
        _check_jpegs(_paths_of(used))
    return _domains(used), inventory


def _domains(used: Mapping[str, Files]) -> list[Domain]:
    """In alphabetical order, each with the classes of all."""
    all_classes: set[str] = set()
    for files in used.values():
        all_classes.update(files)
    classes = sorted(all_classes)
    domains = []
    for name, files in sorted(used.items()):
        of_all_classes = {of: files.get(of, []) for of in classes}
        domains.append(folder_domain(name, classes, of_all_classes))
    return domains


def _paths_of(used: Mapping[str, Files]) -> list[Path]:
    paths = []
    for files in used.values():
        for of_class in files.values():
            paths += of_class
    return paths


def _count_by_domain(images: Iterable[str]) -> dict[str, int]:
    """How many of `images`, "clipart/axe/clipart_012_000002.jpg", each domain has."""
    counts = dict.fromkeys(DOMAINS, 0)
    for image in images:
        domain, _, _ = image.partition("/")
        if domain in counts:
            counts[domain] += 1
    return counts


def domainnet_folder(root: Path) -> Path:
    """`root`, or `root`/domain_net. Raises DataError where neither holds a domain of DomainNet."""
    return folder_of_domains(root, "DomainNet", DOMAINS, FOLDER)


def is_domainnet(root: Path) -> bool:
    """Whether `root` is laid out as DomainNet: by most of the domains' names, which other data sets share in part."""
    for folder in (root, root / FOLDER):
        present = [name for name in DOMAINS if (folder / name).is_dir()]
        if len(present) > len(DOMAINS) / 2:
            return True
    return False


def _select(
    domain: str,
    files: Files,
    listed: Mapping[str, int] | None,
    duplicates: frozenset[str] | None,
) -> tuple[Files, Found]:
    """The images of `domain` that count: in its lists where it has some, and no duplicates."""
    used: Files = {}
    used_count = 0
    dropped = 0
    unlisted = []
    there = set()
    for name, paths in files.items():
        for path in paths:
            image = f"{domain}/{name}/{path.name}"
            there.add(image)
            if duplicates is not None and image in duplicates:
                dropped += 1
            elif listed is not None and image not in listed:
                unlisted.append(image)
            else:
                used.setdefault(name, []).append(path)
                used_count += 1
    expected = set(listed or ()) - (duplicates or frozenset())
    absent = sorted(expected - there)
    counts = Found(len(there), dropped, used_count, tuple(unlisted), tuple(absent))
    return used, counts


def _check_jpegs(paths: Iterable[Path]) -> None:
    """Decoding 600,000 images takes minutes; looking at both ends of each takes seconds and finds cut-off downloads.
    What does not begin and end as a JPEG is decoded."""
    paths = list(paths)
    doubtful = []
    with ThreadPoolExecutor(8) as pool:
        are_whole = pool.map(_has_both_ends, paths, chunksize=256)
        for path, is_whole in zip(paths, are_whole, strict=True):
            if not is_whole:
                doubtful.append(path)
    check_readable(doubtful)


def _has_both_ends(path: Path) -> bool:
    if not path.is_file():  # a pipe, which would wait for ever
        return False
    try:
        with path.open("rb") as file:
            begins = file.read(2) == b"\xff\xd8"  # start of image
            file.seek(-2, 2)
            return begins and file.read(2) == b"\xff\xd9"  # end of image
    except OSError:  # shorter than two bytes
        return False
