"""GAQAT: gradient-adaptive freezing of quantizer scales (arXiv 2412.05551; reconstruction in `docs/algorithms.md`, GAQAT).

Under SAGM every scale s_i has two gradients, the task's and the perturbed, smoothing one's:

    g(s_i) = w_t · m_i · g_task(s_i) + w_p · k_i · g_smooth(s_i)          m, k in {0, 1}

The *disorder* of a branch over a window of K steps is the share of its sign flips (a zero keeps the sign before it):

    δ_i = flips_i / comparisons_i,     0 for a constant sign, 1 for an alternating one, about ½ for noise

Every K steps the frozen branch of the scales with δ_i below a threshold is masked for the next K steps. The threshold is
r, or a significance against coin flips: δ_i < ½ - z · ½/√comparisons_i. Per-channel scales are decided together, on the
flips of all channels that got a gradient, or each for itself. The history goes on while a scale is frozen, so that it can
be released.

Flips of one layer's channels are not independent, so z overstates the evidence of a per-channel scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from qat.objectives.contract import Gradients
from qat.words import Branch, Policy


@dataclass(frozen=True)
class FreezeRule:
    """Which scales freeze, when, and for how long.

    window:      K, steps between decisions, at least 2.
    threshold:   r; None decides by `z`. `weight_threshold`, where given, is the threshold of weight scales alone.
    when:        freeze what lies "below" the threshold, or "above" its mirror image about ½.
    branch:      the gradient that is masked.
    policy:      "disorder" as above; "never"; "always"; "permanent": once frozen, for ever; "random": as many scales as
                 disorder would freeze, drawn at random.
    per_channel: each channel of a scale for itself.
    targets:     which scales may freeze.
    start:       first step at which anything may freeze.
    rescale:     give the branch that is left the weight of both.
    """

    window: int = 100
    threshold: float | None = None
    weight_threshold: float | None = None
    z: float = 3.0
    when: Literal["below", "above"] = "below"
    branch: Branch = "task"
    policy: Policy = "disorder"
    per_channel: bool = False
    targets: Literal["both", "weights", "activations"] = "both"
    start: int = 0
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(
                f"freeze window: sign flips need at least 2 steps, got {self.window}"
            )


@dataclass(frozen=True)
class Seen:
    """What one step showed, float32 of shape (scales,), in the order of the freezer's names.

    disorder: of the task branch over the window so far; conflict: share of the channels whose task and smoothing signs
    differ in this step; cosine: between the two gradients of the scale; frozen: share of its channels that are frozen.
    """

    disorder: Tensor
    conflict: Tensor
    cosine: Tensor
    frozen: Tensor


class ScaleFreezer:
    """Follows the scales' gradients and masks a branch of some. Call `mask` after the objective, once a step.

    names, scales: what to follow, shape () or (channels,) each; is_weight tells which threshold holds.
    seed: of the "random" policy's draws, the same on every process.
    """

    def __init__(
        self,
        names: Sequence[str],
        scales: Sequence[Parameter],
        is_weight: Sequence[bool],
        rule: FreezeRule,
        seed: int = 0,
    ) -> None:
        self.names, self.scales, self.rule = tuple(names), tuple(scales), rule
        device = scales[0].device if scales else torch.device("cpu")
        self.sizes = [s.numel() for s in scales]
        self.owner = torch.repeat_interleave(
            torch.arange(len(scales)), torch.tensor(self.sizes, dtype=torch.long)
        ).to(device)
        self.channels = torch.tensor(self.sizes, dtype=torch.float32, device=device)
        self.is_weight = torch.tensor(list(is_weight), device=device)
        total = sum(self.sizes)
        self.last = torch.zeros(total, device=device)
        self.flips = torch.zeros(total, device=device)
        self.compared = 0
        self.step = 0
        self.frozen = torch.full((total,), rule.policy == "always", device=device)
        self.generator = torch.Generator().manual_seed(seed)

    def mask(self, gradients: Gradients, parameters: Sequence[Parameter]) -> Seen:
        """Take the frozen branch out of the scales' `.grad`, then record this step's signs, and decide when a window ends.

        Raises ValueError when the objective returned one branch only.
        """
        if not gradients.task or not gradients.perturbed:
            raise ValueError(
                "scale freezing needs an objective with two branches, such as sagm"
            )
        place = {id(p): i for i, p in enumerate(parameters)}
        where = [place[id(s)] for s in self.scales]
        task, smooth = (
            self._flat([branch[i] for i in where])
            for branch in (gradients.task, gradients.perturbed)
        )
        if bool(self.frozen.any()):
            self._fill(task, smooth, gradients.mix)
        seen = self._see(task, smooth)
        if self.step % self.rule.window == 0:
            self._decide()
        return seen

    def _fill(self, task: Tensor, smooth: Tensor, mix: tuple[float, float]) -> None:
        keep = (~self.frozen).to(task.dtype)
        first, second = (torch.full_like(keep, w) for w in mix)
        if self.rule.rescale and self.rule.branch != "both":
            first, second = (
                torch.where(self.frozen, sum(mix), w) for w in (first, second)
            )
        kept_task = first * task * (keep if self.rule.branch != "smooth" else 1)
        kept_smooth = second * smooth * (keep if self.rule.branch != "task" else 1)
        share = self._sum(self.frozen.float()) / self.channels
        for scale, masked, part in zip(
            self.scales,
            (kept_task + kept_smooth).split(self.sizes),
            share.tolist(),
            strict=True,
        ):
            if scale.grad is None or not part:
                continue
            if self.rule.branch == "both" and part == 1:
                # Of a zero gradient an optimizer's momentum would make a step
                scale.grad = None
            else:
                scale.grad.copy_(masked.view_as(scale))

    def _see(self, task: Tensor, smooth: Tensor) -> Seen:
        sign = torch.where(task == 0, self.last, task.sign())
        self.flips += (sign * self.last) < 0
        self.last = sign
        self.step += 1
        self.compared += 1
        dot, first, second = (
            self._sum(x) for x in (task * smooth, task * task, smooth * smooth)
        )
        return Seen(
            disorder=self._sum(self.flips)
            / (self.channels * max(self.compared - 1, 1)),
            conflict=self._sum((task * smooth < 0).float()) / self.channels,
            cosine=dot / (first * second).sqrt().clamp_min(1e-30),
            frozen=self._sum(self.frozen.float()) / self.channels,
        )

    def _decide(self) -> None:
        """A window has ended: new masks, and a fresh window."""
        if self.step >= self.rule.start and self.rule.policy not in ("never", "always"):
            chosen = self._chosen()
            if self.rule.policy == "random":
                chosen = self._as_many(chosen)
            self.frozen = (
                (self.frozen | chosen) if self.rule.policy == "permanent" else chosen
            )
        self.flips.zero_()
        self.last = torch.zeros_like(self.last)
        self.compared = 0

    def _chosen(self) -> Tensor:
        """(channels,) bool: what this window's disorder freezes."""
        comparisons = self.compared - 1
        # A channel without any gradient is not calm, it says nothing
        alive = (self.last != 0).float()
        if self.rule.per_channel:
            each = torch.full_like(self.flips, comparisons)
            chosen = beyond(
                self.flips / comparisons, each, self._threshold()[self.owner], self.rule
            ) & (alive > 0)
        else:
            pooled = self._sum(alive) * comparisons
            calm = beyond(
                self._sum(self.flips) / pooled.clamp_min(1),
                pooled,
                self._threshold(),
                self.rule,
            )
            chosen = (calm & (pooled > 0))[self.owner]
        if self.rule.targets == "both":
            return chosen
        return chosen & (self.is_weight == (self.rule.targets == "weights"))[self.owner]

    def _threshold(self) -> Tensor:
        """r per scale, NaN where z decides."""
        plain = float("nan") if self.rule.threshold is None else self.rule.threshold
        weights = (
            plain if self.rule.weight_threshold is None else self.rule.weight_threshold
        )
        return torch.where(self.is_weight, weights, plain)

    def _as_many(self, chosen: Tensor) -> Tensor:
        """As many scales (or channels) as `chosen`, drawn at random."""
        if self.rule.per_channel:
            order = torch.randperm(len(chosen), generator=self.generator).to(
                chosen.device
            )
            return chosen[order]
        of_scale = self._sum(chosen.float()) > 0
        order = torch.randperm(len(of_scale), generator=self.generator).to(
            chosen.device
        )
        return of_scale[order][self.owner]

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self.sizes), device=values.device).index_add_(
            0, self.owner, values
        )

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(gradients, self.scales, strict=True)
        return torch.cat(
            [(torch.zeros_like(s) if g is None else g).flatten() for g, s in pairs]
        ).float()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "names": list(self.names), "last": self.last, "flips": self.flips, "frozen": self.frozen,
            "compared": self.compared, "step": self.step, "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of other scales."""
        if tuple(state["names"]) != self.names:
            raise ValueError(
                "scale freezer: the checkpoint follows other scales than this model has"
            )
        device = self.last.device
        self.last, self.flips, self.frozen = (
            state[k].to(device) for k in ("last", "flips", "frozen")
        )
        self.compared, self.step = state["compared"], state["step"]
        self.generator.set_state(state["generator"].cpu())


def beyond(
    disorder: Tensor, comparisons: Tensor, threshold: Tensor, rule: FreezeRule
) -> Tensor:
    """Which disorders lie beyond the threshold: r where given (not NaN), else ½ - z·½/√comparisons; or its mirror image."""
    bound = torch.where(
        threshold.isnan(), 0.5 - rule.z * 0.5 / comparisons.sqrt(), threshold
    )
    return disorder < bound if rule.when == "below" else disorder > 1 - bound
