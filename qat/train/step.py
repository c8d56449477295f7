"""One training step. What happens in it, in this order:

before      BiPer moves its frequency
mixup       images and labels are mixed
objective   fills `.grad`, in one pass (ERM) or two (SAGM and its relatives). A pass is the closure: forward, loss
            (domain-aware, distilled, with penalties), backward; microbatch by microbatch
combine     a control of GAQAT makes one gradient of the two branches
freezer     GAQAT takes a branch out of some scales' gradients
clip, optimizer, schedule
GroupDRO    moves its domains' weights
oscillation follows the weights' codes
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.contract import Closure, Gradients, Objective, erm
from qat.objectives.distillation import Distillation
from qat.objectives.domain_aware import DomainLoss, GroupDRO, erm_loss
from qat.objectives.oscillation import Oscillation
from qat.objectives.replay import replay_of, shared_norm_momentum
from qat.objectives.scale_freeze import ScaleFreezer, Seen
from qat.quantizers.weight_cache import weight_cache
from qat.surgery.backbones import clip_gradients
from qat.surgery.calibrate import paused


@dataclass(frozen=True)
class Outcome:
    """What a step showed.

    loss: scalar. logits: N_K of the first pass, detached. norm, l1_norm: of the gradient before clipping, over all
    parameters. rate: the learning rate that it took. seen: what the scales showed, for objectives with two branches. swung:
    share of weights that swung back, where recorded.
    """

    loss: Tensor
    logits: Tensor
    norm: Tensor
    l1_norm: Tensor
    rate: float
    seen: Seen | None
    swung: float | None


class Schedule(Protocol):
    """A learning-rate schedule: a PyTorch LRScheduler."""

    def step(self) -> None:
        """Move the learning rate on by one step."""


class Precision(Protocol):
    """How forward runs and gradients come back: an accelerate Accelerator."""

    def autocast(self) -> AbstractContextManager[None]:
        """Context in which the forward pass runs in the recipe's precision."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to `.grad`; called once per microbatch, outside `autocast`."""


