"""The data sets of DomainBed in the layouts it reads (facebookresearch/DomainBed, datasets.py; `docs/algorithms.md`,
DomainBed protocol).

    <root>/<domain>/<class>/<image>      or <root>/<folder>/..., the folder being DomainBed's in its --data_dir

Domains are environments 0, 1, ... in alphabetical order of their folders, which seeds their splits. Images are DomainBed's:
nothing else in <root> is read, and lists of a release do not select (`qat.domains.pacs_lists` reads PACS's).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qat.domains.domainnet import FOLDER, is_domainnet, read_domainnet
from qat.domains.folders import (
    DataError,
    Domain,
    check_readable,
    class_files,
    folder_domain,
    folders_in,
    some,
)
from qat.domains.inventory import PUBLISHED, Counts, Found, Inventory
from qat.domains.pacs_lists import absent_images
from qat.domains.roots import folder_of_domains

PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PACS_IMAGES = {
    "art_painting": (379, 255, 285, 184, 201, 295, 449),
    "cartoon": (389, 457, 346, 135, 324, 288, 405),
    "photo": (189, 202, 182, 186, 199, 280, 432),
    "sketch": (772, 740, 753, 608, 816, 80, 160),
}
VLCS_IMAGES = {"Caltech101": 1_415, "LabelMe": 2_656, "SUN09": 3_282, "VOC2007": 3_376}
OFFICE_HOME_IMAGES = {
    "Art": 2_427,
    "Clipart": 4_365,
    "Product": 4_439,
    "Real World": 4_357,
}


def _counts(classes: int, images: Mapping[str, int]) -> Counts:
    return Counts(classes, images, images)


def _pacs_counts() -> Counts:
    by_class = {}
    for domain, images in PACS_IMAGES.items():
        by_class[domain] = dict(zip(PACS_CLASSES, images, strict=True))
    totals = {domain: sum(images) for domain, images in PACS_IMAGES.items()}
    return Counts(len(PACS_CLASSES), totals, totals, by_class)


@dataclass(frozen=True)
class Benchmark:
    """One data set of DomainBed.

    folder: its folder in DomainBed's --data_dir. environments: folder of each domain -> DomainBed's short name.
    steps, evaluate_every: DomainBed's defaults. classes: names of the class folders, empty where they are not checked.
    """

    name: str
    folder: str
    environments: Mapping[str, str]
    counts: Counts
    classes: tuple[str, ...] = ()
    steps: int = 5001
    evaluate_every: int = 300
    note: str = ""


BENCHMARKS = {
    "PACS": Benchmark(
        "PACS",
        "PACS",
        {"art_painting": "A", "cartoon": "C", "photo": "P", "sketch": "S"},
        _pacs_counts(),
        PACS_CLASSES,
    ),
    "VLCS": Benchmark(
        "VLCS",
        "VLCS",
        {"Caltech101": "C", "LabelMe": "L", "SUN09": "S", "VOC2007": "V"},
        _counts(5, VLCS_IMAGES),
        ("bird", "car", "chair", "dog", "person"),
    ),
    "OfficeHome": Benchmark(
        "OfficeHome",
        "office_home",
        {"Art": "A", "Clipart": "C", "Product": "P", "Real World": "R"},
        _counts(65, OFFICE_HOME_IMAGES),
    ),
    "TerraIncognita": Benchmark(
        "TerraIncognita",
        "terra_incognita",
        {
            "location_100": "L100",
            "location_38": "L38",
            "location_43": "L43",
            "location_46": "L46",
        },
        Counts(
            10,
            {},
            {},
            uncounted=("location_100", "location_38", "location_43", "location_46"),
        ),
        (
            "bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon",
            "squirrel",
        ),
        note="DomainBed's paper counts 24,788 images; its script has since read labels of 2021, so copies differ",
    ),
    "DomainNet": Benchmark(
        "DomainNet",
        FOLDER,
        {
            "clipart": "clip",
            "infograph": "info",
            "painting": "paint",
            "quickdraw": "quick",
            "real": "real",
            "sketch": "sketch",
        },
        PUBLISHED,
        evaluate_every=1000,
    ),
}  # fmt: skip


def recognised(root: Path) -> Benchmark | None:
    """The benchmark whose domains `root` holds, by most of their folders' names; None for other data."""
    if is_domainnet(root):
        return BENCHMARKS["DomainNet"]
    for benchmark in BENCHMARKS.values():
        for folder in (root, root / benchmark.folder):
            there = [
                name for name in benchmark.environments if (folder / name).is_dir()
            ]
            if len(there) > len(benchmark.environments) / 2:
                return benchmark
    return None


