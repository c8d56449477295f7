"""The QONNX file in the hands of the `qonnx` package computes the trained codes."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.lower import lower, trained_codes
from export.qonnx import emit_qonnx
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import LayerSpec
from qat.surgery.swap import quantize_, quantizers
from tests.surgery.nets import TinyNet, with_random_norms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    onnx_exec = pytest.importorskip("qonnx.core.onnx_exec")
    modelwrapper = pytest.importorskip("qonnx.core.modelwrapper")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("offset", [False, True])
def test_qonnx_computes_our_codes(offset: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 33, 29, generator=torch.Generator().manual_seed(3))
    model = with_random_norms(TinyNet()).eval()
    layer = LayerSpec(QuantSpec(3, signed=True, axis=0), QuantSpec(4, offset=offset))
    quantize_(model, [("*", layer)], images[:1], weight_init="mse")
    calibrate(model, [images])
    proto = emit_qonnx(lower(model, images))
    onnx.checker.check_model(proto)
    assert {o.domain for o in proto.opset_import} == {"", "qonnx.custom_op.general"}
    onnx.save(proto, str(tmp_path / "tiny.onnx"))
    image = images[:1].numpy()
    seen = onnx_exec.execute_onnx(
        modelwrapper.ModelWrapper(str(tmp_path / "tiny.onnx")), {"input": image}, return_full_exec_context=True
    )
    codes, outputs = trained_codes(model, image)
    logits = outputs["logits"]
    for name, quantizer in quantizers(model).items():
        computed = seen[f"{name}.quantized"]
        if quantizer.is_weight:
            scale = quantizer.scale.numpy().reshape(-1, *[1] * (computed.ndim - 1))
            expected = quantizer.codes(model.get_parameter(name)).numpy()
            assert np.array_equal(np.rint(computed / scale), expected), name
        else:
            shift = 1 << (quantizer.spec.bits - 1) if quantizer.spec.signed and not quantizer.spec.offset else 0
            found = np.rint(computed / quantizer.scale.numpy()) + (
                quantizer.zero_point if quantizer.spec.offset else shift
            )
            assert np.array_equal(found, codes[name]), name
    assert np.abs(seen["logits"] - logits).max() <= 1e-5 * np.abs(logits).max()  # float32 sums in another order
