"""The common structures of vision come through whole, or are refused by name with a cure; the rest in tools/structures.py."""

import re
from pathlib import Path

import pytest
import torch

import qat
from tests.export.outcomes import outcome
from tests.export.structures import STRUCTURES

REFUSED = {  # and what the message names
    "volume": r"^0#conv3d0: .* products of conv3d; put \('0', FLOAT\) before",
    "recurrent": r"^gru#gru0: .* products of gru; put \('gru', FLOAT\) before",
    "long_memory": r"^lstm#lstm0: .* products of lstm; put \('lstm', FLOAT\) before",
    "dynamic_convolution": r"^#conv2d0: the weight of this conv2d depends on the image; .* torch\.matmul",
    "data_dependent_branch": r"^the model's own forward: .* out of PyTorch \(__bool__\), .* torch\.where",
    "fixed_batch": r"^the model fixes its batch to a number, .* x\.shape\[0\] where its forward has len\(x\)",
    "written_in_place": r"^body#setitem0: writes .* into a part of a tensor \(setitem\), .* torch\.cat",
}
QUICK = (
    "residual_in_place", "sum_of_a_list", "squeeze_and_excite_linear", "unet_transposed", "image_plus_net",
    "transformer_fused", "encoder_layer", "cross_attention", "einsum_layer", "tied_autoencoder", "one_module_twice",
    "shared_weights", "focus_stem", "sound", "two_images",
)  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(STRUCTURES) >= 117 and STRUCTURES.keys() >= REFUSED and set(QUICK) <= STRUCTURES.keys()


@pytest.mark.parametrize("name", QUICK)
def test_a_common_structure_is_certified(name: str, tmp_path: Path) -> None:
    model, example = STRUCTURES[name]()
    assert outcome(model, example, "ort-int8", tmp_path) == ("certified", "")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_followed_is_refused_with_a_cure(name: str, tmp_path: Path) -> None:
    model, example = STRUCTURES[name]()
    verdict, words = outcome(model, example, "ort-int8", tmp_path)
    assert verdict == "refused" and re.match(REFUSED[name], words), words


@pytest.mark.parametrize(("name", "pattern"), [("recurrent", "gru"), ("long_memory", "lstm"), ("volume", "0")])
def test_a_float_rule_licenses_what_cannot_be_quantized(name: str, pattern: str, tmp_path: Path) -> None:
    """The cure of the refusal works."""
    model, example = STRUCTURES[name]()
    rules = [(pattern, qat.FLOAT), *qat.uniform_rules(4)]
    assert outcome(model, example, "ort-int8", tmp_path, rules) == ("certified", "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-native"])
@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - REFUSED.keys()))
def test_every_structure_is_certified(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = STRUCTURES[name]()
    assert outcome(model, example, target, tmp_path) == ("certified", "")