def read_benchmark(
    root: Path, benchmark: Benchmark, *, check_images: bool = True
) -> tuple[list[Domain], Inventory]:
    """The domains under `root` in alphabetical order, and what was found of the published counts.

    An incomplete copy is read as far as it goes: a domain without images is left out, and the inventory says what is
    missing, by file where a release's lists lie beside the domains.
    check_images: look for broken files first, so that they stop the run before it starts.
    Raises DataError where `root` holds none or one of the domains, a class is missing in one, or an image is broken.
    """
    if benchmark.name == "DomainNet":
        return read_domainnet(
            root, published=benchmark.counts, check_images=check_images
        )
    names = tuple(benchmark.environments)
    folder = folder_of_domains(root, benchmark.name, names, benchmark.folder)
    files: dict[str, dict[str, list[Path]]] = {}
    for name in names:
        if (folder / name).is_dir():
            files[name] = class_files(folder / name)
    used = {name: of_class for name, of_class in files.items() if of_class}
    if len(used) < 2:
        raise DataError(
            f"--data-root {root}: {len(used)} domain(s) of {benchmark.name} hold images, and leaving one out takes two; "
            f"expected {folder}/{{{','.join(names)}}}/<class>/*.jpg"
        )
    classes = _classes(folder, benchmark, used)
    domains = [folder_domain(name, classes, used[name]) for name in sorted(used)]
    inventory = Inventory(
        folder,
        benchmark.counts,
        {name: _found(folder, name, of_class) for name, of_class in files.items()},
        {name: tuple(of_class) for name, of_class in used.items()},
        duplicates=None,
        listed={},
        strangers=tuple(p.name for p in folders_in(folder) if p.name not in names),
        name=benchmark.name,
        note=benchmark.note,
    )
    if check_images:
        for of_class in used.values():
            check_readable([path for paths in of_class.values() for path in paths])
    return domains, inventory


def _classes(
    folder: Path, benchmark: Benchmark, used: Mapping[str, Mapping[str, list[Path]]]
) -> tuple[str, ...]:
    """The class folders of all domains. Raises DataError where one lacks a class: ImageFolder, which DomainBed reads with,
    numbers the classes of each domain for itself, so the labels of that domain would be others."""
    every = set(benchmark.classes)
    for name, of_class in sorted(used.items()):
        strangers = sorted(of_class.keys() - set(benchmark.classes))
        if benchmark.classes and strangers:
            raise DataError(
                f"{folder / name / strangers[0]}: {benchmark.name} has no class {strangers[0]!r}; rename or remove the folder"
            )
        every.update(of_class)
    for name, of_class in sorted(used.items()):
        missing = sorted(every - of_class.keys())
        if missing:
            raise DataError(
                f"domain {name!r} of {benchmark.name} in {folder}: no images of class {some(missing)}; "
                "unpack the data set again"
            )
    return tuple(sorted(every))


def _found(folder: Path, domain: str, files: Mapping[str, list[Path]]) -> Found:
    count = sum(len(paths) for paths in files.values())
    return Found(
        on_disk=count,
        used=count,
        absent=absent_images(folder, domain),
        by_class={name: len(paths) for name, paths in files.items()},
    )
