"""One training step, in the order that is the science:

closure   forward, loss (domain-aware, distilled, damped), backward; microbatch by microbatch where gradients accumulate
objective fills `.grad`: ERM in one pass, SAGM and its relatives in two
freezer   GAQAT: takes a branch out of some scales' gradients, or a control does
clip, optimizer, schedule, oscillation
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.conflict import combine
from qat.objectives.contract import Closure, Gradients, Objective, erm
from qat.objectives.controls import CONTROLS
from qat.objectives.distillation import Distillation
from qat.objectives.domain_aware import LOSSES, GroupDRO, head_features, per_domain
from qat.objectives.oscillation import Oscillation, damping
from qat.objectives.replay import replay_of, shared_norm_momentum
from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer, Seen
from qat.objectives.sharpness import Perturbation, asam, gsam, mixed, sagm, sam
from qat.quantizers.biper import periodic_regulariser
from qat.quantizers.contract import Quantizer
from qat.quantizers.weight_cache import weight_cache
from qat.runs.recipe import BiperRecipe, GaqatRecipe, LsqRecipe, Recipe, SagmRecipe
from qat.surgery.backbones import clip_gradients, first_and_last
from qat.surgery.binarize import periodic_weights
from qat.surgery.calibrate import paused
from qat.surgery.swap import quantized_weights, quantizers

FLATNESS: dict[str, Callable[..., Gradients]] = {"sagm": sagm, "sam": sam, "asam": asam, "gsam": gsam}
WITH_ALPHA = {"sagm", "gsam"}


@dataclass(frozen=True)
class Outcome:
    """loss: scalar; logits: N_K of the first pass, detached; norm, l1_norm: of the gradient before clipping, over all
    parameters; seen: what the scales showed, for objectives with two branches; swung: share of weights that swung back,
    where recorded."""

    loss: Tensor
    logits: Tensor
    norm: Tensor
    l1_norm: Tensor
    seen: Seen | None
    swung: float | None


class Precision(Protocol):
    """How forward runs and gradients come back: an accelerate Accelerator."""

    def autocast(self) -> AbstractContextManager[None]:
        """Context in which the forward pass runs in the recipe's precision."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to `.grad`; called once per microbatch, outside `autocast`."""


