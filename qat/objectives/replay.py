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
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    buffers = [
        b
        for m in norms
        for b in (m.running_mean, m.running_var, m.num_batches_tracked)
        if b is not None
    ]
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
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [m.momentum for m in norms]
    try:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = (
                None if momentum is None else 1 - (1 - momentum) ** (1 / passes)
            )
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


def _set_random_state(
    device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
