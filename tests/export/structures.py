"""Small models of the common structures of vision, each with an example: what must come through whole or be refused by name.

`STRUCTURES` maps a name to a function that makes the model (seeded by the caller) and its example. All have norm statistics
and biases like those of a trained net.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import deform_conv2d

SIDE = 12
Made = tuple[nn.Module, Any]
STRUCTURES: dict[str, Callable[[], Made]] = {}


def structure(make: Callable[[], Any]) -> Callable[[], Any]:
    """Note a function that makes a model, or (model, example)."""

    def made() -> Made:
        result = make()
        model, example = result if isinstance(result, tuple) else (result, images())
        return like_trained(model), example

    STRUCTURES[make.__name__] = made
    return make


def images(channels: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(4, channels, side, side)


def like_trained(model: nn.Module) -> nn.Module:
    """Norms with statistics, biases and zero-initialised parameters as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 and bool((parameter == parameter.flatten()[:1]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class Net(nn.Module):
    """Stem, body, pooled head; the body keeps 8 channels unless it says how many it gives."""

    def __init__(self, body: nn.Module, out: int = 8, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = body
        self.head = nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Patches, a body on (N, 9, 16), pooled head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 9, 16) * 0.1)
        self.body = body
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.body(tokens)).mean(1))


class Lambda(nn.Module):
    """A function of x, and modules that it may use by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution of unchanged size, batch norm."""
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs))


# ------------------------------------------------------------------------------------------------ plain


@structure
def plain() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()))


@structure
def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


@structure
def perceptron() -> Made:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(
        4, 10
    )


@structure
def perceptron_with_norms() -> Made:
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 10)


@structure
def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5)
    )


@structure
def network_in_network() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.ReLU(), conv(kernel=1), nn.ReLU(), conv(kernel=1), nn.ReLU()))


@structure
def fully_convolutional() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@structure
def strided_and_dilated() -> nn.Module:
    return Net(nn.Sequential(conv(stride=2), nn.ReLU(), conv(dilation=2, padding=2), nn.ReLU()))


@structure
def asymmetric_kernels() -> nn.Module:
    first = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
    second = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), stride=(2, 1))
    return Net(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))


@structure
def even_kernels() -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(8, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.ReLU()))


@structure
def padding_as_a_word() -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="valid")))


@structure
def grouped() -> nn.Module:
    return Net(nn.Sequential(conv(groups=2), nn.ReLU(), conv(groups=4), nn.ReLU()))


@structure
def depthwise_separable() -> nn.Module:
    return Net(nn.Sequential(conv(groups=8), nn.ReLU6(), conv(kernel=1), nn.ReLU6()))


@structure
def depth_multiplier() -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 8, 1)))


@structure
def odd_channels() -> nn.Module:
    return nn.Sequential(
        conv(3, 7), nn.ReLU(), conv(7, 13), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(13, 3)
    )


@structure
def grey_image() -> Made:
    return Net(conv(), channels=1), images(1)


@structure
def many_bands() -> Made:
    return Net(conv(), channels=9), images(9)


@structure
def not_square() -> Made:
    return Net(conv()), torch.randn(4, 3, 10, 14)


def _padded(mode: Literal["reflect", "replicate", "circular"]) -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.ReLU()))


@structure
def reflecting_borders() -> nn.Module:
    return _padded("reflect")


@structure
def replicated_borders() -> nn.Module:
    return _padded("replicate")


@structure
def circular_borders() -> nn.Module:
    return _padded("circular")


@structure
def padding_module() -> nn.Module:
    return Net(
        nn.Sequential(
            nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)
        )
    )


@structure
def conv_without_bias_or_norm() -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)))


# ------------------------------------------------------------------------------------------------ residual and joined


class Basic(nn.Module):
    def __init__(self, act: nn.Module | None = None, *, statement: bool = False, before: bool = False) -> None:
        super().__init__()
        self.one, self.two = conv(), conv()
        self.act = act or nn.ReLU()
        self.statement = statement

    def forward(self, x: Tensor) -> Tensor:
        out = self.two(self.act(self.one(x)))
        if self.statement:
            out.add_(x)
            return self.act(out)
        return self.act(out + x)


@structure
def basic_residual() -> nn.Module:
    return Net(nn.Sequential(Basic(), Basic()))


@structure
def residual_in_place() -> nn.Module:
    return Net(nn.Sequential(Basic(statement=True), Basic(statement=True)))


@structure
def residual_in_place_activations() -> nn.Module:
    return Net(nn.Sequential(Basic(nn.ReLU(inplace=True)), Basic(nn.ReLU(inplace=True))))


@structure
def bottleneck() -> nn.Module:
    main = nn.Sequential(conv(8, 4, 1), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 8, 1))
    return Net(Lambda(lambda s, x: F.relu(s.main(x) + x), main=main))


@structure
def projected_shortcut() -> nn.Module:
    main = nn.Sequential(conv(8, 12, stride=2), nn.ReLU(), conv(12, 12))
    return Net(Lambda(lambda s, x: F.relu(s.main(x) + s.short(x)), main=main, short=conv(8, 12, 1, stride=2)), 12)


