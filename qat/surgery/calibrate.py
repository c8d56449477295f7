"""Initialise the activation quantizers from data: sign and scale (`docs/algorithms.md`, LSQ)."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer, require_finite
from qat.quantizers.spec import QuantSpec
from qat.surgery.batches import inputs_of
from qat.surgery.binarize import signs_seen
from qat.surgery.example import tensors_in, with_tensors
from qat.surgery.swap import computed_weights, quantized_weights, quantizers
from qat.surgery.wrappers import unwrapped
from qat.words import Init

SAMPLES_PER_BATCH = 16_384


@dataclass(frozen=True)
class CalibrationRow:
    """One activation quantizer after calibration; `clipped` is the share of the sampled elements outside the grid."""

    name: str
    spec: QuantSpec
    scale: float
    clipped: float


@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    init: Init = "mse",
    *,
    batches: int | None = 32,
    overwrite: bool = False,
) -> list[CalibrationRow]:
    """Set sign and scale of every activation quantizer from batches of `loader`, run in full precision.

    loader: batches of images N_C_H_W, of (images, labels), or of dicts of what forward takes and more; what forward does not
            take is left out.
    batches: how many of them are run, the first ones; None: all. Each adds to the memory that calibrating takes.
    init: "lsq", the paper's 2 · mean|x| / sqrt(Qp); or "mse", the scale of least squared quantization error.
    overwrite: replace the scales that quantizers already have. Without it a model that was calibrated, trained or loaded is
    refused, since its learned scales would be lost.
    Calibrating again with the same batches gives the same scales. Batch norm statistics do not move. Either all quantizers
    get their scales or none does. Raises ValueError when there is no batch, a batch or what a quantizer sees is not finite, a
    quantizer has its scale already, or a one-bit activation never saw a negative value; RuntimeError naming a quantizer that
    no batch reached.
    """
    if batches is not None and batches < 1:
        raise ValueError(
            f"calibrate: batches={batches}; one batch at least is needed, None takes all"
        )
    model = unwrapped(model)
    found = {name: q for name, q in quantizers(model).items() if q.starts_from_data}
    taken = [name for name, quantizer in found.items() if quantizer.initialized]
    if taken and not overwrite:
        raise ValueError(
            f"calibrate: {len(taken)} of {len(found)} activation quantizers, {taken[0]!r} first, have their scales already, "
            "from calibration, training or a checkpoint; pass overwrite=True to lose them"
        )
    samples: dict[str, list[Tensor]] = {name: [] for name in found}
    device = next(model.parameters()).device
    seen = 0
    with in_full_precision(model, samples), signs_seen(model):
        for batch in islice(loader, batches):
            args, kwargs = inputs_of(model, batch, f"calibrate: batch {seen}")
            for tensor in tensors_in((args, kwargs)):
                require_finite(tensor, f"calibrate: batch {seen}")
            args, kwargs = with_tensors(
                [args, kwargs], lambda tensor: tensor.to(device)
            )
            model(*args, **kwargs)
            seen += 1
    samples = _of_all_processes(samples)
    if not any(samples.values()) and not seen:
        raise ValueError("calibrate: the loader gave no batch")
    values = {name: _values(name, samples[name]) for name in found}
    starts = {
        name: quantizer.start_for(values[name], init)
        for name, quantizer in found.items()
    }
    for name, start in starts.items():
        found[name].initialize(start.scale, start.signed, start.offset)
    return [_row(name, quantizer, values[name]) for name, quantizer in found.items()]


def _of_all_processes(samples: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The values that all processes of a distributed run saw, alike in each: so all get the same signs and scales.

    Batches are put together in turns, one of each process: where these took every n-th batch of one loader, its order.
    """
    if (
        not (dist.is_available() and dist.is_initialized())
        or dist.get_world_size() == 1
    ):
        return samples
    mine = {
        name: [tensor.cpu() for tensor in tensors] for name, tensors in samples.items()
    }
    everybodys: list[dict[str, list[Tensor]]] = [
        {} for _ in range(dist.get_world_size())
    ]
    dist.all_gather_object(everybodys, mine)
    return {
        name: _by_turns([theirs[name] for theirs in everybodys]) for name in samples
    }


