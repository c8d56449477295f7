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
    readers = {
        i: node.op_type
        for node in session.optimized(proto, name=name).graph.node
        for i in node.input
    }
    kernels: dict[str, str] = {}
    for layer in layers:
        tensors = (weight_of(layer), plane_of(layer, 0), weight_scale_of(layer))
        kernels[layer] = next(
            (readers[tensor] for tensor in tensors if tensor in readers), "none"
        )
    return kernels


def settings_that_differ(
    proto: onnx.ModelProto, images: Given, name: str = ""
) -> dict[str, int]:
    """Codes that differ from the default (ALL, one thread, one batch) at EXTENDED, with 2 threads, in batches of 1.

    name: what messages call `proto`.
    """
    names = quantizer_tensors(proto)
    instrumented = session.with_outputs(proto, names)
    default = session.load(instrumented, name=name).run(images)
    others: dict[str, Mapping[str, NDArray[np.generic]]] = {
        "EXTENDED": session.load(instrumented, level="EXTENDED", name=name).run(images),
        "2 threads": session.load(instrumented, threads=2, name=name).run(images),
        "batches of 1": _one_by_one(
            session.load(instrumented, name=name), images, default
        ),
    }
    counts = {
        setting: sum(int((found[n] != default[n]).sum()) for n in names)
        for setting, found in others.items()
    }
    return {setting: count for setting, count in counts.items() if count}


def quantizer_tensors(proto: onnx.ModelProto) -> list[str]:
    """Names of the uint8 tensors that quantizers write: what comes out of QuantizeLinear, after its clip if it has one."""
    clipped = {
        node.input[0]: node.output[0]
        for node in proto.graph.node
        if node.op_type == "Clip"
    }
    written = [
        node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"
    ]
    return [clipped.get(name, name) for name in written] + [
        name for name, _, _ in code_outputs(proto)
    ]


def _one_by_one(
    loaded: session.Session, images: Given, whole: Mapping[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """The outputs of `loaded` for one image at a time, put together as they lie in `whole`, those of all images at once."""
    runs = [loaded.run(images[i : i + 1]) for i in range(len(images))]
    return {
        name: _joined([run[name] for run in runs], whole[name].shape) for name in whole
    }


def _joined(
    parts: list[NDArray[np.generic]], shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """`parts` side by side along the axis that grew to `shape`: the batch is not first everywhere, as in MViT's attention."""
    grown = [
        axis
        for axis, (part, all_) in enumerate(zip(parts[0].shape, shape, strict=True))
        if part != all_
    ]
    return np.concatenate(parts, axis=grown[0]) if grown else parts[0]
