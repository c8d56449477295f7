"""What the exporter avoids, on the processors it avoids it for: rounding and overflow of ONNX Runtime's arm64 kernels.

`tools/audit_operators.py` tries every operator on every processor; these are its two findings that shaped the files.
"""

import numpy as np
import onnxruntime
import pytest

from export.elsewhere import unavailable
from tools.audit_operators import ALL_A, ALL_B, CONTRIB, Case, Grid, Shape, add_arithmetics, exact_sums, run_cases

MACHINE = "neoverse-n1"
REASON = unavailable(MACHINE, onnxruntime.__version__)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ORDINARY = (Grid(np.float32(0.0371), 8), Grid(np.float32(0.0219), 127), Grid(np.float32(0.0583), 1))
POWERS_OF_TWO = (Grid(np.float32(1 / 16), 0), Grid(np.float32(1 / 32), 7), Grid(np.float32(1 / 8), 128))
OUT_OF_RANGE = (Grid(np.float32(7.3), 127), Grid(np.float32(0.0131), 1), Grid(np.float32(0.0153), 128))


def test_arm64_adds_in_fixed_point_and_x86_does_not() -> None:
    """All 65,536 pairs of codes. Powers of two make ties, which the two round to different sides."""
    cases = []
    expected = []
    for grids in (ORDINARY, POWERS_OF_TWO, OUT_OF_RANGE):
        case = Case({"a": ALL_A, "b": ALL_B})
        a, b, out = (case.grid(grid) for grid in grids)
        arithmetics = add_arithmetics(ALL_A, ALL_B, grids)
        case.returns(case.add("QLinearAdd", ["a", *a, "b", *b, *out], CONTRIB), "QLinearAdd", arithmetics)
        cases.append(case)
        expected.append(arithmetics)
    _, outputs = run_cases(MACHINE, cases)
    found = [next(iter(output.values())) for output in outputs]
    for got, arithmetics in zip(found, expected, strict=True):
        assert np.array_equal(got, arithmetics["fixed point (else divided, a's product fused)"])
    ties = int((found[1] != expected[1]["fused, offset fused"]).sum())
    assert ties > 5_000, f"{ties} of 65,536 pairs differ with powers of two"


@pytest.mark.parametrize(("byte", "overflows"), [(-128, True), (-127, False)])
def test_arm64_depthwise_kernels_overflow_at_byte_minus_128_only(byte: int, overflows: bool) -> None:
    """Two products of −128 and an input code 0, which is −128 to the kernel, are 32,768."""
    shape = Shape("depthwise 3x3", 16, 16, (3, 3), (5, 5), group=16)
    x = np.stack([np.full((16, 5, 5), code, np.uint8) for code in (0, 1, 128, 255)])
    weight = np.full((16, 1, 3, 3), byte, np.int8)
    sums = exact_sums(x, weight, shape)
    scale = np.float32(250 / 9 / 255 / 128)
    expected = np.clip(np.rint(sums.astype(np.float32) * scale) + 255, 0, 255).astype(np.uint8)
    case = Case({"x": x})
    scales = case.constant(np.full(16, scale, np.float32))
    zeros = case.constant(np.zeros(16, np.int8))
    inputs = ["x", *case.grid(Grid(np.float32(1), 0)), case.constant(weight), scales, zeros]
    node = case.add("QLinearConv", [*inputs, *case.grid(Grid(np.float32(1), 255))], **shape.attributes())
    case.returns(node, "QLinearConv", {"exact": expected})
    _, outputs = run_cases(MACHINE, [case])
    wrong = (next(iter(outputs[0].values())) != expected).any((1, 2, 3))
    assert wrong.tolist() == [overflows, False, False, False]
