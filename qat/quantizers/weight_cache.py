"""Weights quantized once for several microbatches.

With ŵ = Q(w) and a loss L = Σ_i L_i(ŵ) over microbatches, dL/dw = Q'(w) · Σ_i dL_i/dŵ: Q is linear in what comes from
above, so its backward may run once, on the sum. Inside `weight_cache` the first call of each weight quantizer
computes ŵ, further calls return it, the microbatches' backward passes add up in ŵ's gradient, and on the way out one
backward pass hands the sums to the quantizers. Nothing is kept beyond the block. In it ŵ and its gradient are held, as much
memory again as the weights and their gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer


@contextmanager
def weight_cache(model: nn.Module) -> Iterator[None]:
    """Around the forward and backward passes of one step's microbatches; weights must not change inside.

    Raises RuntimeError when a weight, or a parameter of its quantizer, was written to between two microbatches. A weight
    that is computed (standardised, say) and not a parameter itself is quantized every time.
    """
    caches: dict[Quantizer, _CachedWeight] = {}
    for module in model.modules():
        if isinstance(module, Quantizer) and module.is_weight:
            caches[module] = _CachedWeight(module)
    try:
        for quantizer, cache in caches.items():
            quantizer.forward = cache  # type: ignore[method-assign,assignment]  # hooks on the quantizer still run
        yield
    finally:
        for quantizer in caches:
            del quantizer.forward
    outputs = []
    gradients = []
    for cache in caches.values():
        if cache.made is None:
            continue
        output, leaf = cache.made
        if leaf.grad is not None:
            outputs.append(output)
            gradients.append(leaf.grad)
    if outputs:
        torch.autograd.backward(outputs, gradients)


class _CachedWeight:
    """The forward of one weight quantizer. made: ŵ with its graph, and the same ŵ as a leaf, which the microbatches read."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.name = quantizer.name
        self.compute = quantizer.forward
        self.parameters = list(quantizer.parameters())
        self.made: tuple[Tensor, Tensor] | None = None
        self.read: list[tuple[Tensor, int]] = []  # with the version that was read

    def __call__(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not weight.is_leaf:
            return self.compute(weight)
        read = [(tensor, tensor._version) for tensor in (weight, *self.parameters)]
        if self.made is None:
            out = self.compute(weight)
            leaf = out.detach().requires_grad_(out.requires_grad)
            self.read = read
            self.made = (out, leaf)
            return leaf
        for (now, version), (before, version_before) in zip(
            read, self.read, strict=True
        ):
            if now is not before or version != version_before:
                raise RuntimeError(
                    f"quantizer {self.name!r}: its weight or scale was written to between two microbatches of one step, "
                    "after the weight had been quantized; step the optimizer outside weight_cache"
                )
        return self.made[1]
