"""LSQ with one pass over memory forward and one backward, on CPU (kernel: `lsq_kernel.cpp`; equations: `lsq.py`).

Only x and the step are kept for backward, and x the layer before has mostly kept already; v = x/s is computed again.
Forward is the plain formula bit for bit. The step's gradient is summed in float32 over at most 512 elements and in float64
beyond, in an order that the number of threads does not change.

Used for float32 and bfloat16 tensors on CPU in eager mode. `torch.compile` and `torch.export` see the plain formula, which
inductor fuses by itself; other dtypes, other devices and second derivatives take it too.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.quantizers import native
from qat.quantizers.spec import Grid

_POINTER: Any = ctypes.c_void_p
_INT64, _INT, _FLOAT, _DOUBLE = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
SHAPE: list[Any] = [_INT64, _INT64, _INT64]
BOUNDS: list[Any] = [_INT, _INT, _FLOAT]
SOURCE = Path(__file__).with_name("lsq_kernel.cpp")
CPU = torch.device("cpu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def _kernels() -> ctypes.CDLL | None:
    made = native.library(SOURCE)
    if made is not None:
        made.lsq_forward.argtypes = [_POINTER] * 3 + SHAPE + BOUNDS + [_INT, _INT]
        made.lsq_backward.argtypes = [_POINTER] * 5 + SHAPE + BOUNDS + [_DOUBLE, _INT, _INT]
        made.lsq_forward.restype = made.lsq_backward.restype = None
    return made


def available(x: Tensor, raw_step: Tensor) -> bool:
    """Whether the kernels take these tensors, here and now."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype in DTYPES
        and raw_step.dtype == torch.float32
        and x.device == raw_step.device == CPU
        and type(x) in (Tensor, torch.nn.Parameter)
        and _kernels() is not None
    )


def forward(x: Tensor, raw_step: Tensor, grid: Grid) -> Tensor:
    """x̂ of x; raw_step float32 () or (channels of `grid.axis`,). The result lies in memory as x does, without x's gaps."""
    kernels = _kernels()
    assert kernels is not None
    out = torch.empty_like(x)
    x = _dense(x, out)
    kernels.lsq_forward(
        x.data_ptr(), raw_step.data_ptr(), out.data_ptr(), *_layout(x, grid.axis), *grid[1:], DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(x: Tensor, upstream: Tensor, raw_step: Tensor, grid: Grid, gradient_scale: float) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/d raw_step) from upstream = dL/dx̂ of x's shape."""
    kernels = _kernels()
    assert kernels is not None
    gradient, step_gradient = torch.empty_like(x), torch.empty_like(raw_step)
    x, upstream = _dense(x, gradient), _dense(upstream, gradient)
    kernels.lsq_backward(
        x.data_ptr(), upstream.data_ptr(), raw_step.data_ptr(), gradient.data_ptr(), step_gradient.data_ptr(),
        *_layout(x, grid.axis), *grid[1:], gradient_scale, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return gradient, step_gradient


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x with the memory layout and dtype of `like`, x itself where it has them."""
    same = x.dtype == like.dtype and x.stride() == like.stride()
    return x if same else torch.empty_like(like).copy_(x)


def _layout(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense tensor: how often a block of channels x inner elements lies in memory."""
    if axis is None or x.shape[axis] == 1:
        return 1, 1, x.numel()
    channels, inner = x.shape[axis], x.stride(axis)
    return (x.numel() // (channels * inner), channels, inner) if x.numel() else (0, channels, 1)
