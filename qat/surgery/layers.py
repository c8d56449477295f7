"""Quantized convolution and linear layers: the float layer's own parameters, a weight quantizer and an input quantizer.

    y = conv(Q_x(x), Q_w(w)) + b          (LSQ, arXiv 1902.08153, figure 1)

State-dict keys of the float layer (`weight`, `bias`) stay what they were. `input_quantizer` is None where the input is
already on an 8-bit grid that the layer reads as it is (see `qat/surgery/plan.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer
from qat.quantizers.recompute import recomputed
from qat.quantizers.spec import QuantSpec
from qat.surgery.binarize import BIPER, Binarizer, input_quantizer, weight_quantizer
from qat.words import Init


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized; None leaves that operand in floating point. `binarizer` says how one-bit operands are.

    table: True: a function of its result alone, such as a GELU after a linear, reads 8-bit codes of it, so that a file for
           `ort-native` holds the function as a table. False: it reads floats where a runtime can write them.
    """

    weight: QuantSpec | None
    input: QuantSpec | None
    binarizer: Binarizer = BIPER
    table: bool = False


FLOAT = LayerSpec(weight=None, input=None)

# Conv2d subclasses whose forward is known here: their padding rule. Anything else might compute something of its own.
PADDING_RULES = {"Conv2d": "fixed", "Conv2dSame": "same"}
# Torch's, and timm's of the same name and arithmetic
LINEAR_NAMES = {"Linear", "NonDynamicallyQuantizableLinear"}


def wraps(layer: nn.Module) -> bool:
    """Whether a layer's forward is known, so that it can be wrapped; of another, the operands are quantized where it
    multiplies them (`qat/surgery/operands.py`)."""
    if isinstance(layer, nn.Conv2d):
        return type(layer).__name__ in PADDING_RULES
    return isinstance(layer, nn.Linear) and type(layer).__name__ in LINEAR_NAMES


class QuantConv2d(nn.Conv2d):
    """Conv2d on fake-quantized input and weight; N_C_H_W float in, N_O_H_W float out.

    `same_padding` pads at run time as TensorFlow (and timm's Conv2dSame) does, after the input quantizer: zero is a code.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    same_padding: bool

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, spec: LayerSpec, name: str, init: Init = "lsq"
    ) -> "QuantConv2d":
        """Wrap `conv`, sharing its parameters. Raises ValueError for a subclass whose forward is not known."""
        rule = PADDING_RULES.get(type(conv).__name__)
        if rule is None:
            raise ValueError(
                f"layer {name!r}: {type(conv).__name__} is a Conv2d subclass that quantize_ does not know; "
                "give it a FLOAT rule to leave it in floating point"
            )
        quantized = _share_state(cls, conv, spec, name, init)
        quantized.same_padding = rule == "same"
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        """The layer on x̂, with ŵ."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        weight = (
            self.weight
            if self.weight_quantizer is None
            else self.weight_quantizer(self.weight)
        )
        with recomputed(x, weight):
            return self._conv_forward(x, weight, self.bias)


class QuantLinear(nn.Linear):
    """Linear on fake-quantized input and weight; (..., in_features) float in, (..., out_features) float out."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    @classmethod
    def from_float(
        cls, linear: nn.Linear, spec: LayerSpec, name: str, init: Init = "lsq"
    ) -> "QuantLinear":
        """The quantized twin of `linear`, with its parameters. Raises ValueError for an unknown subclass."""
        if type(linear).__name__ not in LINEAR_NAMES:
            raise ValueError(
                f"layer {name!r}: {type(linear).__name__} is a Linear subclass that quantize_ does not know"
            )
        return _share_state(cls, linear, spec, name, init)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on x̂, with ŵ."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = (
            self.weight
            if self.weight_quantizer is None
            else self.weight_quantizer(self.weight)
        )
        with recomputed(x, weight):
            return F.linear(x, weight, self.bias)


def _share_state(
    cls: Any, layer: nn.Module, spec: LayerSpec, name: str, init: Init
) -> Any:
    quantized = cls.__new__(cls)
    quantized.__dict__.update(layer.__dict__)
    quantized._modules = dict(layer._modules)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    quantized.weight_quantizer = quantized.input_quantizer = None
    if spec.weight is not None:
        quantized.weight_quantizer = weight_quantizer(
            spec.weight, weight, f"{name}.weight", init, spec.binarizer
        )
    if spec.input is not None:
        channels = getattr(layer, "in_channels", weight.shape[-1])
        quantized.input_quantizer = input_quantizer(
            spec.input, f"{name}.input", channels, spec.binarizer
        )
    return quantized


def pad_same(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Zero-pad N_C_H_W so that the convolution's output is ceil(size / stride); the odd pixel goes right and bottom."""
    pads: list[int] = []
    for axis in (1, 0):  # F.pad counts from the last axis
        size = x.shape[2 + axis]
        covered = (
            (-(-size // stride[axis]) - 1) * stride[axis]
            + (kernel[axis] - 1) * dilation[axis]
            + 1
        )
        total = max(covered - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x
