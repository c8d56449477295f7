"""Fake-quantized tensors that backward computes again instead of keeping.

A convolution keeps its input for backward. In full precision that is the ReLU's result, which the ReLU keeps too; a
quantizer in between makes it a second tensor, and memory grows by the size of every activation. So x̂ remembers how it
was made from what is kept anyway (its `Origin`), and under `recomputed(x̂, …)` autograd keeps that instead. x̂ comes back
bit for bit.

PyTorch's own check that nothing was written over between forward and backward does not reach through such a detour, so
the check is made here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qat.quantizers.spec import Grid

Quantize = Callable[[Tensor, Tensor, Grid], Tensor]


class Kept:
    """A tensor as it is now; `get` raises RuntimeError once it has been written to."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed in place since."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was modified by an in-place operation "
                "after a quantizer had read it"
            )
        return self.tensor


@dataclass(frozen=True)
class Origin:
    """x̂ as `root` quantized once or several times in turn."""

    root: Kept
    quantizations: tuple[tuple[Kept, Grid], ...]
    quantize: Quantize

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The tensor made again: what was kept, through the quantizers that it went through."""
        x = self.root.get()
        for raw_scale, grid in self.quantizations:
            x = self.quantize(x, raw_scale.get(), grid)
        return x


def origin_of(x: Tensor) -> Origin | None:
    """How x was made, if a quantizer made it and nothing has written to it since."""
    noted = getattr(x, "_origin", None)  # an operand may also be a number
    if noted is None:
        return None
    origin, version = noted
    return origin if version == x._version else None


def remember(
    out: Tensor, x: Tensor, raw_scale: Tensor, grid: Grid, quantize: Quantize
) -> None:
    """Note on `out` that it is x quantized."""
    before = origin_of(x)
    quantizations: tuple[tuple[Kept, Grid], ...] = ((Kept(raw_scale), grid),)
    if before is None:
        origin = Origin(Kept(x), quantizations, quantize)
    else:
        quantizations = before.quantizations + quantizations
        origin = Origin(before.root, quantizations, quantize)
    out._origin = origin, out._version  # type: ignore[attr-defined]


def under_compile(fake_quantize: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`fake_quantize(*tensors)` inside `torch.compile`, whose backward shall make x̂ again from `tensors`.

    Inductor decides by itself what it keeps, except that it never makes again what a convolution or a product reads in
    backward, since it cannot fuse into those: it would keep x and x̂ of every layer.
    """
    if not (torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()):
        return fake_quantize(*tensors)
    return checkpoint(
        fake_quantize, *tensors, use_reentrant=False, preserve_rng_state=False
    )


def recomputed(*operands: Tensor) -> AbstractContextManager[Any]:
    """While it is open, autograd keeps the origins of those `operands` that have one, whatever view of them it saves."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()  # `under_compile` has seen to it
    if is_checkpointed():
        # Everything is computed again anyway, and what a hook here kept would not be
        return nullcontext()
    origins: dict[int, tuple[int, Origin]] = {}  # by address: elements, origin
    for x in operands:
        origin = origin_of(x)
        # Empty ones all lie at address 0
        if origin is not None and x.numel():
            origins[x.data_ptr()] = (x.numel(), origin)
    if not origins:
        return nullcontext()

    def pack(saved: Tensor) -> Callable[[], Tensor]:
        numel, origin = origins.get(saved.data_ptr(), (-1, None))
        if origin is None or saved.numel() != numel:
            return Kept(saved).get
        return _View(origin, tuple(saved.shape), saved.stride()).get

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def is_checkpointed() -> bool:
    """Whether somebody else's hooks decide what autograd keeps, as activation checkpointing's do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


@dataclass(frozen=True)
class _View:
    """All elements of x̂ in some order of axes and some shape, as autograd saved them."""

    origin: Origin
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def get(self) -> Tensor:
        return self.origin.compute().as_strided(self.shape, self.strides)
