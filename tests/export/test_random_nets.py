"""Fuzz: random small nets through quantization, lowering, packing and the runtime; every code must match."""

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export import session
from export.graph import emit_qdq
from export.lower import lower_to_integers
from export.reference import IntegerReference
from export.targets import TARGETS
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.surgery.nets import with_random_norms

STAGE = st.fixed_dictionaries(
    {
        "channels": st.sampled_from([3, 5, 8, 12]),
        "kernel": st.sampled_from([1, 3, 5]),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "depthwise": st.booleans(),
        "norm": st.booleans(),
        "bias": st.booleans(),
        "activation": st.sampled_from(["none", "relu", "relu6", "hardswish", "silu"]),
        "residual": st.booleans(),
        "pool": st.sampled_from(["none", "max", "average"]),
    }
)
ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU, "none": nn.Identity}
POOLS = {"max": lambda: nn.MaxPool2d(2, ceil_mode=True), "average": lambda: nn.AvgPool2d(3, 1, 1), "none": nn.Identity}


class Stage(nn.Module):
    def __init__(self, inputs: int, options: dict[str, Any]) -> None:
        super().__init__()
        width, kernel = (inputs if options["depthwise"] else options["channels"]), options["kernel"]
        stride = 1 if options["residual"] else options["stride"]
        self.expand = nn.Conv2d(
            inputs, width, kernel, stride, options["dilation"] * (kernel // 2), options["dilation"],
            groups=inputs if options["depthwise"] else 1, bias=options["bias"],
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(width) if options["norm"] else nn.Identity()
        self.activation, self.pool = ACTIVATIONS[options["activation"]](), POOLS[options["pool"]]()
        self.residual, self.width = options["residual"] and width == inputs, width

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.expand(x)))
        return self.pool(y + x if self.residual else y)


class Net(nn.Module):
    def __init__(self, stages: list[dict[str, Any]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        widths, parts = 6, []
        for options in stages:
            parts.append(Stage(widths, options))
            widths = parts[-1].width
        self.stages, self.head = nn.Sequential(*parts), nn.Linear(widths, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    stages=st.lists(STAGE, min_size=1, max_size=4),
    bits=st.integers(2, 8),
    target=st.sampled_from(["ort-int8", "ort-packed"]),
)
def test_every_code_of_a_random_net_matches(stages: list[dict[str, Any]], bits: int, target: str) -> None:
    torch.manual_seed(bits)
    model = with_random_norms(Net(stages), bits).eval()
    images = torch.randn(2, 3, 17, 15)
    quantize_(model, uniform_rules(bits, bits, ("stem", "head")), images, weight_init="mse")
    calibrate(model, [images])
    lowered = lower_to_integers(model, images, TARGETS[target])
    names = list(lowered.quantizers)
    outputs = session.load(session.with_outputs(emit_qdq(lowered, TARGETS[target]), names)).run(images.numpy())
    expected, defined = IntegerReference(lowered, session.FloatOperators()).run(images, given=outputs)
    assert {n: int((expected[n] != outputs[n]).sum()) for n in names} == dict.fromkeys(names, 0)
    assert np.array_equal(defined["logits"], outputs["logits"])