def _by_turns(of_processes: list[list[Tensor]]) -> list[Tensor]:
    longest = max(len(tensors) for tensors in of_processes)
    return [
        tensors[turn]
        for turn in range(longest)
        for tensors in of_processes
        if turn < len(tensors)
    ]


@contextmanager
def in_full_precision(model: nn.Module, samples: dict[str, list[Tensor]] | None = None):  # type: ignore[no-untyped-def]
    """Eval mode with every quantizer passing its input through; activations' values are collected in `samples`.

    One-bit quantizers stay on: without them a binary net is another net, with other ranges.
    """
    training = {m: m.training for m in model.modules()}
    found = {name: q for name, q in quantizers(model).items() if q.spec.bits > 1}
    try:
        for name, quantizer in found.items():
            quantizer.observer = (
                _collector(samples[name]) if samples and name in samples else _ignore
            )
        model.eval()
        yield
    finally:
        for quantizer in found.values():
            quantizer.observer = None
        for module, mode in training.items():
            module.training = mode


def pause(model: nn.Module) -> None:
    """Every quantizer passes its input through until `begin`: full precision, with all parameters in place."""
    for quantizer in quantizers(model).values():
        quantizer.observer = _ignore


def paused(model: nn.Module) -> bool:
    """Whether any quantizer passes its input through."""
    return any(
        quantizer.observer is not None for quantizer in quantizers(model).values()
    )


@torch.no_grad()
def begin(
    model: nn.Module, batches: Iterable[Any], init: Init = "mse"
) -> list[CalibrationRow]:
    """End a `pause`: weight scales are set from the weights of now, activation scales from `batches` of N_C_H_W images."""
    model = unwrapped(model)
    for weight, quantizer in quantized_weights(model):
        quantizer.begin(weight.detach(), init)
    batches = list(batches)
    _begin_computed(model, batches[:1], init)
    return calibrate(model, batches, init, batches=None, overwrite=True)


def _begin_computed(model: nn.Module, batches: Iterable[Any], init: Init) -> None:
    """Scales of the weights that are computed in forward, from one pass."""
    found = [
        o.weight_quantizer
        for o in computed_weights(model)
        if o.weight_quantizer is not None
    ]
    if not found:
        return
    seen: dict[str, Tensor] = {}
    with in_full_precision(model):
        for quantizer in found:
            quantizer.observer = _keep(seen, quantizer.name)
        for batch in batches:
            args, kwargs = inputs_of(model, batch, "begin")
            args, kwargs = with_tensors(
                [args, kwargs],
                lambda tensor: tensor.to(next(model.parameters()).device),
            )
            model(*args, **kwargs)
    for quantizer in found:
        quantizer.begin(seen[quantizer.name], init)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        seen[name] = x.detach()

    return keep


def _ignore(x: Tensor) -> None:
    pass


def _collector(into: list[Tensor]) -> Callable[[Tensor], None]:
    def collect(x: Tensor) -> None:
        # An odd stride walks through every channel and position; the extremes are kept so that no sign is missed.
        flat = x.flatten().float()
        stride = max(flat.numel() // SAMPLES_PER_BATCH, 1) | 1
        into.append(torch.cat([flat[::stride], flat.min()[None], flat.max()[None]]))

    return collect


def _values(name: str, samples: list[Tensor]) -> Tensor:
    """What a quantizer saw, (count,)."""
    if not samples:
        raise RuntimeError(
            f"calibrate: no batch reached quantizer {name!r}; does forward() skip it in eval mode?"
        )
    values = torch.cat(samples)
    require_finite(values, f"calibrate: input of quantizer {name!r}")
    return values


def _row(name: str, quantizer: Quantizer, values: Tensor) -> CalibrationRow:
    v, grid = values / quantizer.scale, quantizer.grid
    clipped = ((v < grid.qmin - 0.5) | (v > grid.qmax + 0.5)).float().mean()
    return CalibrationRow(name, quantizer.spec, float(quantizer.scale), float(clipped))
