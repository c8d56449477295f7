"""DomainBed's split re-derived by hand, batches that depend on seed and step alone."""

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from qat.domains.balance import balanced_weights
from qat.domains.batches import EqualDomainBatches, EvalImages, TrainImages
from qat.domains.folders import ArrayImages, DataError, Domain
from qat.domains.splits import leave_one_domain_out, seed_hash
from qat.domains.synthetic import CLASSES, STYLES, synthetic_domains
from qat.domains.transforms import eval_transform, train_transform

DOMAINS = synthetic_domains(per_class=3, image_size=16, seed=0)
HALF = ([0.5] * 3, [0.5] * 3)


def pixels_of(domain: Domain) -> NDArray[np.uint8]:
    assert isinstance(domain.images, ArrayImages)
    return domain.images.pixels


def test_seed_hash_is_domainbeds() -> None:
    assert seed_hash(0, 3) == int(hashlib.md5(b"(0, 3)").hexdigest(), 16) % 2**31


def test_split_follows_domainbed_target_included_in_the_numbering() -> None:
    split = leave_one_domain_out(DOMAINS, "cartoon", trial_seed=2)
    assert [s.name for s in split.train] == ["art_painting", "photo", "sketch"]
    for environment, name in enumerate(STYLES):
        keys = list(range(21))
        seed = int(hashlib.md5(str((2, environment)).encode()).hexdigest(), 16) % 2**31
        np.random.RandomState(seed).shuffle(keys)
        out, rest = keys[:4], keys[4:]
        found = {s.name: s.indices.tolist() for s in split.validation} | {"cartoon": split.target_out.indices.tolist()}
        kept = {s.name: s.indices.tolist() for s in split.train} | {"cartoon": split.target_in.indices.tolist()}
        assert (found[name], kept[name]) == (out, rest)


def test_an_unknown_test_domain_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        DataError,
        match=r"--test-domain clipart: no such domain; there are art_painting, cartoon, photo, sketch",
    ):
        leave_one_domain_out(DOMAINS, "clipart")
    with pytest.raises(DataError, match="leaves nothing to train on"):
        leave_one_domain_out(DOMAINS[:1], "art_painting")


def test_a_second_domain_left_out_is_measured_and_does_not_train() -> None:
    alone = leave_one_domain_out(DOMAINS, "cartoon", trial_seed=1)
    pair = leave_one_domain_out(DOMAINS, "cartoon", also_left_out="photo", trial_seed=1)
    assert [s.name for s in pair.train] == [s.name for s in pair.validation] == ["art_painting", "sketch"]
    assert alone.also_left_out is None and pair.also_left_out is not None
    assert pair.also_left_out.name == "photo"
    assert pair.also_left_out.indices.tolist() == alone.train[1].indices.tolist()
    assert pair.target_in.indices.tolist() == alone.target_in.indices.tolist()
    for second in ("cartoon", "clipart"):
        with pytest.raises(
            DataError, match=f"'{second}' cannot be left out beside --test-domain cartoon; there are art_"
        ):
            leave_one_domain_out(DOMAINS, "cartoon", also_left_out=second)
    with pytest.raises(
        DataError, match="only 2 domains: leaving out cartoon and art_painting leaves nothing to train on"
    ):
        leave_one_domain_out(DOMAINS[:2], "cartoon", also_left_out="art_painting")


def test_weighted_batches_draw_every_class_alike() -> None:
    labels = np.asarray([0] * 90 + [1] * 10)
    sampler = EqualDomainBatches([100, 3], 50, seed=1, steps=40, weights=[balanced_weights(labels), np.eye(3)[1]])
    drawn = [draw for batch in sampler for draw in batch]
    first = [labels[index] for domain, index, _ in drawn if domain == 0]
    assert len(first) == 2000 and abs(np.mean(first) - 0.5) < 0.05  # four and a half standard deviations
    assert {index for domain, index, _ in drawn if domain == 1} == {1}
    assert drawn == [draw for batch in sampler for draw in batch]
    with pytest.raises(ValueError, match=r"weights for \[3\] images, but the domains have \[4\]"):
        EqualDomainBatches([4], 2, seed=0, steps=1, weights=[np.ones(3) / 3])


def batches(workers: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    split = leave_one_domain_out(DOMAINS, "sketch")
    sampler = EqualDomainBatches([len(s) for s in split.train], 4, seed=7, start_step=start, steps=5)
    images = TrainImages(split.train, train_transform(16, *HALF))
    return [
        tuple(b) for b in DataLoader(images, batch_sampler=sampler, num_workers=workers, generator=torch.Generator())
    ]


def test_every_batch_has_as_many_images_of_each_source_domain() -> None:
    found = batches(0)
    assert len(found) == 5
    for images, labels, domains in found:
        assert images.shape == (12, 3, 16, 16) and images.dtype == torch.float32 and len(labels) == 12
        assert domains.bincount().tolist() == [4, 4, 4]


def test_batches_depend_on_seed_and_step_not_on_workers_or_global_state() -> None:
    torch.manual_seed(1)
    first = batches(0)
    torch.manual_seed(2)
    for other in (batches(2), batches(0)):
        assert all(torch.equal(a, b) for x, y in zip(first, other, strict=True) for a, b in zip(x, y, strict=True))
    resumed = batches(0, start=3)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(first[3:], resumed, strict=True))
    assert not torch.equal(first[0][0], first[1][0])


def test_augmentation_leaves_trainings_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batches(0)
    assert torch.equal(torch.rand(1), expected)


def test_evaluation_images_are_resized_and_normalised() -> None:
    subset = leave_one_domain_out(DOMAINS, "sketch").target_out
    assert subset is not None
    image, label = EvalImages(subset, eval_transform(16, *HALF))[1]
    raw = np.asarray(subset.domain.images[int(subset.indices[1])], np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(image.numpy(), (raw - 0.5) / 0.5, atol=1e-6)
    assert label == subset.domain.labels[subset.indices[1]]


def test_synthetic_images_depend_on_the_seed_alone() -> None:
    again, other = (
        synthetic_domains(per_class=3, image_size=16, seed=0),
        synthetic_domains(per_class=3, image_size=16, seed=1),
    )
    for a, b, c in zip(DOMAINS, again, other, strict=True):
        assert np.array_equal(pixels_of(a), pixels_of(b))
        assert not np.array_equal(pixels_of(a), pixels_of(c))
        assert a.classes == CLASSES and np.bincount(a.labels).tolist() == [3] * 7


def test_styles_differ_where_they_should() -> None:
    mean = {d.name: pixels_of(d).mean() for d in DOMAINS}
    colour = {d.name: np.ptp(pixels_of(d).astype(int), axis=3).mean() for d in DOMAINS}
    assert mean["sketch"] > 200 and colour["sketch"] < 5
    assert colour["cartoon"] > 25
    with pytest.raises(ValueError, match="--image-size 8"):
        synthetic_domains(per_class=1, image_size=8)
