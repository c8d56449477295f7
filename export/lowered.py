"""The contract between training and export: plain data, no torch.

A trained model becomes a *skeleton*, an ONNX graph in which a node `edgeqat::Mark(name)` stands wherever a quantizer stood,
plus one `LoweredLayer` for every weight quantizer and one `LoweredQuantizer` for every activation quantizer.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.names import weight_of

DOMAIN, MARK = "edgeqat", "Mark"
# Noted at a batch norm of the skeleton: name of the parameter that beta is
BIAS_PARAMETER = "edgeqat.bias_parameter"
# One-bit codes are -127 and +127 in storage: the integer bias gains as much precision, for nothing
BINARY_GAIN = 127


class ExportError(ValueError):
    """The model, the layer or the file cannot be exported or checked; the message names it and says what to do."""


@dataclass(frozen=True)
class LoweredLayer:
    """One quantized convolution or linear layer.

    codes:   int8, O_I_kH_kW or O_I: the codes that were trained, never re-quantized.
    scale:   float32 (O,): real value of one code; after batch-norm folding it carries the norm's multiplier and its
             sign, so that the codes stay untouched (`passes/scales.py` moves the sign onto them where it must).
    bias:    float64 (O,) in real units, or None before anything was folded and the layer has none.
    bias_parameter: name of the trained model's parameter that `bias` rises and falls with, one for one: the layer's own
             bias, or the beta of the batch norm that was folded in. Empty where there is none.
    bias_codes: int32 (O,) in units of input scale times `stored_scale`; set by `passes.to_integers`, but for targets whose
             files hold float biases.
    input_quantizer: name of the quantizer whose codes the layer reads; set by `passes.to_integers`. Empty in a
             weight-only net, whose layers multiply floats with dequantized codes.
    weight_multiplier: integer the codes are multiplied with in the file, so that the integer bias has a finer unit
             ("carry" in metadata and nodes).
    bias_only_channels: output channels in which the bias alone decides every result (a multiplier next to 0, a result that is
             always clipped, a bias that leaves no room for sums); their codes are 0, whatever was trained.
    """

    name: str
    kind: str
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int
    bias: NDArray[np.float64] | None = None
    bias_parameter: str = ""
    bias_codes: NDArray[np.int32] | None = None
    input_quantizer: str = ""
    weight_multiplier: int = 1
    bias_only_channels: tuple[int, ...] = ()

    @property
    def stored_scale(self) -> NDArray[np.float32]:
        """float32 (O,): real value of one unit of codes · weight multiplier, what the file's weight scale is."""
        return self.scale / np.float32(self.weight_multiplier)

    @property
    def folded_bias(self) -> NDArray[np.float64]:
        """float64 (O,): the bias in real units before it was rounded, 0 where the layer has none."""
        return np.zeros(len(self.scale)) if self.bias is None else self.bias

    @property
    def float_bias(self) -> NDArray[np.float32]:
        """float32 (O,): what a layer without integer biases adds."""
        return self.folded_bias.astype(np.float32)


