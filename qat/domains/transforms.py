"""DomainBed's augmentation and evaluation transforms (`docs/algorithms.md`, DomainBed protocol)."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]


def train_transform(
    size: int, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """RandomResizedCrop(size, scale 0.7 to 1), horizontal flip, colour jitter 0.3, 10 % grayscale, normalised float32.

    Held-out source images are not augmented (as in the SWAD line of work; upstream DomainBed augments them).
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.3),
            v2.RandomGrayscale(0.1),
            *to_normalized(mean, std),
        ]
    )


def randaugment(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """RandomResizedCrop(size, scale 0.7 to 1), horizontal flip, RandAugment (arXiv 1909.13719: two operations of magnitude 9
    of 31), normalised float32."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
            *to_normalized(mean, std),
        ]
    )


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Resize to size × size, normalised float32."""
    return v2.Compose(
        [v2.Resize((size, size), antialias=True), *to_normalized(mean, std)]
    )


def to_normalized(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    """PIL image -> float32 3_H_W, normalised."""
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
