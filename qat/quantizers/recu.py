"""ReCU: rectified clamp of weights before their sign (Xu et al., ICCV 2021, arXiv 2103.12369).

    v = (w - mean(w)) / std(w), over each output channel        u(w) = clip(v, Q(1-τ), Q(τ)), quantiles over the layer

Weights far out can hardly change their sign any more ("dead weights"); the clamp brings them back to the quantile, and
their gradient is 0 only there. τ stays fixed here (the published code lets it rise from 0.85 to 0.99).
"""

from typing import Any

import torch
from torch import Tensor

from qat.quantizers.binary import BinaryWeight
from qat.quantizers.contract import along
from qat.quantizers.spec import QuantSpec

EPSILON = 1e-5


class RectifiedWeight(BinaryWeight):
    """ReCU's weight quantizer: u(w) clips the standardized weight to its quantiles 1 - τ and τ. Xu et al., ICCV 2021,
    arXiv 2103.12369.

    tau: quantile that weights are clamped to, in (0.5, 1]. Raises ValueError for another.
    """

    def __init__(
        self,
        spec: QuantSpec,
        weight: Tensor,
        name: str = "",
        *,
        tau: float = 0.99,
        **options: Any,
    ) -> None:
        super().__init__(spec, weight, name, **options)
        if not 0.5 < tau <= 1:
            raise ValueError(
                f"weight quantizer {name!r}: tau must lie in (0.5, 1], got {tau}"
            )
        self.tau = tau
        self.begin(weight.detach())

    def before_sign(self, weight: Tensor) -> Tensor:
        """w standardised and clamped to its quantiles 1 - tau and tau, of its shape."""
        rows = (
            weight.reshape(1, -1)
            if self.spec.axis is None
            else weight.movedim(self.spec.axis, 0).flatten(1)
        )
        deviation, mean = torch.std_mean(rows, dim=1)
        if self.spec.axis is None:
            mean, deviation = mean.squeeze(), deviation.squeeze()
        axis = self.spec.axis
        centred = (weight - along(mean, weight, axis)) / (
            along(deviation, weight, axis) + EPSILON
        )
        return centred.clamp(*_quantiles(centred.detach().flatten(), self.tau))


def _quantiles(values: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(Q(1-τ), Q(τ)), the nearest ranks; torch.quantile takes no more than 16 million values."""
    last = values.numel() - 1
    low = min(int((1 - tau) * last), last)
    return values.kthvalue(low + 1).values, values.kthvalue(last - low + 1).values
