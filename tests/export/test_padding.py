"""Padding of codes: the file pads with what the trained net pads with, or is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import session
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError
from export.native_graph import emit
from export.reference import IntegerReference
from export.targets import TARGETS
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules

IMAGES = torch.randn(4, 3, 11, 11, generator=torch.Generator().manual_seed(2))


class Padded(nn.Module):
    """A residual sum that two branches read, so that it has codes; one pads them, for a layer or a max pool and a layer."""

    def __init__(self, fill: float, pool: bool) -> None:
        super().__init__()
        self.fill, self.pool = fill, pool
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)
        padded = F.pad(x, (1, 2, 0, 1), value=self.fill)
        padded = F.max_pool2d(padded, 3, 2) if self.pool else padded
        return self.head(self.third(padded).mean((2, 3)) + x.mean((2, 3)))


def net(fill: float, pool: bool) -> nn.Module:
    torch.manual_seed(3)
    model = Padded(fill, pool).eval()
    with torch.no_grad():
        assert model.second.bias is not None
        model.second.bias.fill_(-4.0)  # sums are negative, so that a zero would win in the max pool
    quantize_(model, uniform_rules(8, 8), IMAGES[:1])
    calibrate(model, [IMAGES])
    return model


@pytest.mark.parametrize("target", ["ort-int8", "ort-native"])
@pytest.mark.parametrize(("fill", "pool"), [(0.0, False), (0.0, True), (-np.inf, True)])
def test_the_file_pads_with_what_was_trained(fill: float, pool: bool, target: str) -> None:
    model = net(fill, pool)
    logits = trained_codes(model, IMAGES.numpy())[1]["logits"]
    lowered = lower_to_integers(model, IMAGES[:1], TARGETS[target])
    runtime = session.load(session.with_outputs(emit(lowered, TARGETS[target]), list(lowered.quantizers)))
    found = runtime.run(IMAGES.numpy())
    expected, _ = IntegerReference(lowered, session.FloatOperators()).run(IMAGES, given=found)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    # At 8 bits, rounded biases change single codes by one; another padding changes whole borders.
    assert np.abs(found["logits"] - logits).max() < 0.01 * np.ptp(logits)


@pytest.mark.parametrize(("fill", "pool"), [(-2.0, False), (0.37, True), (-2.0, True)])
def test_codes_padded_with_another_number_are_refused_by_layer_and_value(fill: float, pool: bool) -> None:
    with pytest.raises(ExportError, match=rf"layer 'third': its input is padded with {fill:g}, which is not a code"):
        lower_to_integers(net(fill, pool), IMAGES[:1])
