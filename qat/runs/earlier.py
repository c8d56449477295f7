"""Files of run folders written by earlier versions, such as those in which a quantizer's scale was called its step."""

from collections.abc import Collection
from typing import Any

from qat.words import EARLIER_NAME

RECIPE_ENTRIES = {
    "step_init": "scale_init",
    "step_lr_ratio": "scale_lr_ratio",
    "step_lr_unit": "scale_lr_unit",
}
# Flags of grids, which 1-bit runs had and could not use
NOT_OF_BIPER = (
    "bits", "weight_bits", "weight_only", "activation_only", "activations", "power_of_two", "gradient_count", "rules",
)  # fmt: skip
FULL_PRECISION = ("fp", "sagm")
CHECKPOINT_ENTRIES = {"step_sizes": "scale_sizes"}
PARAMETER = "raw_scale"


def recipe_entries(values: dict[str, Any]) -> dict[str, Any]:
    """Entries of a recipe.json under the names of now."""
    renamed = {RECIPE_ENTRIES.get(name, name): value for name, value in values.items()}
    if renamed.get("scale_lr_unit") == "step":
        renamed["scale_lr_unit"] = "scale"
    if renamed.get("method") == "biper":
        for name in NOT_OF_BIPER:
            renamed.pop(name, None)
    if renamed.get("method") not in FULL_PRECISION:
        # A run of before this entry was trained with code -128
        renamed.setdefault("symmetric_weights", False)
    return renamed


def results_entries(
    results: dict[str, Any], measured: Collection[str]
) -> dict[str, Any]:
    """Entries of a results.json in which the part that the run was tested on is called "test", under that part's own name.

    measured: names of all parts that the run was measured on.
    """
    of_sources = results.get("source_validation")
    if not isinstance(of_sources, dict):
        return results
    others = sorted(set(measured) - of_sources.keys())
    if len(others) != 1:
        return results
    return results | {"test_domain": others[0]}


def log_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One line of a metrics.jsonl under the names of now."""
    if isinstance(entry.get("steps"), dict):
        return {
            "scales" if name == "steps" else name: value
            for name, value in entry.items()
        }
    return entry


def checkpoint_entries(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint under the names of now: its entries, and the parameters in every part of it."""
    renamed = {
        CHECKPOINT_ENTRIES.get(name, name): _parameters(value)
        for name, value in state.items()
    }
    if isinstance(renamed.get("recipe"), dict):
        renamed["recipe"] = recipe_entries(renamed["recipe"])
    return renamed


def _parameters(value: Any) -> Any:
    if isinstance(value, dict):
        return {_parameter(key): _parameters(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_parameters(inner) for inner in value)
    return value


def _parameter(key: Any) -> Any:
    if isinstance(key, str) and key.rpartition(".")[2] == EARLIER_NAME:
        return key.removesuffix(EARLIER_NAME) + PARAMETER
    return key
