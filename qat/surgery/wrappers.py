"""The model itself, out of what wraps it, as it must be for a file."""

import copy

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DataParallel and DistributedDataParallel, however they are nested."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def require_float32(model: nn.Module, what: str) -> None:
    """Raises ValueError where a parameter has another floating-point type than files compute in.

    what: how the message begins.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{what}: parameter {name!r} is {kind}, files compute in float32; call model.float(), and measure again"
            )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose modules keep tensors of their last forward pass with its graph, as the hooks of
    `torch.nn.utils.weight_norm`, `spectral_norm` and `prune` do: these are copied without it, and made anew when it runs."""
    with_graph = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                with_graph.append((vars(module), name, value))
    try:
        for attributes, name, value in with_graph:
            attributes[name] = value.detach()
        return copy.deepcopy(model)
    finally:
        for attributes, name, value in with_graph:
            attributes[name] = value