@dataclass(eq=False)
class TrainingStep:
    """One step of training, made of plain cuts; a recipe's are put together in `qat/train/from_recipe.py`.

    model:       what is run, perhaps wrapped for several processes. unwrapped: the model itself.
    optimizer:   steps along `.grad` of its parameters. precision: how forward runs and gradients come back.
    objective:   fills `.grad` through a closure, in one pass or two.
    mixup:       (images, labels N, steps taken) -> mixed images and shares N_K of the classes, which the loss reads instead.
    loss:        of logits, the head's features, labels and domains -> a scalar. features: holds what the head reads, where
                 the loss needs it; empty: the loss is given the logits.
    domain_count: number of source domains. over_domains: (a closure of each one's images, parameters) fills `.grad`, in the
                 place of the objective; None: the objective runs on the whole batch.
    accumulate:  microbatches that a batch is cut into. memory_format: of the images that the model is given.
    distillation: (images, logits, loss) -> the loss mixed with a teacher's. penalties: () -> a scalar each, added to it.
    before:      called with the number of steps taken before a step begins, such as to set BiPer's frequency.
    combine:     (gradients, parameters, steps taken): makes one gradient of the two branches in `.grad`, of the scales or,
                 where a control takes them in turns, of all parameters.
    freezer:     takes a branch out of some scales' gradients, and records what it sees.
    clip, clip_mode: limit of the gradients in timm's sense ("norm", "value", "agc"; None: none).
    schedule:    moves the learning rate on after each step. oscillation: follows the weights' codes.
    """

    model: nn.Module
    unwrapped: nn.Module
    optimizer: Any
    precision: Precision
    objective: Objective = erm
    mixup: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    loss: DomainLoss = erm_loss
    features: Sequence[Tensor] = ()
    domain_count: int = 1
    over_domains: Callable[[Sequence[Closure], list[Parameter]], Gradients] | None = (
        None
    )
    accumulate: int = 1
    memory_format: torch.memory_format = torch.contiguous_format
    distillation: Distillation | None = None
    penalties: Sequence[Callable[[], Tensor]] = ()
    before: Callable[[int], None] | None = None
    combine: Callable[[Gradients, list[Parameter], int], None] | None = None
    freezer: ScaleFreezer | None = None
    clip: float | None = None
    clip_mode: str = "norm"
    schedule: Schedule | None = None
    oscillation: Oscillation | None = None

    def __post_init__(self) -> None:
        self.taken = 0
        self.device = next(self.unwrapped.parameters()).device
        self.parameters: list[Parameter] = []
        for group in self.optimizer.param_groups:
            self.parameters += group["params"]
        self.clipped = self.parameters

    def leave_unclipped(self, parameters: Sequence[Parameter]) -> None:
        """Clip all but these: adaptive clipping spares the classifier."""
        left_alone = {id(parameter) for parameter in parameters}
        self.clipped = [p for p in self.parameters if id(p) not in left_alone]

    def __call__(self, images: Tensor, labels: Tensor, domains: Tensor) -> Outcome:
        """Take a step on images N_C_H_W, labels N and domains N."""
        if self.before is not None:
            self.before(self.taken)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels, self.taken)
        images = images.contiguous(memory_format=self.memory_format)
        gradients, logits = self._run_objective(images, labels, domains)
        if self.combine is not None:
            self.combine(gradients, self.parameters, self.taken)
        seen = None
        if self.freezer is not None:
            seen = self.freezer.mask(gradients, self.parameters)
        l1_norm = sum_of_magnitudes(self.parameters)
        norm = clip_gradients(self.parameters, self.clipped, self.clip, self.clip_mode)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if isinstance(self.loss, GroupDRO):
            self.loss.advance()
        swung = None
        if self.oscillation is not None and not paused(self.unwrapped):
            swung = self.oscillation.update()
        self.taken += 1
        return Outcome(gradients.loss, logits, norm, l1_norm, rate, seen, swung)

    def _run_objective(
        self, images: Tensor, labels: Tensor, domains: Tensor
    ) -> tuple[Gradients, Tensor]:
        """Fill `.grad`; returns what the objective saw and the logits N_K of its first pass."""
        passes = self.accumulate
        if self.over_domains is not None:
            passes *= self.domain_count
        if passes == 1:
            return self._run_passes(images, labels, domains)
        with shared_norm_momentum(self.unwrapped, passes):
            return self._run_passes(images, labels, domains)

    def _run_passes(
        self, images: Tensor, labels: Tensor, domains: Tensor
    ) -> tuple[Gradients, Tensor]:
        logits_of_passes: list[Tensor] = []
        if self.over_domains is None:
            closure = self._closure(images, labels, domains, logits_of_passes)
            replay = replay_of(self.unwrapped, self.device)
            gradients = self.objective(closure, self.parameters, replay)
            return gradients, logits_of_passes[0]
        closures = []
        positions = []
        for domain in range(self.domain_count):
            of_domain = domains == domain
            closures.append(
                self._closure(
                    images[of_domain],
                    labels[of_domain],
                    domains[of_domain],
                    logits_of_passes,
                )
            )
            positions.append(of_domain.nonzero().flatten())
        gradients = self.over_domains(closures, self.parameters)
        passes_of_a_domain = len(logits_of_passes) // self.domain_count
        first_passes = torch.cat(logits_of_passes[::passes_of_a_domain])
        return gradients, first_passes[torch.cat(positions).argsort()]

    def _closure(
        self,
        images: Tensor,
        labels: Tensor,
        domains: Tensor,
        logits_of_passes: list[Tensor],
    ) -> Closure:
        """One forward and backward pass over the images, microbatch by microbatch; adds its logits to `logits_of_passes`."""
        count = len(labels)
        cuts = microbatches(count, self.accumulate)

        def closure() -> Tensor:
            logits: list[Tensor] = []
            losses: list[Tensor] = []
            for microbatch in cuts:
                is_last = microbatch is cuts[-1]
                with nullcontext() if is_last else self._without_exchange():
                    of_microbatch, loss = self._forward(
                        images[microbatch], labels[microbatch], domains[microbatch]
                    )
                    # A mean over all, of microbatches that may differ in size
                    loss = loss * (len(of_microbatch) / count)
                    self.precision.backward(loss)
                logits.append(of_microbatch.detach())
                losses.append(loss.detach())
            logits_of_passes.append(in_order(logits, cuts, count))
            return torch.stack(losses).sum()

        def closure_with_cache() -> Tensor:
            with weight_cache(self.unwrapped):
                return closure()

        return closure if len(cuts) == 1 else closure_with_cache

    def _forward(
        self, images: Tensor, labels: Tensor, domains: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(logits N_K, loss) of one microbatch."""
        with self.precision.autocast():
            logits = self.model(images)
            features = self.features[0] if self.features else logits
            loss = self.loss(logits.float(), features.float(), labels, domains)
            if self.distillation is not None:
                loss = self.distillation(images, logits, loss)
            for penalty in self.penalties:
                loss = loss + penalty()
        return logits, loss

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Several processes exchange gradients in the last microbatch of a step, not in the others."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of its steps."""
        state: dict[str, Any] = {
            "taken": self.taken,
            "freezer": None,
            "oscillation": None,
            "domain_weights": None,
        }
        if self.freezer is not None:
            state["freezer"] = self.freezer.state_dict()
        if self.oscillation is not None:
            state["oscillation"] = self.oscillation.state_dict()
        if isinstance(self.loss, GroupDRO):
            state["domain_weights"] = self.loss.weights
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.taken = state["taken"]
        if self.freezer is not None:
            self.freezer.load_state_dict(state["freezer"])
        if self.oscillation is not None:
            self.oscillation.load_state_dict(state["oscillation"])
        if isinstance(self.loss, GroupDRO):
            self.loss.weights = state["domain_weights"]


def microbatches(images: int, count: int) -> list[slice]:
    """`count` disjoint cuts of a batch, every count-th image each, so that all have as many of every domain; empty cuts
    left out."""
    return [slice(first, None, count) for first in range(min(count, max(images, 1)))]


def in_order(logits: list[Tensor], cuts: list[slice], count: int) -> Tensor:
    """Logits N_K of a batch of `count` images in its order, from those of its microbatches."""
    if len(cuts) == 1:
        return logits[0]
    positions = [torch.arange(count)[microbatch] for microbatch in cuts]
    return torch.cat(logits)[torch.cat(positions).argsort()]


def sum_of_magnitudes(parameters: list[Parameter]) -> Tensor:
    """L1 norm of the gradients, what the refined schedule of Adam-like optimizers goes by."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients, norm_type=1.0)
