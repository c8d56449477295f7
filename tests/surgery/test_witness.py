"""Multiplications that the trace loses are seen by the dispatcher, and the module is named."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat.surgery.swap import quantize_, uniform_rules
from qat.surgery.trace import trace_calls
from qat.surgery.witness import check_witnessed, witness

IMAGE = torch.zeros(1, 3, 10, 10)


def into_a_buffer(x: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])
    made[:, 1:] = x
    return made[:, 1:]


def into_one_image(x: Tensor) -> Tensor:
    """All there are in the example."""
    made = torch.zeros(x.shape)
    made[:1] = x
    return made


def through_out(x: Tensor) -> Tensor:
    made = torch.zeros(x.shape)
    np.copyto(made.numpy(), x.numpy())
    return made


def through_a_view(x: Tensor) -> Tensor:
    made = torch.zeros(2, *x.shape)
    made[0].copy_(x)
    return made[0]


HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "a write into a buffer": into_a_buffer,
    "a write into one image": into_one_image,
    "a numpy copy": through_out,
    "a copy into a view": through_a_view,
    "numpy and back": lambda x: torch.from_numpy(x.numpy().copy()),
    "a Python list": lambda x: torch.tensor(x.tolist()),
    "a storage": lambda x: torch.empty(0).set_(x.untyped_storage(), 0, x.shape, x.stride()),
    "index_copy": lambda x: torch.zeros(x.shape).index_copy_(1, torch.arange(x.shape[1]), x),
}


class Hiding(nn.Module):
    def __init__(self, hide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hide = hide
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hide(torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("hiding", HIDING)
def test_a_hidden_input_is_refused_with_what_hides_it(hiding: str) -> None:
    """Never a table that calls the layers after it constant: so were certified nets with all but one layer in float."""
    model = Hiding(HIDING[hiding]).eval()
    words = (
        r"takes what depends on the image out of PyTorch|through another view of it|hides where|into a part of a tensor"
    )
    with pytest.raises(ValueError, match=words):
        quantize_(model, uniform_rules(4, 4), IMAGE)
    assert type(model) is Hiding and type(model.second) is nn.Conv2d and not hasattr(model, "stream_quantizers")


def test_multiply_adds_that_the_trace_does_not_know_are_refused() -> None:
    """The dispatcher's count against a trace that misses a layer."""
    model = Hiding(into_a_buffer).eval()
    trace = trace_calls(model, IMAGE, frozenset({"first", "second", "head"}))
    trace.calls = [call for call in trace.calls if call.layer != "second"]
    with pytest.raises(ValueError, match=r"module 'second': makes 5,184 multiply-adds .* can follow 0 of them"):
        check_witnessed(witness(model, IMAGE), trace)  # 6 · 6 pixels · 4 · 4 · 9


class Tables(nn.Module):
    """A layer on a constant table, a product that its own code makes, one by einsum, one transposed, one per vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, groups=1, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.positions = nn.Linear(2, 4)
        self.register_buffer("grid", torch.randn(64, 2))
        self.mix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x)) + self.positions(self.grid).t().reshape(1, 4, 8, 8)
        x = torch.einsum("nchw,cd->nd", x, self.mix)
        return torch.stack([torch.mv(self.mix[:, :4], row[:4]) for row in x])


@pytest.mark.parametrize("samples", [1, 3])
def test_multiply_adds_are_those_counted_by_hand_and_constants_are_none(samples: int) -> None:
    model = Tables().eval()
    images = torch.zeros(samples, 3, 10, 10)
    by_hand = {"conv": 4 * 4 * 4 * 27, "up": 4 * 4 * 4 * 4 * 4, "": 4 * 6 + 4 * 4}  # einsum first adds over h and w
    assert dict(witness(model, images)) == {path: samples * count for path, count in by_hand.items()}
    trace = trace_calls(model, images, frozenset({"conv", "up", "positions"}))
    check_witnessed(witness(model, images), trace)


def test_the_model_is_left_as_it_was() -> None:
    model = Tables()
    model.conv.eval()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    witness(model, IMAGE)
    assert model.training and not model.conv.training and model.up.training
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def hidden_copy(x: Tensor) -> np.ndarray:
    """x in NumPy, by a way that no function mode sees."""
    with torch._C.DisableTorchFunction():
        return x.detach().numpy()


class Flickering(nn.Module):
    """Constant at first sight: which table is read depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        numbers = hidden_copy(x).sum()
        rows = torch.arange(4.0).reshape(2, 2) + float(numbers > 0)
        return self.conv(x).mean((2, 3)) + self.table(rows)[:1]


def test_a_constant_must_stay_constant_when_the_image_changes() -> None:
    with pytest.raises(ValueError, match="module 'table'"):
        quantize_(Flickering().eval(), uniform_rules(4, 4), IMAGE)
