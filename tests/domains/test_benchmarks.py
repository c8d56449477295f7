"""DomainBed's data sets in their layouts, on miniatures of one tiny image by many names, with every fault planted."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.domains.benchmarks import BENCHMARKS, Benchmark, read_benchmark, recognised
from qat.domains.folders import DataError, Domain, FolderImages
from qat.domains.inventory import Counts
from qat.domains.pacs_lists import official_split, read_lists
from qat.domains.splits import Subset
from tests.real_data import FOLDER, needs

SMALL = ("PACS", "VLCS", "OfficeHome", "TerraIncognita")
PER_CLASS = 2
# As published: images, classes, domains (DomainBed's paper, table of data sets; its classes of environments)
PUBLISHED = {
    "PACS": (9_991, 7, ["A", "C", "P", "S"]),
    "VLCS": (10_729, 5, ["C", "L", "S", "V"]),
    "OfficeHome": (15_588, 65, ["A", "C", "P", "R"]),
    "TerraIncognita": (0, 10, ["L100", "L38", "L43", "L46"]),
    "DomainNet": (586_575, 345, ["clip", "info", "paint", "quick", "real", "sketch"]),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_counts_add_up_to_the_published_totals(name: str) -> None:
    benchmark = BENCHMARKS[name]
    total, classes, environments = PUBLISHED[name]
    assert sum(benchmark.counts.after.values()) == total and benchmark.counts.classes == classes
    assert list(benchmark.environments) == sorted(benchmark.environments) == list(benchmark.counts.domains)
    assert list(benchmark.environments.values()) == environments
    assert benchmark.name == name and len(benchmark.classes) in (0, classes)


def miniature(name: str) -> Benchmark:
    benchmark = BENCHMARKS[name]
    classes = class_names(name)
    counts = {domain: PER_CLASS * len(classes) for domain in benchmark.environments}
    by_class = {d: dict.fromkeys(classes, PER_CLASS) for d in counts} if benchmark.counts.by_class else {}
    if benchmark.counts.uncounted:
        return benchmark
    return replace(benchmark, counts=Counts(len(classes), counts, counts, by_class))


def class_names(name: str) -> tuple[str, ...]:
    return BENCHMARKS[name].classes or tuple(f"class_{number:02}" for number in range(65))


def write(root: Path, name: str) -> Path:
    root.mkdir(parents=True)
    Image.new("RGB", (3, 2), (10, 20, 30)).save(root / "picture.jpg")
    for domain in BENCHMARKS[name].environments:
        for label in class_names(name):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for number in range(PER_CLASS):
                os.link(root / "picture.jpg", folder / f"{number}.jpg")
    (root / "picture.jpg").unlink()
    return root


@pytest.mark.parametrize("name", SMALL)
def test_a_whole_copy_is_read_and_recognised(tmp_path: Path, name: str) -> None:
    benchmark = miniature(name)
    root = write(tmp_path / benchmark.folder, name)
    (root / "notes.txt").write_text("not an image")
    for given in (root, tmp_path):  # the folder of domains, or DomainBed's --data_dir
        assert recognised(given) is BENCHMARKS[name]
        domains, inventory = read_benchmark(given, benchmark)
        assert [d.name for d in domains] == list(benchmark.environments)
        for domain in domains:
            assert domain.classes == tuple(sorted(class_names(name)))
            assert np.bincount(domain.labels).tolist() == [PER_CLASS] * len(domain.classes)
            for path, label in zip(paths_of(domain), domain.labels, strict=True):
                assert (path.parents[1].name, path.parent.name) == (domain.name, domain.classes[label])
        assert inventory.complete
        head = str(inventory).splitlines()[0]
        used = 4 * PER_CLASS * len(class_names(name))
        of = "" if name == "TerraIncognita" else f" of {used:,}"
        classes = len(class_names(name))
        assert head == f"{name} in {root}: complete, {used:,}{of} images, {classes} of {classes} classes"


def paths_of(domain: Domain) -> tuple[Path, ...]:
    assert isinstance(domain.images, FolderImages)
    return domain.images.paths


def problems(root: Path, name: str = "PACS") -> list[str]:
    return list(read_benchmark(root, miniature(name))[1].problems())


def test_missing_images_are_counted_by_class_and_named_by_file_with_lists(tmp_path: Path) -> None:
    root = write(tmp_path / "PACS", "PACS")
    (root / "sketch/dog/1.jpg").unlink()
    os.link(root / "photo/dog/0.jpg", root / "photo/dog/9.jpg")
    (root / "photo/horse/0.jpg").unlink()
    assert problems(root) == [
        "photo: images of a class, against the published: dog +1, horse -1",
        "sketch: 1 image(s) missing; unpack its archive again",
        "sketch: images of a class, against the published: dog -1",
    ]
    lines = [f"sketch/dog/{number}.png 1\n" for number in range(PER_CLASS)]
    (root / "sketch_test_kfold.txt").write_text("".join(lines))
    assert "sketch: 1 listed image(s) are not on disk: sketch/dog/1" in problems(root)


def test_a_missing_domain_and_strangers_are_reported(tmp_path: Path) -> None:
    root = write(tmp_path / "PACS", "PACS")
    (root / "cartoon").rename(root / "comics")
    domains, inventory = read_benchmark(root, miniature("PACS"))
    assert [d.name for d in domains] == ["art_painting", "photo", "sketch"]
    assert list(inventory.problems()) == [
        "domains missing: cartoon; DomainBed seeds a domain's split by its place among all, so the splits here may differ "
        "from its own",
        "folders that are not domains of PACS, left out: comics",
    ]
    row = next(line for line in str(inventory).splitlines() if "cartoon " in line)
    assert row.split() == ["cartoon", "0", "14", "0", "0", "14"]


def test_terra_incognita_has_no_counts_to_compare_and_says_so(tmp_path: Path) -> None:
    root = write(tmp_path / "terra", "TerraIncognita")
    text = str(read_benchmark(root, BENCHMARKS["TerraIncognita"])[1])
    assert "80 images, 10 of 10 classes" in text and "24,788" in text


def below(*parts: str) -> Callable[[Path], Path]:
    return lambda root: root.joinpath(*parts)


@pytest.mark.parametrize(
    ("name", "folder", "given"),
    [
        ("PACS", "PACS", below("sketch")),
        ("PACS", "PACS", below("sketch", "dog")),
        ("PACS", "kfold", lambda root: root.parent),
        ("OfficeHome", "OfficeHomeDataset_10072016", lambda root: root.parent),
        ("DomainNet", "domain_net", below("clipart")),
    ],
)
def test_a_root_one_folder_off_is_named_with_the_right_one(
    tmp_path: Path, name: str, folder: str, given: Callable[[Path], Path]
) -> None:
    if name == "DomainNet":
        (tmp_path / folder / "clipart/axe").mkdir(parents=True)
    else:
        write(tmp_path / folder, name)
    with pytest.raises(DataError) as found:
        read_benchmark(given(tmp_path / folder), BENCHMARKS[name])
    assert str(found.value).endswith(f"pass --data-root {tmp_path / folder}")
    assert recognised(given(tmp_path / folder)) is None


def without(*names: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name)

    return act


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "PACS",
        without("photo/dog"),
        r"domain 'photo' of PACS in .*copy: no images of class dog; unpack",
    ),
    ("VLCS", without("SUN09/dog", "SUN09/car"), r"domain 'SUN09' of VLCS .*: no images of class car, dog; unpack"),
    ("OfficeHome", without("Art/class_07"), r"domain 'Art' of OfficeHome .* class class_07; unpack the data"),
    (
        "PACS",
        lambda root: (root / "photo/dog").rename(root / "photo/dogs"),
        r"photo/dogs: PACS has no class 'dogs'; rename or",
    ),
    (
        "PACS",
        without("art_painting", "photo", "sketch"),
        r"1 domain\(s\) of PACS hold images, and leaving one out takes two",
    ),
    (
        "PACS",
        shutil.rmtree,
        r"--data-root .*copy: no such folder; expected <root>/{art_painting,cartoon,photo,sketch}/",
    ),
    (
        "PACS",
        without("art_painting", "cartoon", "photo", "sketch"),
        r"holds no domain of PACS; expected .*, or PACS in place",
    ),
    (
        "PACS",
        lambda root: (root / "photo/dog/0.jpg").unlink() or (root / "photo/dog/0.jpg").write_bytes(b"\xff\xd8"),  # type: ignore[func-returns-value]
        r"1 unreadable image\(s\): .*photo/dog/0\.jpg",
    ),
]


@pytest.mark.parametrize(("name", "harm", "message"), FAULTS)
def test_a_fault_gives_one_error_that_names_it(
    tmp_path: Path, name: str, harm: Callable[[Path], object], message: str
) -> None:
    root = write(tmp_path / "copy", name)
    harm(root)
    with pytest.raises(DataError, match=message):
        read_benchmark(root, miniature(name))


def test_domains_by_other_names_are_to_be_renamed(tmp_path: Path) -> None:
    root = write(tmp_path / "office", "OfficeHome")
    for name, other in [("Art", "art"), ("Clipart", "clipart"), ("Product", "product"), ("Real World", "real_world")]:
        (root / name).rename(root / f"_{other}")
        (root / f"_{other}").rename(root / other)
    with pytest.raises(DataError, match=r"rename art to 'Art', clipart to 'Clipart', .* real_world to 'Real World'"):
        read_benchmark(root, BENCHMARKS["OfficeHome"])


LISTS = {
    "train": ["dog/0.png 1", "horse/0.png 5", "horse/1.png 5"],
    "crossval": ["dog/1.png 1", "dog/1.png 1"],  # the release repeats a line, too
    "test": ["dog/0.png 1", "dog/1.png 1", "horse/0.png 5", "horse/1.png 5"],
}


def with_lists(tmp_path: Path) -> Path:
    root = write(tmp_path / "PACS", "PACS")
    for domain in BENCHMARKS["PACS"].environments:
        for part, lines in LISTS.items():
            text = "".join(f"{domain}/{line}\n" for line in lines)
            (root / f"{domain}_{part}_kfold.txt").write_text(text)
    return root


def names_of(subset: Subset) -> list[str]:
    paths = paths_of(subset.domain)
    return [f"{paths[i].parent.name}/{paths[i].stem}" for i in subset.indices]


def test_the_official_split_follows_the_lists(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    domains, _ = read_benchmark(root, miniature("PACS"))
    split = official_split(domains, root, "photo")
    assert [s.name for s in split.train] == [s.name for s in split.validation] == ["art_painting", "cartoon", "sketch"]
    assert {tuple(names_of(s)) for s in split.train} == {("dog/0", "horse/0", "horse/1")}
    assert {tuple(names_of(s)) for s in split.validation} == {("dog/1",)}
    assert names_of(split.target_in) == ["dog/0", "dog/1", "horse/0", "horse/1"] and split.target_out is None
    with pytest.raises(DataError, match="--test-domain picture: no such domain"):
        official_split(domains, root, "picture")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog/0.png 0", r"cartoon_train_kfold\.txt:1: label '0'; dog has label 1, counted from 1"),
        ("horse/0.png 4", r":1: label '4'; horse has label 5"),
        (
            "cat/0.png 1",
            r":1: 'cartoon/cat/0\.png 1'; expected 'cartoon/<class>/<file> <label>', classes dog, elephant",
        ),
        ("dog/1.png 1", r"1 image\(s\) of cartoon both train and select: cartoon/dog/1; remove them from one list"),
        ("dog/7.png 1", r"domain 'cartoon': 1 listed image\(s\) are not on disk: cartoon/dog/7"),
    ],
)
def test_a_faulty_list_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    root = with_lists(tmp_path)
    (root / "cartoon_train_kfold.txt").write_text(f"cartoon/{line}\n")
    domains, _ = read_benchmark(root, miniature("PACS"))
    with pytest.raises(DataError, match=message):
        official_split(domains, root, "photo")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    (root / "cartoon_crossval_kfold.txt").unlink()
    with pytest.raises(DataError, match=r"cartoon_crossval_kfold\.txt: no such file; the official split of PACS needs"):
        read_lists(root, "cartoon")


@needs("pacs96", "pacs_lists")
def test_the_real_pacs_is_complete_and_split_by_its_real_lists() -> None:
    domains, inventory = read_benchmark(FOLDER / "pacs96", BENCHMARKS["PACS"], check_images=False)
    assert inventory.complete and inventory.used == 9_991
    split = official_split(domains, FOLDER / "pacs_lists", "cartoon")
    # Of art_painting's 208 lines for selection, one is there twice.
    assert [len(s) for s in split.train] == [1_840, 1_499, 3_531]
    assert [len(s) for s in split.validation] == [207, 171, 398]
    assert len(split.target_in) == 2_344
    assert [set(a.indices) & set(b.indices) for a, b in zip(split.train, split.validation, strict=True)] == [set()] * 3
