"""What each edge target can run, and how a layer is written for it: data that the emitter reads.

A target says which storage and which integer kernels hold; `plan_layer` decides for one layer, or refuses with its name.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.lowered import ExportError, LoweredLayer, LoweredQuantizer

Storage = Literal["int8", "packed", "onnx-int4"]
Activations = Literal["", "uint8", "int8"]

# On x86 without VNNI the runtime then widens before it adds; elsewhere the entry does nothing.
PRECISE_X64 = (("session.x64quantprecision", "1"),)
PRECISE_SINCE = (
    "ONNX Runtime 1.25 to 1.29 end the process when session.x64quantprecision is set"
)
# The first ONNX Runtime whose QLinearConv is right on x86 processors with AMX or AVX-VNNI: 1.23.0 and 1.24.4 write garbage on
# AMX for 20, 24 or 56 output channels (microsoft/onnxruntime#27671). Elsewhere each target's own `runtime` holds.
RUNTIME_ON_AMX = "1.25.1"
# What runtimes add in fewer than 32 bits; docs/arithmetic.md has the table of kernels.
# Two u8·s8 products are added in saturating 16-bit lanes on x86 without VNNI
PAIR_LIMIT = 32_767
# ARM adds two products with (input - 128) in 16 bits, where (-128)·(-128) twice overflows
LOWEST_BYTE = -127
SUM_LIMIT = (1 << 31) - 1  # every kernel's sum over all products, bias included


@dataclass(frozen=True)
class Target:
    """One place a file can run.

    storage:            "int8": one byte per code; "packed": uint8 planes, unpacked by standard operators that the runtime
                        folds at load (any bits, ORT >= 1.18); "onnx-int4": INT4 initialisers read by a Cast (ORT >= 1.23).
    pair_sums_saturate: u8·s8 kernels add pairs of products in 16 bits (x86 AVX2 without VNNI).
    keeps_scales:       whether activations' scales stay exactly as trained (powers of two, for hardware that shifts), at the
                        price that results at a tie are rounded as each runtime likes (`export/ties.py`).
    opset:              of the file, and the oldest ONNX Runtime that reads it.
    why:                the reason for the floor.
    native:             whether layers run on the operators of export/kernels where those can.
    qdq:                type of the activations in a plain QuantizeLinear/DequantizeLinear file (export/qdq.py): "uint8" with
                        the quantizer's own zero point, or "int8" with zero point 0. Empty: the form in which ONNX Runtime
                        finds its integer kernels.
    session_options:    configuration entries that a session needs for the file's codes to be right wherever it may land.
    """

    name: str
    storage: Storage = "int8"
    pair_sums_saturate: bool = True
    keeps_scales: bool = False
    opset: int = 20
    runtime: str = "1.18"
    why: str = "opset 20 is what torch.onnx writes; every operator used here is older"
    native: bool = False
    qdq: Activations = ""
    session_options: tuple[tuple[str, str], ...] = ()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("ort-int8"),
        Target("ort-packed", storage="packed"),
        Target(
            "ort-packed-int4", storage="onnx-int4", opset=21, runtime="1.23",
            why="INT4 tensors are opset 21; casting them to INT8 needs ONNX Runtime 1.23",
        ),
        Target(
            "ort-native", storage="packed", pair_sums_saturate=False, native=True, session_options=PRECISE_X64,
            runtime="1.30", why=PRECISE_SINCE,
        ),
        Target(
            "ort-int8-vnni", pair_sums_saturate=False, session_options=PRECISE_X64, runtime="1.30", why=PRECISE_SINCE
        ),
        Target(
            "ort-packed-vnni", storage="packed", pair_sums_saturate=False, session_options=PRECISE_X64,
            runtime="1.30", why=PRECISE_SINCE,
        ),
        Target("qdq", pair_sums_saturate=False, keeps_scales=True, qdq="uint8"),
        Target("qdq-symmetric", pair_sums_saturate=False, keeps_scales=True, qdq="int8"),
        Target(
            "qdq-int4", storage="onnx-int4", pair_sums_saturate=False, keeps_scales=True, qdq="uint8",
            opset=21, runtime="1.23", why="INT4 tensors are opset 21; read and compared from ONNX Runtime 1.23 on",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is written. bits: width its codes are stored with (8: plain bytes). uint8: weights offset by 128 for
    the u8·u8 kernel, which widens before it adds."""

    bits: int
    uint8: bool