@dataclass(frozen=True)
class LoweredQuantizer:
    """One activation quantizer, its codes in uint8 storage: value = (stored - zero_point) · scale, low <= stored <= high.

    thresholds:  one bit only, one number or one per channel: storage code 254 where the value reaches it, else 0.
    write_scale: one bit only, after a layer: scale that QuantizeLinear gets (`export/thresholds.py`).
    moved_ppm:   how far the scale was moved from the trained one, in parts per million (`export/ties.py`).
    is_fixed:    whether the scale must stay as it is, a power of two.
    """

    name: str
    scale: np.float32
    zero_point: int
    bits: int
    low: int
    high: int
    thresholds: tuple[float, ...] = ()
    write_scale: np.float32 | None = None
    moved_ppm: int = 0
    is_fixed: bool = False

    @property
    def is_binary(self) -> bool:
        """Whether its codes are +1 and -1."""
        return self.bits == 1

    @property
    def gain(self) -> int:
        """stored = code · gain + zero_point."""
        return BINARY_GAIN if self.is_binary else 1

    @classmethod
    def binary(
        cls, name: str, scale: float, thresholds: tuple[float, ...]
    ) -> "LoweredQuantizer":
        """A one-bit quantizer of ±scale that decides at `thresholds`, one or one per channel."""
        return cls(
            name,
            np.float32(scale / BINARY_GAIN),
            BINARY_GAIN,
            1,
            0,
            2 * BINARY_GAIN,
            thresholds,
        )

    @classmethod
    def in_storage(
        cls,
        name: str,
        scale: float,
        bits: int,
        signed: bool,
        zero_point: int | None = None,
    ) -> "LoweredQuantizer":
        """zero_point: of a quantizer with an offset, whose codes lie in storage as they are."""
        if zero_point is None:
            zero_point = 1 << (bits - 1) if signed else 0
        return cls(name, np.float32(scale), zero_point, bits, 0, (1 << bits) - 1)

    def clipped(self, lowest: float, highest: float) -> "LoweredQuantizer":
        """The same grid after an activation that clips to [lowest, highest]: rounding is monotone, so the clip moves
        onto the codes."""
        if self.is_binary:  # the clip's own bounds reach a threshold, or never do
            thresholds = []
            for threshold in self.thresholds:
                thresholds.append(_clipped_threshold(threshold, lowest, highest))
            return replace(self, thresholds=tuple(thresholds))
        low = self.low
        if np.isfinite(lowest):
            low = max(low, self._stored(lowest))
        high = self.high
        if np.isfinite(highest):
            high = min(high, self._stored(highest))
        return replace(self, low=low, high=high)

    def _stored(self, value: float) -> int:
        code = np.rint(np.float32(value) / self.scale) + self.zero_point
        return int(np.clip(code, 0, 255))


def _clipped_threshold(threshold: float, lowest: float, highest: float) -> float:
    """The threshold of x that decides as `threshold` does of x clipped to [lowest, highest]."""
    if lowest >= threshold:
        return -np.inf
    if highest < threshold:
        return np.inf
    return threshold


@dataclass(frozen=True)
class Tried:
    """One operation on codes, all of whose inputs were tried under every known arithmetic (`export/ties.py`).

    quantizer: whose codes it ends in. kind: what it does. inputs: how many were tried. ppm: how far the scale was moved.
    remaining: inputs on which arithmetics still differ; not 0 only where no scale near by avoids all ties.
    """

    quantizer: str
    kind: str
    inputs: int
    ppm: int
    remaining: int


@dataclass
class LoweredModel:
    """Skeleton, layers and quantizers by name, notes on what lowering decided, and the operations that were tried.

    multiply_adds: of the trained net for one image, as PyTorch's dispatcher counts them, but for those of constants.
    trained_at: quantizers that were moved before layout operations -> the value that now carries their codes in the
                order in which the trained net has them.
    repeated: marks of quantizers that run again -> the mark of their first run.
    exact_norms: whether the target computes layer norms of codes as `export/arithmetic.py` defines them; elsewhere they are
                 the runtime's own, in floating point.
    """

    skeleton: ir.Model
    layers: dict[str, LoweredLayer]
    quantizers: dict[str, LoweredQuantizer]
    notes: list[str] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    multiply_adds: int = 0
    trained_at: dict[str, ir.Value] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    exact_norms: bool = False

    def layer(self, name: str) -> LoweredLayer:
        """The layer of this name."""
        return self.layers[weight_of(name)]

    def put_layer(self, layer: LoweredLayer) -> None:
        """Put `layer` in the place of the one of its name."""
        self.layers[weight_of(layer.name)] = layer

    @property
    def weight_codes(self) -> int:
        """How many weight codes the layers have."""
        return sum(layer.codes.size for layer in self.layers.values())

    @property
    def layer_names(self) -> list[str]:
        """Names of all layers."""
        return [layer.name for layer in self.layers.values()]
