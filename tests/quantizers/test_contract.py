"""What a quantizer gets from the base class: a new one says how x is quantized, which codes that are and where to start."""

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.quantizers.contract import Quantizer, Start
from qat.quantizers.spec import QuantSpec
from qat.surgery.swap import quantizers
from qat.words import Init

X = torch.linspace(-2, 2, 33).view(1, 3, 11, 1).repeat(4, 1, 1, 11)


class MaxQuantizer(Quantizer):
    """The scale covers the largest magnitude; gradients pass straight through."""

    starts_from_data = True

    def __init__(self, name: str = "") -> None:
        super().__init__(QuantSpec(4, signed=True), name)
        self.raw_scale = nn.Parameter(torch.full((), float("nan")))

    def start_for(self, values: Tensor, init: Init) -> Start:
        return Start(values.abs().max() / self.spec.qmax)

    def codes(self, x: Tensor) -> Tensor:
        return (x.detach() / self.scale).round().clamp(self.spec.qmin, self.spec.qmax).int()

    def fake_quantize(self, x: Tensor) -> Tensor:
        return x + (self.codes(x) * self.scale - x).detach()


def test_it_refuses_to_run_before_it_has_a_scale_and_runs_after() -> None:
    quantizer = MaxQuantizer("mine")
    with pytest.raises(RuntimeError, match="quantizer 'mine' has no scale yet"):
        quantizer(X)
    quantizer.begin(X)
    assert float(quantizer.scale) == pytest.approx(2 / 7)
    assert torch.allclose(quantizer(X), quantizer.codes(X) * quantizer.scale)
    copy = MaxQuantizer()
    copy.load_state_dict(quantizer.state_dict())
    assert copy.initialized and torch.equal(copy(X), quantizer(X))


def test_it_is_observed_and_passes_through() -> None:
    quantizer = MaxQuantizer()
    seen: list[Tensor] = []
    quantizer.observer = seen.append
    assert quantizer(X) is X and len(seen) == 1


def test_what_is_not_finite_gives_no_step() -> None:
    quantizer = MaxQuantizer("mine")
    with pytest.raises(ValueError, match="input of quantizer 'mine'"):
        quantizer.begin(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="scales must be positive"):
        quantizer.begin(torch.zeros(3))
    with pytest.raises(ValueError, match="no offset"):
        quantizer.initialize(torch.tensor(1.0), offset=torch.tensor(1.0))
    assert not quantizer.initialized


def test_calibrate_gives_it_its_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    qat.quantize_(model, qat.uniform_rules(4), X)
    model[2].input_quantizer = MaxQuantizer("2.input")
    qat.calibrate(model, [X])
    with torch.no_grad():
        largest = float(model[1](nn.functional.conv2d(X, model[0].weight, model[0].bias)).max())  # type: ignore[arg-type]
    assert float(quantizers(model)["2.input"].scale) == pytest.approx(largest / 7, rel=1e-5)
