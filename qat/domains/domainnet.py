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
    on_disk = {
        name: class_files(folder / name) for name in DOMAINS if (folder / name).is_dir()
    }
    used: dict[str, Files] = {}
    found: dict[str, Found] = {}
    for name, files in on_disk.items():
        used[name], found[name] = _select(name, files, lists.get(name), duplicates)
        if files and not used[name]:
            raise DataError(
                f"domain {name!r} in {folder}: its {found[name].on_disk} images are all duplicates or unlisted"
            )
    used = {name: files for name, files in used.items() if files}
    if len(used) < 2:
        there = (
            f"only {', '.join(used)} holds images" if used else "no domain holds images"
        )
        raise DataError(f"--data-root {root}: {there}; expected {LAYOUT}")
    classes = sorted({c for files in used.values() for c in files})
    inventory = Inventory(
        folder,
        published,
        found,
        {name: tuple(files) for name, files in used.items()},
        duplicates=None
        if duplicates is None
        else {d: sum(i.startswith(f"{d}/") for i in duplicates) for d in DOMAINS},
        listed={name: len(images) for name, images in lists.items()},
        strangers=tuple(p.name for p in folders_in(folder) if p.name not in DOMAINS),
    )
    if check_images:
        _check_jpegs(
            [
                path
                for files in used.values()
                for paths in files.values()
                for path in paths
            ]
        )
    return [
        folder_domain(n, classes, {c: f.get(c, []) for c in classes})
        for n, f in sorted(used.items())
    ], inventory


def domainnet_folder(root: Path) -> Path:
    """`root`, or `root`/domain_net. Raises DataError where neither holds a domain of DomainNet."""
    return folder_of_domains(root, "DomainNet", DOMAINS, FOLDER)


def is_domainnet(root: Path) -> bool:
    """Whether `root` is laid out as DomainNet: by most of the domains' names, which other data sets share in part."""
    return any(
        sum((f / name).is_dir() for name in DOMAINS) > len(DOMAINS) / 2
        for f in (root, root / FOLDER)
    )


def _select(
    domain: str,
    files: Files,
    listed: Mapping[str, int] | None,
    duplicates: frozenset[str] | None,
) -> tuple[Files, Found]:
    """The images of `domain` that count: in its lists where it has some, and no duplicates."""
    used: Files = {}
    dropped, unlisted, there = 0, [], set()
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
    absent = sorted((listed or {}).keys() - there - (duplicates or frozenset()))
    count = sum(len(paths) for paths in used.values())
    return used, Found(len(there), dropped, count, tuple(unlisted), tuple(absent))


def _check_jpegs(paths: Iterable[Path]) -> None:
    """Decoding 600,000 images takes minutes; looking at both ends of each takes seconds and finds cut-off downloads.
    What does not begin and end as a JPEG is decoded."""
    paths = list(paths)
    with ThreadPoolExecutor(8) as pool:
        whole = pool.map(_has_both_ends, paths, chunksize=256)
        doubtful = [path for path, fine in zip(paths, whole, strict=True) if not fine]
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
