"""A second count of what a model multiplies, by PyTorch's dispatcher: below modules, functions and in-place tricks.

`trace_calls` follows values through functions, and loses one that a model writes into a buffer: every layer after it then
looks as if it did not depend on the image. The dispatcher sees each convolution and matrix product whatever called it, and
two images tell which of them depend on the image. The multiply-adds are counted by `torch.utils.flop_counter`'s formulas.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qat.surgery.counting import CONTRACTIONS
from qat.surgery.example import Example, arguments_of, with_tensors
from qat.surgery.frames import Location
from qat.surgery.trace import Trace, in_mode, watched

aten = torch.ops.aten


def _inner(first: Any, second: Any, *rest: Any, **kwargs: Any) -> int:
    return 2 * int(first.numel())


# Contractions that the flop counter has no formula for, by floating-point operations like its own.
FURTHER: Mapping[Any, Callable[..., int]] = {
    aten.mv: _inner,
    aten.dot: _inner,
    aten.vdot: _inner,
    aten.addmv: lambda bias, matrix, vector, *rest, **kwargs: _inner(matrix, vector),
    aten.mkldnn_rnn_layer: lambda steps, of_input, of_state, *rest, **kwargs: (
        2
        * int(steps.shape[0] * steps.shape[1])
        * int(of_input.numel() + of_state.numel())
    ),
    aten.addbmm: lambda bias, first, second, *rest, **kwargs: (
        2 * int(first.numel()) * int(second.shape[-1])
    ),
}


class _Witness(TorchDispatchMode):
    """calls: module path, multiply-adds and a checksum of the operands, one entry per contraction."""

    def __init__(self, location: Location) -> None:
        super().__init__()
        self.location = location
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            operations = int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet in FURTHER:
            operations = FURTHER[packet](*args, **kwargs)
        else:
            return out
        checksum = 0
        for operand in (*args, *kwargs.values()):
            if isinstance(operand, Tensor):
                checksum = zlib.crc32(
                    operand.detach().contiguous().cpu().numpy().tobytes(), checksum
                )
        self.calls.append((self.location.path, operations // 2, checksum))
        return out


@torch.no_grad()
def witness(model: nn.Module, example: Example) -> Counter[str]:
    """Multiply-adds that depend on the image, by path of the module that makes them, for the whole of `example`.

    Run in eval mode on two batches of its shape; the model is left as it was. A contraction whose operands are the
    same both times does not depend on the image.
    """
    location = Location()
    given = arguments_of(model, example)
    generator = torch.Generator().manual_seed(0)
    first_batch = with_tensors(
        list(given), lambda tensor: _random_like(tensor, generator)
    )
    second_batch = with_tensors(
        first_batch,
        lambda tensor: -1.5 * tensor if tensor.is_floating_point() else tensor,
    )
    passes = []
    with in_mode(model, training=False), watched(location, model):
        args, kwargs = first_batch
        model(*args, **kwargs)  # some models fill a cache in their first pass
        for args, kwargs in (first_batch, second_batch):  # signs and sizes differ
            location.begin()
            with _Witness(location) as seen:
                model(*args, **kwargs)
            passes.append(seen.calls)
    first, second = passes
    alike = [call[:2] for call in first] == [call[:2] for call in second]
    work: Counter[str] = Counter()
    for index, (path, multiply_adds, checksum) in enumerate(first):
        if not alike or checksum != second[index][2]:
            work[path] += multiply_adds
    return work


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of another image; other types, such as flags and lengths, stay."""
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def check_witnessed(
    seen: Mapping[str, int], trace: Trace, licensed: frozenset[str] = frozenset()
) -> None:
    """Compare the dispatcher's count, by module path, with what the trace accounts for.

    licensed: modules that a rule leaves in floating point, whose functions hide their products.
    Raises ValueError naming the first module that multiplies what depends on the image without the trace knowing of it.
    """
    traced: Counter[str] = Counter()
    for call in trace.calls:
        if call.kind in CONTRACTIONS:
            traced[call.path] += call.multiplications
    for path, multiply_adds in seen.items():
        if (
            multiply_adds > traced[path]
            and path not in licensed
            and not any(name.startswith("#") for name in licensed)
        ):
            where = f"module {path!r}" if path else "the model's own forward"
            raise ValueError(
                f"{where}: makes {multiply_adds:,} multiply-adds that depend on the image, and quantize_ can follow "
                f"{traced[path]:,} of them; something before it hides where its input comes from, such as a write into a "
                "buffer (buf[:] = x), .data, numpy or torch.vmap: write it as an expression of x, for the whole batch"
            )
