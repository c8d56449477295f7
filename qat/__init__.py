"""edgeqat: quantization-aware training of vision backbones for edge devices and unseen domains.

The names below are the public ones; each is loaded when it is first used, so `import qat` loads no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from edgeqat.extras import naming_extra
from qat.waiting import asleep

__version__ = "0.2.0"

asleep()

PUBLIC = {
    "quantize_": "qat.surgery.swap",
    "uniform_rules": "qat.surgery.swap",
    "binary_rules": "qat.surgery.swap",
    "parameter_groups": "qat.surgery.swap",
    "QuantizationTable": "qat.surgery.table",
    "LayerSpec": "qat.surgery.layers",
    "FLOAT": "qat.surgery.layers",
    "QuantSpec": "qat.quantizers.spec",
    "Quantizer": "qat.quantizers.contract",
    "LSQ": "qat.quantizers.lsq",
    "LSQPlus": "qat.quantizers.lsq_plus",
    "calibrate": "qat.surgery.calibrate",
    "pause": "qat.surgery.calibrate",
    "begin": "qat.surgery.calibrate",
    "set_norm_mode": "qat.surgery.batchnorm",
    "restore_norm_statistics": "qat.surgery.batchnorm",
    "settle_": "qat.settle",
    "export_onnx": "qat.own_model",
    "certify": "qat.own_model",
}
__all__ = [
    "FLOAT", "LSQ", "LSQPlus", "LayerSpec", "QuantSpec", "QuantizationTable", "Quantizer", "begin", "binary_rules",
    "calibrate", "certify", "export_onnx", "parameter_groups", "pause", "quantize_", "restore_norm_statistics",
    "set_norm_mode", "settle_", "uniform_rules",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(
            f"module 'qat' has no attribute {name!r}; public are {', '.join(__all__)}"
        )
    try:
        value = getattr(importlib.import_module(PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        raise naming_extra(error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from qat.own_model import certify as certify
    from qat.own_model import export_onnx as export_onnx
    from qat.quantizers.contract import Quantizer as Quantizer
    from qat.quantizers.lsq import LSQ as LSQ
    from qat.quantizers.lsq_plus import LSQPlus as LSQPlus
    from qat.quantizers.spec import QuantSpec as QuantSpec
    from qat.settle import settle_ as settle_
    from qat.surgery.batchnorm import restore_norm_statistics as restore_norm_statistics
    from qat.surgery.batchnorm import set_norm_mode as set_norm_mode
    from qat.surgery.calibrate import begin as begin
    from qat.surgery.calibrate import calibrate as calibrate
    from qat.surgery.calibrate import pause as pause
    from qat.surgery.layers import FLOAT as FLOAT
    from qat.surgery.layers import LayerSpec as LayerSpec
    from qat.surgery.swap import binary_rules as binary_rules
    from qat.surgery.swap import parameter_groups as parameter_groups
    from qat.surgery.swap import quantize_ as quantize_
    from qat.surgery.swap import uniform_rules as uniform_rules
    from qat.surgery.table import QuantizationTable as QuantizationTable
