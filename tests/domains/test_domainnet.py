"""DomainNet: the real lists against the published counts, and a miniature of the layout with every fault planted in it."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.domains.domainnet import is_domainnet, read_domainnet
from qat.domains.domainnet_lists import DOMAINS, read_duplicates, read_lists
from qat.domains.folders import DataError, Domain, FolderImages
from qat.domains.inventory import PUBLISHED
from qat.domains.miniature import CLASSES, MINIATURE, PER_CLASS, write_miniature
from tests.real_data import FOLDER, needs

LISTS = FOLDER / "domainnet_lists"
real_lists = needs("domainnet_lists")


def paths_of(domain: Domain) -> tuple[Path, ...]:
    assert isinstance(domain.images, FolderImages)
    return domain.images.paths


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_miniature(tmp_path_factory.mktemp("miniature") / "domain_net")


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def report(root: Path) -> str:
    return str(read_domainnet(root, published=MINIATURE)[1])


def labels_in(file: Path) -> dict[str, int]:
    pairs = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
    return {image: int(label) for image, label in pairs}


@real_lists
def test_the_real_lists_have_the_published_counts() -> None:
    train, test = (labels_in(LISTS / f"clipart_{part}.txt") for part in ("train", "test"))
    assert (len(train), len(test), len(train.keys() | test.keys())) == (33_525, 14_604, 48_129)
    both = read_lists(LISTS, 345)
    assert both == {"clipart": train | test}
    assert sorted(set(both["clipart"].values())) == list(range(345))
    lines = (LISTS / "clipart_test.txt").read_text().split("\n")
    assert test["clipart/zigzag/clipart_345_000030.jpg"] == 344
    assert [f"{image} {label}" for image, label in test.items()] == lines[:-1]


@real_lists
def test_the_real_duplicates_have_the_published_counts_and_are_in_no_list() -> None:
    duplicates = read_duplicates(LISTS)
    assert duplicates is not None and len(duplicates) == 9_431
    counts = Counter(image.split("/")[0] for image in duplicates)
    assert counts == {"clipart": 704, "infograph": 1_596, "painting": 3_493, "real": 2_380, "sketch": 1_258}
    assert {d: PUBLISHED.before[d] - counts[d] for d in DOMAINS} == PUBLISHED.after
    assert not duplicates & read_lists(LISTS, 345)["clipart"].keys()


def test_published_totals() -> None:
    assert sum(PUBLISHED.before.values()) == 596_006 and sum(PUBLISHED.after.values()) == 586_575
    assert set(PUBLISHED.before) == set(PUBLISHED.after) == set(DOMAINS)


@real_lists
@pytest.mark.slow
@pytest.mark.parametrize("with_lists", [True, False])
def test_a_whole_real_domain_beside_a_part_of_another(tmp_path: Path, with_lists: bool) -> None:
    """Every name of clipart's lists and duplicates, and one sketch, as links to one image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "image.jpg")
    listed = [
        s.split()[0] for part in ("train", "test") for s in (LISTS / f"clipart_{part}.txt").read_text().splitlines()
    ]
    duplicates = [s for s in (LISTS / "duplicates.txt").read_text().splitlines() if s.startswith("clipart/")]
    for image in [*listed, *duplicates, "sketch/axe/sketch_012_000001.jpg"]:
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "image.jpg", tmp_path / image)
    if with_lists:
        for path in LISTS.glob("clipart_*.txt"):
            shutil.copy(path, tmp_path)
    shutil.copy(LISTS / "duplicates.txt", tmp_path)
    (clipart, sketch), inventory = read_domainnet(tmp_path)
    found = inventory.found["clipart"]
    assert (found.on_disk, found.duplicates, found.used) == (48_833, 704, 48_129) and len(clipart) == 48_129
    assert (clipart.labels.tolist().count(0), len(clipart.classes), len(sketch)) == (
        sum("/The_Eiffel_Tower/" in image for image in listed), 345, 1,
    )  # fmt: skip
    problems = list(inventory.problems())
    assert len(problems) == 3 and not any("clipart" in problem for problem in problems)
    assert problems[2] == "sketch: 69,127 image(s) missing; unpack its archive again"


def test_the_miniature_is_read_whole_and_its_duplicates_are_dropped(pristine: Path) -> None:
    domains, inventory = read_domainnet(pristine, published=MINIATURE)
    assert inventory.complete and "complete, 144 of 144 images, 4 of 4 classes, 5 duplicates dropped" in str(inventory)
    assert [d.name for d in domains] == sorted(DOMAINS)
    duplicates = (pristine / "domain_net_duplicates.txt").read_text().split()
    for domain in domains:
        expected = sorted(
            p for p in pristine.glob(f"{domain.name}/*/*.jpg") if str(p.relative_to(pristine)) not in duplicates
        )
        assert list(domain.images.paths) == expected  # type: ignore[attr-defined]
        assert [domain.classes[label] for label in domain.labels] == [p.parent.name for p in expected]
        assert np.bincount(domain.labels).tolist() == [PER_CLASS] * len(CLASSES)
    assert [inventory.found[d].on_disk for d in DOMAINS] == [25, 25, 25, 24, 25, 25]


