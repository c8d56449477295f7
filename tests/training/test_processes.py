"""Two processes under DistributedDataParallel: every rank freezes the same scales and keeps the same weights."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.runs.recipe import recipe_of
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import parameter_groups, quantize_, uniform_rules
from qat.train.from_recipe import training_step
from tests.surgery.nets import TinyNet

STEPS = 24


class Plain:
    """Float32, gradients where autograd puts them."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def train(rank: int, model: nn.Module, wrapped: nn.Module, accumulate: int = 1) -> dict[str, Tensor]:
    """A few GAQAT steps on this rank's own images -> masks of every step, and the weights in the end."""
    recipe = recipe_of("gaqat", window=4, threshold=0.45, per_channel=True, channels_last=False, accumulate=accumulate)
    optimizer = torch.optim.Adam(parameter_groups(model, 0.0, 1e-4), lr=1e-3)
    step = training_step(recipe, wrapped, model, optimizer, Plain(), domains=1)
    draw = torch.Generator().manual_seed(rank)
    assert step.freezer is not None
    masks = []
    for _ in range(STEPS):
        images = torch.randn(4, 3, 33, 29, generator=draw)
        step(images, torch.randint(0, 5, (4,), generator=draw), torch.zeros(4, dtype=torch.long))
        masks.append(step.freezer.frozen.clone())
    return {"masks": torch.stack(masks), "weights": torch.cat([p.detach().flatten() for p in model.parameters()])}


def quantized() -> nn.Module:
    torch.manual_seed(0)
    model = TinyNet()
    quantize_(model, uniform_rules(4, 4), torch.zeros(1, 3, 33, 29))
    calibrate(model, [torch.randn(8, 3, 33, 29)])
    return model.train()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = quantized()
    torch.save(train(rank, model, DistributedDataParallel(model)), Path(folder) / f"ddp{rank}.pt")
    model = quantized()
    torch.save(train(rank, model, DistributedDataParallel(model), accumulate=2), Path(folder) / f"parts{rank}.pt")
    alone = quantized()
    torch.save(train(rank, alone, alone), Path(folder) / f"alone{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_freezes_the_same_scales(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    first, second, alone, other = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ddp0", "ddp1", "alone0", "alone1")
    )
    assert torch.equal(first["masks"], second["masks"]) and torch.equal(first["weights"], second["weights"])
    parts, others = (torch.load(tmp_path / f"parts{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(parts["masks"], others["masks"]) and torch.equal(parts["weights"], others["weights"])
    assert first["masks"].any() and not first["masks"].all()
    # Each rank saw other images: on its own it would have frozen other scales.
    assert not torch.equal(alone["masks"], other["masks"])