@structure
def pooled_shortcut() -> nn.Module:
    main = nn.Sequential(conv(stride=2), nn.ReLU(), conv())
    return Net(Lambda(lambda s, x: F.relu(s.main(x) + F.avg_pool2d(x, 2)), main=main))


@structure
def preactivation() -> nn.Module:
    block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    return Net(nn.Sequential(Lambda(lambda s, x: x + s.block(x), block=block), nn.BatchNorm2d(8), nn.ReLU()))


@structure
def resnext() -> nn.Module:
    main = nn.Sequential(conv(8, 16, 1), nn.ReLU(), conv(16, 16, groups=4), nn.ReLU(), conv(16, 8, 1))
    return Net(Lambda(lambda s, x: F.relu(s.main(x) + x), main=main))


@structure
def scaled_residual() -> nn.Module:
    return Net(Lambda(lambda s, x: x + 0.3 * s.main(x), main=conv()))


@structure
def layer_scale() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.gamma = conv(), nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.main(x)

    return Net(Scaled())


@structure
def three_way_sum() -> nn.Module:
    return Net(Lambda(lambda s, x: F.relu(s.a(x) + s.b(x) + x), a=conv(), b=conv(kernel=1)))


@structure
def sum_of_a_list() -> nn.Module:
    return Net(Lambda(lambda s, x: sum([s.a(x), s.b(x), x]), a=conv(), b=conv(kernel=1)))


@structure
def stacked_and_summed() -> nn.Module:
    return Net(Lambda(lambda s, x: torch.stack([s.a(x), s.b(x)]).sum(0), a=conv(), b=conv(kernel=1)))


@structure
def difference() -> nn.Module:
    return Net(Lambda(lambda s, x: F.relu(s.a(x) - s.b(x)), a=conv(), b=conv(kernel=1)))


@structure
def repvgg() -> nn.Module:
    return Net(
        Lambda(lambda s, x: F.relu(s.a(x) + s.b(x) + s.norm(x)), a=conv(), b=conv(kernel=1), norm=nn.BatchNorm2d(8))
    )


@structure
def dense() -> nn.Module:
    def grow(s: Any, x: Tensor) -> Tensor:
        first = F.relu(s.a(x))
        second = F.relu(s.b(torch.cat([x, first], 1)))
        return torch.cat([x, first, second], 1)

    return Net(Lambda(grow, a=conv(8, 4), b=conv(12, 4)), 16)


@structure
def inception() -> nn.Module:
    def branches(s: Any, x: Tensor) -> Tensor:
        return torch.cat([F.relu(s.a(x)), F.relu(s.b(x)), s.c(F.max_pool2d(x, 3, 1, 1)), F.avg_pool2d(x, 3, 1, 1)], 1)

    return Net(Lambda(branches, a=conv(8, 4, 1), b=conv(8, 4), c=conv(8, 4, 1)), 20)


@structure
def fire() -> nn.Module:
    def squeeze_and_expand(s: Any, x: Tensor) -> Tensor:
        small = F.relu(s.squeeze(x))
        return torch.cat([F.relu(s.one(small)), F.relu(s.three(small))], 1)

    parts = {"squeeze": nn.Conv2d(8, 4, 1), "one": nn.Conv2d(4, 4, 1), "three": nn.Conv2d(4, 4, 3, padding=1)}
    return Net(Lambda(squeeze_and_expand, **parts))


@structure
def ghost() -> nn.Module:
    def more(s: Any, x: Tensor) -> Tensor:
        first = F.relu(s.primary(x))
        return torch.cat([first, F.relu(s.cheap(first))], 1)

    return Net(Lambda(more, primary=conv(8, 4, 1), cheap=conv(4, 4, groups=4)))


@structure
def shuffled_channels() -> nn.Module:
    def unit(s: Any, x: Tensor) -> Tensor:
        kept, used = x.chunk(2, 1)
        out = torch.cat([kept, s.main(used)], 1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Net(
        Lambda(unit, main=nn.Sequential(conv(4, 4, 1), nn.ReLU(), conv(4, 4, groups=4), conv(4, 4, 1), nn.ReLU()))
    )


@structure
def cross_stage_partial() -> nn.Module:
    def stage(s: Any, x: Tensor) -> Tensor:
        left, right = x[:, :4], x[:, 4:]
        return F.relu(s.mix(torch.cat([left, s.main(right)], 1)))

    return Net(Lambda(stage, main=nn.Sequential(conv(4, 4), nn.ReLU()), mix=conv(kernel=1)))


@structure
def res2net() -> nn.Module:
    def scales(s: Any, x: Tensor) -> Tensor:
        a, b = torch.split(x, 4, 1)
        first = F.relu(s.a(a))
        return torch.cat([first, F.relu(s.b(b + first))], 1)

    return Net(Lambda(scales, a=conv(4, 4), b=conv(4, 4)))


@structure
def spatial_pyramid_pooling() -> nn.Module:
    def pools(s: Any, x: Tensor) -> Tensor:
        first = F.max_pool2d(x, 5, 1, 2)
        second = F.max_pool2d(first, 5, 1, 2)
        return F.relu(s.mix(torch.cat([x, first, second], 1)))

    return Net(Lambda(pools, mix=conv(24, 8, 1)))


@structure
def atrous_pyramid() -> nn.Module:
    def pyramid(s: Any, x: Tensor) -> Tensor:
        whole = F.relu(s.pool(F.adaptive_avg_pool2d(x, 1))).expand(-1, -1, *x.shape[2:])
        return F.relu(s.mix(torch.cat([s.a(x), s.b(x), whole], 1)))

    parts = {
        "a": conv(8, 4, 1),
        "b": conv(8, 4, dilation=2, padding=2),
        "pool": nn.Conv2d(8, 4, 1),
        "mix": conv(12, 8, 1),
    }
    return Net(Lambda(pyramid, **parts))


@structure
def stochastic_depth() -> nn.Module:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = conv()

        def forward(self, x: Tensor) -> Tensor:
            out = self.main(x)
            if self.training:
                out = out * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.8) / 0.8
            return F.relu(x + out)

    return Net(nn.Sequential(Dropped(), Dropped()))


