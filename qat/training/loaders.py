"""What a run reads: endless training batches, evaluation batches, and the sample images a run folder keeps."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qat.domains.batches import EqualDomainBatches, EvalImages, TrainImages
from qat.domains.domainnet import is_domainnet, read_domainnet
from qat.domains.folders import read_domains
from qat.domains.splits import LeaveOneDomainOut, Subset, leave_one_domain_out
from qat.domains.synthetic import synthetic_domains
from qat.domains.transforms import eval_transform, train_transform
from qat.training.checkpoint import Built, Samples
from qat.training.recipe import Recipe

EVAL_BATCH = 64
SAMPLES = 128


def split_of(recipe: Recipe, data_root: Path | None = None) -> LeaveOneDomainOut:
    """The split that a finished run of `recipe` was measured on. data_root: where its images are now, if elsewhere."""
    root = data_root or recipe.data_root
    if root is None:
        domains = synthetic_domains(per_class=recipe.per_class, image_size=recipe.image_size, seed=recipe.seed)
    elif is_domainnet(root):
        domains, _ = read_domainnet(root, check_images=False)
    else:
        domains = read_domains(root, check_images=False)
    return leave_one_domain_out(
        domains, recipe.test_domain, holdout_fraction=recipe.holdout, trial_seed=recipe.trial_seed
    )


def train_loader(split: LeaveOneDomainOut, recipe: Recipe, built: Built, start_step: int = 0) -> DataLoader[Any]:
    """Batches start_step .. steps-1 of (images, labels, domains), as many images from every source domain."""
    sampler = EqualDomainBatches(
        [len(s) for s in split.train], recipe.batch_size, recipe.seed, start_step=start_step, steps=recipe.steps
    )
    images = TrainImages(split.train, train_transform(recipe.image_size, built.mean, built.std))
    return DataLoader(
        images, batch_sampler=sampler, num_workers=recipe.workers, persistent_workers=recipe.workers > 0,
        generator=torch.Generator(),  # else every pass over a loader draws from the generator that training uses
    )  # fmt: skip


def some_images(split: LeaveOneDomainOut, recipe: Recipe, built: Built, batches: int) -> Iterator[Tensor]:
    """Images N_3_H_W of the first training batches, for calibration and batch norm statistics."""
    loader = train_loader(split, replace(recipe, workers=0), built)
    return (batch[0] for batch in itertools.islice(loader, batches))


def eval_batches(subset: Subset, recipe: Recipe, built: Built) -> DataLoader[Any]:
    images = EvalImages(subset, eval_transform(recipe.image_size, built.mean, built.std))
    return DataLoader(images, batch_size=EVAL_BATCH, generator=torch.Generator())


def collect_samples(split: LeaveOneDomainOut, recipe: Recipe, built: Built) -> Samples:
    """A few held-out images of every domain, the target included, spread evenly, as the model sees them."""
    subsets = (*split.validation, split.target_out)
    each = -(-SAMPLES // len(subsets))
    images, labels, domains = [], [], []
    for subset in subsets:
        data = EvalImages(subset, eval_transform(recipe.image_size, built.mean, built.std))
        for index in np.linspace(0, len(data) - 1, min(each, len(data))).astype(int):
            image, label = data[int(index)]
            images.append(image.numpy())
            labels.append(label)
            domains.append(subset.name)
    return Samples(np.stack(images), np.array(labels, np.int64), np.array(domains))
