"""What a file says about itself: target, preprocessing, and a signature over every layer's codes.

Stored as one JSON text under the key `edgeqat` of the ONNX model's metadata, where any runtime can read it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.feeds import Feeds, Given
from export.lowered import ExportError, LoweredLayer, LoweredModel
from export.metadata_entries import (
    FLOAT_TARGETS,
    check_description,
    check_proof,
    parsed_entries,
)
from export.names import bias_of, int4_weight_of, plane_of, weight_of, weight_scale_of
from export.packing import plane_widths, unpack
from export.targets import RUNTIME_ON_AMX, TARGETS, Target

KEY, FORMAT = "edgeqat", 3
# 1: weights' multipliers were powers of two, scales were not moved. 2: no digests of scales, biases and the graph; INT4 files
# without multiplier.
READABLE = range(1, FORMAT + 1)
# Quantizer -> how far its scale is from the trained one (`export/ties.py`)
MOVED = "scales_moved_ppm"
# Of a layer; files of format 1 and 2 have only the first
DIGESTS = ("sha256", "scale_sha256", "bias_sha256")
SAID = ("target", "storage", "runtime", "session_options", MOVED)
FLOAT_RUNTIME = "1.18"  # the oldest that reads opset 20
MOST_PLANES = 3  # of packed codes: 7 = 4 + 2 + 1 bits
PROOF_KEY = "edgeqat.proven"  # written by `qat certify`, after the file


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the model's input: RGB, resized to size × size, scaled to [0, 1], (x - mean) / std, N_3_H_W."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Tensors:
    """The inputs of a model that does not say how an image file becomes them.

    tensors: input name -> its shape without the batch, and its type.
    """

    tensors: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[Any]) -> "Tensors":
        """values: one torch tensor or array per name, N_... each."""
        entries: dict[str, dict[str, Any]] = {}
        for name, value in zip(names, values, strict=True):
            shape = [int(size) for size in value.shape[1:]]
            dtype = str(value.dtype).removeprefix("torch.")
            entries[name] = {"shape": shape, "dtype": dtype}
        return cls(entries)


Source = Preprocessing | Tensors | Mapping[str, Any]


def _as_entry(source: Source) -> dict[str, Any]:
    return dict(source) if isinstance(source, Mapping) else asdict(source)


def image_input(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metadata's `input` of the file `name`, which takes images. Raises ExportError for one that takes tensors."""
    entry: dict[str, Any] = metadata["input"]
    if "tensors" not in entry:
        return entry
    inputs = []
    for tensor, value in entry["tensors"].items():
        inputs.append(f"{tensor} {value['dtype']} {['N', *value['shape']]}")
    raise ExportError(
        f"{name}: takes tensors ({', '.join(inputs)}) and does not say how an image becomes them; export it with classes=, "
        "mean= and std= (qat.export_onnx), or run it in ONNX Runtime"
    )


def random_inputs(metadata: Mapping[str, Any], samples: int) -> Given:
    """Normal numbers, and zeros for integers, of the shapes that a file's metadata states."""
    entry = metadata["input"]
    generator = np.random.default_rng(0)
    if "tensors" not in entry:
        images = generator.normal(size=(samples, 3, entry["size"], entry["size"]))
        return images.astype(np.float32)
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in entry["tensors"].items():
        shape = (samples, *value["shape"])
        is_float = value["dtype"].startswith("float")
        numbers = generator.normal(size=shape) if is_float else np.zeros(shape)
        arrays[name] = numbers.astype(value["dtype"])
    if len(arrays) > 1:
        return Feeds(arrays)
    (only,) = arrays.values()
    return only


def describe(
    model: LoweredModel, target: Target, source: Source, producer: str
) -> dict[str, Any]:
    """What a file of `model` for `target` says of itself, but for its digests."""
    moved = {}
    for tried in model.tried:
        if tried.ppm:
            moved[tried.quantizer] = tried.ppm
    return {
        "format": FORMAT,
        "producer": producer,
        "target": target.name,
        "storage": target.storage,
        "runtime": {
            "onnxruntime": f">={target.runtime}",
            "onnxruntime_on_amx": f">={RUNTIME_ON_AMX}",
            "opset": target.opset,
            "why": target.why,
        },
        "session_options": dict(target.session_options),
        MOVED: moved,
        "input": _as_entry(source),
        "layers": [_entry(layer) for layer in model.layers.values()],
    }


def _entry(layer: LoweredLayer) -> dict[str, Any]:
    bias = layer.float_bias if layer.bias_codes is None else layer.bias_codes
    entry: dict[str, Any] = {
        "name": layer.name,
        "bits": layer.bits,
        "carry": layer.weight_multiplier,
        "shape": list(layer.codes.shape),
        "sha256": digest(layer.codes),
        "scale_sha256": _digest_of_bytes(layer.stored_scale),
        "bias_sha256": _digest_of_bytes(bias),
    }
    if not layer.input_quantizer:
        entry["reads"] = "float"
    return entry


