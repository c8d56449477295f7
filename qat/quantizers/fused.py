"""LSQ with one pass over memory forward and one backward (equations: `lsq.py`): on CPU by `lsq_kernel.cpp`, on CUDA by
`lsq_triton.py`.

Only x and the scale are kept for backward, and x the layer before has mostly kept already; v = x/s is computed again.
Forward is the plain formula bit for bit. The scale's gradient is summed in float32 over at most 512 elements (on CUDA a tile
of 1024) and in float64 beyond, in an order that the number of threads does not change.

Used for float32 and bfloat16 tensors in eager mode, on CUDA from a size on. `torch.compile` and `torch.export` see the plain
formula, which inductor fuses by itself; other dtypes, other devices and second derivatives take it too.
"""

import ctypes
import importlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.quantizers import native, uniform
from qat.quantizers.spec import Grid

_POINTER: Any = ctypes.c_void_p
_INT64, _INT, _FLOAT, _DOUBLE = (
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_float,
    ctypes.c_double,
)
SHAPE: list[Any] = [_INT64, _INT64, _INT64]
BOUNDS: list[Any] = [_INT, _INT, _FLOAT]
SOURCE = Path(__file__).with_name("lsq_kernel.cpp")
CPU = torch.device("cpu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Elements; in smaller tensors the time of a launch decides, and PyTorch's are cheaper (not measured yet)
SMALLEST_ON_GPU = 1 << 14

log = logging.getLogger("edgeqat")


@cache
def _kernels() -> ctypes.CDLL | None:
    made = native.library(SOURCE)
    if made is not None:
        made.lsq_forward.argtypes = [_POINTER] * 3 + SHAPE + BOUNDS + [_INT, _INT]
        made.lsq_backward.argtypes = (
            [_POINTER] * 5 + SHAPE + BOUNDS + [_DOUBLE, _INT, _INT]
        )
        made.lsq_forward.restype = made.lsq_backward.restype = None
    return made


@cache
def _gpu_kernels(device: torch.device) -> Any | None:
    """The module of Triton kernels, tried once on `device`, or None (noted once) where they cannot be had."""
    if not native.wanted():
        return None
    try:
        kernels = importlib.import_module("qat.quantizers.lsq_triton")
        x, scale = torch.ones(2, device=device), torch.ones((), device=device)
        kernels.forward(x, scale, torch.empty_like(x), (1, 1, 2), Grid(None, -1, 1))
    except (
        Exception
        # Triton's own errors are of many classes: no compiler, an old GPU, a driver that is too new
    ) as error:
        log.warning(
            "LSQ's Triton kernels cannot be used, it runs as plain PyTorch on %s, slower: %s",
            device,
            error,
        )
        return None
    return kernels


def available(x: Tensor, raw_scale: Tensor) -> bool:
    """Whether the kernels take these tensors, here and now."""
    if (
        torch.compiler.is_compiling()
        or x.dtype not in DTYPES
        or raw_scale.dtype != torch.float32
        or x.device != raw_scale.device
        or type(x) not in (Tensor, torch.nn.Parameter)
    ):
        return False
    if x.is_cuda:
        return x.numel() >= SMALLEST_ON_GPU and _gpu_kernels(x.device) is not None
    return x.device == CPU and _kernels() is not None


def quantize(x: Tensor, raw_scale: Tensor, grid: Grid) -> Tensor:
    """x̂ by the kernels where they take it, else by the plain formula: the same bits."""
    chosen = forward if available(x, raw_scale) else uniform.quantize
    return chosen(x, raw_scale, grid)


def gradients(
    x: Tensor, upstream: Tensor, raw_scale: Tensor, grid: Grid, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/d raw_scale), by the plain formula also where they are differentiated again."""
    fast = available(x, raw_scale) and not torch.is_grad_enabled()
    chosen = backward if fast else uniform.gradients
    return chosen(x, upstream, raw_scale, grid, gradient_scale)


def forward(x: Tensor, raw_scale: Tensor, grid: Grid) -> Tensor:
    """x̂ of x; raw_scale float32 () or (channels of `grid.axis`,). The result lies in memory as `_beside` says."""
    out = _beside(x)
    x, raw_scale = _dense(x, out), raw_scale.contiguous()
    if x.is_cuda:
        _gpu(x).forward(x, raw_scale, out, _layout(x, grid.axis), grid)
        return out
    kernels = _kernels()
    assert kernels is not None
    kernels.lsq_forward(
        x.data_ptr(),
        raw_scale.data_ptr(),
        out.data_ptr(),
        *_layout(x, grid.axis),
        *grid[1:],
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def backward(
    x: Tensor, upstream: Tensor, raw_scale: Tensor, grid: Grid, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/d raw_scale) from upstream = dL/dx̂ of x's shape."""
    gradient = _beside(x)
    x, upstream, raw_scale = (
        _dense(x, gradient),
        _dense(upstream, gradient),
        raw_scale.contiguous(),
    )
    layout = _layout(x, grid.axis)
    if x.is_cuda:
        return gradient, _gpu(x).backward(
            x, upstream, raw_scale, gradient, layout, grid, gradient_scale
        )
    kernels, scale_gradient = _kernels(), torch.empty_like(raw_scale)
    assert kernels is not None
    kernels.lsq_backward(
        x.data_ptr(),
        upstream.data_ptr(),
        raw_scale.data_ptr(),
        gradient.data_ptr(),
        scale_gradient.data_ptr(),
        *layout,
        *grid[1:],
        gradient_scale,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return gradient, scale_gradient


def _gpu(x: Tensor) -> Any:
    kernels = _gpu_kernels(x.device)
    assert kernels is not None
    return kernels


def _beside(x: Tensor) -> Tensor:
    """An empty tensor like x: contiguous or channels last if x is that or a part of such, else contiguous. In permuted order
    (queries, keys and values cut out of one tensor) a batched product would copy it first, and keep the copy."""
    out = torch.empty_like(x)
    if out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last):
        return out
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x with the memory layout and dtype of `like`, x itself where it has them."""
    same = x.dtype == like.dtype and x.stride() == like.stride()
    return x if same else torch.empty_like(like).copy_(x)


def _layout(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense tensor: how often a block of channels x inner elements lies in memory."""
    if axis is None or x.shape[axis] == 1:
        return 1, 1, x.numel()
    channels, inner = x.shape[axis], x.stride(axis)
    return (
        (x.numel() // (channels * inner), channels, inner)
        if x.numel()
        else (0, channels, 1)
    )
