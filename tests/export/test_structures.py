"""The common structures of vision come through whole, or are refused by name with a cure; the rest in tools/structures.py."""

import re
from pathlib import Path

import pytest
import torch

import qat
from tests.export.outcomes import outcome
from tests.export.structures import STRUCTURES
from tests.quick import slow_but

REFUSED = {  # and what the message names
    "volume": r"^0#conv3d0: .* products of conv3d; put \('0', FLOAT\) before",
    "recurrent": r"^net#gru0: .* products of gru; put \('net', FLOAT\) before",
    "recurrent_plain": r"^net#rnn_relu0: .* products of rnn_relu; put \('net', FLOAT\) before",
    "recurrent_twice_both_ways": r"^net#gru0: .* products of gru; put \('net', FLOAT\) before",
    "long_memory": r"^net#lstm0: .* products of lstm; put \('net', FLOAT\) before",
    "long_memory_both_ways": r"^net#lstm0: .* products of lstm; put \('net', FLOAT\) before",
    "long_memory_cell": r"^net#lstm_cell0: .* products of lstm_cell; put \('net', FLOAT\) before",
    "dynamic_convolution": r"^#conv2d0: the weight of this conv2d depends on the image; .* torch\.matmul",
    "data_dependent_branch": r"^the model's own forward: .* out of PyTorch \(__bool__\), .*torch\.where",
    "fixed_batch": r"^the model fixes its batch to a number, .* x\.shape\[0\] where its forward has len\(x\)",
    "prototypes_by_size": r"^the model computes otherwise for some numbers of images.*='use_mm_for_euclid_dist'.* <= 25",
    "image_by_image": r"^module 'body\.linear': makes .* torch\.vmap: write it as an expression of x",
    "deformable": r"^body#deform_conv2d0: .* products of deform_conv2d; put \('body', FLOAT\) before",
    "written_in_place": r"^body#setitem0: writes .* into a part of a tensor \(setitem\), .* torch\.cat",
}
QUICK = (
    "residual_in_place", "unet_transposed", "image_plus_net", "cross_attention", "tied_autoencoder", "shared_weights",
    "focus_stem", "powers_of_two", "functional_call", "two_images", "weight_norm_by_hooks", "einsum_of_one",
    "written_into_zeros", "clamped_twice",
)  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(STRUCTURES) >= 117
    assert {*REFUSED, *QUICK} <= STRUCTURES.keys()


@pytest.mark.parametrize("name", QUICK)
def test_a_common_structure_is_certified(name: str, tmp_path: Path) -> None:
    model, example = STRUCTURES[name]()
    assert outcome(model, example, "ort-int8", tmp_path) == ("certified", "")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_followed_is_refused_with_a_cure(name: str, tmp_path: Path) -> None:
    model, example = STRUCTURES[name]()
    verdict, words = outcome(model, example, "ort-int8", tmp_path)
    assert verdict == "refused" and re.match(REFUSED[name], words), words


LICENSED = {  # and the layer that a FLOAT rule leaves in floating point
    "volume": "0",
    "deformable": "body",
    "recurrent": "net",
    "recurrent_plain": "net",
    "recurrent_twice_both_ways": "net",
    "long_memory": "net",
    "long_memory_both_ways": "net",
    "long_memory_cell": "net",
    "einsum_layer": "body.linear0",
    "encoder_layer": "body.self_attn.*",
    "unet_transposed": "up",
}


@pytest.mark.parametrize("name", slow_but(["recurrent"], LICENSED))
def test_a_float_rule_leaves_a_layer_in_floating_point(name: str, tmp_path: Path) -> None:
    """It is the cure that refusals name."""
    model, example = STRUCTURES[name]()
    rules = [(LICENSED[name], qat.FLOAT), *qat.uniform_rules(4)]
    assert outcome(model, example, "ort-int8", tmp_path, rules) == ("certified", "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-native"])
@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - REFUSED.keys()))
def test_every_structure_is_certified(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = STRUCTURES[name]()
    assert outcome(model, example, target, tmp_path) == ("certified", "")
