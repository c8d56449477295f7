"""The integer reference against a plain NumPy integer loop, and against ONNX Runtime over all pairs of codes."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import session
from export.lowered import LoweredQuantizer
from export.reference import Accumulator, Codes, IntegerReference, Mean, Sum, Value, Window, WindowMean, quantize
from tests.export.conftest import Exported


def grid(scale: float | np.float32, zero_point: int, low: int = 0, high: int = 255) -> LoweredQuantizer:
    return LoweredQuantizer("q", np.float32(scale), zero_point, 8, low, high)


def test_conv_epilogue_against_a_loop_of_python_integers(tiny: Exported) -> None:
    """block.conv1 at a few places, every multiply-add written out."""
    codes, _ = IntegerReference(tiny.lowered).run(torch.from_numpy(tiny.images))
    layer = tiny.lowered.layers["block.conv1.weight"]
    source, target = (tiny.lowered.quantizers[n] for n in ("block.conv1.input", "block.conv2.input"))
    x = codes["block.conv1.input"].astype(int) - source.zero_point
    assert layer.bias_codes is not None
    for image, o, row, column in [(0, 0, 0, 0), (1, 7, 8, 7), (2, 3, 4, 5), (5, 5, 0, 7)]:
        total = int(layer.bias_codes[o])
        for c in range(8):
            for i in range(3):
                for j in range(3):
                    y, z = row + i - 1, column + j - 1
                    if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                        total += int(x[image, c, y, z]) * int(layer.codes[o, c, i, j]) * layer.weight_multiplier
        m = np.float32(np.float32(source.scale * layer.stored_scale[o]) / target.scale)
        expected = np.clip(np.rint(np.float32(total) * m) + target.zero_point, target.low, target.high)
        assert codes["block.conv2.input"][image, o, row, column] == expected


def test_requantization_is_division_not_multiplication_by_the_inverse() -> None:
    stored = torch.arange(256.0)
    first, second = grid(0.1, 0), grid(0.3, 128)
    got = quantize(Codes(stored, first), second).numpy()
    real = np.arange(256, dtype=np.float32) * np.float32(0.1)
    assert np.array_equal(got, np.clip(np.rint(real / np.float32(0.3)) + 128, 0, 255))


def test_large_sums_are_rounded_to_float32_before_the_multiplier() -> None:
    sums = torch.tensor([[float(2**24 + 1)]], dtype=torch.float64)
    value = Accumulator(sums, torch.tensor([2.0**-20]))
    assert float(quantize(value, grid(1.0, 0))) == np.rint(np.float32(2**24 + 1) * np.float32(2**-20))


def run_qdq(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], inputs: dict[str, NDArray[np.uint8]]
) -> NDArray[np.generic]:
    (name, x), *others = inputs.items()
    constants = constants | dict(others)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return session.load(model).run(x)["y"]


def dequantize(x: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [x, f"s{x}", f"z{x}"], [f"{x}f"])


def quantize_node(x: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [x, "sy", "zy"], ["y"])


@pytest.mark.parametrize("seed", range(6))
def test_add_equals_the_runtime_on_all_pairs_of_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sa, sb, sy = (np.float32(v) for v in rng.uniform(0.01, 0.3, 3))
    za, zb, zy = (np.uint8(v) for v in rng.choice([0, 128], 3))
    a = np.repeat(np.arange(256, dtype=np.uint8), 256).reshape(1, 256, 256)
    b = np.tile(np.arange(256, dtype=np.uint8), 256).reshape(1, 256, 256)
    nodes = [
        dequantize("a"),
        dequantize("b"),
        helper.make_node("Add", ["af", "bf"], ["c"]),
        quantize_node("c"),
    ]
    both = np.stack([a, b], 1)
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), *nodes]
    got = run_qdq(nodes, {"sa": sa, "sb": sb, "sy": sy, "za": za, "zb": zb, "zy": zy}, {"x": both})
    value = Sum(
        Codes(torch.from_numpy(a).float(), grid(sa, int(za))),
        Codes(torch.from_numpy(b).float(), grid(sb, int(zb))),
    )
    assert np.array_equal(quantize(value, grid(sy, int(zy))).numpy().ravel(), got.ravel())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["global", "window", "padded", "ceil"])
def test_pools_equal_the_runtime(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, 19, 11, 7)).astype(np.uint8)
    sx, sy = (np.float32(v) for v in rng.uniform(0.01, 0.1, 2))
    zx, zy = (np.uint8(v) for v in rng.choice([0, 128], 2))
    source = Codes(torch.from_numpy(x).float(), grid(sx, int(zx)))
    value: Value
    if kind == "global":
        value, node = Mean(source), helper.make_node("GlobalAveragePool", ["xf"], ["c"])
    else:
        pad, ceil, counts = {"window": (0, 0, 0), "padded": (1, 0, int(seed % 2)), "ceil": (0, 1, 0)}[kind]
        kernel = (3, 3) if kind == "padded" else (2, 2)
        value = WindowMean(source, Window(kernel, (2, 2), (pad,) * 4, ceil=bool(ceil)), bool(counts))
        node = helper.make_node(
            "AveragePool", ["xf"], ["c"], kernel_shape=kernel, strides=[2, 2], pads=[pad] * 4, ceil_mode=ceil,
            count_include_pad=counts,
        )  # fmt: skip
    got = run_qdq([dequantize("x"), node, quantize_node("c")], {"sx": sx, "sy": sy, "zx": zx, "zy": zy}, {"x": x})
    assert np.array_equal(quantize(value, grid(sy, int(zy))).numpy(), got)


def test_given_codes_isolate_the_operation_that_differs(tiny: Exported) -> None:
    reference = IntegerReference(tiny.lowered)
    images = torch.from_numpy(tiny.images)
    codes, _ = reference.run(images)
    planted = dict(codes)
    planted["block.conv2.input"] = np.where(codes["block.conv2.input"] > 7, 0, 15).astype(np.uint8)
    seen, _ = reference.run(images, given=planted)
    differing = {n for n in codes if not np.array_equal(seen[n], planted[n])}
    assert "block.conv2.input" in differing  # the planted one itself
    assert "block.bn2#batch_norm0" in differing  # computed from it
    assert "head.input" not in differing  # computed from given codes that nobody changed
