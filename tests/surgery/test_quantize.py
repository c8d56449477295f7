"""`quantize_` accounts for every layer and every joining tensor, or raises and changes nothing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.layers import FLOAT, LayerSpec, QuantConv2d, pad_same
from qat.surgery.swap import parameter_groups, quantize_, quantizers, sizes_of_scales, uniform_rules
from qat.surgery.table import QuantizationTable
from tests.surgery.nets import TinyNet, with_random_norms

X = torch.randn(2, 3, 33, 29, generator=torch.Generator().manual_seed(0))
EDGES = ("stem", "head")


def quantized(bits: int = 4) -> tuple[TinyNet, QuantizationTable]:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet()).eval()
    table = quantize_(model, uniform_rules(bits, bits, EDGES), X)
    calibrate(model, [X])
    return model, table


def test_table_names_every_layer_with_its_bits_and_macs() -> None:
    _, table = quantized()
    bits = {row.name: (row.weight.bits, row.input.bits) for row in table.rows}
    assert bits == {
        "stem": (8, 8),
        "block.conv1": (4, 4),
        "block.conv2": (4, 4),
        "left": (4, 4),
        "right": (4, 4),
        "head": (8, 8),
    }
    macs = {row.name: row.macs for row in table.rows}
    assert macs["stem"] == 17 * 15 * 8 * 27  # 33×29 at stride 2, padding 1
    assert macs["block.conv2"] == 9 * 8 * 8 * 9  # depthwise on 9×8
    assert macs["head"] == 13 * 5
    assert "100.0% of the MACs quantized" in str(table)


def test_sites_stand_where_integer_operations_join() -> None:
    _, table = quantized()
    assert set(table.points) == {
        "#clip0",  # the stem's relu6: read by the residual add and, after the max pool, by conv1
        "block.bn2#batch_norm0",  # into the add
        "block#clip1",  # the sum after its relu
        "left#conv2d0", "#clip1",  # both parts of the concat
        "#cat0", "down#avg_pool2d0",
    }  # fmt: skip


class Tokens(nn.Module):
    """An MLP whose GELU ends in codes, and one whose result a mean in floating point reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.fc3, self.fc4 = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        gate = F.silu(self.fc3(x))
        return self.fc4(gate) + gate.mean(-1, keepdim=True)


def test_a_function_of_a_linear_reads_codes_where_a_rule_asks_for_a_table() -> None:
    asking = [(name, replace(spec, table=True)) for name, spec in uniform_rules(4)]
    table = quantize_(Tokens().eval(), asking, X)
    assert "fc1#linear0" in table.points and "fc3#linear0" not in table.points
    assert "is a table" in table.explain("fc1#linear0")
    without = quantize_(Tokens().eval(), [("fc1", uniform_rules(4)[0][1]), *asking], X)
    assert without.points == quantize_(Tokens().eval(), uniform_rules(4), X).points
    assert set(table.points) - set(without.points) == {"fc1#linear0"}
    in_float = quantize_(Tokens().eval(), [("fc1", replace(FLOAT, table=True)), *asking], X)
    assert "fc1#linear0" not in in_float.points


def test_every_quantizer_gets_a_gradient_and_moves() -> None:
    model, _ = quantized()
    model.train()
    scales = {name: q.scale.clone() for name, q in quantizers(model).items()}
    groups = parameter_groups(model, weight_decay=0.1, scale_lr=0.01)
    optimizer = torch.optim.SGD(groups, lr=0.01)
    F.cross_entropy(model(X), torch.tensor([1, 3])).backward()
    optimizer.step()
    assert all(
        torch.isfinite(q.scale).all() and not torch.equal(q.scale, scales[n]) for n, q in quantizers(model).items()
    )


