"""What integers round off a trained net: how far each layer's int32 bias lies from the trained one, and the sums it is
added to."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.lowered import LoweredLayer, LoweredModel, LoweredQuantizer
from export.skeleton import reading_quantizer, weight_layer

# The largest sum of a channel that `export/passes/biases.py` may reduce to its bias, in codes
NEGLIGIBLE_CODES = 2.0**-10


@dataclass(frozen=True)
class BiasRounding:
    """change: float64 (O,), what rounding adds to the bias, in real units. unit: float64 (O,), real value of one bias code.
    in_codes: float64 (O,), the change in codes of the quantizer that reads the layer; None where its results are floats."""

    change: NDArray[np.float64]
    unit: NDArray[np.float64]
    in_codes: NDArray[np.float64] | None

    @property
    def largest(self) -> float:
        """Of all channels, in codes; 0 where results are floats."""
        return (
            0.0
            if self.in_codes is None
            else float(np.abs(self.in_codes).max(initial=0.0))
        )


def bias_roundings(model: LoweredModel) -> dict[str, BiasRounding]:
    """By layer of a canonical `model`. Left out: layers with float biases, which round nothing, and those that end in one
    bit, whose integer biases decide exactly what the trained thresholds decide."""
    found: dict[str, BiasRounding] = {}
    for node in model.skeleton.graph:
        layer = weight_layer(node, model)
        if layer is None or layer.bias_codes is None:
            continue
        reader = reading_quantizer(node, model)
        if reader is None or not reader.is_binary:
            found[layer.name] = _rounding(
                layer, model.quantizers[layer.input_quantizer], reader
            )
    return found


def _rounding(
    layer: LoweredLayer, source: LoweredQuantizer, reader: LoweredQuantizer | None
) -> BiasRounding:
    assert layer.bias_codes is not None
    # In float32, as the runtime multiplies them
    unit = (source.scale * layer.stored_scale).astype(np.float64)
    change = layer.bias_codes * unit - layer.folded_bias
    in_codes = None if reader is None else change / float(reader.scale)
    return BiasRounding(change, np.abs(unit), in_codes)


def largest_sums(layer: LoweredLayer, source: LoweredQuantizer) -> NDArray[np.float64]:
    """float64 (O,): the largest magnitude that a channel's sum of products of codes can have, without bias and multiplier."""
    largest_input = max(source.high - source.zero_point, source.zero_point - source.low)
    return (
        np.abs(layer.codes.astype(np.float64)).reshape(len(layer.codes), -1).sum(1)
        * largest_input
    )


def largest_results(
    layer: LoweredLayer, source: LoweredQuantizer
) -> NDArray[np.float64]:
    """float64 (O,): the same in real units."""
    return (
        largest_sums(layer, source)
        * np.abs(layer.scale.astype(np.float64))
        * float(source.scale)
    )