@structure
def dropout_everywhere() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.ReLU(), nn.Dropout2d(0.2), conv(), nn.ReLU(), nn.Dropout(0.1)))


# ------------------------------------------------------------------------------------------------ gates and mobile nets


class SqueezeExcite(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


@structure
def squeeze_and_excite() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.ReLU(), SqueezeExcite()))


@structure
def squeeze_and_excite_hard() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.Hardswish(), SqueezeExcite(F.hardsigmoid)))


@structure
def squeeze_and_excite_linear() -> nn.Module:
    def gated(s: Any, x: Tensor) -> Tensor:
        weights = torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3))))))
        return x * weights[:, :, None, None]

    return Net(Lambda(gated, down=nn.Linear(8, 4), up=nn.Linear(4, 8)))


@structure
def efficient_channel_attention() -> nn.Module:
    def gated(s: Any, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)).unsqueeze(1)
        return x * torch.sigmoid(s.mix(pooled)).view(x.shape[0], -1, 1, 1)

    return Net(Lambda(gated, mix=nn.Conv1d(1, 1, 3, padding=1, bias=False)))


@structure
def block_attention() -> nn.Module:
    def gated(s: Any, x: Tensor) -> Tensor:
        pooled = s.mlp(F.adaptive_avg_pool2d(x, 1)) + s.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(pooled)
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(s.place(maps))

    mlp = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    return Net(Lambda(gated, mlp=mlp, place=nn.Conv2d(2, 1, 3, padding=1)))


@structure
def gated_convolution() -> nn.Module:
    return Net(Lambda(lambda s, x: s.value(x) * torch.sigmoid(s.gate(x)), value=conv(), gate=conv()))


@structure
def gated_linear_unit() -> nn.Module:
    return Net(Lambda(lambda s, x: F.glu(s.both(x), 1), both=conv(8, 16)))


@structure
def selective_kernel() -> nn.Module:
    def choose(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x), s.b(x)
        weights = s.choice((a + b).mean((2, 3))).view(x.shape[0], 2, 8, 1, 1).softmax(1)
        return a * weights[:, 0] + b * weights[:, 1]

    return Net(Lambda(choose, a=conv(), b=conv(dilation=2, padding=2), choice=nn.Linear(8, 16)))


def inverted_residual(act: Callable[[], nn.Module]) -> nn.Module:
    main = nn.Sequential(conv(8, 16, 1), act(), conv(16, 16, groups=16), act(), conv(16, 8, 1))
    return Net(Lambda(lambda s, x: x + s.main(x), main=main))


@structure
def mobilenet_v2() -> nn.Module:
    return inverted_residual(nn.ReLU6)


@structure
def mobilenet_v3() -> nn.Module:
    return inverted_residual(nn.Hardswish)


@structure
def efficientnet() -> nn.Module:
    return inverted_residual(nn.SiLU)


@structure
def fused_inverted_residual() -> nn.Module:
    main = nn.Sequential(conv(8, 16), nn.SiLU(), conv(16, 8, 1))
    return Net(Lambda(lambda s, x: x + s.main(x), main=main))


@structure
def convnext() -> nn.Module:
    def block(s: Any, x: Tensor) -> Tensor:
        out = s.norm(s.spatial(x).permute(0, 2, 3, 1))
        return x + s.two(F.gelu(s.one(out))).permute(0, 3, 1, 2)

    parts = {"spatial": nn.Conv2d(8, 8, 7, padding=3, groups=8), "norm": nn.LayerNorm(8)}
    return Net(Lambda(block, **parts, one=nn.Linear(8, 16), two=nn.Linear(16, 8)))


@structure
def convmixer() -> nn.Module:
    spatial = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.GELU(), nn.BatchNorm2d(8))
    point = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))
    return Net(Lambda(lambda s, x: s.point(x + s.spatial(x)), spatial=spatial, point=point))


