"""`qat bench --profile`: every node of the graph that the runtime made is there, of the right kind, in the right island."""

from collections import Counter

import pytest
import torch

from edgeqat.cpp import compiler
from export import session
from export.lower import lower_float, lower_to_integers
from export.native_graph import emit
from export.profile import CODES, CONVERT, FLOAT, LAYOUT, NodeTime, Profile, cure_of, islands_of, kind_of, profile
from export.targets import TARGETS
from tests.export.conftest import build_tiny

IMAGES = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(3))
NATIVE = pytest.param("ort-native", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))


@pytest.mark.parametrize("target", ["ort-packed", NATIVE])
def test_every_node_that_the_runtime_runs_is_timed(target: str) -> None:
    canonical = lower_to_integers(build_tiny(4, IMAGES), IMAGES, TARGETS[target])
    proto = emit(canonical, TARGETS[target])
    (found,) = profile({"file": proto}, IMAGES.numpy()[:1], rounds=3)
    expected = Counter(node.op_type for node in session.optimized(proto).graph.node)
    assert Counter(node.operator for node in found.nodes) == expected
    assert {node.kind for node in found.nodes} >= {CODES, CONVERT}
    assert min(node.milliseconds for node in found.nodes) >= 0 < found.milliseconds
    assert sum(found.share(kind) for kind in (CODES, CONVERT, FLOAT, LAYOUT)) == pytest.approx(1.0, abs=1e-9)


def test_a_net_of_floats_has_no_codes() -> None:
    proto = lower_float(build_tiny(4, IMAGES), IMAGES)
    (found,) = profile({"fp32": proto}, IMAGES.numpy()[:1], rounds=2)
    assert {node.kind for node in found.nodes} <= {FLOAT, LAYOUT}
    assert found.share(FLOAT) > 0


@pytest.mark.parametrize(
    ("operator", "reads", "writes", "kind"),
    [
        ("QLinearConv", ("uint8", "float", "uint8", "int8"), ("uint8",), CODES),
        ("QGemmFloat", ("uint8", "float", "int32", "int8"), ("float",), CODES),
        ("Clip", ("uint8", "uint8", "uint8"), ("uint8",), CODES),
        ("MaxPool", ("uint8",), ("uint8",), CODES),
        ("MaxPool", ("float",), ("float",), FLOAT),
        ("QImage", ("float",), ("uint8",), CONVERT),
        ("DequantizeLinear", ("uint8", "float", "uint8"), ("float",), CONVERT),
        ("Transpose", ("uint8",), ("uint8",), LAYOUT),
        ("Shape", ("float",), ("int64",), LAYOUT),
        ("Sigmoid", ("float",), ("float",), FLOAT),
        ("Conv", ("float", "float"), ("float",), FLOAT),
    ],
)
def test_the_kind_follows_from_what_a_node_reads_and_writes(
    operator: str, reads: tuple[str, ...], writes: tuple[str, ...], kind: str
) -> None:
    assert kind_of(operator, reads, writes) == kind


def test_islands_lie_between_nodes_on_codes() -> None:
    nodes = [
        NodeTime("image", "QuantizeLinear", CONVERT, 1.0),
        NodeTime("turn", "Transpose", LAYOUT, 2.0),
        NodeTime("stem", "QLinearConv", CODES, 40.0),
        NodeTime("flat", "Reshape", LAYOUT, 4.0),  # moves codes alone: no island
        NodeTime("body", "QLinearConv", CODES, 40.0),
        NodeTime("real", "DequantizeLinear", CONVERT, 8.0),
        NodeTime("act", "Sigmoid", FLOAT, 16.0),
        NodeTime("back", "QuantizeLinear", CONVERT, 32.0),
        NodeTime("head", "QGemm", CODES, 40.0),
    ]
    islands = islands_of(nodes, native=False)
    places = [(island.after, island.before, island.milliseconds) for island in islands]
    assert places == [("body", "head", 56.0), ("", "stem", 3.0)]
    assert "ort-native" in islands[0].cure
    text = str(Profile("net", tuple(nodes), tuple(islands)))
    assert "2 float islands, 32.2% of the time" in text  # 59 of 183
    assert "body .. head: DequantizeLinear, Sigmoid, QuantizeLinear" in text


def test_the_cure_is_one_that_would_help() -> None:
    between = ("DequantizeLinear", "Sigmoid", "Mul", "QuantizeLinear")
    assert "ort-native" in cure_of(between, native=False, at_an_end=False)
    assert "ort-native" not in cure_of(between, native=True, at_an_end=False)
    assert "ort-native" in cure_of(("DequantizeLinear", "ReduceMean"), native=False, at_an_end=False)
    assert "rule" in cure_of(("DequantizeLinear", "Conv", "Sigmoid"), native=False, at_an_end=False)
    assert "rule" not in cure_of(("DequantizeLinear", "LayerNormalization"), native=False, at_an_end=False)
    assert "needed" in cure_of(("QuantizeLinear", "Transpose"), native=True, at_an_end=True)
