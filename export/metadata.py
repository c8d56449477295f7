"""What a file says about itself: target, preprocessing, and a signature over every layer's codes.

Stored as one JSON text under the key `edgeqat` of the ONNX model's metadata, where any runtime can read it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.lowered import ExportError, LoweredLayer, LoweredModel
from export.packing import plane_widths, unpack
from export.targets import TARGETS, Target

KEY, FORMAT = "edgeqat", 2
READABLE = range(1, FORMAT + 1)  # format 1 had weights' multipliers that were powers of two, and no moved scales
MOVED = "scales_moved_ppm"  # quantizer -> how far its scale is from the trained one (`export/ties.py`)
PROOF_KEY = "edgeqat.proven"  # written by `qat certify`, after the file


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the model's input: RGB, resized to size × size, scaled to [0, 1], (x - mean) / std, N_3_H_W."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]


def sign(
    proto: onnx.ModelProto, model: LoweredModel, target: Target, preprocessing: Preprocessing, producer: str
) -> onnx.ModelProto:
    """Write the metadata into `proto` (in place) and return it."""
    moved = {tried.quantizer: tried.ppm for tried in model.tried if tried.ppm}
    layers = [
        {
            "name": layer.name,
            "bits": layer.bits,
            "carry": layer.carry,
            "shape": list(layer.codes.shape),
            "sha256": digest(layer.codes),
            **({} if layer.input_quantizer else {"reads": "float"}),
        }
        for layer in model.layers.values()
    ]
    value = {
        "format": FORMAT,
        "producer": producer,
        "target": target.name,
        "storage": target.storage,
        "runtime": {"onnxruntime": f">={target.runtime}", "opset": target.opset, "why": target.why},
        "session_options": dict(target.session_options),
        MOVED: moved,
        "input": asdict(preprocessing),
        "layers": layers,
        "sha256": hashlib.sha256("".join(str(entry["sha256"]) for entry in layers).encode()).hexdigest(),
    }
    onnx.helper.set_model_props(proto, {KEY: json.dumps(value)})
    return proto


def digest(codes: NDArray[np.generic]) -> str:
    """SHA-256 of int8 codes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(codes, np.int8).tobytes()).hexdigest()


def read_metadata(proto: onnx.ModelProto, name: str) -> dict[str, Any]:
    """Raises ExportError when the file has none, or one of a newer format."""
    found = next((p.value for p in proto.metadata_props if p.key == KEY), None)
    if found is None:
        raise ExportError(f"{name}: carries no edgeqat metadata; export it with `qat export`")
    value: dict[str, Any] = json.loads(found)
    if value.get("format") not in READABLE:
        raise ExportError(f"{name}: metadata format {value.get('format')} is newer than this version reads ({FORMAT})")
    return value


def graph_digest(proto: onnx.ModelProto) -> str:
    """SHA-256 of the graph alone: what is proven of it does not depend on the metadata."""
    return hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()


def record_proof(proto: onnx.ModelProto, proven: Sequence[Mapping[str, Any]]) -> None:
    """Write into `proto` where its codes were proven, one entry per machine; an older record is replaced."""
    others = {p.key: p.value for p in proto.metadata_props if p.key != PROOF_KEY}
    record = {"graph_sha256": graph_digest(proto), "proven": list(proven)}
    onnx.helper.set_model_props(proto, others | {PROOF_KEY: json.dumps(record)})


def proof_of(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    """Where the file's codes were proven; nothing if the graph has changed since."""
    found = next((p.value for p in proto.metadata_props if p.key == PROOF_KEY), None)
    if found is None:
        return []
    record = json.loads(found)
    return list(record["proven"]) if record["graph_sha256"] == graph_digest(proto) else []


def wanted_options(proto: onnx.ModelProto) -> dict[str, str]:
    """Session options that the file's metadata asks for."""
    found = next((p.value for p in proto.metadata_props if p.key == KEY), None)
    return json.loads(found).get("session_options", {}) if found else {}


def missing_options(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Warnings, one for each session option that the file's target needs and its metadata does not ask for."""
    found = next((json.loads(p.value) for p in proto.metadata_props if p.key == KEY), None)
    target = TARGETS.get(found["target"]) if found is not None else None
    if found is None or target is None:
        return ()
    return tuple(
        f"session option {key}={value} is not in the metadata: without it codes may be wrong on some machines"
        for key, value in target.session_options
        if found["session_options"].get(key) != value
    )


def broken_signatures(proto: onnx.ModelProto, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Layers whose codes in the file are not the signed ones, and how; checked without the run."""
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    broken = {}
    for entry in metadata["layers"]:
        codes = stored_codes(found, entry["name"], entry["bits"], entry["carry"], tuple(entry["shape"]))
        if codes is None:
            broken[entry["name"]] = "its weight is not in the file"
        elif not np.array_equal(codes, np.rint(codes)) or digest(codes) != entry["sha256"]:
            broken[entry["name"]] = "its codes do not match their SHA-256"
    return broken


def codes_of(layer: LoweredLayer, found: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic] | None:
    """The layer's weight codes as a file's initialisers `found` hold them."""
    return stored_codes(found, layer.name, layer.bits, layer.carry, layer.codes.shape)


def stored_codes(
    found: Mapping[str, NDArray[np.generic]], name: str, bits: int, carry: int, shape: tuple[int, ...]
) -> NDArray[np.generic] | None:
    """Codes of layer `name` in any storage (float64 where a byte is no multiple of the carry); None where absent."""
    weight = f"{name}.weight"
    if weight in found:
        offset = 128 if found[weight].dtype == np.uint8 else 0
        return (found[weight].astype(np.float64) - offset) / carry
    if f"{weight}/int4" in found:
        return found[f"{weight}/int4"].astype(np.int8)
    planes = [found[f"{weight}/p{i}"] for i in range(3) if f"{weight}/p{i}" in found]
    if len(planes) != len(plane_widths(bits)) or any(p.dtype != np.uint8 for p in planes):
        return None
    return unpack([np.asarray(p, np.uint8) for p in planes], bits, shape)
