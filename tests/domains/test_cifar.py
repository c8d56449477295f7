"""CIFAR-10 from folders: reading, the split, epochs; and with the real data the public ResNet-20's 91.73 %."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.domains.cifar import EpochBatches, cifar10_split, crop_flip, read_cifar10
from qat.domains.folders import ArrayImages, DataError, Domain
from qat.surgery.backbones import create_backbone
from qat.train.evaluate import accuracy, predictor
from tests.real_data import FOLDER, needs

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write(root: Path, split: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    for name in CLASSES:
        (root / split / name).mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(root / split / CLASSES[label] / f"{index:05d}.png", compress_level=0)


def random_images(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, side, side, 3), np.uint8), np.arange(count) % 10


def test_folders_are_read_into_memory_as_they_are(tmp_path: Path) -> None:
    written = {"train": random_images(30), "test": random_images(20)}
    for split, arrays in written.items():
        write(tmp_path, split, *arrays)
    for domain in read_cifar10(tmp_path):
        pixels, labels = written[domain.name]
        assert domain.classes == CLASSES and len(domain) == len(labels)
        found = {np.asarray(domain.images[i]).tobytes(): int(domain.labels[i]) for i in range(len(domain))}
        assert found == {p.tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no CIFAR-10; expected"):
        read_cifar10(tmp_path)
    for split in ("train", "test"):
        write(tmp_path, split, *random_images(10, side=31))
    with pytest.raises(DataError, match=r"CIFAR-10 has 32 × 32"):
        read_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="pass --download"):
        read_cifar10(tmp_path)


def domain(name: str, count: int) -> Domain:
    pixels, labels = random_images(count)
    return Domain(name, CLASSES, ArrayImages(pixels), labels)


def test_the_split_holds_out_training_images_and_never_touches_the_test() -> None:
    split = cifar10_split(domain("train", 50), domain("test", 20), 0.1, 0)
    held, rest = set(split.validation[0].indices.tolist()), set(split.train[0].indices.tolist())
    assert len(held) == 5 and held | rest == set(range(50)) and not held & rest
    assert split.target_in.indices.tolist() == list(range(20)) and split.target_out is None
    with pytest.raises(DataError, match="--holdout"):
        cifar10_split(domain("train", 50), domain("test", 20), 0.01, 0)


def test_an_epoch_shows_every_image_once_and_resumes_where_it_stopped() -> None:
    batches = list(EpochBatches(10, 4, seed=3, steps=7))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    epochs = [[i for b in batches[s : s + 3] for _, i, _ in b] for s in (0, 3)]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 2 and epochs[0] != epochs[1]
    assert list(EpochBatches(10, 4, seed=3, start_step=4, steps=7)) == batches[4:]
    assert len({seed for b in batches for _, _, seed in b}) == 24


def test_augmentation_shifts_by_at_most_four_and_flips() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[16, 10] = 255
    where = set()
    for seed in range(60):
        torch.manual_seed(seed)
        out = crop_flip(32, (0.0,) * 3, (1.0,) * 3)(Image.fromarray(pixels))
        assert out.shape == (3, 32, 32) and float(out.sum()) == 3
        row, column = divmod(int(out[0].argmax()), 32)
        where.add((row, column))
    assert {r for r, _ in where} <= set(range(12, 21))
    left, flipped = {c for _, c in where if c < 16}, {31 - c for _, c in where if c >= 16}
    assert left <= set(range(6, 15)) and flipped <= set(range(6, 15)) and left and flipped


@pytest.mark.slow
@needs("cifar10", "weights")
def test_the_public_resnet20_has_its_published_accuracy(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(FOLDER / "cifar10/test_0.webp").convert("RGB"))
    tiles = sheet.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(10_000, 32, 32, 3)
    labels = np.load(FOLDER / "cifar10/labels.npz")["y_test"]
    write(tmp_path, "test", tiles, labels)
    write(tmp_path, "train", tiles[:10], np.arange(10))
    _, test = read_cifar10(tmp_path)
    model, _ = create_backbone("cifar_resnet20", 10, weights=FOLDER / "weights/resnet20-12fca82f.th")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert isinstance(test.images, ArrayImages)
    images = (torch.from_numpy(test.images.pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    batches = list(zip(images.split(250), torch.from_numpy(test.labels).split(250), strict=True))
    assert round(accuracy(predictor(model, torch.device("cpu")), batches, 10) * 10_000) == 9173
