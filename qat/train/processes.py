"""Several processes that train one net (`accelerate launch`, `torchrun`): what they share out, gather and agree on.

Every process takes the same steps. Of each batch it sees every count-th image of every domain, so that all together see the
images that one process would have seen; gradients are averaged (DistributedDataParallel). Batch norms see their own
process's images, as with --accumulate. Process 0 alone writes.
"""

from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import nn

from qat.domains.splits import Subset
from qat.runs.parts import Optimization, RecipeError

T = TypeVar("T")


class Processes:
    """The processes of a run, of which this one is `rank` of `count`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.accelerator.wait_for_everyone()

    def from_first(self, value: T) -> T:
        """What process 0 has, whose `value` counts."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def all(self, value: T) -> list[T]:
        """The value of each process, in the order of their ranks."""
        return [value] if self.count == 1 else list(gather_object([value]))

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.count == 1:
            return values
        mine = torch.tensor(values, device=self.accelerator.device)
        found = self.accelerator.reduce(mine, "mean")
        assert isinstance(found, torch.Tensor)
        return [float(value) for value in found]

    def share_of(self, subset: Subset) -> Subset:
        """Every count-th image of `subset`: those that this process measures."""
        return Subset(subset.domain, subset.indices[self.rank :: self.count])

    def joined(self, mine: NDArray[np.int64], total: int) -> NDArray[np.int64]:
        """What all processes found for their shares of `total` images, in the order of the whole."""
        if self.count == 1:
            return mine
        whole = np.empty(total, np.int64)
        for rank, found in enumerate(self.all(mine)):
            whole[rank :: self.count] = found
        return whole

    def agree_on_buffers(self, model: nn.Module) -> None:
        """Batch norm statistics, which each process followed on its own images, become those of process 0."""
        if self.count == 1:
            return
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def require_even(self, optimization: Optimization) -> None:
        """Raises RecipeError where a batch cannot be shared out in equal parts."""
        if optimization.batch_size % self.count:
            raise RecipeError(
                f"--batch-size {optimization.batch_size}: cannot be shared out among {self.count} processes; "
                f"use a multiple of {self.count}"
            )


def states_of_randomness(processes: Processes) -> dict[str, Any]:
    """The states of every process's random numbers, for a checkpoint."""
    mine: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    return {"rng": mine["cpu"], "rng_of_processes": processes.all(mine)}


def restore_randomness(state: dict[str, Any], processes: Processes) -> None:
    """Take over what `states_of_randomness` gave. With another number of processes, each begins from process 0's state."""
    saved = state.get("rng_of_processes", [{"cpu": state["rng"]}])
    mine = saved[processes.rank] if len(saved) == processes.count else saved[0]
    torch.set_rng_state(mine["cpu"])
    if torch.cuda.is_available() and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])
