"""Ensembles in one file: the members as they were, their average against NumPy, every member's codes proven; and
weight-only nets."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import session
from export.certificate import certify
from export.ensemble import AVERAGES, check_joined, merge_members, split_members
from export.graph import emit_qdq
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredModel
from export.metadata import KEY, Preprocessing, sign
from export.targets import TARGETS
from export.verify import verify_file
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.surgery.nets import TinyNet, with_random_norms

IMAGES = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(3))
TARGET = TARGETS["ort-packed"]
PREPROCESSING = Preprocessing(33, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), tuple("abcde"))


def trained(seed: int, bits: int, weight_only: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = with_random_norms(TinyNet(), seed).eval()
    rules = uniform_rules(bits, bits, ("stem", "head"))
    if weight_only:
        rules = [(name, replace(spec, input=None)) for name, spec in rules]
        quantize_(model, rules, IMAGES[:1], stream=None, weight_init="mse")
        return model
    quantize_(model, rules, IMAGES[:1], weight_init="mse")
    calibrate(model, [IMAGES])
    return model


def written(model: torch.nn.Module, target: str = "ort-packed") -> tuple[LoweredModel, onnx.ModelProto]:
    lowered = lower_to_integers(model, IMAGES, TARGETS[target])
    return lowered, sign(emit_qdq(lowered, TARGETS[target]), lowered, TARGETS[target], PREPROCESSING, "test")


@pytest.fixture(scope="module")
def members() -> list[tuple[torch.nn.Module, LoweredModel, onnx.ModelProto]]:
    nets = [trained(0, 4), trained(1, 3), trained(2, 7, weight_only=True)]
    return [(net, *written(net)) for net in nets]


def merged(members, average="probabilities"):  # type: ignore[no-untyped-def]
    return merge_members([proto for _, _, proto in members], ["one", "two", "three"], average)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_file_answers_with_the_average_of_its_members(members, average: str) -> None:  # type: ignore[no-untyped-def]
    proto = merged(members, average)
    onnx.checker.check_model(proto)
    alone = np.stack([session.load(p).run(IMAGES.numpy())["logits"] for _, _, p in members]).astype(np.float64)
    together = session.load(proto).run(IMAGES.numpy())["logits"]
    shares = np.exp(alone) / np.exp(alone).sum(-1, keepdims=True)
    if average == "logits":
        assert np.allclose(together, alone.mean(0), atol=1e-5)
    else:
        assert np.allclose(np.exp(together), shares.mean(0), atol=1e-6)  # softmax of the logits is the mean share
        assert not np.allclose(together, alone.mean(0), atol=1e-2)


def test_members_come_out_as_they_went_in(members) -> None:  # type: ignore[no-untyped-def]
    for (_, _, before), after in zip(members, split_members(merged(members), "e"), strict=True):
        assert [n.SerializeToString() for n in before.graph.node] == [n.SerializeToString() for n in after.graph.node]
        assert sorted(t.SerializeToString() for t in before.graph.initializer) == sorted(
            t.SerializeToString() for t in after.graph.initializer
        )
        metadata = [json.loads(p.metadata_props[0].value) for p in (before, after)]
        assert metadata[0] == metadata[1]


def test_verify_reads_the_file_alone_and_names_a_tampered_member(members, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    proto, file = merged(members), tmp_path / "ensemble.onnx"
    onnx.save(proto, str(file))
    check = verify_file(file)
    assert check.passed and check.layers == 18 and check.integer == check.kernels == 12, str(check)
    tensor = next(t for t in proto.graph.initializer if t.name == "m1/block.conv2.weight/p0")
    data = bytearray(tensor.raw_data)
    data[2] ^= 1
    tensor.raw_data = bytes(data)
    onnx.save(proto, str(file))
    assert list(verify_file(file).signed) == ["m1/block.conv2"]


def test_every_member_is_certified_and_together_they_compute_the_same(members, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    proto = merged(members)
    parts = split_members(proto, "e")
    for (net, lowered, _), part in zip(members, parts, strict=True):
        file = tmp_path / "part.onnx"
        onnx.save(part, str(file))
        found = certify(lowered, file, IMAGES.numpy(), np.zeros(4, np.int64), partial(trained_codes, net))
        assert found.passed and found.mismatches == 0, str(found)
    joined = check_joined(proto, parts, IMAGES.numpy())
    assert joined.passed and joined.members == 3, str(joined)
    other = check_joined(proto, [parts[0], parts[0], parts[2]], IMAGES.numpy())
    assert not other.passed and "FAILED" in str(other)


def test_a_broken_average_fails(members) -> None:  # type: ignore[no-untyped-def]
    proto = merged(members)
    next(n for n in proto.graph.node if n.op_type == "Softmax").op_type = "LogSoftmax"
    assert not check_joined(proto, split_members(proto, "e"), IMAGES.numpy()).passed


def test_what_cannot_be_an_ensemble_raises(members) -> None:  # type: ignore[no-untyped-def]
    first = members[0][2]
    with pytest.raises(ExportError, match="at least two"):
        merge_members([first], ["one"])
    with pytest.raises(ExportError, match="one and two differ in target"):
        merge_members([first, written(members[1][0], "ort-int8")[1]], ["one", "two"])
    other = onnx.ModelProto()
    other.CopyFrom(first)
    value = json.loads(other.metadata_props[0].value)
    value["input"]["classes"][0] = "z"
    onnx.helper.set_model_props(other, {KEY: json.dumps(value)})
    with pytest.raises(ExportError, match="one and two differ in input"):
        merge_members([first, other], ["one", "two"])
    with pytest.raises(ExportError, match="is not an ensemble"):
        split_members(first, "file")


@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-packed-int4"])
def test_a_weight_only_net_keeps_its_codes_and_its_logits(target: str, tmp_path: Path) -> None:
    net = trained(5, 4, weight_only=True)
    lowered, proto = written(net, target)
    file = tmp_path / "net.onnx"
    onnx.save(proto, str(file))
    found = certify(lowered, file, IMAGES.numpy(), np.zeros(4, np.int64), lambda x: trained_codes(net, x))
    assert found.passed and not found.float_layers and any("weight-only" in note for note in found.notes)
    with torch.no_grad():
        expected = net(IMAGES).numpy()
    assert np.allclose(session.load(file).run(IMAGES.numpy())["logits"], expected, atol=1e-5)
    assert verify_file(file).passed
    for layer in ("block.conv1", "head"):
        tensors = {t.name: t for t in proto.graph.initializer}
        bias = tensors[f"{layer}.bias"]
        values = onnx.numpy_helper.to_array(bias).copy()
        values[1] += 0.5
        tensors[f"{layer}.bias"].CopyFrom(onnx.numpy_helper.from_array(values, f"{layer}.bias"))
    onnx.save(proto, str(file))
    found = certify(lowered, file, IMAGES.numpy(), np.zeros(4, np.int64), lambda x: trained_codes(net, x))
    assert found.stored == {"block.conv1": "its bias differs", "head": "its bias differs"}
