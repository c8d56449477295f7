"""Every storage gives the same codes and runs the same kernels; what a target cannot run is refused with the layer's name."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import session
from export.certificate import certify, compare_stored
from export.graph import emit_qdq
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredLayer, LoweredQuantizer
from export.metadata import Preprocessing, missing_options, sign
from export.native_graph import emit
from export.passes.biases import check_sums
from export.runtime_checks import INTEGER_KERNELS, layer_kernels
from export.targets import TARGETS, plan_layer, saturates, target_named, weight_multiplier_of
from qat.surgery.layers import QuantConv2d, QuantLinear
from tests.export.conftest import Exported, build_tiny
from tests.quick import slow_but

IMAGES = torch.randn(3, 3, 33, 29, generator=torch.Generator().manual_seed(9))


PACKED = list(itertools.product([2, 3, 4, 5, 7], ["ort-packed", "ort-packed-int4"]))


@pytest.mark.parametrize(
    ("bits", "target"), slow_but([(3, "ort-packed"), (4, "ort-packed-int4"), (7, "ort-packed")], PACKED)
)
def test_packed_files_are_certified_and_fold_to_integer_kernels(bits: int, target: str, tmp_path: Path) -> None:
    model, chosen = build_tiny(bits, IMAGES), TARGETS[target]
    lowered = lower_to_integers(model, IMAGES, chosen)
    proto, file = emit_qdq(lowered, chosen), tmp_path / "packed.onnx"
    onnx.save(proto, str(file))
    result = certify(lowered, file, IMAGES.numpy(), np.zeros(3, np.int64), lambda x: trained_codes(model, x))
    assert result.passed, str(result)
    assert result.integer_kernels == result.layers
    operators = {node.op_type for node in session.optimized(proto).graph.node}
    assert not operators & {"Gather", "Add", "Slice", "Cast"}  # nothing is unpacked at run time


def test_packed_and_plain_files_compute_the_same_logits(tiny: Exported) -> None:
    chosen = TARGETS["ort-packed"]
    packed = emit_qdq(lower_to_integers(tiny.model, IMAGES, chosen), chosen)
    first, second = (session.load(p).run(tiny.images)["logits"] for p in (tiny.proto, packed))
    assert np.array_equal(first, second)
    sizes = {t.name: numpy_helper.to_array(t).nbytes for t in packed.graph.initializer}
    assert sizes["block.conv1.weight/p0"] == 8 * 8 * 9 // 2


def test_a_flipped_bit_in_a_plane_is_found(tiny: Exported) -> None:
    chosen = TARGETS["ort-packed"]
    lowered = lower_to_integers(tiny.model, IMAGES, chosen)
    packed = emit_qdq(lowered, chosen)
    assert compare_stored(lowered, packed) == {}
    plane = next(t for t in packed.graph.initializer if t.name == "right.weight/p0")
    plane.raw_data = bytes([plane.raw_data[0] ^ 0x10]) + plane.raw_data[1:]
    assert compare_stored(lowered, packed) == {"right": f"1 of {7 * 8 * 9} weight codes differ"}


def layer(codes: list[int], bits: int = 8, weight_multiplier: int = 1) -> LoweredLayer:
    return LoweredLayer(
        "l", "conv", np.array([codes], np.int8), np.array([0.5], np.float32), bits, weight_multiplier=weight_multiplier
    )


def test_saturation_is_decided_by_the_worst_pair() -> None:
    grid = LoweredQuantizer.in_storage("q", 1.0, 8, signed=False)
    assert not saturates(layer([64, 64]), grid)  # 2 · 255 · 64 = 32640 fits
    assert saturates(layer([65, 0]), grid)
    assert plan_layer(TARGETS["ort-int8"], layer([127]), grid).uint8
    assert not plan_layer(TARGETS["ort-int8-vnni"], layer([127]), grid).uint8


def test_the_byte_minus_128_is_stored_as_uint8_everywhere() -> None:
    four_bits = LoweredQuantizer.in_storage("q", 1.0, 4, signed=False)
    for target in (t for t in TARGETS.values() if not t.qdq):
        assert plan_layer(target, layer([-128, 3]), four_bits).uint8
        assert plan_layer(target, layer([-8, 3], bits=4, weight_multiplier=16), four_bits).uint8
        assert not plan_layer(target, layer([-127, 3]), four_bits).uint8
        assert not plan_layer(target, layer([-8, 3], bits=4, weight_multiplier=15), four_bits).uint8


STORED = list(itertools.product([2, 3, 4, 8], ["ort-int8", "ort-packed", "ort-packed-int4", "ort-packed-vnni", "qdq"]))
QUICK = [
    (8, "ort-int8"),
    (2, "ort-packed"),
    (3, "ort-packed-int4"),
    (4, "ort-packed-vnni"),
    (8, "qdq"),
    (4, "ort-int8"),
]


@pytest.mark.parametrize(("bits", "target"), slow_but(QUICK, STORED))
def test_no_file_holds_the_byte_minus_128(bits: int, target: str) -> None:
    """Every weight at its lowest code, in the bytes that the runtime's kernels read."""
    model = build_tiny(bits, IMAGES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (QuantConv2d, QuantLinear)):
                module.weight.fill_(-1000.0)
    lowered = lower_to_integers(model, IMAGES, TARGETS[target])
    assert {int(entry.codes.min()) for entry in lowered.layers.values()} <= {-(1 << (bits - 1)), -127}
    weights = bytes_the_runtime_reads(emit(lowered, TARGETS[target]))
    assert len(weights) == len(lowered.layers)
    assert all(stored.dtype == np.uint8 or stored.min() >= -127 for stored in weights.values())


