"""Native operators alone, against NumPy: sums and products of codes, scaled channels, layer norms, softmaxes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeqat.cpp import compiler
from export import session
from export.lowered import DOMAIN, ExportError
from export.native_checks import native_outputs

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")
Shape = tuple[int, ...]
Codes = NDArray[np.uint8]
GRID = {"y_scale": 0.25, "y_zero": 100, "y_low": 3, "y_high": 250}
one = np.float32


def computed(
    kind: str,
    inputs: Mapping[str, NDArray[Any]],
    constants: dict[str, NDArray[np.float32]],
    numbers: Mapping[str, float | str],
) -> Codes:
    """What one node gives that reads `inputs` and `constants`, in this order."""
    node = helper.make_node(kind, [*inputs, *constants], ["y"], domain=DOMAIN, codes=["y"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in numbers.items())
    graph = helper.make_graph(
        [node],
        "operator",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (found,) = session.load(proto, threads=2).session.run(None, inputs)
    return np.asarray(found)


def as_codes(results: NDArray[np.floating]) -> Codes:
    return results.clip(GRID["y_low"], GRID["y_high"]).astype(np.uint8)


def random_codes(shape: Shape, seed: int) -> Codes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 5, 7, 33), (2, 5, 7, 33)),
        ((2, 5, 7, 33), (2, 1, 1, 33)),
        ((2, 5, 7, 33), (2, 5, 7, 1)),
        ((2, 5, 7, 33), (1, 5, 1, 33)),
        ((3, 9, 40), (3, 9, 40)),
        ((3, 40), (1, 40)),
    ],
)
def test_products_of_codes(first: Shape, second: Shape) -> None:
    a, b = random_codes(first, 0), random_codes(second, 1)
    numbers = GRID | {"a_zero": 128, "b_zero": 7, "ratio": 0.0123}
    products = (a.astype(np.int64) - 128) * (b.astype(np.int64) - 7)
    expected = as_codes(np.rint(products.astype(one) * one(0.0123) + one(100)))
    assert len(np.unique(expected)) > 50
    assert np.array_equal(computed("QMul", {"a": a, "b": b}, {}, numbers), expected)


@pytest.mark.parametrize("shape", [(2, 5, 7, 33), (3, 9, 40), (3, 1), (1, 4, 4099)])
def test_sums_of_codes(shape: Shape) -> None:
    """Ratios of exact halves, so that many sums are ties, and ratios of many digits."""
    a, b = random_codes(shape, 6), random_codes(shape, 7)
    for first, second, offset in ((0.5, 0.25, 3.5), (0.7310585, -0.0123457, 11.7)):
        numbers = GRID | {"ratio_first": first, "ratio_second": second, "offset": offset}
        inner = (b * np.float64(one(second)) + np.float64(one(offset))).astype(one)
        expected = as_codes(np.rint((a * np.float64(one(first)) + inner).astype(one)))
        assert np.array_equal(computed("QAdd", {"a": a, "b": b}, {}, numbers), expected)


@pytest.mark.parametrize("shape", [(2, 5, 7, 33), (3, 9, 40), (3, 1)])
def test_scaled_channels_are_what_three_float_operators_compute(shape: Shape) -> None:
    x = random_codes(shape, 2)
    gain = np.random.default_rng(3).standard_normal(shape[-1]).astype(one)
    gain[::3] = 0.5  # exact halves: ties
    real = (x.astype(one) - one(9)) * one(0.125)
    expected = as_codes(np.rint(real * gain / one(0.25)) + 100)
    numbers = GRID | {"x_scale": 0.125, "x_zero": 9, "below_zero": 0}
    assert np.array_equal(computed("QScale", {"x": x}, {"gain": gain}, numbers), expected)
    slopes = np.where(real < 0, real * gain, real)
    expected = as_codes(np.rint(slopes / one(0.25)) + 100)
    assert np.array_equal(computed("QScale", {"x": x}, {"gain": gain}, numbers | {"below_zero": 1}), expected)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 5, 7, 33), (0, 3, 1, 2)),
        ((2, 33, 5, 7), (0, 2, 3, 1)),
        ((1, 64, 14, 14), (0, 2, 3, 1)),
        ((3, 17, 48, 50), (0, 1, 3, 2)),
        ((2, 9, 3, 5, 16), (2, 0, 3, 1, 4)),
        ((2, 9, 3, 5, 16), (4, 1, 3, 0, 2)),
        ((31, 1, 18), (2, 1, 0)),
        ((1, 1, 7), (1, 2, 0)),
        ((6,), (0,)),
        ((3, 0, 5), (2, 0, 1)),
    ],
)
def test_codes_with_their_axes_in_another_order(shape: Shape, order: tuple[int, ...]) -> None:
    x = random_codes(shape, 8)
    digits = "".join(map(str, order))
    assert np.array_equal(computed("QTranspose", {"x": x}, {}, {"order": digits}), x.transpose(order))


@pytest.mark.parametrize("order", ["", "01", "0123", "011", "01x", "0 1 2", "12\u0660"])
def test_such_an_order_is_refused_before_a_runtime_sees_it(order: str) -> None:
    node = helper.make_node("QTranspose", ["x"], ["y"], domain=DOMAIN, order=order)
    shape = (TensorProto.UINT8, (2, 3, 4))
    with pytest.raises(ExportError, match=r"here: its order .* does not name each of 3 axes once"):
        native_outputs(node, {"x": shape}, "here")
    node.attribute[0].s = b"201"
    assert native_outputs(node, {"x": shape}, "here")[0] == [(TensorProto.UINT8, (4, 2, 3))]


@pytest.mark.parametrize("order", ["", "01", "0123", "011", "01x", "0 1 2"])
def test_an_order_that_does_not_name_every_axis_once_is_refused(order: str) -> None:
    x = random_codes((2, 3, 4), 8)
    with pytest.raises(Exception, match="order"):
        computed("QTranspose", {"x": x}, {}, {"order": order})


def exponential(x: np.float32) -> np.float32:
    """As export/kernels/loops.hpp says it, one number at a time."""
    t = max(x, one(-86))
    power = np.rint(t * one(1.44269504))
    r = (t - power * one(0.693359375)) - power * one(-2.12194440e-4)
    p = one(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + one(coefficient)
    return one(((p * (r * r) + r) + one(1)) * one(2.0 ** int(power)))


@pytest.mark.parametrize("shape", [(2, 3, 5, 37), (3, 1), (7, 8), (1, 2, 197), (5, 3)])
def test_softmaxes_to_codes(shape: Shape) -> None:
    scores = (np.random.default_rng(8).standard_normal(shape) * 3).astype(one)
    scores[0] = -0.5  # all alike
    scores[-1, ..., -1] = -np.inf if shape[-1] > 1 else 0  # masked
    scores[-1, ..., 0] = 120  # nearly all of the weight
    scale = one(1 / 200)
    expected = np.empty(shape, np.uint8)
    for place in np.ndindex(*shape[:-1]):
        row = scores[place]
        weights = [exponential(x) for x in row - row.max()]
        lanes = [one(0)] * 8
        for index, weight in enumerate(weights):
            lanes[index % 8] = lanes[index % 8] + weight
        a, b, c, d, e, f, g, h = lanes
        factor = one(1) / (((a + e) + (c + g)) + ((b + f) + (d + h))) / scale
        expected[place] = as_codes(np.rint(np.array(weights) * factor) + 100)
        assert abs(weights[-1] - np.exp(np.float64(row[-1]) - row.max())) <= 1e-6
    numbers = GRID | {"y_scale": float(scale)}
    assert np.array_equal(computed("QSoftmax", {"scores": scores}, {}, numbers), expected)


@pytest.mark.parametrize("shape", [(2, 7, 5, 24), (1, 1, 1, 3), (2, 600, 3, 40)])
def test_pools_over_whole_images(shape: Shape) -> None:
    x = random_codes(shape, 9)
    x[0] = 255  # the largest sums there are
    multiplier = one(0.8 / (shape[1] * shape[2]))
    totals = x.reshape(shape[0], -1, shape[3]).astype(object).sum(axis=1) - 40 * shape[1] * shape[2]
    expected = as_codes(np.rint(totals.astype(one) * multiplier) + 100).reshape(shape[0], 1, 1, shape[3])
    numbers = GRID | {"x_zero": 40, "multiplier": float(multiplier)}
    assert np.array_equal(computed("QGlobalPool", {"x": x}, {}, numbers), expected)


@pytest.mark.parametrize("shape", [(2, 3, 96), (5, 1), (2, 4, 5, 67), (3, 1000)])
def test_layer_norms_of_codes(shape: Shape) -> None:
    x = random_codes(shape, 4)
    x[0] = 7  # no variance
    count = shape[-1]
    generator = np.random.default_rng(5)
    gain = (generator.standard_normal(count) * 30).astype(one)
    shift = (generator.standard_normal(count) * 9).astype(one)
    numbers = GRID | {"epsilon": 55.5}
    expected = np.empty(shape, np.uint8)
    for place in np.ndindex(*shape[:-1]):
        row = [int(code) for code in x[place]]
        total = sum(row)
        variance = count * sum(code * code for code in row) - total * total
        reciprocal = one(1 / np.sqrt(np.float64(variance) + 55.5))
        for index, code in enumerate(row):
            scaled = one(count * code - total) * reciprocal * gain[index] + shift[index]
            expected[(*place, index)] = as_codes(np.rint(scaled) + 100)
    found = computed("QLayerNorm", {"x": x}, {"gain": gain, "shift": shift}, numbers)
    assert np.array_equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    a, b = random_codes((2, 5, 7, 33), 0), random_codes((2, 2, 1, 33), 1)
    numbers = GRID | {"a_zero": 0, "b_zero": 0, "ratio": 0.1}
    with pytest.raises(Exception, match="shapes do not fit"):
        computed("QMul", {"a": a, "b": b}, {}, numbers)
    gain = np.ones(32, np.float32)
    with pytest.raises(Exception, match="another length"):
        computed("QScale", {"x": a}, {"gain": gain}, GRID | {"x_scale": 0.1, "x_zero": 0, "below_zero": 0})
    with pytest.raises(ExportError, match="different numbers"):
        computed("QLayerNorm", {"x": a}, {"gain": gain, "shift": gain[:5]}, GRID | {"epsilon": 1.0})
