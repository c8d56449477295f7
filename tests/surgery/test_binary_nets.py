"""Binary-friendly backbones: in timm's registry, of the published sizes, binarized by rules that name what stays out."""

import pytest
import timm
import torch
from torch import nn

from qat.quantizers.binary import BinaryWeight
from qat.quantizers.bireal import BinaryActivation
from qat.surgery.backbones import create_backbone, first_and_last, register_binary_nets
from qat.surgery.binarize import Binarizer, binary_weights, hardtanh_for_relu_, periodic_weights
from qat.surgery.calibrate import begin, calibrate, pause, paused
from qat.surgery.layers import FLOAT
from qat.surgery.swap import binary_rules, parameter_groups, quantize_
from tests.narrow import present
from tests.surgery.nets import with_random_norms

PUBLISHED = {  # millions of parameters, docs/algorithms.md, binary networks
    "cifar_resnet20": 0.27, "bireal_cifar_resnet20": 0.27, "bireal_cifar_resnet18": 11.01, "bireal_vgg_small": 4.66,
    "bireal_resnet18": 11.69, "bireal_resnet34": 21.81,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_timm_finds_the_architecture_with_its_published_size(name: str) -> None:
    register_binary_nets()
    register_binary_nets()  # a second time does not collide
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000 if name.startswith("bireal_resnet") else 10)
    # two digits are published, and the released code counts a few unused per-channel parameters
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - PUBLISHED[name]) <= 0.015
    assert name in timm.list_models("*")


def test_pretrained_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="--weights"):
        create_backbone("bireal_cifar_resnet20", 10, pretrained=True)


def test_rules_keep_first_last_and_shortcuts_and_binarize_the_rest() -> None:
    model, _ = create_backbone("bireal_resnet18", 3)
    table = quantize_(model, binary_rules(model, first_and_last(model)), torch.zeros(1, 3, 32, 32))
    bits = {row.name: row.weight.bits for row in table.rows}
    kept = {name for name, b in bits.items() if b == 8}
    assert kept == {"conv1", "fc", *(f"stages.{i}.0.downsample.1" for i in (1, 2, 3))}
    assert len(bits) - len(kept) == 16 == len(list(binary_weights(model))) and set(bits.values()) == {1, 8}
    assert all(row.input.bits == 1 for row in table.rows if row.weight.bits == 1)


def test_edges_may_stay_in_floating_point() -> None:
    model, _ = create_backbone("bireal_cifar_resnet20", 10)
    table = quantize_(model, binary_rules(model, first_and_last(model), edge=FLOAT), torch.zeros(1, 3, 32, 32))
    assert {row.name for row in table.rows if row.weight is None} == {"conv1", "fc"}


def test_a_timm_net_is_binarized_by_the_same_rules_once_its_relus_are_hardtanhs() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    relu, _ = create_backbone("test_resnet", 4)
    quantize_(relu, binary_rules(relu, first_and_last(relu)), images)
    with pytest.raises(ValueError, match=r"never negative.*hardtanh_for_relu_"):
        calibrate(relu, [images])
    model = with_random_norms(create_backbone("test_resnet", 4)[0])  # timm starts the last norms of its blocks at 0
    assert hardtanh_for_relu_(model) > 0 and not any(isinstance(m, nn.ReLU) for m in model.modules())
    quantize_(model, binary_rules(model, first_and_last(model), binarizer=Binarizer(frequency=7.0)), images)
    calibrate(model, [images])
    assert {float(q.frequency) for q, _ in periodic_weights(model)} == {7.0}
    with_random_norms(model)  # those at the branches' ends begin at 0
    model.train()(images).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for _, w in binary_weights(model))


def test_a_layer_that_would_binarize_the_images_is_named() -> None:
    model, _ = create_backbone("bireal_cifar_resnet20", 10)
    with pytest.raises(ValueError, match="'conv1' would binarize the model's input"):
        quantize_(model, binary_rules(model, ["fc"]), torch.zeros(1, 3, 32, 32))


def test_a_binary_net_that_was_paused_rounds_again_once_it_begins() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(2, 3, 8, 8)
    quantize_(net, binary_rules(net, ("0", "3")), images)
    pause(net)
    net(images)
    begin(net, [images])
    assert not paused(net)
    seen: list[torch.Tensor] = []
    net[1].register_forward_hook(lambda module, args, result: seen.append(result))
    net(images)
    # 4 channels of 3 x 3 products of ±1, times one scale per output channel, plus a bias
    sums = (seen[0] - net[1].bias.view(-1, 1, 1)) / present(net[1].weight_quantizer.scale).view(-1, 1, 1)
    assert sums.abs().max() <= 36.001 and torch.allclose(sums / 2, (sums / 2).round(), atol=1e-3)


def test_scales_thresholds_and_frequencies_are_not_decayed() -> None:
    model, _ = create_backbone("bireal_cifar_resnet20", 10)
    learned = Binarizer(learn_frequency=True, learn_thresholds=True)
    quantize_(model, binary_rules(model, first_and_last(model), binarizer=learned), torch.zeros(1, 3, 32, 32))
    weights, norms, scales = parameter_groups(model, 0.1, 0.01, decay_norms=True)
    assert (weights["weight_decay"], norms["weight_decay"], scales["weight_decay"]) == (0.1, 0.1, 0.0)
    own = {
        id(p) for m in model.modules() if isinstance(m, (BinaryWeight, BinaryActivation)) for p in m.parameters()
        if p.requires_grad
    }  # fmt: skip
    assert own and own <= {id(p) for p in scales["params"]}
