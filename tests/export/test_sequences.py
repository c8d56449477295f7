"""Tensors that are not images: sequences (N, C, L), and codes whose batch is not the first axis."""

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export import session
from export.graph import emit_qdq
from export.lower import lower_to_integers
from export.lowered import LoweredModel
from export.reference import IntegerReference
from export.runtime_checks import settings_that_differ
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules


class Sequences(nn.Module):
    """A convolution over an image, then over its pixels in a row, pooled with padding and an end hanging over."""

    def __init__(self, counts_padding: bool, ceil: bool) -> None:
        super().__init__()
        self.stem, self.along = nn.Conv2d(3, 6, 3), nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.pool = nn.AvgPool1d(4, 2, 0 if ceil else 1, ceil_mode=ceil, count_include_pad=counts_padding)
        self.mix, self.head = nn.Conv1d(5, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.along(self.stem(x).relu().flatten(2)).relu()
        return self.head(self.mix(self.pool(rows)).mean(2))


class BatchSecond(nn.Module):
    """Queries and keys of one layer, split before the batch as MViT's are, each read by a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qk, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(4, 3)
        self.q, self.k = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.stem(x).flatten(2).transpose(1, 2)
        q, k = self.qk(pixels).unflatten(2, (2, 4)).permute(2, 0, 3, 1).unbind(0)
        return self.head((self.q(q) + self.k(k)).mean(2))


def exported(model: nn.Module, images: Tensor) -> tuple[LoweredModel, onnx.ModelProto]:
    quantize_(model, uniform_rules(4, 4, ("stem", "head")), images, weight_init="mse")
    calibrate(model, [images])
    lowered = lower_to_integers(model, images[:1])
    return lowered, emit_qdq(lowered)


def test_layers_and_pools_over_sequences_give_the_codes_of_the_reference() -> None:
    for counts_padding, ceil in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        images = torch.randn(3, 3, 9, 9)
        lowered, proto = exported(Sequences(counts_padding, ceil).eval(), images)
        names = list(lowered.quantizers)
        outputs = session.load(session.with_outputs(proto, names)).run(images.numpy())
        expected, _ = IntegerReference(lowered, session.FloatOperators()).run(images, given=outputs)
        assert any(outputs[n].shape == (3, 5, 12) for n in names)
        assert {n: int((expected[n] != outputs[n]).sum()) for n in names} == dict.fromkeys(names, 0)


def test_batches_of_one_are_compared_where_the_batch_lies() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 6, 6)
    _, proto = exported(BatchSecond().eval(), images)
    outputs = session.load(session.with_outputs(proto, ["q.input"])).run(images.numpy())
    assert outputs["q.input"].shape == (1, 3, 4, 16)
    assert settings_that_differ(proto, images.numpy().astype(np.float32)) == {}