def _activation(act: nn.Module) -> nn.Module:
    return Net(nn.Sequential(conv(), act, conv(), act))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.1), "prelu": lambda: nn.PReLU(8), "elu": nn.ELU, "selu": nn.SELU, "silu": nn.SiLU,
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "mish": nn.Mish, "softplus": nn.Softplus,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "square_of_relu": lambda: Lambda(lambda s, x: F.relu(x) ** 2), "softsign": nn.Softsign, "clamp": lambda: Lambda(
        lambda s, x: x.clamp(-1, 2)),
}  # fmt: skip


def _with_activation(make: Callable[[], nn.Module]) -> Made:
    return like_trained(_activation(make())), images()


for _name, _make in ACTIVATIONS.items():
    STRUCTURES[f"activation_{_name}"] = partial(_with_activation, _make)


# ------------------------------------------------------------------------------------------------ pools, norms, layout

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2), "max_overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average_padded": lambda x: F.avg_pool2d(x, 3, 2, 1), "average_ceil": lambda x: F.avg_pool2d(x, 5, 3, ceil_mode=True),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 1), "adaptive_average": lambda x: F.adaptive_avg_pool2d(x, 3),
    "power": lambda x: F.lp_pool2d(x.clamp_min(0.01), 2.0, 2), "mean_of_rows": lambda x: x.mean(2, keepdim=True),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "generalized_mean": lambda x: F.avg_pool2d(x ** 3, 2).clamp_min(0.01) ** (1 / 3),
}  # fmt: skip


def _with_pool(pool: Callable[[Tensor], Tensor]) -> Made:
    pooled = Lambda(lambda s, x: pool(x))
    return like_trained(Net(nn.Sequential(conv(), nn.ReLU(), pooled, nn.Conv2d(8, 8, 1)))), images()


for _name, _pool in POOLS.items():
    STRUCTURES[f"pool_{_name}"] = partial(_with_pool, _pool)

NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 8), "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "local": lambda: nn.LocalResponseNorm(3),
    "layer_of_channels": lambda: Lambda(lambda s, x: s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(8)),
    "root_mean_square": lambda: Lambda(lambda s, x: x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()),
    "frozen": lambda: Lambda(lambda s, x: x * torch.linspace(0.5, 1.5, 8).view(-1, 1, 1) + 0.1),
    "unit_length": lambda: Lambda(lambda s, x: F.normalize(x, dim=1)),
}  # fmt: skip


def _with_norm(make: Callable[[], nn.Module]) -> Made:
    return like_trained(Net(nn.Sequential(nn.Conv2d(8, 8, 3), make(), nn.ReLU(), nn.Conv2d(8, 8, 3)))), images()


for _name, _make in NORMS.items():
    STRUCTURES[f"norm_{_name}"] = partial(_with_norm, _make)


@structure
def conv_after_norm_and_dropout() -> nn.Module:
    return Net(nn.Sequential(nn.BatchNorm2d(8), conv(), nn.Dropout(), nn.BatchNorm2d(8), nn.ReLU(), conv()))


@structure
def pixel_shuffle() -> nn.Module:
    return Net(nn.Sequential(conv(8, 16), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(4, 8, 3)))


@structure
def pixel_unshuffle() -> nn.Module:
    return Net(nn.Sequential(conv(), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 3)))


@structure
def rolled() -> nn.Module:
    return Net(Lambda(lambda s, x: s.main(torch.roll(x, (1, 2), (2, 3))), main=conv()))


@structure
def flipped_and_joined() -> nn.Module:
    return Net(Lambda(lambda s, x: F.relu(s.main(x) + s.main(x.flip(3)).flip(3)), main=conv()))


@structure
def shifted_channels() -> nn.Module:
    def shift(s: Any, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return s.mix(torch.cat([F.pad(left[..., 1:], (0, 1)), F.pad(right[..., :-1], (1, 0))], 1))

    return Net(Lambda(shift, mix=conv(kernel=1)))


# ------------------------------------------------------------------------------------------------ decoders


def _unet(enlarged: Callable[[Any, Tensor, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    """enlarged: the coarse features at the size of the fine ones; given the model, both features."""

    def net(s: Any, x: Tensor) -> Tensor:
        fine = F.relu(s.a(x))
        coarse = F.relu(s.b(F.max_pool2d(fine, 2)))
        return s.out(F.relu(s.c(torch.cat([enlarged(s, coarse, fine), fine], 1))))

    return Lambda(net, a=conv(3, 8), b=conv(8, 8), c=conv(16, 8), out=nn.Conv2d(8, 2, 1), **more)


@structure
def unet() -> nn.Module:
    return _unet(lambda s, coarse, fine: F.interpolate(coarse, scale_factor=2, mode="nearest"))


@structure
def unet_bilinear() -> nn.Module:
    return _unet(
        lambda s, coarse, fine: F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
    )


@structure
def unet_transposed() -> nn.Module:
    return _unet(lambda s, coarse, fine: s.up(coarse), up=nn.ConvTranspose2d(8, 8, 2, stride=2))


@structure
def unet_with_the_image() -> nn.Module:
    return Lambda(
        lambda s, x: s.out(torch.cat([F.relu(s.a(x)), x], 1)), a=conv(3, 8), out=nn.Conv2d(11, 2, 3, padding=1)
    )


@structure
def image_plus_net() -> nn.Module:
    return Lambda(lambda s, x: x + s.b(F.relu(s.a(x))), a=conv(3, 8), b=nn.Conv2d(8, 3, 3, padding=1))


@structure
def feature_pyramid() -> nn.Module:
    def net(s: Any, x: Tensor) -> dict[str, Tensor]:
        fine = F.relu(s.a(x))
        coarse = F.relu(s.b(fine))
        top = s.side_b(coarse)
        lower = s.side_a(fine) + F.interpolate(top, scale_factor=2, mode="nearest")
        return {"fine": s.smooth(lower), "coarse": top}

    parts = {"a": conv(3, 8), "b": conv(stride=2), "side_a": nn.Conv2d(8, 4, 1), "side_b": nn.Conv2d(8, 4, 1)}
    return Lambda(net, **parts, smooth=nn.Conv2d(4, 4, 3, padding=1))


@structure
def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1, output_padding=1), nn.Sigmoid(),
    )  # fmt: skip


@structure
def transposed_grouped_dilated() -> nn.Module:
    return Net(nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2, dilation=2, stride=(2, 1)), nn.ReLU()))


