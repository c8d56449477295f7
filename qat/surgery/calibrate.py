"""Initialise the activation quantizers from data: sign and scale (`docs/algorithms.md`, LSQ)."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
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
    calibrated = _quantizers_to_calibrate(model, overwrite)
    samples: dict[str, list[Tensor]] = {name: [] for name in calibrated}
    count = 0
    with in_full_precision(model, samples), signs_seen(model):
        for batch in islice(loader, batches):
            _run(model, batch, f"calibrate: batch {count}")
            count += 1
    samples = _of_all_processes(samples)
    if not any(samples.values()) and not count:
        raise ValueError("calibrate: the loader gave no batch")
    values = {}
    starts = {}
    for name in calibrated:
        values[name] = _values(name, samples[name])
    for name, quantizer in calibrated.items():
        starts[name] = quantizer.start_for(values[name], init)
    # Nothing raises from here on: all quantizers get their scales
    rows = []
    for name, quantizer in calibrated.items():
        start = starts[name]
        quantizer.initialize(start.scale, start.signed, start.offset)
        rows.append(_row(name, quantizer, values[name]))
    return rows


def _quantizers_to_calibrate(model: nn.Module, overwrite: bool) -> dict[str, Quantizer]:
    """Those whose scale comes from data. Raises ValueError where that would lose a scale without `overwrite`."""
    calibrated = {}
    already_set = []
    for name, quantizer in quantizers(model).items():
        if not quantizer.starts_from_data:
            continue
        calibrated[name] = quantizer
        if quantizer.initialized:
            already_set.append(name)
    if already_set and not overwrite:
        raise ValueError(
            f"calibrate: {len(already_set)} of {len(calibrated)} activation quantizers, {already_set[0]!r} first, have their "
            "scales already, from calibration, training or a checkpoint; pass overwrite=True to lose them"
        )
    return calibrated


def _run(model: nn.Module, batch: Any, name: str) -> None:
    """One forward pass on the model's device; `name` stands for the batch in errors."""
    device = next(model.parameters()).device
    arguments = inputs_of(model, batch, name)
    for tensor in tensors_in(arguments):
        require_finite(tensor, name)
    args, kwargs = with_tensors(list(arguments), lambda tensor: tensor.to(device))
    model(*args, **kwargs)


def _of_all_processes(samples: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The values that all processes of a distributed run saw, alike in each: so all get the same signs and scales.

    Batches are put together in turns, one of each process: where these took every n-th batch of one loader, its order.
    """
    is_distributed = dist.is_available() and dist.is_initialized()
    if not is_distributed or dist.get_world_size() == 1:
        return samples
    mine = {}
    for name, tensors in samples.items():
        mine[name] = [tensor.cpu() for tensor in tensors]
    of_processes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_processes, mine)
    joined = {}
    for name in samples:
        joined[name] = _by_turns([theirs[name] for theirs in of_processes])
    return joined


def _by_turns(of_processes: list[list[Tensor]]) -> list[Tensor]:
    """The first tensor of each process, then the second of each, and so on."""
    in_turns = []
    for turn in zip_longest(*of_processes):
        in_turns += [tensor for tensor in turn if tensor is not None]
    return in_turns


@contextmanager
def in_full_precision(model: nn.Module, samples: dict[str, list[Tensor]] | None = None):  # type: ignore[no-untyped-def]
    """Eval mode with every quantizer passing its input through; activations' values are collected in `samples`.

    One-bit quantizers stay on: without them a binary net is another net, with other ranges.
    """
    training = {m: m.training for m in model.modules()}
    several_bits = {n: q for n, q in quantizers(model).items() if q.spec.bits > 1}
    try:
        for name, quantizer in several_bits.items():
            quantizer.observer = _ignore
            if samples and name in samples:
                quantizer.observer = _collector(samples[name])
        model.eval()
        yield
    finally:
        for quantizer in several_bits.values():
            quantizer.observer = None
        for module, mode in training.items():
            module.training = mode


def pause(model: nn.Module) -> None:
    """Every quantizer passes its input through until `begin`: full precision, with all parameters in place."""
    for quantizer in quantizers(model).values():
        quantizer.observer = _ignore


def paused(model: nn.Module) -> bool:
    """Whether any quantizer passes its input through."""
    observers = [quantizer.observer for quantizer in quantizers(model).values()]
    return any(observer is not None for observer in observers)


@torch.no_grad()
def begin(
    model: nn.Module, batches: Iterable[Any], init: Init = "mse"
) -> list[CalibrationRow]:
    """End a `pause`: weight scales are set from the current weights, activation scales from `batches` of N_C_H_W images."""
    model = unwrapped(model)
    for quantizer in quantizers(model).values():
        quantizer.observer = None
    for weight, quantizer in quantized_weights(model):
        quantizer.begin(weight.detach(), init)
    batches = list(batches)
    _begin_computed(model, batches[:1], init)
    return calibrate(model, batches, init, batches=None, overwrite=True)


def _begin_computed(model: nn.Module, batches: Iterable[Any], init: Init) -> None:
    """Scales of the weights that are computed in forward, from one pass."""
    weight_quantizers = []
    for operands in computed_weights(model):
        if operands.weight_quantizer is not None:
            weight_quantizers.append(operands.weight_quantizer)
    if not weight_quantizers:
        return
    weights: dict[str, Tensor] = {}
    with in_full_precision(model):
        for quantizer in weight_quantizers:
            quantizer.observer = _keep(weights, quantizer.name)
        for batch in batches:
            _run(model, batch, "begin")
    for quantizer in weight_quantizers:
        quantizer.begin(weights[quantizer.name], init)


def _keep(weights: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        weights[name] = x.detach()

    return keep


def _ignore(x: Tensor) -> None:
    pass


def _collector(into: list[Tensor]) -> Callable[[Tensor], None]:
    def collect(x: Tensor) -> None:
        # An odd stride walks through every channel and position; the extremes are kept so that no sign is missed.
        flat = x.flatten().float()
        stride = max(flat.numel() // SAMPLES_PER_BATCH, 1) | 1
        extremes = torch.stack([flat.min(), flat.max()])
        into.append(torch.cat([flat[::stride], extremes]))

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
    grid = quantizer.grid
    v = values / quantizer.scale
    is_clipped = (v < grid.qmin - 0.5) | (v > grid.qmax + 0.5)
    share = float(is_clipped.float().mean())
    return CalibrationRow(name, quantizer.spec, float(quantizer.scale), share)
