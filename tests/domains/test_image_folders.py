"""Ordinary folders of images: layouts, splits, notes, and one error for each way to get them wrong."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat.domains.balance import balanced_weights, class_counts, imbalance_note
from qat.domains.folders import DataError, FolderImages
from qat.domains.image_folders import read_image_folders, recognised_layout, stratified_indices
from qat.domains.splits import Subset


def fill(root: Path, counts: dict[str, int]) -> Path:
    """So many pictures in each folder."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (3, 2), (number, 7, 9)).save(root / name / f"{number}.png")
    return root


FLAT = {"cat": 10, "dog": 5, "emu": 2}
SPLIT = {f"{part}/{name}": count for part, count in (("train", 4), ("val", 2), ("test", 3)) for name in ("cat", "dog")}
DOMAINS = {f"{domain}/{name}": 10 for domain in ("photo", "sketch") for name in ("cat", "dog")}


def files_of(subset: Subset) -> list[str]:
    assert isinstance(subset.domain.images, FolderImages)
    paths = subset.domain.images.paths
    return [f"{paths[i].parents[1].name}/{paths[i].parent.name}/{paths[i].stem}" for i in subset.indices]


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    found = read_image_folders(fill(tmp_path / "pets", FLAT), holdout=0.2)
    (train,), (validation,) = found.split.train, found.split.validation
    assert found.layout == "flat" and found.split.classes == ("cat", "dog", "emu")
    held = Counter(name.split("/")[1] for name in files_of(validation))
    assert held == {"cat": 2, "dog": 1, "emu": 1}
    assert len(set(files_of(train)) | set(files_of(validation))) == len(train) + len(validation) == 17
    assert files_of(found.split.target_in) == files_of(validation)
    assert found.split.target_in.name != validation.name and found.split.target_out is None
    assert found.notes[0].startswith("4 of 17 images, drawn at random from each class, select")
    assert found.notes[1].startswith("no folder test: the reported accuracy is that of the images that select")
    again = read_image_folders(tmp_path / "pets", holdout=0.2)
    other = read_image_folders(tmp_path / "pets", holdout=0.2, trial_seed=1)
    assert files_of(again.split.validation[0]) == files_of(validation) != files_of(other.split.validation[0])


def test_labels_go_with_their_folders(tmp_path: Path) -> None:
    (train,) = read_image_folders(fill(tmp_path, FLAT)).split.train
    for name, index in zip(files_of(train), train.indices, strict=True):
        assert train.domain.classes[train.domain.labels[index]] == name.split("/")[1]


def test_a_split_folder_is_used_as_it_is(tmp_path: Path) -> None:
    found = read_image_folders(fill(tmp_path, SPLIT))
    split = found.split
    assert found.layout == "split" and found.notes == ()
    assert [len(split.train[0]), len(split.validation[0]), len(split.target_in)] == [8, 4, 6]
    for part, subset in [("train", split.train[0]), ("val", split.validation[0]), ("test", split.target_in)]:
        assert {name.split("/")[0] for name in files_of(subset)} == {part} == {subset.name}


def test_without_val_a_share_of_the_training_images_selects(tmp_path: Path) -> None:
    counts = {"Training/cat": 10, "Training/dog": 20, "testing/cat": 3, "testing/dog": 1}
    found = read_image_folders(fill(tmp_path, counts), holdout=0.3)
    split = found.split
    assert [len(split.train[0]), len(split.validation[0]), len(split.target_in)] == [21, 9, 4]
    assert not set(files_of(split.train[0])) & set(files_of(split.validation[0]))
    assert found.notes == (
        "no folder val: 9 of 30 training images, drawn at random from each class, select the checkpoint and do not train",
    )


