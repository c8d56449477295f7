"""Quantizers for a convolution or linear that no layer's own forward makes in the plain way: a weight that is computed
(weight standardization), a parameter that a block multiplies with directly, a layer's weight that another module uses.
"""

from typing import Any

from torch import Tensor, nn

from qat.quantizers.contract import Quantizer
from qat.surgery.binarize import input_quantizer, weight_quantizer
from qat.surgery.layers import LayerSpec
from qat.surgery.trace import weight_operand
from qat.words import Init


class QuantOperands(nn.Module):
    """Fake-quantizes the operands of one call of a convolution or linear, whatever they were computed from.

    kind: "conv1d", "conv2d" or "linear". `forward` gives the operands; export reads them there.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def __init__(
        self, name: str, kind: str, spec: LayerSpec, weight: Tensor, init: Init
    ) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        self.weight_quantizer = self.input_quantizer = None
        if spec.weight is not None:
            self.weight_quantizer = weight_quantizer(
                spec.weight, weight, f"{name}.weight", init, spec.binarizer
            )
        if spec.input is not None:
            self.input_quantizer = input_quantizer(
                spec.input, f"{name}.input", weight.shape[1], spec.binarizer
            )

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: the convolution's or linear's input; weight: O_I_kH_kW, O_I_k or O_I; bias: (O,) or None, passed through."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        return x, weight, bias

    def quantized(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with x, weight and bias quantized."""
        given = args[0] if args else kwargs["input"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        operands = self(given, weight_operand(args, kwargs), bias)
        return (*operands, *args[3:]), {
            k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")
        }
