"""Two 8-bit quantizers in a row survive the runtime, which would drop one of them."""

import numpy as np
import torch
from torch import Tensor, nn

from export import session
from export.graph import emit_qdq
from export.lower import lower_to_integers
from export.reference import IntegerReference
from qat.quantizers.lsq import LSQ
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.extra: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return (self.second(self.extra(y + y.flip(2)))).mean((2, 3))


def test_both_quantizers_keep_their_grid() -> None:
    torch.manual_seed(0)
    model, images = Twice().eval(), torch.randn(2, 3, 12, 12)
    quantize_(model, uniform_rules(8, 8), images)
    model.extra = LSQ(QuantSpec(8), name="extra")
    calibrate(model, [images])
    model.extra.raw_scale.data.mul_(2.7)
    lowered = lower_to_integers(model, images)
    names = list(lowered.quantizers)
    (found,) = session.load(emit_qdq(lowered)).run(images.numpy()).values()
    _, defined = IntegerReference(lowered, session.FloatOperators()).run(images)
    assert "extra" in names
    # the float mean at the end may round in another order; a dropped quantizer moves it a thousand times as far
    assert np.abs(found - defined["logits"]).max() < 1e-6