def target_named(name: str) -> Target:
    """Raises ExportError for an unknown target, with those there are."""
    if name not in TARGETS:
        raise ExportError(
            f"target {name!r}: unknown; there are {', '.join([*TARGETS, 'fp32', 'fp16'])}"
        )
    return TARGETS[name]


def plan_layer(
    target: Target, layer: LoweredLayer, source: LoweredQuantizer | None
) -> LayerPlan:
    """Decide how `layer` is stored for `target`; `source` is the quantizer it reads, None where it reads floats."""
    if target.qdq:
        fits = (
            layer.bits <= 4
            and layer.codes.min(initial=0) >= -8
            and layer.codes.max(initial=0) <= 7
        )
        return LayerPlan(
            4 if fits and target.storage == "onnx-int4" else 8, uint8=False
        )
    if source is not None and needs_uint8(target, layer, source):
        return LayerPlan(8, uint8=True)
    return LayerPlan(layer.bits if target.storage != "int8" else 8, uint8=False)


def needs_uint8(target: Target, layer: LoweredLayer, source: LoweredQuantizer) -> bool:
    """Whether int8 weights would be computed wrongly on some processor of `target`."""
    if holds_lowest_byte(layer):
        return True
    return target.pair_sums_saturate and saturates(layer, source)


def holds_lowest_byte(layer: LoweredLayer) -> bool:
    """Whether a weight, as stored, is the byte -128, with which ARM's int8 kernels overflow."""
    return int(layer.codes.min(initial=0)) * layer.weight_multiplier < LOWEST_BYTE


def check_quantizer(target: Target, quantizer: LoweredQuantizer) -> None:
    """Raises ExportError naming a quantizer whose codes a plain QDQ file for `target` cannot hold."""
    if not target.qdq:
        return
    where = f"quantizer {quantizer.name!r}: target {target.name}"
    if quantizer.is_binary:
        raise ExportError(
            f"{where} has no one-bit activations, for QuantizeLinear knows no threshold; export for an ort target, or train "
            "activations of at least 2 bits"
        )
    lowest, highest = (
        quantizer.low - quantizer.zero_point,
        quantizer.high - quantizer.zero_point,
    )
    if target.qdq == "int8" and (lowest < -128 or highest > 127):
        raise ExportError(
            f"{where} holds activations as int8 with zero point 0, and its codes go from {lowest} to {highest}; train this "
            "quantizer signed or with at most 7 bits, or export for target qdq, which has zero points"
        )


def saturates(layer: LoweredLayer, source: LoweredQuantizer) -> bool:
    """Whether two products of this layer, as stored, can overflow the 16-bit lanes that x86 without VNNI adds them in."""
    largest = (
        int(np.abs(layer.codes.astype(np.int32)).max(initial=0))
        * layer.weight_multiplier
    )
    return 2 * source.high * largest > PAIR_LIMIT


def weight_multiplier_of(target: Target, bits: int, source: LoweredQuantizer) -> int:
    """The integer that weights are multiplied with in the file: the bias, an integer in the same unit, is as much finer.

    It is the largest that keeps codes within [-127, 127] and pairs of products within 16 bits whatever the weights; 1-bit
    codes are +1 and -1. All targets for ONNX Runtime have the same, so that a settled net (`qat/settle.py`) is exact on each.
    """
    if target.qdq:
        return 1
    largest = 1 << max(bits - 1, 0)
    within_a_byte = -LOWEST_BYTE // largest
    within_pairs = PAIR_LIMIT // (2 * source.high * largest)
    return max(min(within_a_byte, within_pairs), 1)