def test_domainbeds_folder_name_and_no_lists(root: Path, tmp_path: Path) -> None:
    for path in root.glob("*_t*.txt"):
        path.unlink()
    (root / "domain_net_duplicates.txt").rename(root / "duplicates.txt")
    root.rename(tmp_path / "domain_net")
    domains, inventory = read_domainnet(tmp_path, published=MINIATURE)
    assert inventory.complete and [len(d) for d in domains] == [24] * 6
    assert is_domainnet(tmp_path) and is_domainnet(tmp_path / "domain_net")


def test_a_copy_that_domainbed_has_cleaned_is_complete(root: Path) -> None:
    for image in (root / "domain_net_duplicates.txt").read_text().split():
        (root / image).unlink()
    (root / "domain_net_duplicates.txt").unlink()
    assert read_domainnet(root, published=MINIATURE)[1].complete


def test_other_data_sets_are_not_taken_for_domainnet(tmp_path: Path) -> None:
    for name in ("art_painting", "cartoon", "photo", "sketch"):
        (tmp_path / name).mkdir()
    assert not is_domainnet(tmp_path)


def test_labels_follow_the_alphabet_of_class_names_not_the_lists(root: Path) -> None:
    """As ImageFolder: capitals first. The lists call this class 3."""
    for domain in DOMAINS:
        (root / domain / "triangle").rename(root / domain / "Triangle")
        for part in ("train", "test"):
            path = root / f"{domain}_{part}.txt"
            path.write_text(path.read_text().replace("/triangle/", "/Triangle/"))
    domains, _ = read_domainnet(root, published=MINIATURE)
    assert domains[0].classes == ("Triangle", "circle", "square", "star")
    for path, label in zip(domains[0].images.paths, domains[0].labels, strict=True):  # type: ignore[attr-defined]
        assert path.parent.name == domains[0].classes[label]


def without_lists(root: Path) -> None:
    for path in root.glob("*_t*.txt"):
        path.unlink()


def without_class(root: Path) -> None:
    without_lists(root)
    shutil.rmtree(root / "real/star")


def without_class_but_listed(root: Path) -> None:
    shutil.rmtree(root / "real/star")


def without_class_anywhere(root: Path) -> None:
    without_lists(root)
    for domain in DOMAINS:
        shutil.rmtree(root / domain / "star")


def misnamed_domain(root: Path) -> None:
    (root / "painting").rename(root / "paintings")


def unlisted_image(root: Path) -> None:
    path = root / "sketch_test.txt"
    path.write_text("\n".join(path.read_text().split("\n")[1:]))


def without_duplicates_file(root: Path) -> None:
    without_lists(root)
    (root / "domain_net_duplicates.txt").unlink()


def short_duplicates_file(root: Path) -> None:
    without_lists(root)
    path = root / "domain_net_duplicates.txt"
    path.write_text("\n".join(path.read_text().split("\n")[1:]))


REPORTS = [
    (
        without_class,
        138,
        ["1 class(es) without images: real/star", "real: 6 image(s) missing; unpack its archive again"],
    ),
    (
        without_class_but_listed,
        138,
        [
            "1 class(es) without images: real/star",
            "real: 6 listed image(s) are not on disk: "
            + ", ".join(f"real/star/real_003_{n:06}.jpg" for n in range(1, 6))
            + " and 1 more",
        ],
    ),
    (
        without_class_anywhere,
        108,
        ["classes: 3 of 4 have images", *(f"{d}: 6 image(s) missing; unpack its archive again" for d in DOMAINS)],
    ),
    (
        misnamed_domain,
        120,
        [
            "domains missing: painting; DomainBed seeds a domain's split by its place among all, so the splits here may "
            "differ from its own",
            "folders that are not domains of DomainNet, left out: paintings",
        ],
    ),
    (
        unlisted_image,
        143,
        [
            "sketch: its lists name 23 images, 24 published; download them again",
            "sketch: 1 image(s) are in no list and left out: sketch/circle/sketch_001_000005.jpg",
        ],
    ),
    (
        without_duplicates_file,
        149,
        [
            f"{d}: 1 image(s) more than published, duplicates among them; put DomainBed's domain_net_duplicates.txt into ROOT"
            for d in DOMAINS
            if d != "quickdraw"
        ],
    ),
    (
        short_duplicates_file,
        145,
        ["clipart: 1 image(s) more than published", "clipart: 0 entries in the list of duplicates, 1 published"],
    ),
]


@pytest.mark.parametrize(("harm", "used", "problems"), REPORTS, ids=lambda v: getattr(v, "__name__", ""))
def test_an_incomplete_copy_is_used_and_reported(
    root: Path, harm: Callable[[Path], None], used: int, problems: list[str]
) -> None:
    harm(root)
    domains, inventory = read_domainnet(root, published=MINIATURE)
    assert sum(len(d) for d in domains) == inventory.used == used
    head, *rows = str(inventory).split("\n")
    assert f"incomplete, {used} of 144 images" in head and not inventory.complete
    assert [row[2:] for row in rows if row.startswith("- ")] == [p.replace("ROOT", str(root)) for p in problems]
    labelled = {
        d.classes[label] == p.parent.name for d in domains for label, p in zip(d.labels, paths_of(d), strict=True)
    }
    assert labelled == {True}


