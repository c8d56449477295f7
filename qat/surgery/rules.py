"""Bit rules for single layers, from a file.

    [[rules]]
    layers = "blocks.0.*"     # glob over layer names; the first rule that matches decides
    weight_bits = 8           # left out: the weight stays in floating point
    input_bits = 8            # left out: so does the input
    per_channel = true        # the default; false: one scale for the whole weight
    offset = false            # true: LSQ+ for the input
    table = false             # the default; true: a GELU after a linear reads 8-bit codes, a table in `ort-native` files

The same as JSON: {"rules": [{"layers": "head", "weight_bits": 8, "input_bits": 8}]}.
"""

import fnmatch
import json
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edgeqat.files import FileError, read_text
from qat.quantizers.spec import QuantSpec
from qat.surgery.decide import Rules
from qat.surgery.layers import FLOAT, LayerSpec
from qat.surgery.observe import WEIGHTED

KEYS = {
    "layers": str,
    "weight_bits": int,
    "input_bits": int,
    "per_channel": bool,
    "offset": bool,
    "table": bool,
}


def read_rules(path: Path) -> list[tuple[str, LayerSpec]]:
    """The rules of a TOML or JSON file, in order. Raises ValueError naming file, rule and entry that cannot be used."""
    is_json = path.suffix == ".json"
    try:
        text = read_text(path)
        content = json.loads(text) if is_json else tomllib.loads(text)
    except FileError as error:
        raise ValueError(f"--rules {error}") from error
    except ValueError as error:
        language = "JSON" if is_json else "TOML"
        raise ValueError(f"--rules {path}: not {language} ({error})") from error
    rules = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(rules, list) or not rules:
        raise ValueError(
            f"--rules {path}: holds no list named rules; write [[rules]] tables, each with layers = <glob>"
        )
    read = []
    for number, entry in enumerate(rules, 1):
        read.append(_rule(entry, f"--rules {path}: rule {number}"))
    return read


def _rule(entry: Any, where: str) -> tuple[str, LayerSpec]:
    if not isinstance(entry, dict) or "layers" not in entry:
        raise ValueError(f"{where}: needs layers = <glob over layer names>")
    for key, value in entry.items():
        if key not in KEYS:
            raise ValueError(
                f"{where}: unknown entry {key!r}; known: {', '.join(KEYS)}"
            )
        if type(value) is not KEYS[key]:
            raise ValueError(
                f"{where}: {key} must be {KEYS[key].__name__}, got {value!r}"
            )
    weight = None
    source = None
    try:
        if "weight_bits" in entry:
            per_channel = entry.get("per_channel", True)
            weight = QuantSpec.of_weight(entry["weight_bits"], per_channel=per_channel)
        if "input_bits" in entry:
            source = QuantSpec(entry["input_bits"], offset=entry.get("offset", False))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if weight is None and source is None:
        return entry["layers"], FLOAT
    return entry["layers"], LayerSpec(weight, source, table=entry.get("table", False))


def before(
    given: Rules, others: Rules, model: nn.Module
) -> list[tuple[str, LayerSpec]]:
    """`given`, then those of `others` that still decide a layer of `model`: a rule that decides nothing is an error."""
    undecided = set()
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            undecided.add(name)
    rules = list(given)
    for pattern, _ in given:
        undecided -= _matched(undecided, pattern)
    for pattern, spec in others:
        decided = _matched(undecided, pattern)
        if decided:
            rules.append((pattern, spec))
            undecided -= decided
    return rules


def _matched(names: Iterable[str], pattern: str) -> set[str]:
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def with_options(
    rules: Rules, *, weight: dict[str, Any], source: dict[str, Any]
) -> list[tuple[str, LayerSpec]]:
    """`rules` with fields of every weight's and every input's spec replaced."""
    changed = []
    for pattern, spec in rules:
        new_weight = None if spec.weight is None else replace(spec.weight, **weight)
        new_input = None if spec.input is None else replace(spec.input, **source)
        changed.append((pattern, replace(spec, weight=new_weight, input=new_input)))
    return changed
