"""The common structures of vision come through whole, or are refused by name with a cure; the rest in tools/structures.py."""

from pathlib import Path

import pytest
import torch

import qat
from tests.export.outcomes import outcome
from tests.export.structures import STRUCTURES

REFUSED = {
    "volume", "recurrent", "long_memory", "dynamic_convolution", "data_dependent_branch", "fixed_batch", "written_in_place",
}  # fmt: skip
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
    assert verdict == "refused", words


@pytest.mark.parametrize(("name", "pattern"), [("recurrent", "gru"), ("long_memory", "lstm"), ("volume", "0")])
def test_a_float_rule_licenses_what_cannot_be_quantized(name: str, pattern: str, tmp_path: Path) -> None:
    """The cure of the refusal works."""
    model, example = STRUCTURES[name]()
    rules = [(pattern, qat.FLOAT), *qat.uniform_rules(4)]
    assert outcome(model, example, "ort-int8", tmp_path, rules) == ("certified", "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-native"])
@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - REFUSED))
def test_every_structure_is_certified(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = STRUCTURES[name]()
    assert outcome(model, example, target, tmp_path) == ("certified", "")
