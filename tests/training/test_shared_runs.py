"""Whole runs of two processes against one process with the same global batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qat.domains.batches import EqualDomainBatches, ShareOfBatches
from qat.domains.cifar import EpochBatches
from qat.domains.synthetic import synthetic_domains
from qat.runs.parts import RecipeError
from qat.runs.recipe import recipe_of
from qat.runs.run_folder import RunFolder
from qat.train.loop import run

# Batch norms see their own process's images, so their statistics stay: all else is the same sum in another order
SHARED: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 6, "batch_size": 4, "evaluate_every": 3, "workers": 0,
    "norms": "frozen-statistics", "calibration_batches": 4,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lsq": {"averaging": "ema", "ema_decay": 0.5},
    "sagm-lsq": {},
    "gaqat": {"window": 3, "threshold": 0.6, "per_channel": True},
}


def train_all(root: Path) -> None:
    domains = synthetic_domains(per_class=4, image_size=32, seed=0)
    for method, options in METHODS.items():
        recipe = recipe_of(method, **SHARED, **options, out=root / method)
        run(recipe, domains)


def process(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    environment(rank, 2, Path(root))
    train_all(Path(root) / "two")
    with pytest.raises(RecipeError, match="--batch-size 3: cannot be shared out among 2 processes"):
        run(recipe_of("lsq", **SHARED | {"batch_size": 3}), synthetic_domains(per_class=4, image_size=32, seed=0))
    dist.destroy_process_group()


def environment(rank: int, count: int, root: Path) -> None:
    """What torchrun sets, and the group itself: meeting in a file needs no free port."""
    import os

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=count)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("shared")
    torch.multiprocessing.spawn(process, (str(root),), nprocs=2)
    train_all(root / "one")
    return root / "one", root / "two"


def tensors(folder: Path, name: str = "checkpoint.pt") -> dict[str, Tensor]:
    model = RunFolder.open(folder).load(name)["model"]
    return {key: value for key, value in model.items() if isinstance(value, Tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_trains(method: str, folders: tuple[Path, Path]) -> None:
    one, two = (folder / method for folder in folders)
    for (name, expected), found in zip(tensors(one, "last.pt").items(), tensors(two, "last.pt").values(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), name
    losses = [[e["loss"] for e in RunFolder.open(f).metrics() if "loss" in e] for f in (one, two)]
    assert len(losses[0]) == SHARED["steps"] and np.allclose(losses[0], losses[1], rtol=1e-4)
    assert (one / "calibration.json").read_text() == (two / "calibration.json").read_text()


@pytest.mark.slow
def test_two_processes_freeze_what_one_freezes(folders: tuple[Path, Path]) -> None:
    one, two = (RunFolder.open(folder / "gaqat").load("last.pt")["step"]["freezer"] for folder in folders)
    assert torch.equal(one["frozen"], two["frozen"]) and one["frozen"].any()


@pytest.mark.slow
def test_one_of_them_writes_a_whole_folder_and_measures_every_image(folders: tuple[Path, Path]) -> None:
    one, two = (folder / "lsq" for folder in folders)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    expected, found = RunFolder.open(one).predictions(), RunFolder.open(two).predictions()
    for domain, (predicted, labels) in expected.items():
        assert (found[domain][1] == labels).all()
        assert (found[domain][0] == predicted).mean() > 0.9
    assert len((two / "metrics.jsonl").read_text().splitlines()) == len(
        (one / "metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize("batches", [EqualDomainBatches([9, 7], 4, 0, steps=3), EpochBatches(11, 4, 0, steps=6)])
def test_shares_of_a_batch_are_disjoint_and_make_up_the_whole(batches: Any) -> None:
    shares = [list(ShareOfBatches(batches, rank, 2)) for rank in range(2)]
    for whole, first, second in zip(list(batches), *shares, strict=True):
        assert len(first) == len(second)
        together = [draw for pair in zip(first, second, strict=True) for draw in pair]
        assert together[: len(whole)] == whole and together[len(whole) :] == whole[: len(whole) % 2]
        if len(whole) % 4 == 0:
            for domain in {draw[0] for draw in whole}:
                counts = [sum(draw[0] == domain for draw in share) for share in (first, second)]
                assert counts[0] == counts[1]
