"""Binary weights: one sign and one learned scale per output channel, whatever function stands before the sign.

    ŵ = α · sign(u(w))        dL/dw = dL/dŵ · α · u'(w)        dL/dα = Σ dL/dŵ · sign(u(w))

u is what binarizers differ in: the identity clipped to [-1, 1] here (XNOR-Net, arXiv 1603.05279, with a learned α), a sine
in `biper`, a rectified clamp in `recu`. The sign's own derivative is taken as 1. α starts at the scale of least squared
error, mean |u(w)|, or uniformly in [0, 1) as BiPer's code has it; a batch norm after the layer makes the two equivalent.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers.contract import (
    SMALLEST_SCALE,
    Quantizer,
    Start,
    along,
    positive_scale,
    sign,
)
from qat.quantizers.spec import QuantSpec
from qat.words import AlphaInit, Init


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return sign(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def sign_ste(u: Tensor) -> Tensor:
    """±1 with the identity as its derivative; zeros become +1. Any float dtype and shape."""
    return _SignSTE.apply(u)


class BinaryWeight(Quantizer):
    """A latent weight w, any shape, in one bit: ŵ = α · sign(u(w)), with u of a subclass (`before_sign`).

    α (`scale`) is learned, one per channel of spec.axis or one in all. The sign's derivative is taken as 1.

    alpha_init: where α starts, "least-squares" or as BiPer's code has it.
    Raises ValueError for a spec of more than 1 bit.
    """

    is_weight = True

    def __init__(
        self,
        spec: QuantSpec,
        weight: Tensor,
        name: str = "",
        *,
        alpha_init: AlphaInit = "least-squares",
    ) -> None:
        if spec.bits != 1:
            raise ValueError(
                f"weight quantizer {name!r}: a binary quantizer has 1 bit, got spec {spec}"
            )
        super().__init__(spec, name)
        self.alpha_init = alpha_init
        shape = () if spec.axis is None else (weight.shape[spec.axis],)
        self.raw_scale = nn.Parameter(torch.ones(shape))

    @torch.no_grad()
    def start_for(self, values: Tensor, init: Init) -> Start:
        """α as `alpha_init` says; one bit has no clipping that `init` could weigh."""
        if self.alpha_init == "uniform":
            return Start(
                torch.empty_like(self.raw_scale)
                .uniform_(0, 1)
                .clamp_min_(SMALLEST_SCALE)
            )
        dims = [d for d in range(values.dim()) if d != self.spec.axis]
        magnitude = self.before_sign(values).abs().float().mean(dim=dims)
        return Start(torch.where(magnitude > 0, magnitude, 1.0))

    def before_sign(self, weight: Tensor) -> Tensor:
        """u(w), differentiable, of w's shape."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no function before the sign"
        )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x̂ of a weight x: sign(f(x)) · α, of x's shape."""
        return self.relaxed(self.before_sign(x)) * along(
            positive_scale(self.raw_scale), x, self.spec.axis
        )

    def relaxed(self, u: Tensor) -> Tensor:
        """ŵ / α for u = u(w), of u's shape: sign(u) with derivative 1, or what a subclass trains on in its place."""
        return sign_ste(u)

    def codes(self, x: Tensor) -> Tensor:
        """-1 or +1, int32."""
        return sign(self.before_sign(x.detach())).to(torch.int32)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return str(self.spec)


class SignWeight(BinaryWeight):
    """u(w) = clip(w, -1, 1): the plain straight-through estimator."""

    def __init__(
        self, spec: QuantSpec, weight: Tensor, name: str = "", **options: Any
    ) -> None:
        super().__init__(spec, weight, name, **options)
        self.begin(weight.detach())

    def before_sign(self, weight: Tensor) -> Tensor:
        """w clipped to [-1, 1], of its shape."""
        return weight.clamp(-1, 1)
