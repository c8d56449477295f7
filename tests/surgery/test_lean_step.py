"""What a training step saves, time and memory, changes no bit: ReLUs left to quantizers, tensors computed again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.quantizers import contract, fused, recompute
from qat.quantizers.lsq import LSQ
from qat.quantizers.recompute import recomputed
from qat.quantizers.spec import QuantSpec
from qat.surgery import points
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import QuantConv2d
from qat.surgery.swap import quantize_, uniform_rules
from tests.narrow import gradient
from tests.surgery.nets import TinyNet, with_random_norms


class ClipNet(nn.Module):
    """Each kind of ReLU before a convolution of its own; the last one is read twice and must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 7, 7, 3, padding=1, bias=i % 2 == 0) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(7) for _ in range(6))
        self.clips = nn.ModuleList(
            [nn.ReLU6(inplace=True), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU(), nn.Hardtanh(0, 2)]
        )
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, clip in zip(self.convs[:5], self.norms[:5], self.clips, strict=True):
            x = clip(norm(conv(x)))
        x = torch.relu(self.norms[5](self.convs[5](x)))
        return self.head((x + x.flip(2)).mean((2, 3)))


class NormedNet(nn.Module):
    """A residual stream of tokens, quantized where it adds, that a layer norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm, self.head = (
            nn.Linear(3, 24), nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 5)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.norm(x + self.mix(x)).mean(1))


class PooledNet(nn.Module):
    """A stem whose quantized result both kinds of pools read, one of them as in ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((F.max_pool2d(x, 3, 2) + F.avg_pool2d(x, 3, 2)).mean((2, 3)))


def quantized(net: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model, images = with_random_norms(net()), torch.randn(4, 3, 13, 11)
    quantize_(model, uniform_rules(4, 4, (), 8), images)
    calibrate(model, [images])
    for quantizer in model.modules():  # scales that leave codes above the clip at 6, and some elements beyond the grid
        if isinstance(quantizer, LSQ) and quantizer.ceiling == 6:
            quantizer.initialize(torch.tensor(0.83))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data *= 4
    return model, images


def step(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients and logits of a training step; bytes that autograd kept."""
    model = copy.deepcopy(model).train()
    kept: dict[int, int] = {}
    logits = model(images)
    stack, seen = [logits.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved") and (saved := _held(getattr(node, name))) is not None:
                kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        for saved in getattr(node, "saved_tensors", ()) if type(node).__name__ == "FakeQuantizeLSQBackward" else ():
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
    logits.square().sum().backward()
    gradients = {name: gradient(p) for name, p in model.named_parameters()}
    return gradients | {"logits": logits.detach()}, sum(kept.values())


def _held(raw: object) -> Tensor | None:
    try:
        packed = raw.data  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):
        return None
    if isinstance(packed, Tensor):
        return packed
    owner = getattr(packed, "__self__", None)
    tensor = (
        owner.tensor if isinstance(owner, recompute.Kept) else getattr(getattr(owner, "origin", None), "root", None)
    )
    return tensor.tensor if isinstance(tensor, recompute.Kept) else tensor


@pytest.mark.parametrize("net", [TinyNet, ClipNet])
def test_relus_left_to_quantizers_change_no_bit(net: type[nn.Module]) -> None:
    model, images = quantized(net)
    streams = model.stream_quantizers
    assert isinstance(streams, points.StreamQuantizers)
    relus = streams.relus
    assert len(relus) == {TinyNet: 1, ClipNet: 5}[net]
    assert all(q.clips_as_relu() for q in relus.values())
    skipped, _ = step(model, images)
    model.stream_quantizers.relus = {}
    computed, _ = step(model, images)
    assert computed.keys() == skipped.keys()
    for name, value in computed.items():
        assert torch.equal(value, skipped[name]), name


def test_without_the_upper_clip_the_test_above_would_see_it() -> None:
    model, images = quantized(ClipNet)
    for quantizer in model.stream_quantizers.relus.values():
        quantizer.ceiling = float("inf")
    skipped, _ = step(model, images)
    model.stream_quantizers.relus = {}
    assert not torch.equal(step(model, images)[0]["logits"], skipped["logits"])


def test_a_relu_stays_where_its_quantizer_is_signed_or_off() -> None:
    model, images = quantized(ClipNet)
    for quantizer in model.stream_quantizers.relus.values():
        quantizer.initialize(quantizer.scale, signed=True)
    signed, _ = step(model, images)
    model.stream_quantizers.relus = {}
    assert torch.equal(step(model, images)[0]["logits"], signed["logits"])


def test_eval_mode_runs_every_operation() -> None:
    model, images = quantized(ClipNet)
    calls: list[str] = []
    for clip in model.clips:
        clip.register_forward_hook(lambda _, inputs, output: calls.append(f"{(output >= 0).all()}"))
    model.eval()(images)
    assert calls == ["True"] * 5


@pytest.mark.parametrize("net", [TinyNet, ClipNet])
@pytest.mark.parametrize("fast", [True, False])
def test_tensors_computed_again_change_no_bit_and_keep_less(
    net: type[nn.Module], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(fused, "available", lambda x, raw_scale: False)
    model, images = quantized(net)
    again, kept_again = step(model, images)
    for module in (contract, recompute):
        monkeypatch.setattr(module, "origin_of", lambda x: None)
    plain, kept = step(model, images)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    assert kept_again < 0.85 * kept


@pytest.mark.parametrize("net", [NormedNet, PooledNet])
def test_norms_and_pools_compute_what_they_read_again(net: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = quantized(net)
    again, kept_again = step(model, images)
    monkeypatch.setattr(points, "KEEPING", set())
    plain, kept = step(model, images)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    assert kept - kept_again == 4 * 24 * 13 * 11 * 4  # bytes of the tensor that is read, in both nets


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    conv = QuantConv2d.from_float(nn.Conv2d(3, 4, 1), uniform_rules(4, 4, ())[0][1], "conv")
    conv.input_quantizer.initialize(torch.tensor(0.1), signed=False)
    source = torch.rand(2, 3, 5, 5, requires_grad=True)
    x = source * 2
    y = conv(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="in-place operation"):
        y.sum().backward()


def test_a_quantized_tensor_that_was_written_to_is_kept_itself() -> None:
    quantizer = LSQ(QuantSpec(8, signed=True))
    quantizer.initialize(torch.tensor(0.1), signed=True)
    x, other = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    y = torch.relu_(quantizer(x))
    with recomputed(y):
        product = y @ other
    (gradient,) = torch.autograd.grad(product.sum(), other)
    assert torch.equal(gradient, y.detach().transpose(1, 2) @ torch.ones(2, 3, 3))


def test_chained_quantizers_and_transposed_views_come_back_exactly() -> None:
    first, second = (LSQ(QuantSpec(bits, signed=True)) for bits in (8, 3))
    first.initialize(torch.tensor(0.05), signed=True)
    second.initialize(torch.tensor(0.4), signed=True)
    x, other = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    x_hat = second(first(x))
    with recomputed(x_hat):
        product = x_hat.transpose(1, 2) @ other
    upstream = torch.randn_like(product)
    (gradient,) = torch.autograd.grad(product, other, upstream)
    assert torch.equal(gradient, x_hat.detach() @ upstream)
