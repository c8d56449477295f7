"""The model itself, out of what wraps it, as it must be for a file."""

import torch
from torch import nn


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
