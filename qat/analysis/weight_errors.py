"""What quantization does to a layer's weights: its noise, and how many weights lie beyond the grid.

SQNR = 10 log10( Σ w² / Σ (w - ŵ)² ) in dB, ŵ the fake-quantized weight; about 6 dB more for every bit
clipped = share of the weights whose w / s lies beyond the lowest or the highest code
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer, along
from qat.surgery.swap import quantized_weights


@dataclass(frozen=True)
class WeightError:
    """Of one layer. sqnr: in dB, infinite where nothing is lost. clipped: share of the weights."""

    name: str
    bits: int
    sqnr: float
    clipped: float


def weight_errors(model: nn.Module) -> list[WeightError]:
    """Of every layer with weights of 2 bits or more, in the model's order: of one bit only the sign is kept, so that its
    weights have no size to lose."""
    errors = []
    for weight, quantizer in quantized_weights(model):
        if quantizer.spec.bits > 1:
            errors.append(weight_error(weight.detach(), quantizer))
    return errors


@torch.no_grad()
def weight_error(weight: Tensor, quantizer: Quantizer) -> WeightError:
    """weight: latent, of any shape."""
    spec = quantizer.spec
    lost = weight - quantizer(weight)
    signal = float(weight.double().square().sum())
    noise = float(lost.double().square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise)
    in_scales = weight / along(quantizer.scale, weight, spec.axis)
    beyond = (in_scales < spec.qmin) | (in_scales > spec.qmax)
    name = quantizer.name.removesuffix(".weight")
    return WeightError(name, spec.bits, sqnr, float(beyond.float().mean()))
