"""What entries of a file's metadata may hold: everything that is read is checked by type and range before anybody uses it.

The file is a stranger's until proven otherwise; what it says decides sizes of buffers, loops and the runtime's options.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from edgeqat.files import FileError, reason_of, require_entries
from export.lowered import ExportError
from export.targets import TARGETS

MOST_TEXT = (
    16 << 20
    # Characters of one metadata entry; a thousand layers and 22,000 classes take less than one million
)
MOST_LAYERS = 100_000
MOST_CLASSES = 1_000_000
MOST_NAME = 1_000  # characters
SIZES = range(1, 4097)  # pixels
BITS = range(1, 9)
WEIGHT_MULTIPLIERS = range(1, 128)
MOST_CODES = 1 << 31  # of one layer
FLOAT_TARGETS = ("fp32", "fp16", "qonnx")  # files without layers of codes
SESSION_OPTIONS = frozenset(
    option for target in TARGETS.values() for option in target.session_options
)

DESCRIPTION = {
    "format": int,
    "target": str,
    "input": dict,
    "layers": list,
    "sha256": str,
}
INPUT = {"size": int, "mean": list, "std": list, "classes": list}
TENSOR = {"shape": list, "dtype": str}
TYPES = ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool")
MOST_INPUTS, MOST_AXES = 64, 8
EXTENTS = range(1, 1 << 20)
MOST_VALUES = 1 << 27  # of one input's sample
LAYER = {"name": str, "bits": int, "carry": int, "shape": list, "sha256": str}
PROOF = {"graph_sha256": str, "proven": list}
PROVEN = {"machine": str, "runtime": str, "images": int}
# Unicode's categories of what moves a terminal's cursor or is half a character
CONTROL = ("Cc", "Cs", "Zl", "Zp")
HEX = re.compile(r"[0-9a-f]{64}")


def parsed_entries(text: str, key: str, name: str) -> dict[str, Any]:
    """The JSON object `text`, metadata `key` of the file `name`. Raises ExportError naming both."""
    where = f"{name}: metadata {key}"
    if len(text) > MOST_TEXT:
        raise ExportError(
            f"{where}: has {len(text)} characters; {MOST_TEXT} are possible"
        )
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{where}: is not JSON ({reason_of(error)})") from error
    if not isinstance(value, dict):
        raise ExportError(f"{where}: holds no named entries")
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def check_description(value: Mapping[str, Any], name: str) -> None:
    """Raises ExportError naming the file `name` and the first entry of its description that holds what none can."""
    where = f"{name}: metadata entry"
    _require(value, DESCRIPTION, f"{name}: metadata")
    _check_target(value["target"], where)
    _check_input(value["input"], where)
    _check_options(value.get("session_options", {}), where)
    _check_digest(value["sha256"], f"{where} sha256")
    if "graph_sha256" in value:
        _check_digest(value["graph_sha256"], f"{where} graph_sha256")
    if len(value["layers"]) > MOST_LAYERS:
        raise ExportError(
            f"{where} layers has {len(value['layers'])} layers; {MOST_LAYERS} are possible"
        )
    for index, layer in enumerate(value["layers"]):
        _check_layer(layer, f"{where} layers[{index}]")
    _check_names(
        [layer["name"] for layer in value["layers"]], f"{where} layers", unique=True
    )
    _check_rest(value, where)


def _check_target(target: str, where: str) -> None:
    known = (*TARGETS, *FLOAT_TARGETS)
    if target not in known:
        raise ExportError(
            f"{where} target is {_short(target)}; there are {', '.join(known)}"
        )


def _check_tensors(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not 1 <= len(value) <= MOST_INPUTS:
        raise ExportError(
            f"{where} input.tensors is {_short(value)}; it needs 1 to {MOST_INPUTS} named entries"
        )
    _check_names(list(value), f"{where} input.tensors", unique=True)
    for name, entry in value.items():
        parts = _require(entry, TENSOR, f"{where} input.tensors[{_short(name)}]")
        shape, kind = parts["shape"], parts["dtype"]
        if len(shape) > MOST_AXES or not all(
            type(size) is int and size in EXTENTS for size in shape
        ):
            raise ExportError(
                f"{where} input.tensors[{_short(name)}] has shape {_short(shape)}, which no input can have"
            )
        if math.prod(shape) > MOST_VALUES or kind not in TYPES:
            raise ExportError(
                f"{where} input.tensors[{_short(name)}] is {_short(kind)} {_short(shape)}; up to {MOST_VALUES} of "
                f"{', '.join(TYPES)} are possible"
            )


def _check_input(value: Any, where: str) -> None:
    if isinstance(value, dict) and "tensors" in value:
        _check_tensors(value["tensors"], where)
        return
    entries = _require(value, INPUT, f"{where} input")
    if entries["size"] not in SIZES:
        raise ExportError(
            f"{where} input.size is {_short(entries['size'])}; {SIZES[0]} to {SIZES[-1]} are possible"
        )
    for key in ("mean", "std"):
        numbers = entries[key]
        if len(numbers) != 3 or not all(_is_finite(number) for number in numbers):
            raise ExportError(
                f"{where} input.{key} is {_short(numbers)}; it needs three finite numbers"
            )
    if not all(_survives_float32(number) for number in entries["std"]):
        raise ExportError(
            f"{where} input.std is {_short(entries['std'])}; it needs numbers above 0"
        )
    if not 1 <= len(entries["classes"]) <= MOST_CLASSES:
        raise ExportError(
            f"{where} input.classes has {len(entries['classes'])} names; 1 to {MOST_CLASSES} are possible"
        )
    _check_names(entries["classes"], f"{where} input.classes")


def _is_finite(number: Any) -> bool:
    """Whether JSON's `number` is one that float32 holds. True and False are not numbers."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return math.isfinite(number) and abs(number) < 1e30