def test_without_test_val_is_reported_and_a_note_says_so(tmp_path: Path) -> None:
    counts = {"train/cat": 4, "train/dog": 4, "train/emu": 4, "valid/dog": 3, "valid/emu": 1}
    found = read_image_folders(fill(tmp_path, counts))
    split = found.split
    assert files_of(split.target_in) == files_of(split.validation[0]) and len(split.target_in) == 4
    assert [split.validation[0].domain.labels.tolist(), split.classes] == [[1, 1, 1, 2], ("cat", "dog", "emu")]
    assert found.notes[0] == f"{tmp_path / 'valid'}: no images of cat"
    assert found.notes[1].startswith("no folder test")


def test_domains_leave_one_out(tmp_path: Path) -> None:
    found = read_image_folders(fill(tmp_path, DOMAINS), test_domain="sketch")
    assert found.layout == "domains" and found.split.target_in.name == "sketch"
    assert found.split.target_out is not None and len(found.split.target_out) == 4
    with pytest.raises(DataError, match=r"--test-domain: say which domain of .* to leave out: photo, sketch"):
        read_image_folders(tmp_path)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, r"--data-root .*root: no images \(\.jpeg, \.jpg, \.png, \.webp\) in it; expected <root>/<class>/\*"),
        ({"": 3}, "holds images, but no folders of classes"),
        ({"cat": 3, "photo/dog": 3}, r"cat hold\(s\) images, photo hold\(s\) folders of images"),
        (
            {"train": 3, "val": 2},
            r"root/train: holds images, but no folders of classes; expected .*root/train/<class>/\*",
        ),
        ({"pets/cat": 3, "pets/dog": 3}, r"holds one folder, with the classes in it; pass --data-root .*root/pets"),
        ({"data/train/cat": 3, "data/val/cat": 3}, r"one folder deeper; pass --data-root .*root/data"),
        ({"data/photo/cat": 3, "data/sketch/cat": 3}, r"one folder deeper; pass --data-root .*root/data"),
        ({"train/cat": 3, "extra/cat": 3}, r"extra beside train: neither a part \(train, training, val"),
        ({"train/cat": 3, "val/cat": 1, "validation/cat": 1}, r"val, validation: two folders for val; keep one"),
        ({"val/cat": 3, "test/cat": 1}, "test, val, but no folder train to learn from"),
        ({"train/cat": 3, "train/dog": 0}, r"root/train: no images in class dog; fill or remove the folder"),
        ({"train/cat": 3}, r"root/train: one class only \(cat\); a classifier needs two or more"),
        ({"cat": 3}, r"root: one class only \(cat\)"),
        ({"cat": 1, "dog": 1}, "no class has two images, so none can be held out"),
        ({**SPLIT, "test/emu": 1}, r"root/test: class emu has no training images; there are cat, dog"),
    ],
)
def test_each_fault_is_one_error_that_says_what_to_do(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    (tmp_path / "root").mkdir()
    root = tmp_path / "root"
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (3, 2)).save(root / name / f"{number}.png")
    with pytest.raises(DataError, match=message):
        read_image_folders(root)


