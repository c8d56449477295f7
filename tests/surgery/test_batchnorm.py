"""Batch norms: how they train, statistics taken again with quantizers on, folding with proof."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qat.surgery import batchnorm
from qat.surgery.batchnorm import fold_norms, restore_norm_statistics, set_norm_mode
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import parameter_groups, quantize_, uniform_rules
from qat.words import NormMode
from tests.narrow import present
from tests.surgery.nets import TinyNet, with_random_norms


def images(seed: int = 0, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 21, 19, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("mode", ["normal", "frozen-statistics", "frozen"])
def test_what_each_mode_lets_move(mode: NormMode) -> None:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    set_norm_mode(model, mode)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.1), lr=0.1)
    for seed in range(2):
        model.train()
        optimizer.zero_grad()
        out = copy.deepcopy(model)(images(seed))
        model(images(seed)).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    moved = {kind for kind in ("running_mean", "running_var", "weight", "bias") if not torch.equal(
        before[f"block.bn1.{kind}"], after[f"block.bn1.{kind}"])}  # fmt: skip
    expected = {"normal": {"running_mean", "running_var", "weight", "bias"}, "frozen-statistics": {"weight", "bias"}}
    assert moved == expected.get(mode, set())
    assert not torch.equal(before["stem.weight"], after["stem.weight"])
    model.eval()
    set_norm_mode(model, "normal")
    assert all(p.requires_grad for p in model.parameters()) and out.shape == (4, 5)


def test_statistics_are_those_of_the_quantized_net_over_all_batches_even_when_frozen() -> None:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    quantize_(model, uniform_rules(2, 2, ()), images()[:1])
    calibrate(model, [images()])
    set_norm_mode(model, "frozen")
    model.train()
    seen: list[torch.Tensor] = []
    handle = model.bn.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    momentum, batches = model.bn.momentum, [images(1), images(2)]
    restore_norm_statistics(model, batches)
    handle.remove()
    means = np.stack([x.double().numpy().mean((0, 2, 3)) for x in seen])
    variances = np.stack([x.double().numpy().var((0, 2, 3), ddof=1) for x in seen])
    assert np.allclose(model.bn.running_mean.numpy(), means.mean(0), rtol=0, atol=1e-5)  # float32 means of 1e3 elements
    assert np.allclose(model.bn.running_var.numpy(), variances.mean(0), rtol=1e-5, atol=0)
    assert model.bn.momentum == momentum and model.training
    # the quantizers were on: the stem's outputs are sums of 2-bit codes
    stem = nn.functional.conv2d(batches[0], model.stem.weight, model.stem.bias, 2, 1)
    assert not torch.allclose(seen[0], stem)
    kept = model.bn.running_mean.clone()
    model(images(3))
    assert torch.equal(kept, present(model.bn.running_mean))  # frozen again afterwards


class Timm(nn.Module):
    """A norm that carries its activation, as timm's do; a norm after two readers, which must stay."""

    def __init__(self) -> None:
        from timm.layers import BatchNormAct2d

        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 7, 3, bias=False), BatchNormAct2d(7)
        self.shared, self.after = nn.Conv2d(7, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(self.norm(self.conv(x)))
        return self.after(y) + y


@pytest.mark.parametrize(("net", "folded"), [
    (TinyNet, ["stem", "block.conv1", "block.conv2"]), (Timm, ["conv"]),
])  # fmt: skip
def test_folding_keeps_the_function(net: type[nn.Module], folded: list[str]) -> None:
    torch.manual_seed(0)
    model = with_random_norms(net()).eval()
    expected = model(images()).detach()
    assert fold_norms(model, images()) == folded
    out = model(images()).detach()
    assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (1 if net is Timm else 0)


@pytest.mark.parametrize("term", ["running_mean", "running_var", "weight", "bias", "conv bias"])
def test_folding_proves_itself(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = batchnorm._folded

    def forgetful(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
        conv, norm = copy.deepcopy(conv), copy.deepcopy(norm)
        neutral = 1.0 if term in ("weight", "running_var") else 0.0
        with torch.no_grad():
            (conv.bias if term == "conv bias" else getattr(norm, term)).fill_(neutral)
        return fold(conv, norm)

    model = nn.Sequential(nn.Conv2d(3, 7, 3), with_random_norms(nn.Sequential(nn.BatchNorm2d(7)))[0]).eval()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(batchnorm, "_folded", forgetful)
    with pytest.raises(ValueError, match="fold_norms: 0 with its batch norm"):
        fold_norms(model, images())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    monkeypatch.undo()
    assert fold_norms(model, images()) == ["0"]


def test_a_quantized_model_is_folded_at_export_instead() -> None:
    model = with_random_norms(TinyNet())
    quantize_(model, uniform_rules(4, 4, ()), images()[:1])
    with pytest.raises(ValueError, match="before quantize_"):
        fold_norms(model, images())
