"""The certificate passes on what was trained and names what was not."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.certificate import Certificate, LevelResult, certify, compare_stored
from export.fidelity import fidelity
from export.lowered import ExportError
from export.reference import IntegerReference
from export.runtime_checks import layer_kernels
from qat.surgery.swap import quantizers
from tests.export.conftest import Exported

LABELS = np.zeros(6, np.int64)


def certificate(tiny: Exported, file: Path) -> Certificate:
    return certify(tiny.lowered, file, tiny.images, LABELS, tiny.trained)


def tampered(tiny: Exported, name: str, tmp_path: Path) -> Path:
    """The file with one element of initializer `name` changed in its lowest bit (weights: the lowest bit of the code)."""
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.proto)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    data = bytearray(tensor.raw_data)
    layer = tiny.lowered.layers.get(name)
    data[4] ^= 1 if layer is None else layer.weight_multiplier
    tensor.raw_data = bytes(data)
    file = tmp_path / "tampered.onnx"
    onnx.save(proto, str(file))
    return file


def test_every_code_matches_at_the_integer_levels(tiny: Exported) -> None:
    result = certificate(tiny, tiny.file)
    assert result.passed and result.mismatches == 0
    by_level = {level.level: level for level in result.levels}
    assert list(by_level) == ["DISABLE", "BASIC", "EXTENDED", "ALL"]
    assert by_level["ALL"].total == by_level["EXTENDED"].total == 0
    assert by_level["ALL"].logits_equal and by_level["EXTENDED"].logits_equal
    assert by_level["ALL"].codes == sum(codes.size for codes in tiny.trained(tiny.images)[0].values())
    assert result.integer_kernels == result.layers == 6


def test_rounding_of_biases_is_all_that_separates_training_from_the_integer_definition(
    tiny: Exported,
) -> None:
    exact = dataclasses.replace(tiny.lowered, layers=dict(tiny.lowered.layers), quantizers={})
    scales = {name: np.float32(q.scale.item()) for name, q in quantizers(tiny.model).items() if not q.is_weight}
    for name, grid in tiny.lowered.quantizers.items():  # with the trained scales, before ties were avoided
        exact.quantizers[name] = dataclasses.replace(grid, scale=scales[name])
    for name, layer in exact.layers.items():
        unit = (exact.quantizers[layer.input_quantizer].scale * layer.stored_scale).astype(np.float64)
        bias = np.zeros(len(unit)) if layer.bias is None else layer.bias
        exact.layers[name] = dataclasses.replace(layer, bias_codes=bias / unit)  # type: ignore[arg-type]  # not rounded
    found = tiny.trained(tiny.images)
    judged, _ = fidelity(IntegerReference(exact), tiny.images, lambda images: found, found[1], len(tiny.images))
    # float32 convolution in training against exact sums: about 3 codes in a million at ties
    assert not judged.unexplained and judged.at_ties <= 1e-5 * judged.codes, judged


@pytest.mark.parametrize("layer", ["stem", "block.conv2", "head"])
def test_one_corrupt_weight_code_is_found_and_its_layer_named(tiny: Exported, layer: str, tmp_path: Path) -> None:
    result = certificate(tiny, tampered(tiny, f"{layer}.weight", tmp_path))
    assert not result.passed and result.mismatches > 0
    assert list(result.stored) == [layer]
    assert "1 of" in result.stored[layer] and "NOT CERTIFIED" in str(result) and f"{layer}:" in str(result)


def test_a_corrupt_code_shows_in_the_runtimes_codes_right_after_its_layer(tiny: Exported, tmp_path: Path) -> None:
    result = certificate(tiny, tampered(tiny, "block.conv2.weight", tmp_path))
    exact = next(level for level in result.levels if level.level == "ALL")
    assert list(exact.mismatches) == ["block.bn2#batch_norm0"]


@pytest.mark.parametrize(("tensor", "what"), [("left.weight/s", "scale"), ("left.bias", "bias")])
def test_corrupt_scale_and_bias_are_found(tiny: Exported, tensor: str, what: str, tmp_path: Path) -> None:
    file = tampered(tiny, tensor, tmp_path)
    assert compare_stored(tiny.lowered, onnx.load(str(file))) == {
        "left": f"its {'weight scale' if what == 'scale' else what} differs"
    }


def test_a_corrupt_activation_scale_fails_through_the_runtimes_codes(tiny: Exported, tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.proto)
    clip = next(n for n in proto.graph.node if n.output[0] == "block.conv2.input")
    scale = next(n.input[1] for n in proto.graph.node if n.output[0] == clip.input[0])
    tensor = next(t for t in proto.graph.initializer if t.name == scale)
    value = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.01)
    tensor.raw_data = value.tobytes()
    file = tmp_path / "scaled.onnx"
    onnx.save(proto, str(file))
    result = certificate(tiny, file)
    assert not result.passed and not result.stored


def test_a_layer_left_in_float_is_named(tiny: Exported) -> None:
    """Clip in float before the quantizer breaks the runtime's fusion; the check of its graph must notice."""
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.proto)
    clipped = next(n for n in proto.graph.node if n.op_type == "Clip" and n.output[0] == "block.conv2.input")
    node = next(n for n in proto.graph.node if n.output[0] == clipped.input[0])
    clip = onnx.helper.make_node("Sigmoid", [node.input[0]], ["sigmoid"])
    node.input[0] = "sigmoid"
    proto.graph.node.insert(list(proto.graph.node).index(node), clip)
    kernels = layer_kernels(tiny.lowered.layer_names, proto)
    assert [name for name, kernel in kernels.items() if kernel != "QLinearConv" and name != "head"] == ["block.conv1"]


def test_missing_foreign_and_damaged_files_are_named(tiny: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.onnx: no such file"):
        certificate(tiny, tmp_path / "absent.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(tiny.file.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"damaged\.onnx: not a valid ONNX file"):
        certificate(tiny, damaged)
    foreign = tmp_path / "foreign.onnx"
    node = onnx.helper.make_node("Relu", ["input"], ["logits"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [1, 3, 33, 29]) for n in ("input", "logits")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])), str(foreign))
    with pytest.raises(ExportError, match=r"foreign\.onnx: has no tensor"):
        certificate(tiny, foreign)


def test_float_levels_may_decide_ties_and_nothing_else(tiny: Exported) -> None:
    """Few differences pass, or any number that lies at ties; the exact levels pass none."""
    at_ties, beyond = 5e-5, 0.02
    assert LevelResult("DISABLE", 100_000, {"q": 31}, True, (), at_ties).passed
    assert not LevelResult("DISABLE", 100_000, {"q": 31}, True, (), beyond).passed
    assert LevelResult("BASIC", 100_000, {"q": 1}, True, (), beyond).passed
    assert not LevelResult("ALL", 100_000, {"q": 1}, True, (), at_ties).passed
    reference = IntegerReference(tiny.lowered)
    images = torch.from_numpy(tiny.images)
    codes, _ = reference.run(images)
    reference.run(images, given=codes)
    assert reference.farthest_from_tie == 0.0
    grid = tiny.lowered.quantizers["stem.input"]
    scaled = tiny.images.astype(np.float64) / float(grid.scale)
    wrong = codes["stem.input"].copy()
    wrong[0, 0, 0, 0] ^= 1
    reference.run(images, given=codes | {"stem.input": wrong})
    first = scaled[0, 0, 0, 0]
    assert reference.farthest_from_tie == pytest.approx(abs(first - np.floor(first) - 0.5), abs=1e-6)