def sign(
    proto: onnx.ModelProto,
    model: LoweredModel,
    target: Target,
    source: Source,
    producer: str,
) -> onnx.ModelProto:
    """Write the metadata into `proto` (in place) and return it."""
    write_metadata(proto, describe(model, target, source, producer))
    return proto


def sign_float(
    proto: onnx.ModelProto, target: str, source: Source, producer: str
) -> onnx.ModelProto:
    """Write the metadata of a file without integer codes into `proto` (in place) and return it.

    target: one of FLOAT_TARGETS.
    """
    assert target in FLOAT_TARGETS
    value = {
        "format": FORMAT,
        "producer": producer,
        "target": target,
        "storage": "float",
        "runtime": {
            "onnxruntime": f">={FLOAT_RUNTIME}",
            "opset": _standard_opset(proto),
            "why": "a float file of opset 20",
        },
        "session_options": {},
        MOVED: {},
        "input": _as_entry(source),
        "layers": [],
    }
    write_metadata(proto, value)
    return proto


def _standard_opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operators that `proto` imports."""
    (version,) = (
        opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx")
    )
    return int(version)


def write_metadata(proto: onnx.ModelProto, value: Mapping[str, Any]) -> None:
    """Put `value` into `proto`, with the digests over its list of layers and over the graph."""
    digests = {
        "sha256": _digest_of_digests(value["layers"]),
        "graph_sha256": graph_digest(proto),
    }
    onnx.helper.set_model_props(proto, {KEY: json.dumps({**value, **digests})})


def different_descriptions(
    found: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, str]:
    """Where the metadata `found` in a file is not what its run would write, and how. The producer's version may differ."""
    expected = json.loads(json.dumps(expected))  # as it is when read from a file
    in_file: dict[str, Any] = {}
    in_run: dict[str, Any] = {}
    for key in SAID:
        in_file[key] = found.get(key)
        in_run[key] = expected[key]
    for key, value in expected["input"].items():
        in_file[key] = found["input"].get(key)
        in_run[key] = value
    different: dict[str, str] = {}
    for key, value in in_run.items():
        if in_file[key] != value:
            different[key] = (
                f"the file says {_short(in_file[key])}, the run {_short(value)}"
            )
    layers = _different_layers(found["layers"], expected["layers"])
    if layers:
        different["layers"] = layers
    return different


