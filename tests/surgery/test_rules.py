"""Rules from files: what they decide, and what is said about bad ones."""

import json
from pathlib import Path

import pytest
import torch

from qat.quantizers.spec import QuantSpec
from qat.surgery.layers import LayerSpec
from qat.surgery.rules import before, read_rules, with_options
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from tests.surgery.nets import TinyNet

TOML = """
[[rules]]
layers = "block.*"
weight_bits = 2
input_bits = 3
per_channel = false
offset = true

[[rules]]
layers = "head"
weight_bits = 5
table = true
"""
EXPECTED = [
    ("block.*", LayerSpec(QuantSpec(2, signed=True), QuantSpec(3, offset=True))),
    ("head", LayerSpec(QuantSpec(5, signed=True, axis=0), None, table=True)),
]


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(TOML)
    rules = [
        {"layers": "block.*", "weight_bits": 2, "input_bits": 3, "per_channel": False, "offset": True},
        {"layers": "head", "weight_bits": 5, "table": True},
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"rules": rules}))
    assert read_rules(tmp_path / "rules.toml") == read_rules(tmp_path / "rules.json") == EXPECTED


def test_rules_of_a_file_come_first_and_leave_the_rest_to_the_flags(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    rules = before(EXPECTED, uniform_rules(4, 4, ("stem", "head"), 8), model)
    assert [pattern for pattern, _ in rules] == ["block.*", "head", "stem", "*"]
    quantize_(model, rules, torch.randn(1, 3, 33, 29))
    bits = {name: q.spec.bits for name, q in quantizers(model).items() if q.is_weight}
    assert bits == {
        "stem.weight": 8, "block.conv1.weight": 2, "block.conv2.weight": 2, "left.weight": 4, "right.weight": 4,
        "head.weight": 5,
    }  # fmt: skip
    everything = [("*", EXPECTED[1][1])]
    assert before(everything, uniform_rules(4, 4, ("stem",)), TinyNet()) == everything


def test_options_hold_for_every_rule() -> None:
    rules = with_options(EXPECTED, weight={"power_of_two": True}, source={"gradient_count": "numel"})
    assert rules[0][1].weight.power_of_two and not rules[0][1].input.power_of_two
    assert rules[0][1].input.gradient_count == "numel" and rules[1][1].input is None


@pytest.mark.parametrize(("text", "message"), [
    ("[[rules]", "not TOML"), ("other = 1", "no list named rules"), ("[[rules]]\nweight_bits = 4", "rule 1: needs layers"),
    ('[[rules]]\nlayers = "a"\nbits = 4', "unknown entry 'bits'; known: layers, weight_bits"),
    ('[[rules]]\nlayers = "a"\nweight_bits = "4"', "weight_bits must be int"),
    ('[[rules]]\nlayers = "a"\nweight_bits = true', "weight_bits must be int"),
    ('[[rules]]\nlayers = "a"\nweight_bits = 11', "rule 1: .*11"),
])  # fmt: skip
def test_bad_files_are_named_with_what_to_do(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_rules(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        read_rules(tmp_path / "absent.toml")