@structure
def super_resolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))


@structure
def detector_heads() -> nn.Module:
    def net(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(s.body(x))
        return s.boxes(features), s.scores(features).flatten(2)

    return Lambda(net, body=conv(3, 8), boxes=nn.Conv2d(8, 4, 1), scores=nn.Conv2d(8, 6, 1))


@structure
def many_tasks() -> nn.Module:
    def net(s: Any, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(s.body(x)).mean((2, 3))
        return {"class": s.a(features), "angle": s.b(features)}

    return Lambda(net, body=conv(3, 8), a=nn.Linear(8, 5), b=nn.Linear(8, 1))


# ------------------------------------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Self-attention of two heads on (N, L, 16)."""

    def __init__(self, product: str = "open") -> None:
        super().__init__()
        self.qkv, self.out, self.product = nn.Linear(16, 48), nn.Linear(16, 16), product

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.product == "open":
            mixed = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.product == "einsum":
            weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)).softmax(-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.product == "causal")
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.first, self.second, self.attention = nn.LayerNorm(16), nn.LayerNorm(16), attention
        self.one, self.two, self.act = nn.Linear(16, 32), nn.Linear(32, 16), act

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.two(self.act(self.one(self.second(x))))


@structure
def transformer() -> nn.Module:
    return Tokens(Block(Attention()))


@structure
def transformer_fused() -> nn.Module:
    return Tokens(Block(Attention("fused")))


@structure
def transformer_causal() -> nn.Module:
    return Tokens(Block(Attention("causal")))


@structure
def transformer_einsum() -> nn.Module:
    return Tokens(Block(Attention("einsum")))


@structure
def multihead_attention() -> nn.Module:
    inner = nn.MultiheadAttention(16, 2, batch_first=True)
    return Tokens(Block(Lambda(lambda s, x: s.inner(x, x, x, need_weights=False)[0], inner=inner)))


@structure
def multihead_attention_with_weights() -> nn.Module:
    inner = nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1)
    return Tokens(Block(Lambda(lambda s, x: s.inner(x, x, x)[0], inner=inner)))


@structure
def encoder_layer() -> nn.Module:
    return Tokens(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))


@structure
def encoder_layer_norm_first() -> nn.Module:
    return Tokens(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, activation="gelu"))


@structure
def cross_attention() -> nn.Module:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.queries = (
                nn.MultiheadAttention(16, 2, batch_first=True),
                nn.Parameter(torch.randn(1, 3, 16)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]

    return Tokens(Queries())


@structure
def class_token() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
            self.block, self.head = Block(Attention()), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.block(torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1))[:, 0])

    return Net()


@structure
def windows() -> nn.Module:
    def windowed(s: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        maps = x.view(n, 3, 3, 16).unsqueeze(1)
        return x + s.inner(maps.reshape(n * 3, 3, 16)).view(n, 9, 16)

    return Tokens(Lambda(windowed, inner=Attention()))


@structure
def relative_positions() -> nn.Module:
    class Biased(nn.Module):
        index: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.table = nn.Linear(16, 48), nn.Parameter(torch.randn(81, 2))
            self.register_buffer("index", torch.randint(0, 81, (9, 9)))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(x.shape[0], 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index].permute(2, 0, 1)
            weights = (q @ k.transpose(-2, -1) * 8**-0.5 + bias).softmax(-1)
            return (weights @ v).transpose(1, 2).reshape(x.shape[0], 9, 16)

    return Tokens(Biased())


@structure
def linear_attention() -> nn.Module:
    def mixed(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).chunk(3, -1)
        return s.out(F.relu(q) @ (F.relu(k).transpose(1, 2) @ v))

    return Tokens(Lambda(mixed, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16)))