class TrainingStep:
    """Steps `optimizer` once per call. `model` is what is run (perhaps wrapped for several processes), `own` the model."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, own: nn.Module, optimizer: Any, precision: Precision,
        *, domains: int, teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.own, self.optimizer, self.precision = recipe, model, own, optimizer, precision
        self.device = next(own.parameters()).device
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.parameters: list[Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.objective = objective_of(recipe, own, self.parameters)
        self.freezer = freezer_of(recipe, own) if isinstance(recipe, SagmRecipe) else None
        self.loss, self.domains, self.taken = LOSSES[recipe.domain_loss](domains), domains, 0
        self.features: list[Tensor] = []
        head = own.get_submodule(first_and_last(own)[-1])
        if recipe.domain_loss != "erm":
            self.features, _ = head_features(own, head)
        self.unclipped = {id(p) for p in head.parameters()} if recipe.clip_mode == "agc" else set()
        self.distillation = self.oscillation = None
        self.damping = recipe.damping if isinstance(recipe, LsqRecipe) else 0.0
        self.reg_tau = recipe.reg_tau if isinstance(recipe, BiperRecipe) else 0.0
        if isinstance(recipe, LsqRecipe):
            if teacher is not None:
                self.distillation = Distillation(teacher.to(self.device), recipe.distill_weight)
            if recipe.oscillation or recipe.freeze_oscillating is not None:
                weights, grids = zip(*quantized_weights(own), strict=True)
                self.oscillation = Oscillation(weights, grids, freeze_above=recipe.freeze_oscillating)

    def __call__(self, images: Tensor, labels: Tensor, domains: Tensor) -> Outcome:
        self._set_frequency()
        images, seen_logits = images.contiguous(memory_format=self.memory_format), list[Tensor]()
        quantized = not paused(self.own)
        split = isinstance(self.recipe, SagmRecipe) and self.recipe.per_domain
        passes = self.recipe.accumulate * (self.domains if split else 1)
        with shared_norm_momentum(self.own, passes) if passes > 1 else nullcontext():
            if split:
                parts = [domains == d for d in range(self.domains)]
                closures = [self._closure(images[p], labels[p], domains[p], seen_logits) for p in parts]
                replays = partial(replay_of, self.own, self.device)
                gradients = per_domain(self.objective, replays)(closures, self.parameters)
                order = torch.cat([p.nonzero().flatten() for p in parts]).argsort()
                logits = torch.cat(seen_logits[::2])[order]
            else:
                closure = self._closure(images, labels, domains, seen_logits)
                gradients = self.objective(closure, self.parameters, replay_of(self.own, self.device))
                logits = seen_logits[0]
        seen = self._resolve(gradients)
        l1_norm = sum_of_magnitudes(self.parameters)
        clipped = [p for p in self.parameters if id(p) not in self.unclipped]
        norm = clip_gradients(self.parameters, clipped, self.recipe.clip, self.recipe.clip_mode)
        self.optimizer.step()
        if isinstance(self.loss, GroupDRO):
            self.loss.advance()
        swung = self.oscillation.update() if self.oscillation is not None and quantized else None
        self.taken += 1
        return Outcome(gradients.loss, logits, norm, l1_norm, seen, swung)

    def _set_frequency(self) -> None:
        recipe = self.recipe
        if isinstance(recipe, BiperRecipe) and recipe.frequency_start is not None and recipe.stage == 1:
            reached = min((self.taken + 1) / recipe.steps, 1.0)
            for quantizer, _ in periodic_weights(self.own):
                quantizer.set_frequency(recipe.frequency_start + reached * (recipe.frequency - recipe.frequency_start))

    def _closure(self, images: Tensor, labels: Tensor, domains: Tensor, seen: list[Tensor]) -> Closure:
        parts = microbatches(len(labels), self.recipe.accumulate)
        order = torch.cat([torch.arange(len(labels))[p] for p in parts]).argsort()

        def closure() -> Tensor:
            logits, losses = list[Tensor](), list[Tensor]()
            with weight_cache(self.own) if len(parts) > 1 else nullcontext():
                for part in parts:
                    last = part is parts[-1]
                    with nullcontext() if last else self._without_exchange():
                        found, loss = self._forward(images[part], labels[part], domains[part])
                        loss = loss * (len(found) / len(labels))  # a mean over all, of parts that may differ in size
                        self.precision.backward(loss)
                    logits.append(found.detach())
                    losses.append(loss.detach())
            seen.append(torch.cat(logits)[order] if len(parts) > 1 else logits[0])
            return torch.stack(losses).sum()

        return closure

    def _forward(self, images: Tensor, labels: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
        """(logits N_K, loss) of one microbatch."""
        with self.precision.autocast():
            logits = self.model(images)
            features = self.features[0] if self.features else logits
            loss = self.loss(logits.float(), features.float(), labels, domains)
            if self.distillation is not None:
                loss = self.distillation(images, logits, loss)
            if self.damping and not paused(self.own):
                loss = loss + self.damping * damping(*zip(*quantized_weights(self.own), strict=True))
            if self.reg_tau:
                loss = loss + self.reg_tau * periodic_regulariser(periodic_weights(self.own))
        return logits, loss

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Several processes exchange gradients in the last microbatch of a step, not in the others."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def _resolve(self, gradients: Gradients) -> Seen | None:
        """Settle what the two branches of the scales do to each other."""
        if self.freezer is None:
            return None
        if isinstance(self.recipe, GaqatRecipe):
            self._combine(gradients, CONTROLS[self.recipe.control].combined, self.recipe.per_channel)
        return self.freezer.mask(gradients, self.parameters)

    def _combine(self, gradients: Gradients, how: str, per_channel: bool) -> None:
        """Make the two branches one, as controls do that freeze nothing; how: of `Control.combined`."""
        assert self.freezer is not None
        if how == "alternate":
            turn = (self.taken // self.freezer.rule.window) % 2
            mixed(gradients, self.parameters, ((1.0, 0.0), (0.0, 1.0))[turn])
        elif how:
            combine(gradients, self.parameters, scale_groups(self.own, per_channel), how)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
            "oscillation": None if self.oscillation is None else self.oscillation.state_dict(),
            "domain_weights": self.loss.weights if isinstance(self.loss, GroupDRO) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if self.freezer is not None:
            self.freezer.load_state_dict(state["freezer"])
        if self.oscillation is not None:
            self.oscillation.load_state_dict(state["oscillation"])
        if isinstance(self.loss, GroupDRO):
            self.loss.weights = state["domain_weights"]


def microbatches(images: int, count: int) -> list[slice]:
    """`count` disjoint parts of a batch, every count-th image each, so that all have as many of every domain; empty parts
    left out."""
    return [slice(first, None, count) for first in range(min(count, max(images, 1)))]


def objective_of(recipe: Recipe, model: nn.Module, parameters: list[Parameter]) -> Objective:
    """The objective a recipe names, its options filled in."""
    if not isinstance(recipe, SagmRecipe):
        return erm
    kinds = parameter_kinds(model)
    after_quantizer = [(q, w) for w, q in quantized_weights(model)] if recipe.perturb == "quantized" else []
    where = Perturbation([kinds[id(p)] in recipe.perturb_kinds for p in parameters], after_quantizer)
    options = {"alpha": recipe.alpha} if recipe.flatness in WITH_ALPHA else {}
    return partial(FLATNESS[recipe.flatness], rho=recipe.rho, where=where, **options)


def freezer_of(recipe: SagmRecipe, model: nn.Module) -> ScaleFreezer | None:
    """Follows every quantizer's scale; freezes by the recipe's rule, or nothing where it has none. None where none are."""
    found = quantizers(model)
    if not found:
        return None
    rule = FreezeRule(policy="never")
    if isinstance(recipe, GaqatRecipe):
        control = CONTROLS[recipe.control]
        rule = FreezeRule(
            window=recipe.window,
            threshold=recipe.threshold,
            weight_threshold=recipe.weight_threshold,
            z=recipe.z,
            when="above" if control.above else recipe.freeze_when,
            branch=control.branch,
            policy=control.policy,
            per_channel=recipe.per_channel,
            targets=recipe.freeze_scales,
            start=recipe.start_step,
            rescale=recipe.rescale,
        )
    return ScaleFreezer(
        list(found), [q.raw_scale for q in found.values()], [q.is_weight for q in found.values()], rule, recipe.seed
    )


def parameter_kinds(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> "weights", "norms", "biases" or "scales"."""
    kinds: dict[int, str] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantizer):
                kinds[id(parameter)] = "scales"
            elif name.endswith("bias") and not is_norm(module):
                kinds[id(parameter)] = "biases"
            else:
                kinds[id(parameter)] = "norms" if is_norm(module) else "weights"
    return kinds


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes over channels or batch."""
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))


def sum_of_magnitudes(parameters: list[Parameter]) -> Tensor:
    """L1 norm of the gradients, what the refined schedule of Adam-like optimizers goes by."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=1.0) if gradients else torch.zeros(())


def scale_groups(model: nn.Module, each: bool = False) -> list[list[Parameter]]:
    """Scales of each layer (weight and input) together and every stream quantizer by itself; or `each` by itself."""
    groups: dict[str, list[Parameter]] = {}
    for name, quantizer in quantizers(model).items():
        layer = name if each or "#" in name else name.rpartition(".")[0]
        groups.setdefault(layer, []).append(quantizer.raw_scale)
    return list(groups.values())
