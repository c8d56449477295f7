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
    kept = [
        (m, _CachedWeight(m))
        for m in model.modules()
        if isinstance(m, Quantizer) and m.is_weight
    ]
    try:
        for quantizer, once in kept:
            quantizer.forward = once  # type: ignore[method-assign,assignment]  # hooks on the quantizer still run
        yield
    finally:
        for quantizer, _ in kept:
            del quantizer.forward
    made = [
        once.made
        for _, once in kept
        if once.made is not None and once.made[1].grad is not None
    ]
    if made:
        torch.autograd.backward(
            [out for out, _ in made], [leaf.grad for _, leaf in made]
        )


class _CachedWeight:
    """The forward of one weight quantizer. made: ŵ with its graph, and the same ŵ as a leaf, which the microbatches read."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.name, self.compute, self.parameters = (
            quantizer.name,
            quantizer.forward,
            list(quantizer.parameters()),
        )
        self.made: tuple[Tensor, Tensor] | None = None
        self.read: list[tuple[Tensor, int]] = []

    def __call__(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not weight.is_leaf:
            return self.compute(weight)
        read = [(tensor, tensor._version) for tensor in (weight, *self.parameters)]
        if self.made is None:
            out, self.read = self.compute(weight), read
            self.made = out, out.detach().requires_grad_(out.requires_grad)
        elif any(
            now is not then or new != old
            for (now, new), (then, old) in zip(read, self.read, strict=True)
        ):
            raise RuntimeError(
                f"quantizer {self.name!r}: its weight or scale was written to between two microbatches of one step, after "
                "the weight had been quantized; step the optimizer outside weight_cache"
            )
        return self.made[1]
