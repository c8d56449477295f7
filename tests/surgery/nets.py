"""Small nets that have what timm backbones have: residual adds, in-place ones, pools, concats, shared inputs."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return F.relu(y)


class TinyNet(nn.Module):
    """conv-bn-relu, max pool, residual block, concat of two branches, average pool, linear."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = Residual(8)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 7, 3, padding=1)
        self.down = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.head = nn.Linear(13, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.pool(F.relu6(self.bn(self.stem(x)))))
        x = self.down(torch.cat([self.left(x), F.relu(self.right(x))], 1))
        return self.head(x.mean((2, 3)))


def with_random_norms(model: Net, seed: int = 0) -> Net:
    """Batch norms with every term at work: random gamma (some negative), beta, mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            count = module.num_features
            sign = torch.where(torch.rand(count, generator=generator) < 0.3, -1.0, 1.0)
            module.weight.data = (0.4 + torch.rand(count, generator=generator)) * sign
            module.bias.data = torch.randn(count, generator=generator) * 0.3
            module.running_mean = torch.randn(count, generator=generator) * 0.2
            module.running_var = 0.3 + torch.rand(count, generator=generator)
    return model
