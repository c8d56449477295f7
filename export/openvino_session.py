"""The one door to OpenVINO, which is needed to check plain QDQ files (export/qdq.py) and nothing else.

OpenVINO reads QuantizeLinear and DequantizeLinear as one FakeQuantize. Its low-precision transformations move the
dequantization after layers, pools and sums, which then run on 8-bit integers, and fuse what follows a layer into it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from export.agreement import Logits, Runtime, StoredCodes, from_reals, with_real_outputs
from export.feeds import Feeds, Given
from export.lowered import ExportError, LoweredQuantizer

# On processors with bfloat16 OpenVINO takes it for what is not quantized, unless it is told otherwise.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenvinoSession:
    """A model compiled for the CPU: `run(images)` gives its outputs by name."""

    def __init__(self, proto: onnx.ModelProto, options: Mapping[str, str]) -> None:
        openvino = _openvino()
        core = openvino.Core()
        try:
            self.compiled = core.compile_model(
                core.read_model(proto.SerializeToString()), "CPU", dict(options)
            )
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO {version()} cannot load the model: {error}"
            ) from error
        self.outputs = [value.name for value in proto.graph.output]

    def run(self, images: Given) -> dict[str, np.ndarray]:
        """Outputs by name for one batch."""
        found = self.compiled(dict(images) if isinstance(images, Feeds) else images)
        return {name: np.array(found[name]) for name in self.outputs}


def openvino_runtime(
    proto: onnx.ModelProto,
    quantizers: Mapping[str, LoweredQuantizer],
    name: str,
    options: Mapping[str, str],
) -> Runtime:
    """OpenVINO on the CPU under a name of one's choice.

    It shows no codes: they are taken from the floats after DequantizeLinear, in a copy of the file that returns these too.
    """
    instrumented, outputs = with_real_outputs(proto, quantizers)
    exposed, plain = (
        OpenvinoSession(instrumented, options),
        OpenvinoSession(proto, options),
    )

    def codes(images: Given) -> StoredCodes:
        found = exposed.run(images)
        return {
            name: from_reals(found[outputs[name]], grid)
            for name, grid in quantizers.items()
        }

    def logits(images: Given) -> Logits:
        (value,) = plain.run(images).values()
        return value.astype(np.float32)

    return Runtime(name, version(), codes, logits)


def version() -> str:
    """OpenVINO's version."""
    return str(_openvino().__version__).split("-")[0]


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ExportError("OpenVINO is not installed: pip install openvino") from error
    return openvino