def _survives_float32(number: float) -> bool:
    """Whether one can divide by the positive `number` in float32."""
    return number >= 1e-30


def _check_options(options: Any, where: str) -> None:
    """Only what a target of this program asks for: other options of the runtime write files or load libraries."""
    if not isinstance(options, dict):
        raise ExportError(
            f"{where} session_options is {_short(options)}; it needs named entries"
        )
    for key, option in options.items():
        if not isinstance(option, str) or (key, option) not in SESSION_OPTIONS:
            known = ", ".join(
                f"{known_key}={known_option}"
                for known_key, known_option in sorted(SESSION_OPTIONS)
            )
            raise ExportError(
                f"{where} session_options asks for {_short(f'{key}={option}')}; a file may ask for {known}"
            )


def _check_layer(value: Any, where: str) -> None:
    entries = _require(value, LAYER, where)
    for key, possible in (("bits", BITS), ("carry", WEIGHT_MULTIPLIERS)):
        if entries[key] not in possible:
            raise ExportError(
                f"{where}.{key} is {_short(entries[key])}; {possible[0]} to {possible[-1]} are possible"
            )
    shape = entries["shape"]
    if (
        not 1 <= len(shape) <= 8
        or not all(_is_extent(size) for size in shape)
        or math.prod(shape) > MOST_CODES
    ):
        raise ExportError(
            f"{where}.shape is {_short(shape)}; it needs 1 to 8 numbers from 1 on, of at most 2^31 codes"
        )
    for key in ("sha256", "scale_sha256", "bias_sha256"):
        if key in entries:
            _check_digest(entries[key], f"{where}.{key}")
    if entries.get("reads", "float") != "float":
        raise ExportError(
            f"{where}.reads is {_short(entries['reads'])}; it may be 'float' or absent"
        )


def _is_extent(size: Any) -> bool:
    return (
        isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MOST_CODES
    )


def _check_rest(value: Mapping[str, Any], where: str) -> None:
    """What only some files have: their producer, what their target needs, scales that were moved, an ensemble's members."""
    for key, kind in (
        ("producer", str),
        ("storage", str),
        ("runtime", dict),
        ("scales_moved_ppm", dict),
    ):
        if key in value and not isinstance(value[key], kind):
            raise ExportError(
                f"{where} {key} is {_short(value[key])}, not {kind.__name__}"
            )
    if "producer" in value:
        _check_names([value["producer"]], f"{where} producer")
    for quantizer, moved in value.get("scales_moved_ppm", {}).items():
        if not _is_finite(moved):
            raise ExportError(
                f"{where} scales_moved_ppm[{_short(quantizer)}] is {_short(moved)}, not a number"
            )
    if ("members" in value) != ("average" in value):
        raise ExportError(
            f"{where} members and average: an ensemble has both, other files have none"
        )
    if "members" in value:
        members = value["members"]
        if not isinstance(members, list) or not 2 <= len(members) <= 1000:
            raise ExportError(
                f"{where} members is {_short(members)}; it needs 2 to 1000 names"
            )
        _check_names(members, f"{where} members")
        if value["average"] not in ("probabilities", "logits"):
            raise ExportError(
                f"{where} average is {_short(value['average'])}; there are probabilities and logits"
            )


def check_proof(value: Mapping[str, Any], name: str) -> None:
    """Raises ExportError naming the file `name` and what in its record of proofs is none."""
    where = f"{name}: metadata edgeqat.proven"
    record = _require(value, PROOF, where)
    _check_digest(record["graph_sha256"], f"{where}, entry graph_sha256")
    for index, proven in enumerate(record["proven"]):
        entries = _require(proven, PROVEN, f"{where}, entry proven[{index}]")
        _check_names(
            [entries["machine"], entries["runtime"]], f"{where}, entry proven[{index}]"
        )
        if entries["images"] < 0:
            raise ExportError(
                f"{where}, entry proven[{index}].images is {entries['images']}; it cannot be negative"
            )


def _require(value: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        return require_entries(value, kinds, where)
    except FileError as error:
        raise ExportError(str(error)) from error


def _check_names(names: list[Any], where: str, *, unique: bool = False) -> None:
    """Each of `names` is text that a terminal may show: not empty, no control characters."""
    for index, text in enumerate(names):
        if (
            not isinstance(text, str)
            or not 1 <= len(text) <= MOST_NAME
            or _has_control(text)
        ):
            raise ExportError(
                f"{where}[{index}] is {_short(text)}; it needs a name of 1 to {MOST_NAME} characters, none of them control "
                "characters"
            )
    if unique and len(set(names)) < len(names):
        twice = next(_repeated(names))
        raise ExportError(f"{where} names {_short(twice)} twice")


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) in CONTROL for character in text)


def _repeated(names: list[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _check_digest(text: Any, where: str) -> None:
    if not isinstance(text, str) or not HEX.fullmatch(text):
        raise ExportError(f"{where} is {_short(text)}; it needs 64 hexadecimal digits")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
