"""What a run reads: endless training batches, evaluation batches, and the sample images a run folder keeps."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from edgeqat.interrupts import leave_signals_to_the_parent
from qat.domains.balance import balanced_weights
from qat.domains.batches import (
    EqualDomainBatches,
    EvalImages,
    ShareOfBatches,
    TrainImages,
)
from qat.domains.cifar import EpochBatches, crop_flip
from qat.domains.splits import Split, Subset
from qat.domains.transforms import eval_transform, randaugment, train_transform
from qat.runs.build import Built
from qat.runs.recipe import Recipe
from qat.runs.run_folder import Samples

AUGMENTATIONS = {
    "domainbed": train_transform,
    "crop-flip": crop_flip,
    "randaugment": randaugment,
}
EVAL_BATCH = 64
SAMPLES = 128


def _sampler(
    split: Split, recipe: Recipe, start_step: int
) -> EqualDomainBatches | EpochBatches:
    """Positions of the images in every batch: as many of each source domain, or all images once an epoch."""
    optimization = recipe.optimization
    sizes = [len(subset) for subset in split.train]
    images_per_step = optimization.batch_size * optimization.accumulate
    steps: dict[str, Any] = {"start_step": start_step, "steps": optimization.steps}
    if optimization.epochs is not None:
        return EpochBatches(sum(sizes), images_per_step, optimization.seed, **steps)
    weights = _weights(split) if recipe.images.balanced else None
    return EqualDomainBatches(
        sizes, images_per_step, optimization.seed, weights=weights, **steps
    )


def train_loader(
    split: Split,
    recipe: Recipe,
    built: Built,
    start_step: int = 0,
    *,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[Any]:
    """Batches start_step .. steps-1 of (images, labels, domains): as many images from every source domain, or epochs. A batch
    is all that one optimizer step sees, however many microbatches it is cut into. Each of several processes has its share."""
    sampler = _sampler(split, recipe, start_step)
    augmentation = AUGMENTATIONS[recipe.images.augmentation]
    augmented = augmentation(recipe.model.image_size, built.mean, built.std)
    images = TrainImages(split.train, augmented)
    return DataLoader(
        images,
        batch_sampler=ShareOfBatches(sampler, rank, processes),
        num_workers=recipe.images.workers,
        persistent_workers=recipe.images.workers > 0,
        worker_init_fn=leave_signals_to_the_parent,
        # Else every pass over a loader draws from the generator that training uses
        generator=torch.Generator(),
    )


def _weights(split: Split) -> list[NDArray[np.float64]]:
    """For every source domain the probability of each image that makes its classes equally likely."""
    return [balanced_weights(s.domain.labels[s.indices]) for s in split.train]


def some_images(
    split: Split, recipe: Recipe, built: Built, batches: int
) -> Iterator[Tensor]:
    """Images N_3_H_W of the first training batches, for calibration and batch norm statistics."""
    loader = train_loader(
        split,
        recipe.changed(
            workers=0, accumulate=1, steps=max(recipe.optimization.steps, batches)
        ),
        built,
    )
    return (batch[0] for batch in itertools.islice(loader, batches))


def eval_batches(subset: Subset, recipe: Recipe, built: Built) -> DataLoader[Any]:
    """Batches of (images, labels) of `subset` in order, as the recipe's model sees them."""
    return seen_batches(subset, recipe.model.image_size, built.mean, built.std)


def seen_batches(
    subset: Subset,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> DataLoader[Any]:
    """Batches of (images, labels) of `subset` in order, resized to size × size and normalised."""
    images = EvalImages(subset, eval_transform(size, mean, std))
    return DataLoader(images, batch_size=EVAL_BATCH, generator=torch.Generator())


def collect_samples(split: Split, recipe: Recipe, built: Built) -> Samples:
    """A few held-out images of every domain, the target included, spread evenly, as the model sees them."""
    subsets = (*split.validation, split.target_out or split.target_in)
    return _samples(subsets, -(-SAMPLES // len(subsets)), recipe, built)


def samples_of_test(split: Split, recipe: Recipe, built: Built, count: int) -> Samples:
    """`count` images of the test part, spread evenly, as the model sees them."""
    return _samples((split.target_in,), count, recipe, built)


def _samples(
    subsets: Sequence[Subset], each: int, recipe: Recipe, built: Built
) -> Samples:
    images, labels, domains = [], [], []
    for subset in subsets:
        data = EvalImages(
            subset, eval_transform(recipe.model.image_size, built.mean, built.std)
        )
        for index in np.linspace(0, len(data) - 1, min(each, len(data))).astype(int):
            image, label = data[int(index)]
            images.append(image.numpy())
            labels.append(label)
            domains.append(subset.name)
    return Samples(np.stack(images), np.array(labels, np.int64), np.array(domains))
