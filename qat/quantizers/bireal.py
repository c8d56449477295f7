"""Binary activations with Bi-Real Net's surrogate (Liu et al., ECCV 2018, arXiv 1808.00278; `docs/algorithms.md`).

    forward   code = +1 where a >= t, else -1                  backward   dL/da = dL/dcode · max(0, 2 - 2|ā|)

ā = a - t, or with `standardize` (a - t) / sqrt(var(a - t) + 1e-5) per sample over channels and space, through which
gradients flow. A positive factor changes no sign, so training and evaluation compute the same codes. t is 0, or learned per
channel (ReActNet's RSign, arXiv 2003.03488).

BiPer's published code (edmav4/BiPer) takes the unbiased variance, the sum of squares over n - 1 for n values per sample, and
divides in training only, so that a gradient taken in evaluation is that of the values themselves: `published_deviation`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer, sign
from qat.quantizers.spec import QuantSpec

EPSILON = 1e-5


class _SignBiReal(torch.autograd.Function):
    """(a - t, ā) -> sign(a - t); the gradient goes to ā."""

    @staticmethod
    def forward(ctx: Any, shifted: Tensor, surrogate: Tensor) -> Tensor:
        ctx.save_for_backward(surrogate)
        return sign(shifted)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (surrogate,) = ctx.saved_tensors
        return None, (2 - 2 * surrogate.abs()).clamp_min_(0).mul_(gradients[0])


class BinaryActivation(Quantizer):
    """Activations in one bit: sign(a - t), codes -1 and +1, scale 1. Input N_C_H_W (or N_C), float.

    Its derivative is Bi-Real Net's, 2 - 2|ā| for |ā| < 1, else 0. Liu et al., ECCV 2018, arXiv 1808.00278.

    channels:    length of axis 1 when thresholds are learned, else None.
    standardize: take the surrogate at values of unit variance per sample.
    published_deviation: with `standardize`, the unbiased variance, and in training mode only, as in BiPer's code.
    """

    def __init__(
        self,
        spec: QuantSpec,
        name: str = "",
        *,
        standardize: bool = True,
        published_deviation: bool = False,
        channels: int | None = None,
    ) -> None:
        if spec.bits != 1 or spec.axis is not None:
            raise ValueError(
                f"quantizer {name!r}: a binary activation has 1 bit and one scale, got spec {spec}"
            )
        super().__init__(spec, name)
        self.standardize, self.initialized = standardize, True
        self.published_deviation = published_deviation
        # BatchNorm scales what a binary layer reads
        self.raw_scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.threshold = (
            None if channels is None else nn.Parameter(torch.zeros(channels))
        )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x̂ of activations x: -1 or +1, of x's shape."""
        shifted = self._shifted(x)
        surrogate = shifted
        if self.standardize and shifted.requires_grad:
            surrogate = self._standardized(shifted)
        return _SignBiReal.apply(shifted.detach(), surrogate)

    def _standardized(self, shifted: Tensor) -> Tensor:
        if self.published_deviation and not self.training:
            return shifted
        dims = tuple(range(1, shifted.dim()))
        variance = shifted.var(dims, unbiased=self.published_deviation, keepdim=True)
        return shifted * torch.rsqrt(variance + EPSILON)

    def codes(self, x: Tensor) -> Tensor:
        """-1 or +1, int32."""
        return sign(self._shifted(x.detach())).to(torch.int32)

    def _shifted(self, x: Tensor) -> Tensor:
        if self.threshold is None:
            return x
        return x - self.threshold.view(1, -1, *[1] * (x.dim() - 2))
