"""A small trained-looking net, lowered and written once for all export tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export.graph import emit_qdq
from export.lower import lower_to_integers, trained_codes
from export.lowered import LoweredModel
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.surgery.nets import TinyNet, with_random_norms


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    lowered: LoweredModel
    proto: onnx.ModelProto
    file: Path
    images: NDArray[np.float32]

    def trained(
        self, images: NDArray[np.float32]
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
        return trained_codes(self.model, images)


def build_tiny(bits: int, images: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    quantize_(model, uniform_rules(bits, bits, ("stem", "head")), images[:1], weight_init="mse")
    calibrate(model, [images])
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    images = torch.randn(6, 3, 33, 29, generator=torch.Generator().manual_seed(3))
    model = build_tiny(4, images)
    lowered = lower_to_integers(model, images)
    proto = emit_qdq(lowered)
    file = tmp_path_factory.mktemp("export") / "tiny.onnx"
    onnx.save(proto, str(file))
    return Exported(model, lowered, proto, file, images.numpy())
