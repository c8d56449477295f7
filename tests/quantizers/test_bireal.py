"""Binary activations: codes, zeros, thresholds, and gradients against the derivative of an explicit surrogate function."""

import pytest
import torch
from torch import Tensor

from qat.quantizers.bireal import BinaryActivation
from qat.quantizers.spec import QuantSpec

BIT = QuantSpec(1)


def values() -> Tensor:
    x = torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(0)) * 1.3
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return x


def surrogate(a: Tensor) -> Tensor:
    """F with F' = max(0, 2 - 2|a|): Bi-Real Net's piecewise quadratic."""
    inside = torch.where(a < 0, 2 * a + a * a, 2 * a - a * a)
    return torch.where(a.abs() < 1, inside, a.sign())


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_are_the_surrogates(standardize: bool, learned: bool) -> None:
    quantizer = BinaryActivation(BIT, standardize=standardize, channels=5 if learned else None)
    threshold = torch.linspace(-0.4, 0.3, 5) if learned else torch.zeros(5)
    if learned:
        quantizer.threshold.data.copy_(threshold)
    x = values().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(upstream)
    y, t = x.detach().double().requires_grad_(), threshold.double().requires_grad_()
    a = y - t.view(1, 5, 1, 1)
    if standardize:
        flat = a.flatten(1)
        spread = (flat - flat.mean(1, keepdim=True)).square().mean(1) + 1e-5
        a = a / spread.sqrt().view(-1, 1, 1, 1)
    surrogate(a).backward(upstream.double())
    # float32 against float64; gradients reach about 10, threshold gradients are sums of 84 of them
    assert (x.grad.double() - y.grad).abs().max() < 2e-5
    if learned:
        assert (quantizer.threshold.grad.double() - t.grad).abs().max() < 5e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 2, 1), (3, 5)])
def test_the_published_deviation_is_unbiased_and_in_training_alone(training: bool, shape: tuple[int, ...]) -> None:
    """Few values per sample: n - 1 is far from n."""
    quantizer = BinaryActivation(BIT, published_deviation=True).train(training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    quantizer(x).backward(upstream)
    y = x.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for sample, weight in zip(y, upstream.double(), strict=True):
        a = sample
        if training:
            mean = sample.sum() / sample.numel()
            a = sample / (((sample - mean) ** 2).sum() / (sample.numel() - 1) + 1e-5).sqrt()
        loss = loss + (surrogate(a) * weight).sum()
    loss.backward()
    assert (x.grad.double() - y.grad).abs().max() < 2e-5  # float32 against float64; gradients reach about 5


def test_codes_are_signs_with_zero_up_and_the_same_in_training_and_evaluation() -> None:
    x = values()
    quantizer = BinaryActivation(BIT)
    expected = torch.where(x >= 0, 1, -1).to(torch.int32)
    assert torch.equal(quantizer.codes(x), expected) and quantizer.codes(x).view(-1)[:2].tolist() == [1, 1]
    trained = quantizer.train()(x.clone().requires_grad_()).detach()
    assert torch.equal(trained, quantizer.eval()(x))
    assert torch.equal(trained, (quantizer.codes(x) - quantizer.zero_point) * quantizer.scale)


def test_tiny_inputs_keep_their_sign() -> None:
    x = torch.full((1, 2, 2, 2), -1e-42).requires_grad_()  # divided by a deviation, it would round to -0 and then to +1
    assert BinaryActivation(BIT)(x * 1.0).unique().tolist() == [-1.0]


def test_other_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="1 bit and one scale"):
        BinaryActivation(QuantSpec(2))
