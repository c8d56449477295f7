"""The second pass over a batch must be the first one again, but for the perturbation: batch norm statistics move once a
step, and dropout and stochastic depth draw the mask they drew before. Both are contexts, restored unconditionally.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


def replay_of(
    model: nn.Module, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Made before a step's first pass: `with replay():` around a further pass gives it the same random numbers (of the CPU
    and of `device`) and keeps batch norm statistics where they are. Outside, the generators go on as if nothing happened.
    """
    before = _random_state(device)

    @contextmanager
    def replay() -> Iterator[None]:
        after = _random_state(device)
        try:
            _set_random_state(device, before)
            with fixed_norm_statistics(model):
                yield
        finally:
            _set_random_state(device, after)

    return replay


@contextmanager
def fixed_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise as in their mode, but their running statistics and counters do not move."""
    buffers = []
    for norm in _norms_with_statistics(model):
        for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
            if buffer is not None:
                buffers.append(buffer)
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, copy in zip(buffers, saved, strict=True):
            buffer.copy_(copy)


@contextmanager
def shared_norm_momentum(model: nn.Module, passes: int) -> Iterator[None]:
    """Several first passes in one step (one a domain) move batch norm statistics together as far as one pass would:
    m becomes 1 - (1 - m)^(1/passes). A momentum of None, the cumulative mean, stays."""
    norms = _norms_with_statistics(model)
    momenta = [norm.momentum for norm in norms]
    try:
        for norm, momentum in zip(norms, momenta, strict=True):
            if momentum is not None:
                norm.momentum = 1 - (1 - momentum) ** (1 / passes)
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _norms_with_statistics(
    model: nn.Module,
) -> list[nn.modules.batchnorm._BatchNorm]:
    norms = []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.track_running_stats:
            norms.append(module)
    return norms  # type: ignore[return-value]


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the CPU's generator, and of the device's where that is a GPU."""
    of_device = None
    if device.type == "cuda":
        of_device = torch.cuda.get_rng_state(device)
    return torch.get_rng_state(), of_device


def _set_random_state(
    device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