def test_scales_are_a_group_of_their_own_without_weight_decay() -> None:
    model, _ = quantized()
    groups = parameter_groups(model, weight_decay=0.1, scale_lr=0.5)
    scales = {id(q.raw_scale) for q in quantizers(model).values()}
    holding = [g for g in groups if any(id(p) in scales for p in g["params"])]
    assert len(holding) == 1 and {id(p) for p in holding[0]["params"]} == scales
    assert (holding[0]["weight_decay"], holding[0]["lr"]) == (0.0, 0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_relative_scales_learn_in_units_of_their_size() -> None:
    model, _ = quantized()
    found = quantizers(model)
    for factor, quantizer in zip(np.geomspace(1e-3, 10, len(found)), found.values(), strict=True):
        quantizer.raw_scale.data.fill_(factor)
    groups = parameter_groups(model, weight_decay=0.1, scale_lr=0.01, scale_sizes=sizes_of_scales(model))
    rates = {id(p): g["lr"] for g in groups if "lr" in g for p in g["params"]}
    relative = [rates[id(q.raw_scale)] / float(q.scale.mean()) for q in found.values()]
    assert len(set(rates.values())) > 8 and all(0.0070 < r < 0.0142 for r in relative)  # 0.01 to a factor of root two
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_state_dict_keys_of_the_float_model_survive_and_round_trip() -> None:
    plain = set(TinyNet().state_dict())
    model, _ = quantized()
    assert plain <= set(model.state_dict())
    other = TinyNet()
    quantize_(other, uniform_rules(4, 4, EDGES), X)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model(X))


def test_copy_of_a_quantized_model_is_independent() -> None:
    model, _ = quantized()
    twin = copy.deepcopy(model)
    before = model(X)
    for quantizer in quantizers(twin).values():
        quantizer.raw_scale.data.mul_(3)
    assert torch.equal(model(X), before)
    assert not torch.equal(twin(X), before)


def test_forward_equals_the_network_written_out_by_hand() -> None:
    model, _ = quantized()
    q = quantizers(model)

    def bn(m: nn.BatchNorm2d, v: Tensor) -> Tensor:
        return F.batch_norm(v, m.running_mean, m.running_var, m.weight, m.bias)

    def conv(name: str, v: Tensor, layer: nn.Conv2d, **options: int) -> Tensor:
        return F.conv2d(q[f"{name}.input"](v), q[f"{name}.weight"](layer.weight), layer.bias, **options)

    x = q["#clip0"](F.relu6(bn(model.bn, conv("stem", X, model.stem, stride=2, padding=1))))
    x = F.max_pool2d(x, 3, 2, 1)
    block = model.block
    y = F.relu(bn(block.bn1, conv("block.conv1", x, block.conv1, padding=1)))
    y = q["block.bn2#batch_norm0"](bn(block.bn2, conv("block.conv2", y, block.conv2, padding=1, groups=8)))
    x = q["block#clip1"](F.relu(y + x))
    left = q["left#conv2d0"](conv("left", x, model.left))
    right = q["#clip1"](F.relu(conv("right", x, model.right, padding=1)))
    x = q["#cat0"](torch.cat([left, right], 1))
    x = q["down#avg_pool2d0"](F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)).mean((2, 3))
    expected = F.linear(q["head.input"](x), q["head.weight"](model.head.weight), model.head.bias)
    assert torch.equal(model(X), expected)


def test_a_rule_that_matches_nothing_raises_and_changes_nothing() -> None:
    model = TinyNet()
    with pytest.raises(
        ValueError, match=r"rule 'steem' decides nothing: it matches no conv or linear; there are stem, "
    ):
        quantize_(model, uniform_rules(4, 4, ("steem",)), X)
    assert type(model) is TinyNet and type(model.stem) is nn.Conv2d


def test_a_shadowed_rule_raises() -> None:
    spec = LayerSpec(QuantSpec(4, signed=True, axis=0), QuantSpec(4))
    with pytest.raises(ValueError, match=r"rule 'stem' decides nothing: earlier rules take all it matches \(stem\)"):
        quantize_(TinyNet(), [("*", spec), ("stem", spec)], X)


def test_a_layer_no_rule_reaches_raises() -> None:
    spec = LayerSpec(QuantSpec(4, signed=True, axis=0), QuantSpec(4))
    with pytest.raises(ValueError, match="no rule reaches left, right, head"):
        quantize_(TinyNet(), [("stem", spec), ("block.*", spec)], X)


