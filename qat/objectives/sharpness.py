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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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
    products = []
    task_squares = []
    perturbed_squares = []
    for task, perturbed in zip(seen.task, seen.perturbed, strict=True):
        if task is not None and perturbed is not None:
            products.append(_dot(task, perturbed))
            task_squares.append(_dot(task, task))
            perturbed_squares.append(_dot(perturbed, perturbed))
    dot = torch.stack(products).sum()
    task_norm = torch.stack(task_squares).sum().sqrt()
    perturbed_norm = torch.stack(perturbed_squares).sum().sqrt()
    cosine = dot / (task_norm * perturbed_norm + TINY)
    # g⊥ = g - along · g_p
    along = float(cosine * task_norm / (perturbed_norm + TINY))
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
    seen: Gradients,
    parameters: Sequence[Parameter],
    branch_weights: tuple[float, float],
) -> Gradients:
    """Fill `.grad` with branch_weights[0] · task + branch_weights[1] · perturbed. A branch of weight 0 is
    left out."""
    branches = zip(seen.task, seen.perturbed, strict=True)
    for parameter, gradients in zip(parameters, branches, strict=True):
        parameter.grad = None
        for weight, gradient in zip(branch_weights, gradients, strict=True):
            if weight == 0 or gradient is None:
                continue
            part = weight * gradient
            parameter.grad = part if parameter.grad is None else parameter.grad + part
    return Gradients(seen.loss, seen.task, seen.perturbed, branch_weights)


def _two_passes(
    closure: Closure,
    parameters: Sequence[Parameter],
    replay: Replay,
    where: Perturbation,
    length: Callable[[Tensor], Tensor],
    branch_weights: tuple[float, float] | None,
    *,
    eta: float | None = None,
) -> Gradients:
    """Task pass, perturbed pass at θ + length·T²g, everything back in place; `branch_weights` None leaves `.grad` to the
    caller."""
    with _watched(where.after_quantizer) as weights_after:
        loss, task = _pass(closure, parameters)
    latent, latent_gradients = _perturbed_parameters(parameters, task, where)
    displaced, displaced_gradients = _with_gradients(weights_after)
    moves = _moves(
        [*latent, *displaced],
        [*latent_gradients, *displaced_gradients],
        length,
        eta,
    )
    latent_moves = moves[: len(latent)]
    displacements = moves[len(latent) :]
    quantizers = _quantizers_of(where)
    with (
        perturbed(latent, latent_moves),
        _displaced(quantizers, displacements),
        replay(),
    ):
        _, perturbed_gradients = _pass(closure, parameters)
    seen = Gradients(loss, task, perturbed_gradients)
    if branch_weights is None:
        return seen
    return mixed(seen, parameters, branch_weights)


def _with_gradients(outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the weight quantizers' outputs that the backward pass reached, and their gradients."""
    reached = []
    gradients = []
    for output in outputs:
        if output.grad is not None:
            reached.append(output)
            gradients.append(output.grad)
    return reached, gradients


def _quantizers_of(where: Perturbation) -> list[nn.Module]:
    """The quantizers whose outputs are perturbed in the place of their weights."""
    quantizers = []
    for quantizer, _ in where.after_quantizer:
        quantizers.append(quantizer)
    return quantizers


def _perturbed_parameters(
    parameters: Sequence[Parameter],
    task: Sequence[Tensor | None],
    where: Perturbation,
) -> tuple[list[Parameter], list[Tensor]]:
    """The parameters that are themselves perturbed, and their gradients."""
    mask = [True] * len(parameters) if where.mask is None else where.mask
    after_quantizer = {id(weight) for _, weight in where.after_quantizer}
    chosen = []
    gradients = []
    for parameter, gradient, is_chosen in zip(parameters, task, mask, strict=True):
        if not is_chosen or gradient is None or id(parameter) in after_quantizer:
            continue
        chosen.append(parameter)
        gradients.append(gradient)
    return chosen, gradients


def _moves(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    length: Callable[[Tensor], Tensor],
    eta: float | None,
) -> list[Tensor]:
    """length(‖g‖) · g; with eta, length(‖Tg‖) · T²g where T = |θ| + eta."""
    if eta is None:
        factor = length(torch.nn.utils.get_total_norm(gradients))
        return [gradient * factor for gradient in gradients]
    units = []  # T
    scaled = []  # Tg
    for value, gradient in zip(values, gradients, strict=True):
        unit = value.detach().abs() + eta
        units.append(unit)
        scaled.append(unit * gradient)
    factor = length(torch.nn.utils.get_total_norm(scaled))
    moves = []
    for unit, scaled_gradient in zip(units, scaled, strict=True):
        moves.append(unit * scaled_gradient * factor)
    return moves


def _pass(
    closure: Closure, parameters: Sequence[Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one forward and backward pass."""
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
    by_quantizer: dict[nn.Module, Tensor] = {}
    quantizers = [quantizer for quantizer, _ in quantized]

    def keep(quantizer: nn.Module, _: object, output: Tensor) -> None:
        output.retain_grad()
        by_quantizer[quantizer] = output

    with _hooked(quantizers, [keep] * len(quantizers)):
        yield outputs
    for quantizer in quantizers:
        if quantizer in by_quantizer:
            outputs.append(by_quantizer[quantizer])


@contextmanager
def _displaced(
    quantizers: Sequence[nn.Module], moves: Sequence[Tensor]
) -> Iterator[None]:
    """Weight quantizers whose output is displaced by `moves`."""
    if len(quantizers) != len(moves):
        raise RuntimeError(
            "perturb=quantized: a weight quantizer got no gradient; every quantized layer must run in a step"
        )
    hooks = [_adding(move) for move in moves]
    with _hooked(quantizers, hooks):
        yield


def _adding(move: Tensor) -> Callable[..., Tensor]:
    """A forward hook that adds `move` to the output."""

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + move

    return add


@contextmanager
def _hooked(
    modules: Sequence[nn.Module], hooks: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Each module with its forward hook."""
    handles = []
    for module, hook in zip(modules, hooks, strict=True):
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
