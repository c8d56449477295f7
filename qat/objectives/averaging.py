"""Weight averaging: EMA, and SWAD's dense average over the valley of the validation loss (Cha et al., arXiv 2102.08604),
by the paper's algorithm or by its public code.

Everything a model learns is averaged: latent weights, norms, biases, and quantizer scales as positive scales (a raw scale may
have crossed zero, see `qat/quantizers/lsq.py`). Batch norm statistics are not averaged but taken again from data
(`qat.surgery.batchnorm.restore_norm_statistics`), and with the quantizers on, for the averaged weights make other codes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.contract import positive_scale

SCALE = "raw_scale"


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
        rate = (
            1 / self.count
            if self.decay is None
            else max(1 - self.decay, 1 / self.count)
        )
        for name, value in _learned(model).items():
            if self.count == 1:
                self.values[name] = value.clone()
            else:
                # A resumed run's values come from the CPU.
                self.values[name] = (
                    self.values[name].to(value.device).lerp_(value, rate)
                )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged parameters. Raises RuntimeError before the first update."""
        if not self.count:
            raise RuntimeError("weight averaging: nothing was averaged yet")
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"decay": self.decay, "count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.decay, self.count, self.values = (
            state["decay"],
            state["count"],
            dict(state["values"]),
        )


class LossValley:
    """SWAD's rule for when to average, fed with the validation loss at every evaluation (algorithm 1 of the paper; what the
    public code averages is `PublishedValley`).

    The valley begins at the evaluation whose loss is the least of the `converge` that start with it. With l = `ratio` times
    their mean, it ends before the first `tolerance` evaluations on end that all exceed l. So a span is averaged only once
    it is known not to start such a row, up to `tolerance` - 1 evaluations later.
    """

    def __init__(
        self, converge: int = 3, tolerance: int = 6, ratio: float = 1.3
    ) -> None:
        self.converge, self.tolerance, self.ratio = converge, tolerance, ratio
        # Before the valley: candidates for its beginning
        self.pending: list[tuple[float, Average]] = []
        self.average: Average | None = None
        self.bound = float("inf")
        self.ended = False

    def push(self, loss: float, span: Average) -> None:
        """`span`: mean of the parameters over the steps since the last evaluation; kept, and not to be changed after."""
        if self.ended:
            return
        self.pending.append((loss, span))
        if self.average is None:
            self.pending = self.pending[-self.converge :]
            losses = [value for value, _ in self.pending]
            if len(losses) < self.converge or losses[0] > min(losses):
                return
            self.bound = self.ratio * sum(losses) / len(losses)
            self.average = merged(self.pending[:1])
            self.pending = self.pending[1:]
        while len(self.pending) >= self.tolerance and not self.ended:
            if _least(self.pending[: self.tolerance]) > self.bound:
                self.ended = True
            else:
                _, span = self.pending.pop(0)
                merge(self.average, span)

    def result(self) -> Average | None:
        """The valley's average as of now: a training that stops in the valley ends it where its last loss within l lies.
        None before a valley began."""
        if self.average is None:
            return None
        within = 0
        if not self.ended:
            for index, (loss, _) in enumerate(self.pending):
                if loss <= self.bound:
                    within = index + 1
        return merged([(0.0, self.average), *self.pending[:within]])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "pending": [(loss, span.state_dict()) for loss, span in self.pending],
            "bound": self.bound,
            "ended": self.ended,
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.pending = [(loss, _loaded(span)) for loss, span in state["pending"]]
        self.bound = state["bound"]
        self.ended = state["ended"]
        self.average = None if state["average"] is None else _loaded(state["average"])