def test_the_report_sets_found_against_published(root: Path) -> None:
    without_class(root)
    rows = [line.split() for line in report(root).split("\n")]
    assert ["real", "19", "25", "1", "18", "24"] in rows
    assert ["quickdraw", "24", "24", "0", "24", "24"] in rows


def test_an_image_that_is_listed_and_a_duplicate_is_dropped(root: Path) -> None:
    with (root / "real_test.txt").open("a") as file:
        file.write("real/circle/real_001_000007.jpg 0\n")
    domains, inventory = read_domainnet(root, published=MINIATURE)
    assert inventory.complete and inventory.found["real"].duplicates == 1
    assert not any(p.name == "real_001_000007.jpg" for p in paths_of(domains[4]))


def line(number: int, text: str, name: str = "real_train.txt") -> Callable[[Path], None]:
    """Replaces one line of a list."""

    def act(root: Path) -> None:
        lines = (root / name).read_text().split("\n")
        lines[number - 1] = text
        (root / name).write_text("\n".join(lines))

    return act


def remove(root: Path, domains: Sequence[str]) -> None:
    for domain in domains:
        shutil.rmtree(root / domain)


FAULTS = [
    (line(3, "real/circle/a.jpg four"), r"real_train\.txt:3: label 'four'; expected a whole number from 0 to 3"),
    (line(3, "real/circle/a.jpg -1"), r"real_train\.txt:3: label '-1'"),
    (line(3, "real/circle/a.jpg 4"), r"real_train\.txt:3: label '4'; expected a whole number from 0 to 3"),
    (line(3, "real/circle/a.jpg"), r"real_train\.txt:3: 'real/circle/a\.jpg' has no label"),
    (line(3, "real/circle/a.jpg 2"), r"real_train\.txt:3: class circle has label 2, but 0 in .*clipart_train\.txt:1"),
    (line(3, "real/kite/a.jpg 2"), r"real_train\.txt:3: label 2 is kite, but star in .*clipart_train\.txt:9"),
    (line(3, "reel/circle/a.jpg 0"), r"real_train\.txt:3: domain 'reel'; expected real"),
    (line(3, "real/a.jpg 0"), r"real_train\.txt:3: 'real/a\.jpg'; expected <domain>/<class>/<file>"),
    (line(3, "real/circle/real_001_000001.jpg 0"), r"real_train\.txt:3: real/circle/real_001_000001\.jpg is listed twice"),
    (line(2, "art/circle/a.jpg", "domain_net_duplicates.txt"), r"domain_net_duplicates\.txt:2: domain 'art'; expected clip"),
    (lambda root: (root / "real_test.txt").unlink(), r"real_test\.txt: no such file beside real_train\.txt; .* both lists"),
    (
        lambda root: (root / "real/star/real_003_000002.jpg").write_bytes(b"\xff\xd8 cut off"),
        r"1 unreadable image\(s\): .*real_003_000002\.jpg",
    ),
    (lambda root: (root / "real/star/real_003_000002.jpg").write_bytes(b""), r"1 unreadable image\(s\)"),
    (lambda root: remove(root, DOMAINS[1:]), r"only clipart holds images; expected <root>/{clipart,"),
    (lambda root: remove(root, DOMAINS), r"holds no domain of DomainNet"),
    (shutil.rmtree, r"--data-root .*copy: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), FAULTS)
def test_a_fault_gives_one_error_that_names_it(root: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(root)
    with pytest.raises(DataError, match=message):
        read_domainnet(root, published=MINIATURE)


def test_a_domain_unpacked_one_folder_too_deep_counts_as_missing(root: Path) -> None:
    (root / "real").rename(root / "inner")
    (root / "real").mkdir()
    (root / "inner").rename(root / "real/real")
    domains, inventory = read_domainnet(root, published=MINIATURE)
    assert "real" not in {d.name for d in domains} and "domains missing: real" in str(inventory)


def test_lists_of_another_copy_leave_nothing_and_say_so(root: Path) -> None:
    for name in CLASSES:
        (root / "real" / name).rename(root / "real" / f"_{name}")
    with pytest.raises(DataError, match=r"domain 'real' in .*: its 25 images are all duplicates or unlisted"):
        read_domainnet(root, published=MINIATURE)


def test_a_jpeg_with_bytes_after_its_end_is_fine(root: Path) -> None:
    with (root / "real/star/real_003_000002.jpg").open("ab") as file:
        file.write(b"\0\0")
    assert read_domainnet(root, published=MINIATURE)[1].complete


def test_the_miniature_stays_as_it_is_and_depends_on_nothing_else(pristine: Path, tmp_path: Path) -> None:
    again = write_miniature(tmp_path / "again")
    for path in (p for p in pristine.rglob("*") if p.is_file()):
        assert (again / path.relative_to(pristine)).read_bytes() == path.read_bytes()
    (again / "clipart_train.txt").unlink()
    assert not (write_miniature(again) / "clipart_train.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