@structure
def non_local() -> nn.Module:
    def block(s: Any, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = s.q(x).flatten(2).transpose(1, 2), s.k(x).flatten(2), s.v(x).flatten(2).transpose(1, 2)
        return x + s.out(((q @ k).softmax(-1) @ v).transpose(1, 2).reshape(n, 4, h, w))

    parts = {name: nn.Conv2d(8, 4, 1) for name in ("q", "k", "v")}
    return Net(Lambda(block, **parts, out=nn.Conv2d(4, 8, 1)))


@structure
def mixer() -> nn.Module:
    def block(s: Any, x: Tensor) -> Tensor:
        x = x + s.across(s.first(x).transpose(1, 2)).transpose(1, 2)
        return x + s.within(s.second(x))

    across = nn.Sequential(nn.Linear(9, 18), nn.GELU(), nn.Linear(18, 9))
    within = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return Tokens(Lambda(block, across=across, within=within, first=nn.LayerNorm(16), second=nn.LayerNorm(16)))


@structure
def pooling_mixer() -> nn.Module:
    return Net(
        Lambda(lambda s, x: x + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x + s.main(x), main=conv(kernel=1))
    )


@structure
def gated_mlp() -> nn.Module:
    return Tokens(
        Lambda(
            lambda s, x: x + s.out(F.silu(s.a(x)) * s.b(x)),
            a=nn.Linear(16, 24),
            b=nn.Linear(16, 24),
            out=nn.Linear(24, 16),
        )
    )


@structure
def spatial_gating() -> nn.Module:
    def block(s: Any, x: Tensor) -> Tensor:
        u, v = s.one(x).chunk(2, -1)
        return x + s.two(u * s.mix(v.transpose(1, 2)).transpose(1, 2))

    return Tokens(Lambda(block, one=nn.Linear(16, 32), mix=nn.Linear(9, 9), two=nn.Linear(16, 16)))


@structure
def convolution_then_transformer() -> nn.Module:
    def hybrid(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.stem(x))
        tokens = s.widen(x).flatten(2).transpose(1, 2)
        return s.head(s.block(tokens).mean(1))

    return Lambda(
        hybrid, stem=conv(3, 8, stride=4), widen=nn.Conv2d(8, 16, 1), block=Block(Attention()), head=nn.Linear(16, 5)
    )


# ------------------------------------------------------------------------------------------------ weights of other kinds


@structure
def weight_standardization() -> nn.Module:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            weight = (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    return Net(nn.Sequential(Standardized(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()))


@structure
def weight_norm() -> nn.Module:
    return Net(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU()))


@structure
def weight_norm_by_hooks() -> nn.Module:
    """They keep the weight of the last forward pass as an attribute, with its graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
    return Net(nn.Sequential(layer, nn.ReLU()))


@structure
def spectral_norm_by_hooks() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3))
    return Net(nn.Sequential(layer, nn.ReLU()))


@structure
def pruned() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(layer, "weight", 0.3)
    return Net(nn.Sequential(layer, nn.ReLU()))


@structure
def einsum_of_one() -> nn.Module:
    return Net(nn.Sequential(Lambda(lambda s, x: torch.einsum("bchw->bcwh", x)), conv()))


@structure
def spectral_norm() -> nn.Module:
    return Net(nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.ReLU()))


@structure
def bare_parameters() -> nn.Module:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.matrix = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.randn(8, 5) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, self.kernel)).mean((2, 3)) @ self.matrix

    return Bare()


@structure
def fixed_filters() -> nn.Module:
    class Blurred(nn.Module):
        kernel: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer(
                "kernel", (torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1])).expand(8, 1, 3, 3) / 16
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, stride=2, padding=1, groups=8)

    return Net(nn.Sequential(conv(), nn.ReLU(), Blurred(), conv(), nn.ReLU()))


@structure
def einsum_layer() -> nn.Module:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(8, 8) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.einsum("nchw,cd->ndhw", x, self.mix))

    return Net(Mixed())


@structure
def tied_autoencoder() -> Made:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.encode(x)), self.encode.weight.t())

    return Tied(), torch.randn(4, 12)


@structure
def one_module_twice() -> nn.Module:
    shared = conv()
    return Net(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()))


@structure
def shared_weights() -> nn.Module:
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    return Net(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))


@structure
def cosine_classifier() -> nn.Module:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.prototypes = conv(3, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            features = F.normalize(F.relu(self.body(x)).mean((2, 3)), dim=-1)
            return F.linear(features, F.normalize(self.prototypes, dim=-1))

    return Cosine()


@structure
def lists_and_dicts_of_modules() -> nn.Module:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.heads = (
                nn.ModuleList([Basic(), Basic()]),
                nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 2)}),
            )
            self.stem = conv(3, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = F.relu(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return {name: head(x.mean((2, 3))) for name, head in self.heads.items()}

    return Listed()


# ------------------------------------------------------------------------------------------------ inputs of other kinds


@structure
def two_images() -> Made:
    def net(s: Any, a: Tensor, b: Tensor) -> Tensor:
        return s.head((F.relu(s.body(a)) + F.relu(s.body(b))).mean((2, 3)))

    return Lambda(net, body=conv(3, 8), head=nn.Linear(8, 3)), (images(), images())


@structure
def image_and_numbers() -> Made:
    def net(s: Any, image: Tensor, numbers: Tensor) -> Tensor:
        features = F.relu(s.body(image)).mean((2, 3))
        return s.head(torch.cat([features, F.relu(s.table(numbers))], 1))

    return Lambda(net, body=conv(3, 8), table=nn.Linear(6, 4), head=nn.Linear(12, 3)), (images(), torch.randn(4, 6))


@structure
def modulated_features() -> Made:
    def net(s: Any, image: Tensor, numbers: Tensor) -> Tensor:
        scale, shift = s.film(numbers)[:, :, None, None].chunk(2, 1)
        return s.head(F.relu(s.body(image) * scale + shift).mean((2, 3)))

    return Lambda(net, body=conv(3, 8), film=nn.Linear(6, 16), head=nn.Linear(8, 3)), (images(), torch.randn(4, 6))


@structure
def focus_stem() -> nn.Module:
    def focus(s: Any, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return s.head(F.relu(s.body(torch.cat(parts, 1))).mean((2, 3)))

    return Lambda(focus, body=conv(12, 8), head=nn.Linear(8, 5))


@structure
def coordinates_of_pixels() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        rows = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1).expand(x.shape[0], 1, -1, x.shape[3])
        return s.head(F.relu(s.body(torch.cat([x, rows], 1))).mean((2, 3)))

    return Lambda(net, body=conv(4, 8), head=nn.Linear(8, 5))


@structure
def pooled_image() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@structure
def image_pyramid() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return s.head(torch.cat([s.a(x).mean((2, 3)), s.b(small).mean((2, 3))], 1))

    return Lambda(net, a=conv(3, 8), b=conv(3, 8), head=nn.Linear(16, 5))


@structure
def normalization_in_the_net() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
        return s.main((x - mean) / std)

    return Lambda(net, main=Net(conv()))


@structure
def sound() -> Made:
    body = nn.Sequential(
        nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3), nn.ReLU()
    )
    return nn.Sequential(body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)), torch.randn(4, 1, 20)


@structure
def sequence_with_dilations() -> Made:
    first = nn.Conv1d(4, 8, 3, dilation=2, padding=2)
    return nn.Sequential(
        first, nn.ReLU(), nn.Conv1d(8, 8, 3, dilation=4, padding=4), nn.ReLU(), nn.Conv1d(8, 2, 1)
    ), torch.randn(4, 4, 20)


@structure
def volume() -> Made:
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)), torch.randn(4, 1, 6, 6, 6)


def _sequence(net: nn.Module, features: int = 6) -> nn.Module:
    """A recurrent layer over the places of the features of a convolution."""

    def run(s: Any, x: Tensor) -> Tensor:
        places = F.relu(s.body(x)).flatten(2).transpose(1, 2)
        return s.head(s.net(places)[0].mean(1))

    return Lambda(run, body=conv(3, 8, stride=4), net=net, head=nn.Linear(features, 3))


@structure
def recurrent() -> nn.Module:
    return _sequence(nn.GRU(8, 6, batch_first=True))


@structure
def recurrent_plain() -> nn.Module:
    return _sequence(nn.RNN(8, 6, batch_first=True, nonlinearity="relu"))


@structure
def recurrent_twice_both_ways() -> nn.Module:
    return _sequence(nn.GRU(8, 6, num_layers=2, batch_first=True, bidirectional=True), features=12)


@structure
def long_memory() -> nn.Module:
    return _sequence(nn.LSTM(8, 6, batch_first=True))


@structure
def long_memory_both_ways() -> nn.Module:
    return _sequence(nn.LSTM(8, 6, batch_first=True, bidirectional=True), features=12)


@structure
def long_memory_cell() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        hidden, _ = s.net(F.relu(s.body(x)).mean((2, 3)))
        return s.head(hidden)

    return Lambda(run, body=conv(3, 8, stride=4), net=nn.LSTMCell(8, 6), head=nn.Linear(6, 3))


@structure
def bilinear_pooling() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        a, b = F.relu(s.a(x)).flatten(2), F.relu(s.b(x)).flatten(2)
        return s.head((a @ b.transpose(1, 2) / a.shape[2]).flatten(1))

    return Lambda(net, a=conv(3, 4), b=conv(3, 4), head=nn.Linear(16, 5))


@structure
def frequencies() -> nn.Module:
    return Net(Lambda(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x) * 1.5, s=x.shape[-2:]) + s.a(x), a=conv()))


@structure
def powers_of_two() -> nn.Module:
    return Net(Lambda(lambda s, x: torch.exp2(-s.a(x).abs()) + torch.log2(1 + x) + x, a=conv()))


@structure
def arcs() -> nn.Module:
    return Net(Lambda(lambda s, x: torch.atan(s.a(x)) + torch.asinh(s.b(x)), a=conv(), b=conv()))


class Prototypes(nn.Module):
    """Distances to prototypes. mode: how `torch.cdist` computes them."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.body, self.prototypes = nn.Sequential(conv(3, 8), nn.ReLU()), nn.Parameter(torch.randn(5, 8))
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.body(x).mean((2, 3)), self.prototypes, compute_mode=self.mode)


@structure
def prototypes() -> nn.Module:
    return Prototypes("use_mm_for_euclid_dist")


@structure
def prototypes_by_size() -> nn.Module:
    return Prototypes("use_mm_for_euclid_dist_if_necessary")


@structure
def deformable() -> nn.Module:
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offsets, self.weight = nn.Conv2d(8, 18, 3, padding=1), nn.Parameter(torch.randn(8, 8, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return deform_conv2d(x, self.offsets(x) * 0.1, self.weight, padding=1)

    return Net(Deformable())


@structure
def functional_call() -> nn.Module:
    def doubled(s: Any, x: Tensor) -> Tensor:
        return F.relu(torch.func.functional_call(s.layer, {"weight": s.layer.weight * 2, "bias": s.layer.bias}, (x,)))

    return Net(Lambda(doubled, layer=nn.Conv2d(8, 8, 3, padding=1)))


@structure
def image_by_image() -> nn.Module:
    return Tokens(Lambda(lambda s, x: torch.vmap(s.linear)(x), linear=nn.Linear(16, 16)))


@structure
def spatial_transformer() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        theta = s.locate(F.relu(s.first(x)).mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return s.head(F.relu(s.body(F.grid_sample(x, grid, align_corners=False))).mean((2, 3)))

    return Lambda(net, first=conv(3, 4), locate=nn.Linear(4, 6), body=conv(3, 8), head=nn.Linear(8, 5))


@structure
def dynamic_convolution() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        kernel = s.make(F.relu(s.first(x)).mean((0, 2, 3))).view(8, 3, 3, 3)
        return F.relu(F.conv2d(x, kernel)).mean((2, 3))

    return Lambda(net, first=conv(3, 4), make=nn.Linear(4, 216))


@structure
def data_dependent_branch() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        features = F.relu(s.body(x)).mean((2, 3))
        return s.a(features) if features.mean() > 0 else s.b(features)

    return Lambda(net, body=conv(3, 8), a=nn.Linear(8, 3), b=nn.Linear(8, 3))


@structure
def detached_branch() -> nn.Module:
    return Net(Lambda(lambda s, x: s.a(x) + s.b(x.detach()), a=conv(), b=conv(kernel=1)))


@structure
def clamped_twice() -> nn.Module:
    """A value whose two clips have bounds in tensors."""

    def net(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        low, high = torch.tensor(0.2), torch.tensor(1.5)
        return s.b(torch.clamp(x, low, high)) + s.c(torch.clamp(x, low / 2, high / 2))

    return Net(Lambda(net, a=conv(), b=conv(), c=conv()))


@structure
def folded() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        windows = F.unfold(s.a(x), 3, padding=1)
        return s.mix(F.fold(windows * 0.2, x.shape[-2:], 3, padding=1))

    return Net(Lambda(net, a=conv(8, 8), mix=conv(kernel=1)))


@structure
def written_into_zeros() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 8, *x.shape[2:])
        out[:] = F.relu(s.a(x))
        return s.mix(F.relu(s.b(out)))

    return Net(Lambda(net, a=conv(8, 8), b=conv(8, 8), mix=conv(kernel=1)))


@structure
def written_over() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        out = s.a(x)
        out[:, 0:, ..., :] = out[:, 0:] + s.b(x)
        return s.mix(F.relu(out))

    return Net(Lambda(net, a=conv(8, 8), b=conv(8, 8), mix=conv(kernel=1)))


@structure
def written_in_place() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 8, *x.shape[2:])
        out[:, :4] = s.a(x)
        out[:, 4:] = s.b(x)
        return s.mix(F.relu(out))

    return Net(Lambda(net, a=conv(8, 4), b=conv(8, 4), mix=conv(kernel=1)))


@structure
def sorted_features() -> nn.Module:
    return Net(Lambda(lambda s, x: s.main(x).sort(1).values, main=conv()))


@structure
def largest_features() -> nn.Module:
    return Lambda(
        lambda s, x: s.head(F.relu(s.body(x)).flatten(2).topk(4).values.flatten(1)),
        body=conv(3, 4),
        head=nn.Linear(16, 3),
    )


@structure
def masked() -> nn.Module:
    return Net(Lambda(lambda s, x: s.main(torch.where(x > 0.5, x, torch.zeros_like(x))), main=conv()))


@structure
def multiplied_features() -> nn.Module:
    return Net(Lambda(lambda s, x: F.relu(s.a(x)) * F.relu(s.b(x)), a=conv(), b=conv()))


@structure
def outer_product_of_axes() -> nn.Module:
    def net(s: Any, x: Tensor) -> Tensor:
        rows = torch.sigmoid(s.a(x.mean(3, keepdim=True)))
        columns = torch.sigmoid(s.b(x.mean(2, keepdim=True)))
        return x * rows * columns

    return Net(Lambda(net, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1)))


@structure
def fixed_batch() -> nn.Module:
    return Net(Lambda(lambda s, x: s.main(x) * x.mean((2, 3)).view(len(x), 8, 1, 1), main=conv()))


@structure
def log_probabilities() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.LogSoftmax(-1)
    )


@structure
def image_as_bytes_of_floats() -> nn.Module:
    return Lambda(lambda s, x: s.main((x * 127.5 + 127.5) / 255.0), main=Net(conv()))