class PublishedValley:
    """SWAD's rule as its public code has it (`LossValley` of khanrc/swad), with the interface of `LossValley` here.

    Beginning and l are found as in algorithm 1. What is averaged differs:

    * Every span weighs the same, whatever number of steps it has.
    * At the evaluation that finds the beginning, spans count at once: of the last `tolerance` evaluations the first
      `tolerance` - `converge` + 1, and of these the ones that follow the last loss above l, less the first of them. Most
      lie before the beginning. (Where `tolerance` < `converge`: the `converge` - `tolerance` spans after the beginning.)
    * Each later evaluation counts the oldest of the last `tolerance` spans, from the beginning on, unless all their losses
      exceed l, which ends the valley. So spans that counted at once count again, and a valley that begins with the first
      evaluation counts its span at every evaluation until `tolerance` have been seen.
    * A training that stops in the valley counts the younger ones too, until all that are left exceed l.
    * Before a beginning is found, the result is the last span.
    """

    def __init__(
        self, converge: int = 3, tolerance: int = 6, ratio: float = 1.3
    ) -> None:
        self.converge = converge
        self.tolerance = tolerance
        self.ratio = ratio
        self.recent: list[tuple[float, Average]] = []
        self.evaluations = 0
        self.beginning: int | None = None  # evaluation, from 0
        self.first: Average | None = None  # span at the beginning
        self.average: Average | None = None  # its count is that of spans
        self.bound = float("inf")
        self.ended = False

    def push(self, loss: float, span: Average) -> None:
        """`span`: mean of the parameters over the steps since the last evaluation; kept, and not to be changed after."""
        if self.ended:
            return
        self.evaluations += 1
        self.recent.append((loss, span))
        self.recent = self.recent[-max(self.converge, self.tolerance) :]
        if self.beginning is None:
            self._find_beginning()
            return
        window = self.recent[-self.tolerance :]
        oldest = self.evaluations - len(window)
        if oldest < self.beginning:
            return
        if _least(window) > self.bound:
            self.ended = True
            return
        self._count(window[0][1])

    def result(self) -> Average | None:
        """The average as of now, or the last span before a beginning was found. None before the first evaluation."""
        if self.beginning is None:
            return self.recent[-1][1] if self.recent else None
        average = self.average
        if not self.ended:
            left = self.recent[-self.tolerance :][1:]
            while left and _least(left) <= self.bound:
                average = with_span(average, left.pop(0)[1])
        return self.first if average is None else average

    def _find_beginning(self) -> None:
        candidates = self.recent[-self.converge :]
        losses = [loss for loss, _ in candidates]
        if len(losses) < self.converge or losses[0] > min(losses):
            return
        self.beginning = self.evaluations - self.converge
        self.first = candidates[0][1]
        self.bound = self.ratio * sum(losses) / len(losses)
        for _, span in self._counted_at_once(candidates):
            self._count(span)

    def _counted_at_once(
        self, candidates: list[tuple[float, Average]]
    ) -> list[tuple[float, Average]]:
        lead = self.tolerance - self.converge
        if lead <= 0:
            return candidates[1 : 1 - lead]
        earlier = self.recent[-self.tolerance :][: lead + 1]
        start = 0
        for index, (loss, _) in enumerate(earlier):
            if loss > self.bound:
                start = index + 1
        return earlier[start + 1 :]

    def _count(self, span: Average) -> None:
        self.average = with_span(self.average, span)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "recent": [(loss, span.state_dict()) for loss, span in self.recent],
            "evaluations": self.evaluations,
            "beginning": self.beginning,
            "first": None if self.first is None else self.first.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "bound": self.bound,
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.recent = [(loss, _loaded(span)) for loss, span in state["recent"]]
        self.evaluations = state["evaluations"]
        self.beginning = state["beginning"]
        self.first = None if state["first"] is None else _loaded(state["first"])
        self.average = None if state["average"] is None else _loaded(state["average"])
        self.bound = state["bound"]
        self.ended = state["ended"]


VALLEYS: dict[str, type[LossValley] | type[PublishedValley]] = {
    "swad": LossValley,
    "swad-published": PublishedValley,
}


def with_span(average: Average | None, span: Average) -> Average:
    """A new mean of spans that takes in one more. Spans weigh the same, whatever number of steps each is the mean of."""
    one = Average()
    one.count = 1
    one.values = span.values
    if average is None:
        return one
    return merged([(0.0, average), (0.0, one)])


def _least(spans: Sequence[tuple[float, Average]]) -> float:
    return min(loss for loss, _ in spans)


def merge(into: Average, other: Average) -> None:
    """Make `into` the mean over the updates of both."""
    share = other.count / (into.count + other.count)
    for name, value in other.values.items():
        into.values[name] = into.values[name].to(value.device).lerp(value, share)
    into.count += other.count


def merged(spans: Iterable[tuple[float, Average]]) -> Average:
    """A new mean over the updates of all spans."""
    (_, first), *others = spans
    average = Average()
    average.count = first.count
    average.values = dict(first.values)
    for _, span in others:
        merge(average, span)
    return average


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """What is averaged, detached: parameters, and of scales the positive number."""
    values = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        is_scale = name.rpartition(".")[2] == SCALE
        values[name] = positive_scale(value) if is_scale else value
    return values


def _loaded(state: dict[str, Any]) -> Average:
    average = Average()
    average.load_state_dict(state)
    return average