def _different_layers(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> str:
    """How a file's list of layers differs from the run's; empty where it does not."""
    names_found = [entry["name"] for entry in found]
    names_expected = [entry["name"] for entry in expected]
    if names_found != names_expected:
        return f"the file lists {len(found)} layers, the run has {len(expected)}, or in another order"
    wrong = []
    for entry, of_run in zip(found, expected, strict=True):
        if entry != of_run:
            wrong.append(entry["name"])
    if wrong:
        return f"what the file signs of {', '.join(wrong[:3])} is not what the run has"
    return ""


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def digest(codes: NDArray[np.generic]) -> str:
    """SHA-256 of int8 codes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(codes, np.int8).tobytes()).hexdigest()


def _digest_of_bytes(values: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _digest_of_digests(layers: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the layers' own: of codes, scales and biases, in the file's order."""
    total = hashlib.sha256()
    for entry in layers:
        for key in DIGESTS:
            if key in entry:
                total.update(str(entry[key]).encode())
    return total.hexdigest()


def read_metadata(proto: onnx.ModelProto, name: str) -> dict[str, Any]:
    """Raises ExportError when the file has none, one of a newer format, or one that says what no file can mean."""
    text = _property(proto, KEY)
    if text is None:
        raise ExportError(
            f"{name}: carries no edgeqat metadata; export it with `qat export`"
        )
    value = parsed_entries(text, KEY, name)
    if value.get("format") not in READABLE:
        raise ExportError(
            f"{name}: metadata format {value.get('format')} is newer than this version reads ({FORMAT})"
        )
    check_description(value, name)
    return value


def _property(proto: onnx.ModelProto, key: str) -> str | None:
    """One text of an ONNX model's metadata; None where it has no such entry."""
    for entry in proto.metadata_props:
        if entry.key == key:
            return str(entry.value)
    return None


def graph_digest(proto: onnx.ModelProto) -> str:
    """SHA-256 of the graph alone: what is proven of it does not depend on the metadata."""
    return hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()


def record_proof(proto: onnx.ModelProto, proven: Sequence[Mapping[str, Any]]) -> None:
    """Write into `proto` where its codes were proven, one entry per machine; an older record is replaced."""
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    record = {"graph_sha256": graph_digest(proto), "proven": list(proven)}
    properties[PROOF_KEY] = json.dumps(record)
    onnx.helper.set_model_props(proto, properties)


def proof_of(proto: onnx.ModelProto, name: str = "the file") -> list[dict[str, Any]]:
    """Where the file's codes were proven; nothing if the graph has changed since. Raises ExportError for a damaged record."""
    text = _property(proto, PROOF_KEY)
    if text is None:
        return []
    record = parsed_entries(text, PROOF_KEY, name)
    check_proof(record, name)
    if record["graph_sha256"] != graph_digest(proto):
        return []
    return list(record["proven"])


def wanted_options(proto: onnx.ModelProto, name: str = "the model") -> dict[str, str]:
    """Session options that the file's metadata asks for, each one of those that targets have.

    Raises ExportError for any other: some of the runtime's options write files, so a file must not choose freely.
    """
    if _property(proto, KEY) is None:
        return {}
    options: dict[str, str] = read_metadata(proto, name).get("session_options", {})
    return options


def unsigned_parts(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning for a file of an earlier format, whose signature covers less."""
    if metadata["format"] >= FORMAT:
        return ()
    return (
        f"format {metadata['format']}: its signature covers weight codes alone, not scales, biases and the graph",
    )


def missing_options(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Warnings, one for each session option that the file's target needs and its metadata does not ask for."""
    text = _property(proto, KEY)
    if text is None:
        return ()
    metadata = json.loads(text)
    target = TARGETS.get(metadata["target"])
    if target is None:
        return ()
    options = metadata.get("session_options", {})
    warnings = []
    for key, value in target.session_options:
        if options.get(key) != value:
            warnings.append(
                f"session option {key}={value} is not in the metadata: without it codes may be wrong on some machines"
            )
    return tuple(warnings)


def broken_signatures(
    proto: onnx.ModelProto, metadata: Mapping[str, Any]
) -> dict[str, str]:
    """What in the file is not what was signed, by layer or part, and how; checked without the run. The graph as a whole is
    named where no layer is."""
    tensors = {}
    for tensor in proto.graph.initializer:
        tensors[tensor.name] = numpy_helper.to_array(tensor)
    broken: dict[str, str] = {}
    for entry in metadata["layers"]:
        difference = _unlike_signed(entry, tensors)
        if difference:
            broken[entry["name"]] = difference
    if _digest_of_digests(metadata["layers"]) != metadata["sha256"]:
        broken["list of layers"] = (
            "an entry was changed: the SHA-256 over all of them does not match"
        )
    signed_graph = metadata.get("graph_sha256")
    if not broken and signed_graph is not None and graph_digest(proto) != signed_graph:
        broken["graph"] = (
            "something in it was changed since it was signed: its SHA-256 does not match"
        )
    return broken


def _unlike_signed(
    entry: Mapping[str, Any], tensors: Mapping[str, NDArray[np.generic]]
) -> str:
    """How a layer is not what was signed in its `entry`; empty where it is."""
    name = entry["name"]
    shape = tuple(entry["shape"])
    codes = stored_codes(tensors, name, entry["bits"], entry["carry"], shape)
    if codes is None:
        return "its weight is not in the file"
    are_integers = np.array_equal(codes, np.rint(codes))
    if not are_integers or digest(codes) != entry["sha256"]:
        return "its codes do not match their SHA-256"
    signed_parts = {"scale": weight_scale_of(name), "bias": bias_of(name)}
    for part, tensor_name in signed_parts.items():
        key = f"{part}_sha256"
        if key not in entry:
            continue
        tensor = tensors.get(tensor_name)
        if tensor is None or _digest_of_bytes(tensor) != entry[key]:
            return f"its {part} does not match its SHA-256"
    return ""


def codes_of(
    layer: LoweredLayer, found: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.generic] | None:
    """The layer's weight codes as a file's initialisers `found` hold them."""
    return stored_codes(
        found, layer.name, layer.bits, layer.weight_multiplier, layer.codes.shape
    )


def stored_codes(
    found: Mapping[str, NDArray[np.generic]],
    name: str,
    bits: int,
    weight_multiplier: int,
    shape: tuple[int, ...],
) -> NDArray[np.generic] | None:
    """Codes of layer `name` in any storage (float64 where a byte is not a multiple of the weight multiplier); None where
    absent."""
    stored = found.get(weight_of(name))
    if stored is not None:
        offset = 128 if stored.dtype == np.uint8 else 0
        return (stored.astype(np.float64) - offset) / weight_multiplier
    nibbles = found.get(int4_weight_of(name))
    if nibbles is not None:
        return nibbles.astype(np.int8)
    planes = _planes(found, name)
    widths = plane_widths(bits)
    if len(planes) != len(widths):
        return None
    count = math.prod(shape)
    for plane, width in zip(planes, widths, strict=True):
        whole_bytes = -(-count * width // 8)
        if plane.dtype != np.uint8 or plane.shape != (whole_bytes,):
            return None
    return unpack([np.asarray(plane, np.uint8) for plane in planes], bits, shape)


def _planes(
    found: Mapping[str, NDArray[np.generic]], layer: str
) -> list[NDArray[np.generic]]:
    """The planes of a layer's packed codes, as many as there are."""
    planes = []
    for index in range(MOST_PLANES):
        plane = found.get(plane_of(layer, index))
        if plane is not None:
            planes.append(plane)
    return planes
