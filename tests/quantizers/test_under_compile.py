"""What a compiled step keeps for backward, and that it computes what an eager one does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.quantizers.lsq import LSQ
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.spec import QuantSpec
from tests.nearness import ROUNDING, assert_near


def plain() -> LSQ:
    quantizer = LSQ(QuantSpec(4))
    quantizer.initialize(torch.tensor(0.11), signed=False)
    return quantizer


def with_offset() -> LSQ:
    quantizer = LSQPlus(QuantSpec(4, offset=True))
    quantizer.initialize(torch.tensor(0.21), offset=torch.tensor(-0.63))
    return quantizer


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, with_offset])
def test_backward_keeps_what_came_in_and_makes_the_quantized_tensor_again(make: Callable[[], LSQ]) -> None:
    torch.manual_seed(0)
    quantizer = make()
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    leaves = (x, weight, *quantizer.parameters())

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(quantizer(x), weight)

    gradients = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = run(x, weight)
        gradients.append(torch.autograd.grad(out.square().sum(), leaves, retain_graph=True))
    kept = [t for t in out.grad_fn.saved_tensors if t.shape == x.shape]
    assert len(kept) == 1 and torch.equal(kept[0], x)
    for eager, compiled in zip(*gradients, strict=True):
        assert_near(compiled, eager, 64 * ROUNDING)  # sums of 4 to 120 terms, in another order
