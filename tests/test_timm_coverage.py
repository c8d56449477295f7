"""tools/timm_coverage.py: quantizers that decide nothing in full precision either, and those that quantization cuts off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tools import timm_coverage

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Unread(nn.Module):
    """Half of what it joins is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.used, self.unread = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, timm_coverage.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        joined = torch.cat([self.used(x), F.avg_pool2d(self.unread(x), 3, 1, 1)], 1)
        return self.head(joined[:, :8].mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    made = Unread().eval()
    quantize_(made, uniform_rules(4), X[:1])
    calibrate(made, [X])
    return made


def test_quantizers_of_what_nobody_reads_are_idle(model: nn.Module) -> None:
    idle = set(timm_coverage._train(model, X))
    assert {"unread.weight", "#avg_pool2d0"} <= idle
    assert not any(name.startswith(("stem", "used", "head")) for name in idle)


def test_a_quantizer_that_the_net_needs_is_not_excused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_coverage, "_idle_in_full_precision", lambda model, images: {"#avg_pool2d0"})
    with pytest.raises(timm_coverage.NoGradient, match=r"unread\.weight"):
        timm_coverage._train(model, X)
