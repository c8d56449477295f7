"""What the runtime makes of a file, told from the file alone: which kernels run its layers, and that it computes the same
codes at every level, number of threads and batch.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from export import session
from export.feeds import Given
from export.names import plane_of, weight_of, weight_scale_of
from export.native_file import KERNELS, code_outputs

INTEGER_KERNELS = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "ConvInteger",
    *KERNELS,
}


def layer_kernels(
    layers: Iterable[str], proto: onnx.ModelProto, name: str = ""
) -> dict[str, str]:
    """Layer name -> operator type that runs it in the runtime's optimised graph ("none" where it cannot be found).

    A layer is known by its weight, its first plane or, where the runtime renamed a weight that it widened, its scale.
    name: what messages call `proto`.
    """
    readers = {}
    for node in session.optimized(proto, name=name).graph.node:
        for tensor in node.input:
            readers[tensor] = node.op_type
    kernels: dict[str, str] = {}
    for layer in layers:
        kernels[layer] = "none"
        for tensor in (weight_of(layer), plane_of(layer, 0), weight_scale_of(layer)):
            if tensor in readers:
                kernels[layer] = readers[tensor]
                break
    return kernels


def settings_that_differ(
    proto: onnx.ModelProto, images: Given, name: str = ""
) -> dict[str, int]:
    """Codes that differ from the default (ALL, one thread, one batch) at EXTENDED, with 2 threads, in batches of 1.

    name: what messages call `proto`.
    """
    names = quantizer_tensors(proto)
    instrumented = session.with_outputs(proto, names)
    usual = session.load(instrumented, name=name)
    extended = session.load(instrumented, level="EXTENDED", name=name)
    threaded = session.load(instrumented, threads=2, name=name)
    default = usual.run(images)
    others: dict[str, Mapping[str, NDArray[np.generic]]] = {
        "EXTENDED": extended.run(images),
        "2 threads": threaded.run(images),
        "batches of 1": _one_by_one(usual, images, default),
    }
    differing: dict[str, int] = {}
    for setting, outputs in others.items():
        count = 0
        for tensor in names:
            count += int((outputs[tensor] != default[tensor]).sum())
        if count:
            differing[setting] = count
    return differing


def quantizer_tensors(proto: onnx.ModelProto) -> list[str]:
    """Names of the uint8 tensors that quantizers write: what comes out of QuantizeLinear, after its clip if it has one."""
    written = []
    clipped = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            written.append(node.output[0])
        elif node.op_type == "Clip":
            clipped[node.input[0]] = node.output[0]
    names = [clipped.get(name, name) for name in written]
    for name, _, _ in code_outputs(proto):
        names.append(name)
    return names


def _one_by_one(
    loaded: session.Session, images: Given, whole: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """The outputs of `loaded` for one image at a time, put together as they lie in `whole`, those of all images at once."""
    runs = [loaded.run(images[i : i + 1]) for i in range(len(images))]
    outputs = {}
    for name, of_all_images in whole.items():
        parts = [run[name] for run in runs]
        outputs[name] = _joined(parts, of_all_images.shape)
    return outputs


def _joined(
    parts: list[NDArray[np.generic]], shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """`parts` side by side along the axis that grew to `shape`: the batch is not first everywhere, as in MViT's attention."""
    for axis, (size, whole_size) in enumerate(zip(parts[0].shape, shape, strict=True)):
        if size != whole_size:
            return np.concatenate(parts, axis=axis)
    return parts[0]
