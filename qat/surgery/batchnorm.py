"""The life of batch norms in quantized training: how they train, statistics taken again, folding with proof.

    y = a · (x - μ) + β,   a = γ / sqrt(σ² + ε)          folded into the convolution before it: W' = a·W,  b' = a·(b - μ) + β

Export folds for itself (`export/passes/batch_norms.py`, codes untouched); `fold_norms` is for a float model before
`quantize_`.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.surgery.trace import trace_calls
from qat.words import NormMode

BatchNorm = nn.modules.batchnorm._BatchNorm
# Of a layer's largest output; float32 sums in another order stay an order of magnitude below
FOLD_ERROR = 1e-5


class _HoldStatistics:
    """Forward pre-hook: the norm uses its running statistics whatever mode the model is in."""

    def __init__(self) -> None:
        self.on = True

    def __call__(self, norm: nn.Module, args: Any) -> None:
        if self.on:
            norm.training = False


def set_norm_mode(model: nn.Module, mode: NormMode) -> None:
    """How the model's batch norms train, from here on.

    normal: batch statistics, running ones move. frozen-statistics: running statistics, which stay; γ and β learn (DomainBed's
    frozen batch norm). frozen: γ and β stay too. Call before the optimizer is made: frozen γ and β take no gradient.
    """
    for norm in _norms(model):
        held = getattr(norm, "held_statistics", None)
        if mode != "normal" and held is None:
            held = _HoldStatistics()
            norm.held_statistics = held  # type: ignore[assignment]
            norm.register_forward_pre_hook(held)
        if held is not None:
            held.on = mode != "normal"
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(mode != "frozen")


@torch.no_grad()
def restore_norm_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the running statistics of every batch norm anew, as the plain mean over `batches` of N_C_H_W images, with the
    quantizers on: quantized weights and inputs make other statistics than the float ones that training averaged.

    Every other module is in eval mode meanwhile. Modes and momenta are restored whatever happens; so are the statistics
    when there was no batch (ValueError) or a forward pass failed.
    """
    norms = [norm for norm in _norms(model) if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    training = {module: module.training for module in model.modules()}
    saved = []
    for norm in norms:
        for buffer in norm.buffers(recurse=False):
            saved.append((buffer, buffer.clone()))
    device = next(model.parameters()).device
    seen = 0
    try:
        model.eval()
        with _released(norms):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative mean
                norm.train()
            for images in batches:
                model(images.to(device))
                seen += 1
        if not seen:
            raise ValueError("no batch to take batch norm statistics from")
    except BaseException:
        for buffer, copy in saved:
            buffer.copy_(copy)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _released(norms: list[BatchNorm]) -> Iterator[None]:
    """Norms whose statistics are held let go of them."""
    hooks = []
    for norm in norms:
        hook = getattr(norm, "held_statistics", None)
        if hook is not None:
            hooks.append(hook)
    before = [hook.on for hook in hooks]
    try:
        for hook in hooks:
            hook.on = False
        yield
    finally:
        for hook, on in zip(hooks, before, strict=True):
            hook.on = on


@torch.no_grad()
def fold_norms(model: nn.Module, example: Tensor) -> list[str]:
    """Fold every batch norm that alone reads a convolution into it, in place; returns the convolutions' names.

    example: N_C_H_W float images. Each folded convolution is run on the input that the original one had and compared with
    what the original and its norm gave; raises ValueError naming the layer, with the model as it was, when they differ by
    more than FOLD_ERROR of its largest output. Raises ValueError for a quantized model: there, export folds.
    """
    if any(isinstance(m, (QuantConv2d, QuantLinear)) for m in model.modules()):
        raise ValueError(
            "fold_norms: the model is quantized; fold before quantize_, or leave it to export, which folds"
        )
    pairs = _conv_norm_pairs(model, example)
    seen = _inputs_and_outputs(model, pairs, example)
    folded = {}
    for conv, norm in pairs:
        layer = _folded(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[arg-type]
        given, expected = seen[conv]
        _require_alike(layer(given), expected, conv)
        folded[conv] = layer
    for conv, norm in pairs:
        model.set_submodule(conv, folded[conv])
        model.set_submodule(norm, _what_follows(model.get_submodule(norm)))
    return [conv for conv, _ in pairs]


def _require_alike(result: Tensor, expected: Tensor, name: str) -> None:
    largest = expected.abs().max().clamp_min(1e-30)
    error = float((result - expected).abs().max() / largest)
    if not error <= FOLD_ERROR:
        raise ValueError(
            f"fold_norms: {name} with its batch norm folded in differs by {error:.1e} of its largest output (at most "
            f"{FOLD_ERROR:.0e}); its running variance or gamma is extreme, leave this model unfolded"
        )


def _conv_norm_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """(convolution, norm) by name, where the norm alone reads the convolution."""
    trace = trace_calls(model, example[:1])
    readers = trace.consumers()
    pairs = []
    for call in trace.calls:
        after = readers[call.outputs[0]]
        if call.kind != "conv2d" or len(after) != 1 or after[0].kind != "batch_norm":
            continue
        conv = model.get_submodule(call.path)
        norm = model.get_submodule(after[0].path)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, BatchNorm):
            continue
        if norm.running_mean is not None:
            pairs.append((call.path, after[0].path))
    return pairs


def _inputs_and_outputs(
    model: nn.Module, pairs: list[tuple[str, str]], example: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per convolution: its input, and the result of its norm alone, without the activation that timm's norms carry."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for conv, _ in pairs:
        hook = _keep(inputs, conv)
        handles.append(model.get_submodule(conv).register_forward_hook(hook))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()(example)
        seen = {}
        for conv, norm in pairs:
            output = model.get_submodule(conv)(inputs[conv])
            normalized = _normalized(model.get_submodule(norm), output)
            seen[conv] = (inputs[conv], normalized)
        return seen
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def _keep(inputs: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.setdefault(name, given[0].clone())

    return keep


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """By PyTorch's own batch norm, so that the fold is compared with another computation than its own."""
    assert isinstance(norm, BatchNorm)
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _folded(conv: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    """a·W and a·(b − mean) + β with a = γ / √(variance + ε), in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = conv.weight.dtype
    mean = norm.running_mean.double()
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    a = gamma / deviation
    folded_weight = conv.weight.double() * a.view(-1, 1, 1, 1)
    folded_bias = (bias - mean) * a + beta
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(folded_weight.to(dtype))
    folded.bias = nn.Parameter(folded_bias.to(dtype))
    return folded


def _what_follows(norm: nn.Module) -> nn.Module:
    """What a norm module does besides normalising: timm's carry dropout and an activation."""
    parts = []
    for name in ("drop", "act"):
        part = getattr(norm, name, None)
        if part is not None:
            parts.append(part)
    return nn.Sequential(*parts) if parts else nn.Identity()


def _norms(model: nn.Module) -> list[BatchNorm]:
    return [m for m in model.modules() if isinstance(m, BatchNorm)]
