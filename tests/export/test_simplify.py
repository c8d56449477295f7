"""`simplify` against torch.onnx's own optimiser, and how its work grows with the graph."""

import onnx_ir as ir
import onnxscript.optimizer
import pytest
import timm
import torch
from torch import Tensor, nn

from export.simplify import simplify


def exported(model: nn.Module, side: int) -> ir.Model:
    """As torch.onnx translates it, nothing simplified."""
    example = torch.zeros(2, 3, side, side)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model.eval(), (example,), dynamo=True, optimize=False, verbose=False, opset_version=20, dynamic_shapes=shapes
    )
    assert program is not None
    return program.model


def described(model: ir.Model) -> list[tuple[str, list[tuple[int, ...] | None]]]:
    return [(node.op_type, [shape_of(value) for value in node.inputs]) for node in model.graph]


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """Of constants, whose values decide what was folded."""
    if value is None or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        pytest.param("mobilenetv3_small_050", marks=pytest.mark.slow),
        "test_vit",
        "test_convnext",
        pytest.param("regnetz_005", marks=pytest.mark.slow),
    ],
)
def test_same_graph_as_the_exporters_own_optimiser(name: str) -> None:
    model = exported(timm.create_model(name, num_classes=4), 160 if name == "test_vit" else 64)
    expected = model.clone()
    before = len(list(model.graph))
    onnxscript.optimizer.optimize_ir(expected)
    simplify(model)
    assert described(model) == described(expected)
    assert len(list(model.graph)) < before


class Sums(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.length):
            x = torch.relu(x + index + 1)
        return x


def test_work_grows_with_the_graph_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    original = ir.Node.op_identifier

    def counted(node: ir.Node) -> ir.OperatorIdentifier:
        nonlocal looks
        looks += 1
        return original(node)

    monkeypatch.setattr(ir.Node, "op_identifier", counted)
    counts = []
    for length in (20, 80):
        model = exported(Sums(length), 4)
        looks = 0
        simplify(model)
        counts.append(looks)
    assert counts[0] > 0
    assert counts[1] < 6 * counts[0]  # of a four times longer graph; the square is 16
