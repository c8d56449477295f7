"""A bundle: a file, images and what is expected of them, for a device that has ONNX Runtime and NumPy alone.

    bundle/
      model.onnx      the file, every quantizer's codes among its outputs
      images.bin      float32 N_3_H_W, as the model sees them
      expected.json   for each tensor of codes and each image a digest; logits and answers
      check.py        `python check.py` runs it and prints the verdict; check.mjs does in Node

What is expected comes from the integer definition (`export/reference.py`), not from a runtime; what stays in floating point
between integer operators is computed by ONNX Runtime on the machine that writes the bundle.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export import session
from export.bundled.check import FORMAT, digest
from export.lowered import LoweredModel
from export.metadata import wanted_options
from export.native_file import is_native
from export.reference import IntegerReference
from export.skeleton import (
    CODE_OPS,
    is_mark,
    mark_name,
    quantizer_of,
    quantizers_in_order,
    weight_layer,
)
from export.ties import float_quantizers

BUNDLED = Path(__file__).parent / "bundled"
SCRIPTS = ("check.py", "check.mjs")


class Expected(NamedTuple):
    """By the integer definition: codes of every quantizer, in graph order, for one image after the other; logits N_C."""

    codes: dict[str, list[NDArray[np.uint8]]]
    logits: NDArray[np.float32]


def write_bundle(
    folder: Path,
    model: LoweredModel,
    proto: onnx.ModelProto,
    name: str,
    images: NDArray[np.float32],
) -> Expected:
    """Write the bundle of `proto`, the file `name` of the canonical `model`, into an existing `folder`.

    images: N_3_H_W float32, normalised. Returns what is expected of them.
    """
    order = quantizers_in_order(model)
    exposed = session.with_outputs(proto, order).SerializeToString()
    (folder / "model.onnx").write_bytes(exposed)
    pixels = np.ascontiguousarray(images, np.float32).tobytes()
    (folder / "images.bin").write_bytes(pixels)
    codes, logits = expected_of(model, images)
    expected: dict[str, Any] = {
        "format": FORMAT,
        "about": f"bundle of {name}",
        "model": {"file": "model.onnx", "sha256": hashlib.sha256(exposed).hexdigest()},
        "images": {
            "file": "images.bin",
            "shape": list(images.shape),
            "sha256": hashlib.sha256(pixels).hexdigest(),
        },
        "input": proto.graph.input[0].name,
        "output": proto.graph.output[0].name,
        "session_options": wanted_options(proto),
        "needs_kernels": is_native(proto),
        "expected_from": (
            f"the integer definition; floating-point operators of ONNX Runtime {session.version()} on {platform.machine()}"
        ),
        "tensors": _expected_tensors(model, codes),
        "answers": logits.argmax(1).tolist(),
        "logits": logits.tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))
    for script in SCRIPTS:
        shutil.copyfile(BUNDLED / script, folder / script)
    return Expected(codes, logits)


def _expected_tensors(
    model: LoweredModel, codes: Mapping[str, list[NDArray[np.uint8]]]
) -> list[dict[str, Any]]:
    """An entry for each quantizer, in graph order: what its codes must be, and what they are computed from."""
    in_float = set(float_quantizers(model))
    entries = []
    for quantizer, maker, sources in origins(model):
        of_images = codes[quantizer]
        entry = {
            "name": quantizer,
            "made_by": maker,
            "sources": sources,
            "float": quantizer in in_float,
            "shape": list(of_images[0].shape),
            "sha256": [digest(of_image) for of_image in of_images],
        }
        entries.append(entry)
    return entries


def expected_of(model: LoweredModel, images: NDArray[np.float32]) -> Expected:
    """Codes and logits that the integer definition computes, image by image."""
    reference = IntegerReference(model, session.FloatOperators())
    codes: dict[str, list[NDArray[np.uint8]]] = {}
    for name in quantizers_in_order(model):
        codes[name] = []
    logits = []
    for image in images:
        computed, outputs = reference.run(torch.from_numpy(image[None]))
        for name, of_image in computed.items():
            codes[name].append(np.ascontiguousarray(of_image))
        logits.append(next(iter(outputs.values())).ravel())
    return Expected(codes, np.stack(logits))


def origins(model: LoweredModel) -> Iterator[tuple[str, str, list[str]]]:
    """(quantizer, what computes its codes, the quantizers whose codes that reads), in graph order."""
    for node in model.skeleton.graph:
        if not is_mark(node) or mark_name(node) not in model.quantizers:
            continue
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        maker = _maker(producer, model)
        if quantizer_of(value) is not None:
            maker = "requantization"
        yield mark_name(node), maker, _sources(producer, model)


def _maker(node: ir.Node | None, model: LoweredModel) -> str:
    if node is None:
        return "the quantizer of the images"
    layer = weight_layer(node, model)
    if layer is not None:
        return f"layer {layer.name}"
    return node.op_type


def _sources(node: ir.Node | None, model: LoweredModel) -> list[str]:
    """Quantizers from which floats, or codes that were only moved, lead to `node`."""
    found: list[str] = []
    seen: set[ir.Node] = set()
    pending = [node]
    while pending:
        last = pending.pop()
        if last is None or last in seen:
            continue
        seen.add(last)
        if is_mark(last):
            if mark_name(last) in model.quantizers:
                found.append(mark_name(last))
            continue
        operands = last.inputs[:1] if last.op_type in CODE_OPS else last.inputs
        pending += [value.producer() for value in operands if value is not None]
    return found
