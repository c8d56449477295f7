"""What becomes of a model that a user brings: certified, refused by name, or a fault."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from export.lowered import ExportError
from qat.surgery.example import arguments_of, tensors_in
from qat.surgery.swap import quantizers

CURE = re.compile(r"FLOAT|torch\.(cat|where|matmul|vmap)|x\.shape\[0\]|compute_mode=")  # the cures there are


def outcome(model: nn.Module, example: Any, target: str, folder: Path, rules: Any = None) -> tuple[str, str]:
    """("certified" | "refused" | "fault", details): quantize, calibrate, train three steps, settle, export, certify."""
    try:
        table = qat.quantize_(model, rules or qat.uniform_rules(4), example)
    except (ValueError, TypeError) as error:
        return _refusal(error)
    except Exception as error:
        return "fault", f"quantize_: {type(error).__name__}: {error}"
    try:
        problem = _trained(model, example)
        if problem:
            return "fault", problem
        qat.settle_(model)
        file = qat.export_onnx(model, folder / "model.onnx", target)
    except ExportError as error:
        return _refusal(error)
    except Exception as error:
        return "fault", f"{type(error).__name__}: {error}"
    try:
        certificate = qat.certify(model, file, example)
    except Exception as error:
        return "fault", f"certify: {type(error).__name__}: {error}"
    if not certificate.passed:
        return "fault", f"not certified: {certificate}"
    unexpected = [row.name for row in table.rows if row.weight is None and rules is None]
    return ("fault", f"left in floating point: {unexpected}") if unexpected else ("certified", "")


def _refusal(error: Exception) -> tuple[str, str]:
    """A refusal names a layer, an operation or a module, and says what to do."""
    text = str(error)
    return ("refused", text) if CURE.search(text) else ("fault", f"refused without a cure: {text}")


def _trained(model: nn.Module, example: Any) -> str:
    """Three steps of training; says which quantizer got no gradient, or a bad one."""
    args, kwargs = arguments_of(model, example)
    qat.calibrate(model, [example] if isinstance(example, (Tensor, dict)) else [tuple(example)])
    optimizer = torch.optim.SGD(qat.parameter_groups(model, weight_decay=0.0), lr=1e-3)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        out = model(*args, **kwargs)
        loss = sum((tensor.float() - 0.3).square().mean() for tensor in tensors_in(out))
        loss.backward()
        for name, quantizer in quantizers(model).items():
            gradients = [parameter.grad for parameter in quantizer.parameters()]
            if any(gradient is None for gradient in gradients):
                return f"quantizer {name} gets no gradient"
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):  # type: ignore[arg-type]
                return f"quantizer {name} gets a gradient that is not finite"
        optimizer.step()
    model.eval()
    return ""
