"""Weight averaging: EMA, and SWAD's dense average over the valley of the validation loss (Cha et al., arXiv 2102.08604).

Everything a model learns is averaged: latent weights, norms, biases, and quantizer steps as positive steps (a raw step may
have crossed zero, see `qat/quantizers/lsq.py`). Batch norm statistics are not averaged but taken again from data
(`restore_norm_statistics`), and with the quantizers on, for the averaged weights make other codes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

STEP = "raw_step"


class Average:
    """Running average of a model's floating-point parameters. decay None: the plain mean of all updates (SWA, SWAD)."""

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"EMA decay must lie between 0 and 1, got {decay}")
        self.decay, self.count = decay, 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's parameters in."""
        self.count += 1
        # An EMA starts as a plain mean, so that its first values do not weigh for ever.
        rate = 1 / self.count if self.decay is None else max(1 - self.decay, 1 / self.count)
        for name, value in _learned(model).items():
            if self.count == 1:
                self.values[name] = value.clone()
            else:
                self.values[name].lerp_(value, rate)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged parameters. Raises RuntimeError before the first update."""
        if not self.count:
            raise RuntimeError("weight averaging: nothing was averaged yet")
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.count, self.values = state["decay"], state["count"], dict(state["values"])


class LossValley:
    """SWAD's rule for when to average, fed with the validation loss at every evaluation.

    The valley begins where the loss was least for `converge` evaluations on end, and ends when all of the last `tolerance`
    exceed `ratio` times the mean loss at its beginning. Averages of single evaluations' spans are kept until it is known
    where the valley began. `average` is that of the valley, None before it.
    """

    def __init__(self, converge: int = 3, tolerance: int = 6, ratio: float = 1.3) -> None:
        self.converge, self.tolerance, self.ratio = converge, tolerance, ratio
        self.spans: list[tuple[float, Average]] = []
        self.average: Average | None = None
        self.bound = float("inf")
        self.ended = False

    def push(self, loss: float, span: Average) -> None:
        """`span`: mean of the parameters over the steps since the last evaluation."""
        if self.ended:
            return
        self.spans.append((loss, span))
        if self.average is None:
            recent = self.spans[-self.converge :]
            if len(recent) == self.converge and recent[0][0] == min(value for value, _ in recent):
                self.average = recent[0][1]
                self.bound = self.ratio * sum(value for value, _ in recent) / len(recent)
                for _, later in recent[1:]:
                    merge(self.average, later)
            self.spans = self.spans[-self.converge :]
            return
        merge(self.average, span)
        self.spans = self.spans[-self.tolerance :]
        self.ended = len(self.spans) == self.tolerance and min(value for value, _ in self.spans) > self.bound

    def state_dict(self) -> dict[str, Any]:
        return {
            "spans": [(loss, span.state_dict()) for loss, span in self.spans], "bound": self.bound, "ended": self.ended,
            "average": None if self.average is None else self.average.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spans = [(loss, _loaded(span)) for loss, span in state["spans"]]
        self.bound, self.ended = state["bound"], state["ended"]
        self.average = None if state["average"] is None else _loaded(state["average"])


def merge(into: Average, other: Average) -> None:
    """Make `into` the mean over the updates of both."""
    share = other.count / (into.count + other.count)
    for name, value in other.values.items():
        into.values[name] = into.values[name].lerp(value, share)
    into.count += other.count


@torch.no_grad()
def restore_norm_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the running statistics of every batch norm anew, as the plain mean over `batches` of N_C_H_W images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta, training = [m.momentum for m in norms], model.training
    device = next(model.parameters()).device
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative mean
            norm.train()
        for images in batches:
            model(images.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().abs() if name.rpartition(".")[2] == STEP else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def _loaded(state: dict[str, Any]) -> Average:
    average = Average()
    average.load_state_dict(state)
    return average
