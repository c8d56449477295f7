"""Flat-minima objectives: SAM, ASAM, GSAM and SAGM (`docs/algorithms.md`, sharpness objectives).

With g = ∇L(θ) the task gradient, ‖·‖ one norm over the perturbed set, and g_p = ∇L(θ + ε) on the same batch:

    SAM   (Foret et al., arXiv 2010.01412)    ε = ρ g/‖g‖                     .grad = g_p
    ASAM  (Kwon et al., arXiv 2102.11600)     ε = ρ T²g/‖Tg‖, T = |θ| + η     .grad = g_p
    GSAM  (Zhuang et al., arXiv 2203.08065)   ε as SAM      .grad = g_p - α g⊥,  g⊥ = g - cos·‖g‖·g_p/‖g_p‖
    SAGM  (Wang et al., arXiv 2303.10353)     ε = (ρ/‖g‖ - α) g               .grad = ½ g + ½ g_p

What is perturbed is a choice of parameter kinds, and for weights of the place: `latent`, before the quantizer, where a
small ε may be rounded away; or `quantized`, after it (SAQ, arXiv 2111.12273). Parameters outside the set are mixed alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from qat.objectives.contract import Closure, Gradients, Replay

TINY = 1e-12  # keeps 0/0 out of the norms, as in the published codes


@dataclass(frozen=True)
class Perturbation:
    """What is perturbed.

    mask:            one entry per parameter; None: all.
    after_quantizer: weight quantizers and their weights, whose fake-quantized weight is perturbed instead of the latent one.
    """

    mask: Sequence[bool] | None = None
    after_quantizer: Sequence[tuple[nn.Module, Tensor]] = ()


ALL = Perturbation()


def sam(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay = nullcontext,
    *,
    rho: float = 0.05,
    where: Perturbation = ALL,
) -> Gradients:
    """Sharpness-aware minimisation. Both branches are returned; `.grad` is the perturbed one."""
    return _two_passes(
        closure, parameters, replay, where, lambda norm: rho / (norm + TINY), (0.0, 1.0)
    )


def asam(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay = nullcontext,
    *,
    rho: float = 0.05,
    eta: float = 0.01,
    where: Perturbation = ALL,
) -> Gradients:
    """Adaptive SAM: the ball is measured in units of |θ| + eta."""
    return _two_passes(
        closure,
        parameters,
        replay,
        where,
        lambda norm: rho / (norm + TINY),
        (0.0, 1.0),
        eta=eta,
    )


def gsam(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay = nullcontext,
    *,
    rho: float = 0.05,
    alpha: float = 0.4,
    where: Perturbation = ALL,
) -> Gradients:
    """Surrogate-gap SAM: also descends the part of the task gradient across the perturbed one."""
    seen = _two_passes(
        closure, parameters, replay, where, lambda norm: rho / (norm + TINY), None
    )
    pairs = [
        (g, p)
        for g, p in zip(seen.task, seen.perturbed, strict=True)
        if g is not None and p is not None
    ]
    dot, task, perturbed = (
        torch.stack(x).sum()
        for x in zip(
            *((_dot(g, p), _dot(g, g), _dot(p, p)) for g, p in pairs), strict=True
        )
    )
    cosine = dot / (task.sqrt() * perturbed.sqrt() + TINY)
    # g⊥ = g - along · g_p
    along = float(cosine * task.sqrt() / (perturbed.sqrt() + TINY))
    return mixed(seen, parameters, (-alpha, 1 + alpha * along))


def sagm(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay = nullcontext,
    *,
    rho: float = 0.05,
    alpha: float = 1e-3,
    where: Perturbation = ALL,
) -> Gradients:
    """Sharpness-aware gradient matching. With rho = alpha = 0 it is the plain gradient, bit for bit."""

    return _two_passes(
        closure,
        parameters,
        replay,
        where,
        lambda norm: rho / (norm + TINY) - alpha,
        (0.5, 0.5),
    )


def mixed(
    seen: Gradients, parameters: Sequence[Parameter], mix: tuple[float, float]
) -> Gradients:
    """Fill `.grad` with mix[0] · task + mix[1] · perturbed. A branch of weight 0 is left out of the sum."""
    for parameter, task, perturbed in zip(
        parameters, seen.task, seen.perturbed, strict=True
    ):
        parts = [
            w * g
            for w, g in zip(mix, (task, perturbed), strict=True)
            if w and g is not None
        ]
        parameter.grad = reduce(torch.add, parts) if parts else None
    return Gradients(seen.loss, seen.task, seen.perturbed, mix)


def _two_passes(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay,
    where: Perturbation,
    length: Callable[[Tensor], Tensor],
    mix: tuple[float, float] | None,
    *,
    eta: float | None = None,
) -> Gradients:
    """Task pass, perturbed pass at θ + length·T²g, everything back in place; `mix` None leaves `.grad` to the caller."""
    chosen = [True] * len(parameters) if where.mask is None else list(where.mask)
    replaced = {id(weight) for _, weight in where.after_quantizer}
    with ExitStack() as stack:
        outputs = (
            stack.enter_context(_watched(where.after_quantizer))
            if where.after_quantizer
            else []
        )
        loss, task = _pass(closure, parameters)
        latent = [
            i
            for i, p in enumerate(parameters)
            if chosen[i] and task[i] is not None and id(p) not in replaced
        ]
        places = [(parameters[i].data, task[i]) for i in latent]
        places += [(x.detach(), x.grad) for x in outputs if x.grad is not None]
        gradients = [g for _, g in places if g is not None]
        if eta is None:
            factor = length(torch.nn.utils.get_total_norm(gradients))
            moves = [g * factor for g in gradients]
        else:
            scales = [x.abs() + eta for x, _ in places]
            scaled = [t * g for t, g in zip(scales, gradients, strict=True)]
            factor = length(torch.nn.utils.get_total_norm(scaled))
            moves = [t * g * factor for t, g in zip(scales, scaled, strict=True)]
    quantizers = [quantizer for quantizer, _ in where.after_quantizer]
    with (
        perturbed([parameters[i] for i in latent], moves[: len(latent)]),
        _displaced(quantizers, moves[len(latent) :]),
        replay(),
    ):
        _, second = _pass(closure, parameters)
    seen = Gradients(loss, task, second)
    return seen if mix is None else mixed(seen, parameters, mix)


def _pass(
    closure: Closure, parameters: Sequence[Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    for parameter in parameters:
        parameter.grad = None
    loss = closure()
    return loss, [p.grad for p in parameters]


@contextmanager
def perturbed(
    parameters: Sequence[Parameter], moves: Sequence[Tensor]
) -> Iterator[None]:
    """Parameters displaced by `moves`; on the way out each is its saved copy again, whatever happened inside."""
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(move)
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, saved, strict=True):
                parameter.copy_(copy)


@contextmanager
def _watched(quantized: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[list[Tensor]]:
    """Outputs of the weight quantizers, in order, with their gradients kept."""
    outputs: list[Tensor] = []
    order = {quantizer: i for i, (quantizer, _) in enumerate(quantized)}
    found: dict[int, Tensor] = {}

    def keep(quantizer: nn.Module, _: object, output: Tensor) -> None:
        output.retain_grad()
        found[order[quantizer]] = output
        outputs[:] = [found[i] for i in sorted(found)]

    handles = [quantizer.register_forward_hook(keep) for quantizer, _ in quantized]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _displaced(
    quantizers: Sequence[nn.Module], moves: Sequence[Tensor]
) -> Iterator[None]:
    """Weight quantizers whose output is displaced by `moves`."""
    if len(quantizers) != len(moves):
        raise RuntimeError(
            "perturb=quantized: a weight quantizer got no gradient; every quantized layer must run in a step"
        )
    handles = [
        q.register_forward_hook(lambda _, __, y, m=move: y + m)
        for q, move in zip(quantizers, moves, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