def test_a_missing_root_a_stray_flag_and_a_broken_image(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"--data-root .*nowhere: no such folder; expected <root>/<class>/\*, <root>/{train"
    ):
        read_image_folders(tmp_path / "nowhere")
    root = fill(tmp_path / "pets", FLAT)
    with pytest.raises(DataError, match=r"--test-domain cat: .*pets holds no domains but classes; leave the flag out"):
        read_image_folders(root, test_domain="cat")
    (root / "dog/3.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"1 unreadable image\(s\): .*dog/3\.png; remove or replace"):
        read_image_folders(root)
    assert read_image_folders(root, check_images=False).layout == "flat"


def test_a_part_given_as_root_is_flat_with_a_note(tmp_path: Path) -> None:
    found = read_image_folders(fill(tmp_path, SPLIT) / "train")
    assert found.layout == "flat"
    alone = read_image_folders(fill(tmp_path / "alone", {"train/cat": 3, "train/dog": 3}) / "train")
    assert not any("lies beside" in note for note in alone.notes)
    assert f"{tmp_path / 'train'} lies beside test, train, val; pass --data-root {tmp_path} to use all" in found.notes


def test_other_files_and_hidden_folders_do_not_count(tmp_path: Path) -> None:
    root = fill(tmp_path, {**FLAT, ".cache/cat": 3})
    (root / "README.md").write_text("pets")
    (root / "cat/labels.csv").write_text("0")
    assert recognised_layout(root) == "flat" and read_image_folders(root).split.classes == ("cat", "dog", "emu")


def test_what_files_hold_beside_rgb_is_noted_with_numbers(tmp_path: Path) -> None:
    root = fill(tmp_path, {"cat": 6, "dog": 6})
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (4, 3)).save(root / "cat/turned.jpg", exif=exif)
    Image.new("CMYK", (4, 3)).save(root / "dog/print.jpg")
    Image.new("L", (4, 3), 9).save(root / "dog/grey.png")
    Image.new("RGBA", (4, 3)).save(root / "dog/clear.png")
    Image.fromarray(np.full((3, 4), 40_000, np.uint16)).save(root / "cat/deep.png")
    found = read_image_folders(root)
    (train,), (validation,) = found.split.train, found.split.validation
    images = dict(zip(files_of(train) + files_of(validation), [*train.indices, *validation.indices], strict=True))
    deep = train.domain.images[images[f"{root.name}/cat/deep"]]
    assert deep.mode == "RGB" and deep.getpixel((0, 0)) == (156, 156, 156)  # 40,000 // 256
    notes = [note for note in found.notes if note.startswith("1 of 17 images ")]
    assert [note.rpartition("/")[2] for note in notes] == ["print.jpg", "deep.png", "turned.jpg", "clear.png"]
    assert "CMYK" in notes[0] and "16 bits" in notes[1] and "orientation" in notes[2] and "transparent" in notes[3]


@pytest.mark.parametrize("holdout", [0.0, 0.2, 0.5, 0.97])
def test_a_stratified_split_has_every_class_of_two_or_more_in_both_parts(holdout: float) -> None:
    labels = np.asarray([0] * 40 + [1] * 7 + [2] * 2 + [4])[np.random.default_rng(0).permutation(50)]
    held, rest = stratified_indices(labels, holdout, seed=3)
    assert sorted([*held, *rest]) == list(range(50))
    for label, count in Counter(labels.tolist()).items():
        expected = 0 if count == 1 else min(max(round(holdout * count), 1), count - 1)
        assert (labels[held] == label).sum() == expected
    if holdout == 0.2:
        assert held.tolist() != stratified_indices(labels, holdout, seed=4)[0].tolist()


def test_unbalanced_classes_are_noted_with_numbers(tmp_path: Path) -> None:
    note = imbalance_note(np.asarray([30, 12, 10]), ("cat", "dog", "emu"))
    assert note is not None and "cat has 30 training images, 3.0 times as many as emu" in note
    assert note.endswith("Fewest first: emu 10, dog 12, cat 30")
    assert imbalance_note(np.asarray([29, 12, 10]), ("cat", "dog", "emu")) is None
    none = imbalance_note(np.asarray([1, 0]), ("cat", "dog"))
    assert none is not None and "others have none" in none
    labels = [np.asarray([0, 0, 2]), np.asarray([1, 2])]
    assert class_counts(labels, 4).tolist() == [2, 1, 2, 0]
    counts = {f"{domain}/{name}": count for domain in ("a", "b", "c") for name, count in (("cat", 5), ("dog", 20))}
    found = read_image_folders(fill(tmp_path, counts), test_domain="c")
    assert len(found.notes) == 1 and found.notes[0].startswith("unbalanced classes: dog has ")


def test_balanced_weights_make_every_class_as_likely() -> None:
    labels = np.asarray([3, 0, 0, 1, 0, 3, 0])
    weights = balanced_weights(labels)
    for label, count in Counter(labels.tolist()).items():
        assert [math.isclose(w, 1 / (3 * count)) for w in weights[labels == label]] == [True] * count
    assert math.isclose(weights.sum(), 1)
    with pytest.raises(ValueError, match="no labels"):
        balanced_weights(labels[:0])
