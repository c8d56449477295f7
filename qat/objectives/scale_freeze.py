"""GAQAT: gradient-adaptive freezing of quantizer scales (arXiv 2412.05551; reconstruction in `docs/algorithms.md`, GAQAT).

Under SAGM the gradient of every scale s_i has two branches, the task's and the perturbed one (`smooth` in flags and logs):

    g(s_i) = w_t · m_i · g_task(s_i) + w_p · k_i · g_perturbed(s_i)          m, k in {0, 1}

The *disorder* of a branch over a window of K steps is the share of its sign flips (a zero keeps the sign before it):

    δ_i = flips_i / comparisons_i,     0 for a constant sign, 1 for an alternating one, about ½ for noise

Every K steps, of the scales whose δ_i of the task branch is below a threshold, one branch (the rule's) is masked for the
next K steps. The threshold is
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
    when:        freeze what lies "below" the threshold, or "above" one minus the threshold.
    branch:      the gradient that is masked.
    policy:      "disorder" as above; "never"; "always"; "permanent": once frozen, for ever; "random": as many scales as
                 disorder would freeze, drawn at random.
    per_channel: each channel of a scale for itself.
    targets:     which scales may freeze; "always" freezes all, and "random" draws from all.
    start:       first step at which anything may freeze; "always" freezes from the first step on.
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

    disorder: of the task branch over the window so far; conflict: share of the channels whose signs of task and perturbed
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
        self.names = tuple(names)
        self.scales = tuple(scales)
        self.rule = rule
        device = scales[0].device if scales else torch.device("cpu")
        self.sizes = [scale.numel() for scale in scales]
        sizes = torch.tensor(self.sizes, dtype=torch.long)
        # Of each channel, the position of its scale
        owner = torch.repeat_interleave(torch.arange(len(scales)), sizes)
        self.owner = owner.to(device)
        self.channels_per_scale = torch.tensor(
            self.sizes, dtype=torch.float32, device=device
        )
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
        position = {id(p): index for index, p in enumerate(parameters)}
        positions = [position[id(scale)] for scale in self.scales]
        task = self._flat([gradients.task[index] for index in positions])
        perturbed = self._flat([gradients.perturbed[index] for index in positions])
        if bool(self.frozen.any()):
            self._fill(task, perturbed, gradients.branch_weights)
        seen = self._see(task, perturbed)
        if self.step % self.rule.window == 0:
            self._decide()
        return seen

    def _fill(
        self, task: Tensor, perturbed: Tensor, branch_weights: tuple[float, float]
    ) -> None:
        """Write w_t · m · g_task + w_p · k · g_perturbed into `.grad` of the scales of which something is frozen."""
        rule = self.rule
        is_free = (~self.frozen).to(task.dtype)
        task_weight = torch.full_like(is_free, branch_weights[0])
        perturbed_weight = torch.full_like(is_free, branch_weights[1])
        if rule.rescale and rule.branch != "both":
            task_weight = torch.where(self.frozen, sum(branch_weights), task_weight)
            perturbed_weight = torch.where(
                self.frozen, sum(branch_weights), perturbed_weight
            )
        task_part = task_weight * task
        if rule.branch != "smooth":
            task_part = task_part * is_free
        perturbed_part = perturbed_weight * perturbed
        if rule.branch != "task":
            perturbed_part = perturbed_part * is_free
        masked = (task_part + perturbed_part).split(self.sizes)
        shares = (self._sum(self.frozen.float()) / self.channels_per_scale).tolist()
        for scale, gradient, share in zip(self.scales, masked, shares, strict=True):
            if scale.grad is None or not share:
                continue
            if rule.branch == "both" and share == 1:
                # With a zero gradient, momentum would still move the scale
                scale.grad = None
            else:
                scale.grad.copy_(gradient.view_as(scale))

    def _see(self, task: Tensor, perturbed: Tensor) -> Seen:
        """Count the flips of this step."""
        sign = torch.where(task == 0, self.last, task.sign())
        self.flips += (sign * self.last) < 0
        self.last = sign
        self.step += 1
        self.compared += 1
        comparisons = self.channels_per_scale * max(self.compared - 1, 1)
        conflicts = (task * perturbed < 0).float()
        product = self._sum(task * perturbed)
        squared_norms = self._sum(task * task) * self._sum(perturbed * perturbed)
        return Seen(
            disorder=self._sum(self.flips) / comparisons,
            conflict=self._sum(conflicts) / self.channels_per_scale,
            cosine=product / squared_norms.sqrt().clamp_min(1e-30),
            frozen=self._sum(self.frozen.float()) / self.channels_per_scale,
        )

    def _decide(self) -> None:
        """A window has ended: new masks, and a fresh window."""
        policy = self.rule.policy
        if self.step >= self.rule.start and policy not in ("never", "always"):
            chosen = self._chosen()
            if policy == "random":
                chosen = self._as_many(chosen)
            if policy == "permanent":
                chosen = self.frozen | chosen
            self.frozen = chosen
        self.flips.zero_()
        self.last = torch.zeros_like(self.last)
        self.compared = 0

    def _chosen(self) -> Tensor:
        """(channels,) bool: what this window's disorder freezes."""
        rule = self.rule
        comparisons = self.compared - 1
        # A channel without any gradient is not stable, it says nothing
        has_gradient = self.last != 0
        thresholds = self._thresholds()
        if rule.per_channel:
            each = torch.full_like(self.flips, comparisons)
            disorder = self.flips / comparisons
            chosen = beyond(disorder, each, thresholds[self.owner], rule) & has_gradient
        else:
            pooled = self._sum(has_gradient.float()) * comparisons
            disorder = self._sum(self.flips) / pooled.clamp_min(1)
            of_scales = beyond(disorder, pooled, thresholds, rule) & (pooled > 0)
            chosen = of_scales[self.owner]
        if rule.targets == "both":
            return chosen
        is_target = self.is_weight == (rule.targets == "weights")
        return chosen & is_target[self.owner]

    def _thresholds(self) -> Tensor:
        """r per scale, NaN where z decides."""
        rule = self.rule
        of_others = float("nan") if rule.threshold is None else rule.threshold
        of_weights = of_others
        if rule.weight_threshold is not None:
            of_weights = rule.weight_threshold
        return torch.where(self.is_weight, of_weights, of_others)

    def _as_many(self, chosen: Tensor) -> Tensor:
        """As many scales (or channels) as `chosen`, drawn at random."""
        if self.rule.per_channel:
            return self._shuffled(chosen)
        of_scales = self._sum(chosen.float()) > 0
        return self._shuffled(of_scales)[self.owner]

    def _shuffled(self, values: Tensor) -> Tensor:
        order = torch.randperm(len(values), generator=self.generator)
        return values[order.to(values.device)]

    def _sum(self, values: Tensor) -> Tensor:
        """(channels,) added up over the channels of each scale, (scales,)."""
        sums = torch.zeros(len(self.sizes), device=values.device)
        return sums.index_add_(0, self.owner, values)

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of all scales as (channels,) float32; 0 where a scale got none."""
        parts = []
        for gradient, scale in zip(gradients, self.scales, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(scale)
            parts.append(gradient.flatten())
        return torch.cat(parts).float()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "names": list(self.names),
            "last": self.last,
            "flips": self.flips,
            "frozen": self.frozen,
            "compared": self.compared,
            "step": self.step,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of other scales."""
        if tuple(state["names"]) != self.names:
            raise ValueError(
                "scale freezer: the checkpoint follows other scales than this model has"
            )
        device = self.last.device
        self.last = state["last"].to(device)
        self.flips = state["flips"].to(device)
        self.frozen = state["frozen"].to(device)
        self.compared = state["compared"]
        self.step = state["step"]
        self.generator.set_state(state["generator"].cpu())


def beyond(
    disorder: Tensor, comparisons: Tensor, threshold: Tensor, rule: FreezeRule
) -> Tensor:
    """Which disorders lie beyond the threshold: r where given (not NaN), else ½ - z·½/√comparisons; or above one minus it."""
    significant = 0.5 - rule.z * 0.5 / comparisons.sqrt()
    bound = torch.where(threshold.isnan(), significant, threshold)
    if rule.when == "below":
        return disorder < bound
    return disorder > 1 - bound