def bytes_the_runtime_reads(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weights as they are after the runtime unpacked them, by layer."""
    optimized = session.optimized(proto, level="BASIC")
    found = {t.name: numpy_helper.to_array(t) for t in optimized.graph.initializer}
    dequantized = {n.output[0]: n.input[0] for n in optimized.graph.node if n.op_type == "DequantizeLinear"}
    layers = [n for n in optimized.graph.node if n.op_type in ("Conv", "Gemm")]
    return {n.name: found[dequantized[n.input[1]]] for n in layers}


def test_sums_beyond_32_bits_are_refused_with_layer_and_channel() -> None:
    grid = LoweredQuantizer.in_storage("q", 1.0, 8, signed=False)
    channels = 70_000
    wide = LoweredLayer(
        "wide", "linear", np.stack([np.ones(channels), np.full(channels, 127)]).astype(np.int8),
        np.ones(2, np.float32), 8, bias_codes=np.zeros(2, np.int32),
    )  # fmt: skip
    assert 127 * 255 * channels > 2**31 - 1 > 127 * 255 * (channels - 5000)
    with pytest.raises(ExportError, match=r"layer 'wide': sums of output channel 1 may reach 2,266,950,000"):
        check_sums(wide, grid)
    check_sums(dataclasses.replace(wide, codes=wide.codes[:, :-5000]), grid)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("high", [1, 3, 15, 127, 255])
def test_carried_codes_fit_int8_and_16_bit_pairs(bits: int, high: int) -> None:
    grid = dataclasses.replace(LoweredQuantizer.in_storage("q", 1.0, 8, signed=False), high=high)
    weight_multiplier = weight_multiplier_of(TARGETS["ort-packed"], bits, grid)
    largest = 1 << max(bits - 1, 0)
    fits = [c for c in range(1, 200) if largest * c <= 127 and 2 * high * largest * c <= 32767]
    assert weight_multiplier == max(fits, default=1)


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(ExportError, match=r"target 'ort-int9': unknown; there are ort-int8, ort-packed"):
        target_named("ort-int9")


def test_kernels_are_named_per_layer(tiny: Exported) -> None:
    assert set(layer_kernels(tiny.lowered.layer_names, tiny.proto).values()) <= INTEGER_KERNELS


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if not target.qdq])
def test_every_layer_runs_an_integer_kernel_whatever_the_target(target: str) -> None:
    chosen = TARGETS[target]
    lowered = lower_to_integers(build_tiny(4, IMAGES), IMAGES, chosen)
    assert set(layer_kernels(lowered.layer_names, emit_qdq(lowered, chosen)).values()) <= INTEGER_KERNELS


def test_a_file_whose_metadata_lost_a_session_option_is_warned_about() -> None:
    chosen = TARGETS["ort-packed-vnni"]
    lowered = lower_to_integers(build_tiny(4, IMAGES), IMAGES, chosen)
    proto = emit_qdq(lowered, chosen)
    shown = Preprocessing(33, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ("a",))
    assert missing_options(sign(proto, lowered, chosen, shown, "test")) == ()
    entry = next(p for p in proto.metadata_props if p.key == "edgeqat")
    entry.value = entry.value.replace('"session.x64quantprecision": "1"', "")
    (warning,) = missing_options(proto)
    assert "session.x64quantprecision=1" in warning
