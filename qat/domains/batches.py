"""Training batches: as many images from every source domain, with replacement, for ever (DomainBed; §5.2).

Everything random about a batch follows from (seed, step): a run resumed at step t sees the images and augmentations it
would have seen, with any number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from qat.domains.splits import Subset, seed_hash

Transform = Callable[[Image.Image], Tensor]
Draw = tuple[int, int, int]  # domain, index within it, seed of its augmentation


class EqualDomainBatches(Sampler[list[Draw]]):
    """Yields batches start_step .. steps-1, each `batch_size` draws from every domain of the given sizes.

    weights: for every domain the probability of each image, float64 that sums to 1 (`qat.domains.balance`); None: all alike.
    Raises ValueError where their lengths are not the sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        start_step: int = 0,
        steps: int,
        weights: Sequence[NDArray[np.float64]] | None = None,
    ) -> None:
        if weights is not None and [len(w) for w in weights] != list(sizes):
            raise ValueError(
                f"weights for {[len(w) for w in weights]} images, but the domains have {list(sizes)}"
            )
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.start_step, self.steps = start_step, steps
        self.weights = weights

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start_step, self.steps):
            generator = np.random.default_rng(seed_hash("batch", self.seed, step))
            yield [
                (domain, int(index), int(seed))
                for domain, size in enumerate(self.sizes)
                for index, seed in zip(
                    self._drawn(generator, domain, size),
                    generator.integers(2**62, size=self.batch_size),
                    strict=True,
                )
            ]

    def _drawn(
        self, generator: np.random.Generator, domain: int, size: int
    ) -> NDArray[np.int64]:
        if self.weights is None:
            return generator.integers(size, size=self.batch_size)
        return generator.choice(size, self.batch_size, p=self.weights[domain])


class ShareOfBatches(Sampler[list[Draw]]):
    """Every count-th draw of each batch. A batch that `count` does not divide, as an epoch's last one may be, is filled up
    with its own first draws, so that all shares are as large."""

    def __init__(
        self, batches: Sampler[list[Draw]], rank: int = 0, count: int = 1
    ) -> None:
        self.batches, self.rank, self.count = batches, rank, count

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            missing = -len(batch) % self.count
            filled = [*batch, *(batch * missing)[:missing]]
            yield filled[self.rank :: self.count]


class TrainImages(Dataset[tuple[Tensor, int, int]]):
    """Draw -> (augmented image float32 3_H_W, label, domain)."""

    def __init__(self, subsets: Sequence[Subset], transform: Transform) -> None:
        self.subsets, self.transform = tuple(subsets), transform

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        domain, index, seed = draw
        subset = self.subsets[domain]
        source = int(subset.indices[index])
        with _seeded(seed):
            image = self.transform(subset.domain.images[source])
        return image, int(subset.domain.labels[source]), domain


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchvision draws from torch's global CPU generator: set it for one image and put it back, so that a loader without
    workers does not touch training's. (torch.random.fork_rng does the same at half the price of the augmentation.)"""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class EvalImages(Dataset[tuple[Tensor, int]]):
    """Index -> (image float32 3_H_W, label)."""

    def __init__(self, subset: Subset, transform: Transform) -> None:
        self.subset, self.transform = subset, transform

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source = int(self.subset.indices[index])
        return self.transform(self.subset.domain.images[source]), int(
            self.subset.domain.labels[source]
        )
