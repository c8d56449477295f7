"""CIFAR-10: from a folder or as torchvision keeps it, held in memory; its split, batches and augmentation.

One domain. A part of the training images is held out and selects the checkpoint (or nothing does, and the last step
counts); the test images are measured once, at the end, and never select.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from qat.domains.batches import Draw
from qat.domains.folders import ArrayImages, DataError, Domain, read_domains
from qat.domains.splits import Split, Subset, seed_hash, split_indices
from qat.domains.transforms import Transform, to_normalized

SIDE, PAD = 32, 4
TORCHVISION = "cifar-10-batches-py"
LAYOUT = (
    "<root>/{train,test}/<class>/*.png, or torchvision's <root>/cifar-10-batches-py"
)


def read_cifar10(root: Path, download: bool = False) -> tuple[Domain, Domain]:
    """(training, test) images of CIFAR-10 under `root`, decoded into one uint8 array each.

    download: have torchvision fetch the data set into `root` first.
    Raises DataError where `root` holds neither layout, or images of another size.
    """
    if download or (root / TORCHVISION).is_dir():
        return _from_torchvision(root, True, download), _from_torchvision(
            root, False, download
        )
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        raise DataError(f"--data-root {root}: holds no CIFAR-10; expected {LAYOUT}")
    found = {
        domain.name: domain
        for domain in read_domains(root, check_images=False)
        if domain.name in SPLITS
    }
    return _in_memory(found["train"], root), _in_memory(found["test"], root)


SPLITS = ("train", "test")


def cifar10_split(
    train: Domain, test: Domain, holdout: float, trial_seed: int
) -> Split:
    """Hold out a share of the training images, drawn as DomainBed draws; all test images are the target."""
    held, rest = split_indices(
        len(train), int(holdout * len(train)), seed_hash(trial_seed, 0)
    )
    if not len(held):
        raise DataError(
            f"--holdout {holdout} of {len(train)} training images leaves none to validate on"
        )
    everything = np.arange(len(test))
    return Split(
        (Subset(train, rest),),
        (Subset(train, held),),
        Subset(test, everything),
        None,
        train.classes,
    )


def crop_flip(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The usual CIFAR augmentation: 4 pixels of zeros around, a random crop, a random horizontal flip, normalised float32."""
    return v2.Compose(
        [
            v2.RandomCrop(size, padding=PAD),
            v2.RandomHorizontalFlip(),
            *to_normalized(mean, std),
        ]
    )


class EpochBatches(torch.utils.data.Sampler[list[Draw]]):
    """Batches start_step .. steps-1 of one data set, every image once an epoch; the last batch of an epoch is smaller.

    As with `EqualDomainBatches`, all that is random follows from the seed and the step.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, *, start_step: int = 0, steps: int
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start_step, self.steps = start_step, steps
        self.per_epoch = steps_per_epoch(size, batch_size)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order, seeds = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        for step in range(self.start_step, self.steps):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                generator = np.random.default_rng(seed_hash("epoch", self.seed, epoch))
                order, seeds = (
                    generator.permutation(self.size),
                    generator.integers(2**62, size=self.size),
                )
            first = step % self.per_epoch * self.batch_size
            chosen = slice(first, first + self.batch_size)
            yield [
                (0, int(i), int(s))
                for i, s in zip(order[chosen], seeds[chosen], strict=True)
            ]


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Batches that hold `size` images, the last one maybe smaller."""
    return -(-size // batch_size)


def _from_torchvision(root: Path, train: bool, download: bool) -> Domain:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(str(root), train=train, download=download)
    except RuntimeError as error:
        raise DataError(
            f"--data-root {root}: torchvision cannot read it ({error}); pass --download"
        ) from error
    labels = np.asarray(found.targets, np.int64)
    return Domain(
        SPLITS[0 if train else 1],
        tuple(found.classes),
        ArrayImages(np.asarray(found.data)),
        labels,
    )


def _in_memory(domain: Domain, root: Path) -> Domain:
    pixels: NDArray[np.uint8] = np.empty((len(domain), SIDE, SIDE, 3), np.uint8)
    for index in range(len(domain)):
        image = domain.images[index]
        if image.size != (SIDE, SIDE):
            raise DataError(
                f"--data-root {root}: {domain.name} holds an image of {image.size}, CIFAR-10 has 32 × 32"
            )
        pixels[index] = np.asarray(image)
    return Domain(domain.name, domain.classes, ArrayImages(pixels), domain.labels)
