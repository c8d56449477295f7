"""Brevitas's repairs through the bridge make the net better; our quantizers inside its layers make the same numbers."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat.quantizers.lsq import LSQWeight
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.surgery.nets import TinyNet, with_random_norms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from qat.surgery import brevitas_bridge

pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(bits: int = 3) -> tuple[TinyNet, TinyNet, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 33, 29)
    model = with_random_norms(TinyNet()).eval()
    made = copy.deepcopy(model)
    quantize_(made, uniform_rules(bits, 4, ("stem", "head")), images[:1], weight_init="mse")
    calibrate(made, [images])
    return model, made.eval(), images


@torch.no_grad()
def error(made: nn.Module, model: nn.Module, images: Tensor) -> float:
    return float((made(images) - model(images)).square().mean())


def test_our_quantizers_inside_brevitas_layers_give_our_outputs() -> None:
    _, made, images = quantized()
    theirs = brevitas_bridge.in_brevitas_layers(made)
    assert {type(m).__module__.split(".")[0] for n, m in theirs.named_modules() if n in ("stem", "head")} == {
        "brevitas"
    }
    with torch.no_grad():
        assert torch.equal(theirs(images), made(images))
        assert np.array_equal(
            theirs.block.conv1.quant_weight().int().numpy(),
            made.block.conv1.weight_quantizer.codes(made.block.conv1.weight).numpy(),
        )
        made.block.conv1.weight_quantizer.raw_scale.mul_(1.3)
        assert not torch.equal(theirs(images), made(images))


def test_gradients_pass_through_brevitas_layers_to_our_scales() -> None:
    weight = torch.randn(5, 3, 3, 3)
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 9, 9)
    gradients = []
    for inside in (False, True):
        conv = copy.deepcopy(layer)
        conv.weight = nn.Parameter(weight.clone())
        quantizer = LSQWeight(QuantSpec(4, signed=True, axis=0), conv.weight)
        if inside:
            conv = brevitas_bridge._brevitas_twin(
                conv, weight_quant=brevitas_bridge.weight_quantizer_for_brevitas(quantizer)
            )
            conv(x).square().sum().backward()
        else:
            nn.functional.conv2d(x, quantizer(conv.weight), conv.bias).square().sum().backward()
        gradients.append((conv.weight.grad, quantizer.raw_scale.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_gptq_lowers_the_error_by_moving_weights_alone() -> None:
    model, made, images = quantized()
    before, old = error(made, model, images), {n: p.clone() for n, p in made.named_parameters()}
    brevitas_bridge.gptq_(made, [images])
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, old[n])}
    assert moved == {f"{n}.weight" for n in ("stem", "block.conv1", "block.conv2", "left", "right", "head")}
    assert error(made, model, images) < 0.6 * before


def test_bias_correction_removes_the_mean_error_of_the_output() -> None:
    model, made, images = quantized()
    before = error(made, model, images)
    brevitas_bridge.correct_biases_(made, [images])
    assert error(made, model, images) < 0.6 * before
    assert made.block.conv1.bias is None


def test_equalization_evens_ranges_and_keeps_the_function() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3, groups=1), nn.Flatten(), nn.LazyLinear(4))
    images = torch.randn(2, 3, 11, 9)
    model(images)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 7).view(-1, 1, 1, 1)
    expected = model(images).detach()
    reach = model[0].weight.detach().abs().flatten(1).amax(1)
    brevitas_bridge.equalize_(model, images)
    evened = model[0].weight.detach().abs().flatten(1).amax(1)
    assert float(evened.max() / evened.min()) < 0.1 * float(reach.max() / reach.min())
    assert float((model(images).detach() - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_equalization_finds_functional_relus_and_says_when_there_is_nothing() -> None:
    model, _, images = quantized()
    old = model.block.conv2.weight.detach().clone()
    brevitas_bridge.equalize_(model, images)
    assert not torch.equal(old, model.block.conv2.weight)
    with pytest.raises(ValueError, match="no pair of layers"):
        brevitas_bridge.equalize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3)), images)


def test_a_quantizer_without_a_scale_is_refused_by_name() -> None:
    quantizer = LSQWeight(QuantSpec(4, signed=True), torch.ones(2, 2), name="head.weight")
    quantizer.initialized = False
    with pytest.raises(ValueError, match=r"head\.weight.*calibrate"):
        brevitas_bridge.weight_quantizer_for_brevitas(quantizer)