def test_a_float_rule_leaves_the_layer_alone() -> None:
    model = TinyNet()
    rules = [("right", FLOAT), *uniform_rules(4, 4, EDGES)]
    table = quantize_(model, rules, X)
    assert type(model.right) is nn.Conv2d
    assert [row.weight for row in table.rows if row.name == "right"] == [None]


def test_quantizing_twice_raises() -> None:
    model, _ = quantized()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, uniform_rules(4, 4, EDGES), X)


class Unused(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(13, 5)
        self.positions = nn.Linear(2, 13)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return (
            out + self.positions(torch.ones(1, 2)).mean() + (self.auxiliary(x.new_ones(1, 13)) if self.training else 0)
        )


def test_layers_that_see_no_image_are_left_and_listed() -> None:
    model = Unused().eval()
    table = quantize_(model, [("auxiliary", FLOAT), *uniform_rules(4, 4, EDGES)], X)
    kinds = {row.name: (row.kind, row.weight, row.macs) for row in table.rows}
    assert kinds["auxiliary"] == ("idle", None, 0) and kinds["positions"] == ("constant", None, 0)
    assert type(model.auxiliary) is nn.Linear and type(model.positions) is nn.Linear
    calibrate(model, [X])
    model(X)


def test_a_layer_that_runs_in_training_alone_needs_a_float_rule() -> None:
    with pytest.raises(ValueError, match=r"auxiliary run in training alone.*\('auxiliary', FLOAT\)"):
        quantize_(Unused(), uniform_rules(4, 4, EDGES), X)
    model = Unused()
    quantize_(model, [("auxiliary", FLOAT), *uniform_rules(4, 4, EDGES)], X)
    calibrate(model, [X])
    model.train()(X).sum().backward()
    assert model.auxiliary.weight.grad is not None


class Sleeper(Unused):
    awake = False

    def forward(self, x: Tensor) -> Tensor:
        out = TinyNet.forward(self, x)
        return out + self.auxiliary(x.new_ones(1, 13)) if self.awake else out


def test_an_idle_layer_that_wakes_up_raises() -> None:
    model = Sleeper()
    quantize_(model, uniform_rules(4, 4, EDGES), X)
    calibrate(model, [X])
    model.awake = True
    with pytest.raises(RuntimeError, match=r"auxiliary#linear0: this operation was not there"):
        model(X)


class Fork(TinyNet):
    detour = False

    def forward(self, x: Tensor) -> Tensor:
        if self.detour:
            x = x + x.flip(3)
        return super().forward(x)


def test_an_operation_that_appears_later_raises_with_its_address() -> None:
    model = Fork().eval()
    quantize_(model, uniform_rules(4, 4, EDGES), X)
    calibrate(model, [X])
    model.detour = True
    with pytest.raises(RuntimeError, match=r"#add0: this operation was not there"):
        model(X)


class Counted(TinyNet):
    """Computes positions in integers, as token pools do: two integer tensors that meet are not a merge."""

    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[3])[None, :]
        return super().forward(x[..., (row * torch.ones_like(row))[0]])


def test_integers_that_meet_are_no_join() -> None:
    model = Counted().eval()
    quantize_(model, uniform_rules(4, 4, EDGES), X)
    calibrate(model, [X])
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_matches_timm(stride: int, dilation: int) -> None:
    import timm.layers

    conv = timm.layers.Conv2dSame(3, 4, 3, stride=stride, dilation=dilation)
    # Exact integers: the convolution may add its 27 products in another order when it pads by itself.
    whole = torch.round(8 * X)
    with torch.no_grad():
        conv.weight.copy_(torch.round(32 * conv.weight))
        conv.bias.zero_()
    padded = pad_same(whole, conv.kernel_size, conv.stride, conv.dilation)
    assert torch.equal(F.conv2d(padded, conv.weight, conv.bias, stride, 0, dilation), conv(whole))
    wrapped = QuantConv2d.from_float(conv, LayerSpec(QuantSpec(8, signed=True, axis=0), None), "conv")
    assert wrapped.same_padding
