"""Names of tensors that one file writes and another reads.

    <layer>.weight          a layer's weight codes as bytes; also the name of its weight quantizer and the key of the layer
    <layer>.weight/int4     the codes as ONNX's INT4
    <layer>.weight/p<i>     plane i of packed codes (`export/packing.py`)
    <layer>.weight/s        the weight's scale, one per output channel
    <layer>.bias            the bias, as integer codes or as floats
    @<name>                 uint8 codes as native operators order them (N_H_W_C), of a quantizer or a skeleton value

A layer that runs again within one forward pass is called <layer>@<count>.
"""

WEIGHT = ".weight"
BIAS = ".bias"
NATIVE_CODES = "@"


def weight_of(layer: str) -> str:
    """Name of a layer's weight."""
    return f"{layer}{WEIGHT}"


def layer_of(weight: str) -> str:
    """Name of the layer whose weight has this name; other names come back as they are."""
    return weight.removesuffix(WEIGHT)


def int4_weight_of(layer: str) -> str:
    """Name of a layer's weight codes in ONNX's INT4."""
    return f"{weight_of(layer)}/int4"


def plane_of(layer: str, index: int) -> str:
    """Name of one plane of a layer's packed weight codes."""
    return f"{weight_of(layer)}/p{index}"


def weight_scale_of(layer: str) -> str:
    """Name of the scale of a layer's weight."""
    return f"{weight_of(layer)}/s"


def bias_of(layer: str) -> str:
    """Name of a layer's bias."""
    return f"{layer}{BIAS}"


def gamma_of(beta: str) -> str:
    """Name of a norm's weight in the model, from that of its bias."""
    return weight_of(beta.removesuffix(BIAS))


def run_again(name: str, count: int) -> str:
    """Name of a quantizer in its `count`-th repeated run within one forward pass."""
    if name.endswith(WEIGHT):
        return weight_of(f"{layer_of(name)}@{count}")
    return f"{name}@{count}"


def native_codes_of(name: str) -> str:
    """Name of the tensor in which native operators hold the codes of `name`, a quantizer or a skeleton value."""
    return f"{NATIVE_CODES}{name}"


def named_by_native_codes(tensor: str) -> str | None:
    """The quantizer or skeleton value whose codes a native tensor of this name holds; None for another tensor."""
    if not tensor.startswith(NATIVE_CODES):
        return None
    return tensor.removeprefix(NATIVE_CODES)
