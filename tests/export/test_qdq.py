"""Plain QDQ files: their form, the codes in them, and how the runtimes' codes compare with the integer definition."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from export import session
from export.agreement import Agreement, agree, compare_codes, onnx_runtime, to_storage
from export.certificate import FLOAT_LEVEL_LIMIT, compare_stored
from export.fidelity import fidelity
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredLayer, LoweredModel, LoweredQuantizer
from export.metadata import Preprocessing, broken_signatures, read_metadata, sign
from export.native_graph import emit
from export.passes.scales import positive_scales
from export.reference import IntegerReference
from export.targets import TARGETS, check_quantizer, plan_layer, weight_multiplier_of
from export.verify import verify_file
from qat.quantizers.lsq import LSQ
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import LayerSpec
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from tests.export.test_binary import IMAGES as BINARY_IMAGES
from tests.export.test_binary import binary_net
from tests.export.test_two_quantizers import Twice
from tests.surgery.nets import TinyNet, with_random_norms

Signed = tuple[nn.Module, LoweredModel, Path]
IMAGES = torch.randn(6, 3, 31, 31, generator=torch.Generator().manual_seed(11))
QDQ = [name for name, target in TARGETS.items() if target.qdq]
NORMS = {"stem": "bn", "block.conv1": "block.bn1", "block.conv2": "block.bn2"}


def tiny_net(target: str) -> nn.Module:
    """TinyNet at 4 bits with 7-bit edges, so that every weight code has its opposite. Streams have 8 bits, but 7 where int8
    with zero point 0 must hold unsigned ones."""
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    stream = QuantSpec(7 if target == "qdq-symmetric" else 8)
    quantize_(model, uniform_rules(4, 4, ("stem", "head"), 7), IMAGES[:1], stream=stream, weight_init="mse")
    calibrate(model, [IMAGES])
    return model


def exported(model: nn.Module, target: str) -> tuple[LoweredModel, onnx.ModelProto]:
    lowered = lower_to_integers(model, IMAGES, TARGETS[target])
    proto = emit(lowered, TARGETS[target])
    onnx.checker.check_model(proto, full_check=True)
    return lowered, proto


@dataclasses.dataclass(frozen=True)
class Written:
    target: str
    model: nn.Module
    lowered: LoweredModel
    proto: onnx.ModelProto


@pytest.fixture(scope="module", params=QDQ)
def written(request: pytest.FixtureRequest) -> Written:
    model = tiny_net(request.param)
    return Written(request.param, model, *exported(model, request.param))


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output}


def tensors(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def test_every_layer_sum_and_pool_reads_straight_from_dequantize_linear(written: Written) -> None:
    proto = written.proto
    made, counts = (
        producers(proto),
        dict.fromkeys(("Conv", "Gemm", "Add", "AveragePool", "GlobalAveragePool", "Concat"), 0),
    )
    for node in proto.graph.node:
        if node.op_type in counts:
            counts[node.op_type] += 1
            reads = node.input[:2] if node.op_type in ("Conv", "Gemm") else node.input
            assert [made[name].op_type for name in reads] == ["DequantizeLinear"] * len(reads), node.name
    assert all(counts.values()), counts
    pool = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    assert made[pool.input[0]].op_type == "DequantizeLinear"  # on floats


def test_weights_are_symmetric_with_positive_scales_and_float_biases(written: Written) -> None:
    target, lowered, proto = written.target, written.lowered, written.proto
    made, found = producers(proto), tensors(proto)
    types = set()
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        dequantize = made[node.input[1]]
        codes, scale, zero = (found[name] for name in dequantize.input)
        layer = lowered.layers[f"{node.name}.weight"]
        assert dequantize.attribute[0].name == "axis" and dequantize.attribute[0].i == 0
        assert tuple(scale.dims) == tuple(zero.dims) == (len(layer.scale),)
        assert (numpy_helper.to_array(scale) > 0).all() and not numpy_helper.to_array(zero).astype(int).any()
        assert codes.data_type == zero.data_type
        assert found[node.input[2]].data_type == TensorProto.FLOAT
        small = layer.bits <= 4 and abs(layer.codes.astype(int) + 0.5).max() < 8
        assert codes.data_type == (TensorProto.INT4 if target == "qdq-int4" and small else TensorProto.INT8)
        types.add(codes.data_type)
    assert (TensorProto.INT4 in types) == (target == "qdq-int4")


def test_activations_have_the_targets_type_and_narrow_ones_are_clipped_before(written: Written) -> None:
    target, lowered, proto = written.target, written.lowered, written.proto
    made, found = producers(proto), {name: numpy_helper.to_array(t) for name, t in tensors(proto).items()}
    narrow = 0
    for name, grid in lowered.quantizers.items():
        x, scale, zero = made[name].input
        zero_point = 0 if target == "qdq-symmetric" else grid.zero_point
        assert found[zero].dtype == (np.int8 if target == "qdq-symmetric" else np.uint8)
        assert found[scale] == grid.scale and found[zero] == zero_point
        limits = np.iinfo(found[zero].dtype)
        if (grid.low - grid.zero_point, grid.high - grid.zero_point) != (
            limits.min - zero_point,
            limits.max - zero_point,
        ):
            low, high = (found[bound] for bound in made[x].input[1:])
            steps = np.array([grid.low - grid.zero_point, grid.high - grid.zero_point], np.float32)
            assert made[x].op_type == "Clip" and [low, high] == list(steps * grid.scale)
            narrow += 1
    assert narrow >= 4


def test_codes_in_the_file_are_the_trained_ones_with_the_norms_sign(written: Written) -> None:
    model, lowered, proto = written.model, written.lowered, written.proto
    found = tensors(proto)
    negated = 0
    for name, quantizer in quantizers(model).items():
        if not quantizer.is_weight:
            continue
        layer = name.removesuffix(".weight")
        trained = quantizer.codes(model.get_parameter(name)).numpy().astype(int)
        sign = np.ones(len(trained), int)
        if layer in NORMS:
            sign = np.where(model.get_submodule(NORMS[layer]).weight.detach().numpy() < 0, -1, 1)
        stored = numpy_helper.to_array(found.get(name) or found[f"{name}/int4"]).astype(int)
        assert np.array_equal(stored * sign.reshape(-1, *[1] * (trained.ndim - 1)), trained), layer
        negated += int((sign < 0).sum())
    assert negated > 3
    assert compare_stored(lowered, proto) == {}


def test_onnx_runtime_without_optimisation_gives_the_defined_codes(written: Written) -> None:
    """Sums of floats round where integers do not: a code may land on the other side of a tie, one step away."""
    lowered, proto = written.lowered, written.proto
    reference = IntegerReference(lowered, session.FloatOperators())
    runtime = onnx_runtime(proto, lowered, "DISABLE")
    rows = compare_codes(reference, runtime, IMAGES.numpy())
    assert {row.quantizer for row in rows} == set(lowered.quantizers)
    assert max(row.largest for row in rows) <= 1, rows
    assert sum(row.different for row in rows) <= FLOAT_LEVEL_LIMIT * sum(row.codes for row in rows), rows


def test_the_definition_is_the_trained_net_but_for_ties() -> None:
    model = tiny_net("qdq")
    lowered, _ = exported(model, "qdq")
    found = trained_codes(model, IMAGES.numpy())
    judged, _ = fidelity(IntegerReference(lowered), IMAGES.numpy(), lambda images: found, found[1], len(IMAGES))
    # float32 convolution in training against exact sums, as in test_certificate.py; biases are not rounded here
    assert not judged.unexplained and judged.at_ties <= 1e-4 * judged.codes, judged


def test_a_pair_is_written_again_after_a_layout_operation_and_changes_nothing() -> None:
    grid = LoweredQuantizer.in_storage("q", 0.1, 8, signed=True)
    for scale in np.array([1e-3, 0.1, 0.3, 7.7, 1 / 3], np.float32):
        codes = np.arange(-128, 128)
        reals = codes.astype(np.float32) * scale
        assert np.array_equal(np.rint(reals / scale), codes), grid
    _, proto = exported(tiny_net("qdq"), "qdq")
    made = producers(proto)
    again = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.output[0].startswith("~")]
    assert again and {made[node.input[0]].op_type for node in again} <= {"MaxPool", "Reshape", "Flatten"}


def test_two_quantizers_in_a_row_both_survive_the_runtimes_optimiser() -> None:
    torch.manual_seed(0)
    model, images = Twice().eval(), torch.randn(2, 3, 12, 12)
    quantize_(model, uniform_rules(8, 8), images)
    model.extra = LSQ(QuantSpec(8), name="extra")
    calibrate(model, [images])
    model.extra.raw_scale.data.mul_(2.7)
    lowered = lower_to_integers(model, images, TARGETS["qdq"])
    proto = emit(lowered, TARGETS["qdq"])
    _, expected = IntegerReference(lowered, session.FloatOperators()).run(images)
    # All optimisers but the one that rounds float biases. The float mean at the end may round in another order; a dropped
    # quantizer moves it a thousand times as far.
    for level in session.LEVELS:
        (found,) = session.load(proto, level=level, without=("WeightBiasQuantization",)).run(images.numpy()).values()
        assert np.abs(found - expected["logits"]).max() < 1e-6, level


def layer(codes: list[list[int]], scale: list[float], bits: int = 8) -> LoweredLayer:
    return LoweredLayer("l", "linear", np.array(codes, np.int8), np.array(scale, np.float32), bits)


def with_layer(made: LoweredLayer) -> LoweredModel:
    return LoweredModel(None, {"l.weight": made}, {})  # type: ignore[arg-type]


def test_negative_scales_move_onto_the_codes() -> None:
    model = with_layer(layer([[-127, 5], [-120, 7], [3, 4]], [-0.5, 0.25, 0.0]))
    assert positive_scales(model, TARGETS["qdq"]) is True
    found = model.layers["l.weight"]
    assert found.codes.tolist() == [[127, -5], [-120, 7], [0, 0]]
    assert found.scale.tolist() == [0.5, 0.25, 1.0]
    assert positive_scales(model, TARGETS["qdq"]) is False
    for scale in (0.25, -0.25):
        with pytest.raises(
            ExportError, match=r"layer 'l': target qdq takes int8 weights from -127 .* \[1\] hold code -128"
        ):
            positive_scales(with_layer(layer([[1, 2], [-128, 7]], [0.5, scale])), TARGETS["qdq"])


def test_int4_holds_what_fits_and_nothing_is_carried() -> None:
    plan = lambda *given: plan_layer(TARGETS["qdq-int4"], layer(*given), None).bits  # noqa: E731
    assert plan([[-8, 7]], [1.0], 4) == 4
    assert plan([[8, -7]], [1.0], 4) == 8  # -8 under a negative scale
    assert plan([[1, -1]], [1.0], 1) == 4
    assert plan([[1, -1]], [1.0], 5) == 8
    grid = LoweredQuantizer.in_storage("q", 1.0, 4, signed=False)
    assert [weight_multiplier_of(TARGETS[name], 2, grid) for name in QDQ] == [1, 1, 1]


def test_int8_without_zero_points_refuses_unsigned_8_bit_codes_by_name() -> None:
    check = lambda grid: check_quantizer(TARGETS["qdq-symmetric"], grid)  # noqa: E731
    unsigned = LoweredQuantizer.in_storage("block.input", 1.0, 8, signed=False)
    with pytest.raises(
        ExportError, match=r"quantizer 'block.input': target qdq-symmetric .* 0 to 255; .*at most 7 bits"
    ):
        check(unsigned)
    check(dataclasses.replace(unsigned, high=127))
    check(LoweredQuantizer.in_storage("q", 1.0, 8, signed=True))
    check_quantizer(TARGETS["qdq"], unsigned)
    with pytest.raises(ExportError, match=r"quantizer '.*': target qdq-symmetric"):
        exported(tiny_net("qdq"), "qdq-symmetric")


def test_int8_codes_are_read_back_into_storage() -> None:
    grid = LoweredQuantizer.in_storage("q", 1.0, 4, signed=True)
    assert to_storage(np.array([-8, 0, 7], np.int8), grid).tolist() == [0, 8, 15]
    assert to_storage(np.array([0, 8, 15], np.uint8), grid).tolist() == [0, 8, 15]


def test_one_bit_activations_are_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"quantizer '.*': target qdq has no one-bit activations.*at least 2 bits"):
        lower_to_integers(binary_net(), BINARY_IMAGES, TARGETS["qdq"])


def test_weight_only_nets_hold_their_codes_and_read_floats() -> None:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    quantize_(model, [("*", LayerSpec(QuantSpec(4, signed=True, axis=0), None))], IMAGES[:1], stream=None)
    lowered, proto = exported(model, "qdq-int4")
    assert {node.op_type for node in proto.graph.node if "uantize" in node.op_type} == {"DequantizeLinear"}
    assert compare_stored(lowered, proto) == {}
    found = session.load(proto, level="DISABLE").run(IMAGES.numpy())["logits"]
    expected = model(IMAGES).detach().numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 sums in another order


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    model = tiny_net("qdq")
    lowered, proto = exported(model, "qdq")
    shown = Preprocessing(31, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ("a",))
    file = tmp_path_factory.mktemp("qdq") / "qdq.onnx"
    onnx.save(sign(proto, lowered, TARGETS["qdq"], shown, "test"), str(file))
    return model, lowered, file


def agreement(model: nn.Module, lowered: LoweredModel, file: Path) -> Agreement:
    labels = np.zeros(len(IMAGES), np.int64)
    return agree(lowered, file, "qdq", IMAGES.numpy(), labels, lambda x: trained_codes(model, x))


def test_the_signature_holds_and_a_changed_code_breaks_it(signed: Signed, tmp_path: Path) -> None:
    model, lowered, file = signed
    proto = onnx.load(str(file))
    assert broken_signatures(proto, read_metadata(proto, "qdq")) == {}
    tensor = next(t for t in proto.graph.initializer if t.name == "left.weight")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    assert broken_signatures(proto, read_metadata(proto, "qdq")) == {"left": "its codes do not match their SHA-256"}
    changed = tmp_path / "changed.onnx"
    onnx.save(proto, str(changed))
    result = agreement(model, lowered, changed)
    assert list(result.stored) == ["left"] and not result.passed
    assert "NOT CERTIFIED" in str(result) and "stored codes NOT the trained ones" in str(result)
    check = verify_file(changed)
    assert not check.passed


def test_an_agreement_says_what_is_exact_and_what_is_not(signed: Signed) -> None:
    result = agreement(*signed)
    by_runtime = {found.runtime: found for found in result.results}
    assert list(by_runtime) == [f"ONNX Runtime {level}" for level in session.LEVELS]
    assert result.stored == {} and by_runtime["ONNX Runtime DISABLE"].is_at_ties
    # the runtime's optimiser rounds the float biases
    assert not by_runtime["ONNX Runtime ALL"].is_at_ties and not result.passed
    shown = str(result)
    assert "NOT CERTIFIED" in shown and "stored codes as trained" in shown and "WeightBiasQuantization" in shown
    inexact = [row.quantizer for row in by_runtime["ONNX Runtime ALL"].quantizers if row.different]
    assert inexact and all(name in shown for name in inexact)


def test_a_wrong_activation_scale_is_named_where_it_arises(signed: Signed, tmp_path: Path) -> None:
    model, lowered, file = signed
    proto = onnx.load(str(file))
    node = producers(proto)["block.conv2.input"]
    tensor = tensors(proto)[node.input[1]]
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.02)).tobytes()
    changed = tmp_path / "scaled.onnx"
    onnx.save(proto, str(changed))
    disabled = agreement(model, lowered, changed).results[0]
    wrong = {row.quantizer for row in disabled.quantizers if row.different > 10}
    assert "block.conv2.input" in wrong and "block.conv1.input" not in wrong and not disabled.is_at_ties


def test_a_signed_file_is_verified_without_its_run(signed: Signed) -> None:
    check = verify_file(signed[2])
    assert check.passed and check.is_plain and "the runtime's choice" in str(check)


class Chain(nn.Module):
    """Layers one after another, without residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.point(self.bn2(self.depthwise(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("target", QDQ)
def test_openvino_gives_the_defined_codes_of_a_chain(target: str) -> None:
    pytest.importorskip("openvino", reason="OpenVINO comes with the dev dependencies")
    from export.openvino_session import FLOAT32, openvino_runtime

    torch.manual_seed(0)
    model = with_random_norms(Chain()).eval()
    stream = QuantSpec(7 if target == "qdq-symmetric" else 8)
    quantize_(model, uniform_rules(4, 4, ("stem", "head"), 7), IMAGES[:1], stream=stream, weight_init="mse")
    calibrate(model, [IMAGES])
    lowered, proto = exported(model, target)
    reference = IntegerReference(lowered, session.FloatOperators())
    runtime = openvino_runtime(proto, lowered.quantizers, "OpenVINO", FLOAT32)
    rows = compare_codes(reference, runtime, IMAGES.numpy())
    assert len(rows) == len(lowered.quantizers)
    # near ties, as in ONNX Runtime's float sums
    assert max(row.largest for row in rows) <= 1
    assert sum(row.different for row in rows) <= 1e-4 * sum(row.codes for row in rows), rows
    _, defined = reference.run(IMAGES)
    shipped = runtime.logits(IMAGES.numpy())
    assert (shipped.argmax(1) == defined["logits"].argmax(1)).all()
