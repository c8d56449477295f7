"""Backbones whose convolutions can be binarized, and the CIFAR ResNet they are measured against.

    cifar_resnet20         ResNet-20 with option-A shortcuts (He et al., arXiv 1512.03385, §4.2), the public float net
    bireal_cifar_resnet20  a skip around every 3×3 convolution, Hardtanh, batch norm before the classifier
    bireal_cifar_resnet18  a skip around every block, otherwise the same; `skips=2` puts one around every convolution
    bireal_vgg_small       6 convolutions 128-128-256-256-512-512, each with its batch norm after the pool
    bireal_resnet18/34     for 224 × 224 images: Bi-Real Net (Liu et al., ECCV 2018, arXiv 1808.00278)

The nets are float; `quantize_` with `binary_rules` binarizes them (`docs/algorithms.md`). Shortcuts without weights
are an average pool and zero channels (BiPer), or every second pixel and zero channels (option A). Two departures from the
published code: ImageNet batch norms start at gamma 1 and not at 1e-8, and shortcuts pool before their 1×1 convolution, as
Bi-Real Net does. `qat/surgery/backbones.py` registers these names with timm.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class ZeroChannels(nn.Module):
    """Shortcut without weights: halve height and width, then add channels of zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, average: bool) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.after, self.average = outputs - inputs - self.before, average

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> the shortcut, with channels of zeros added."""
        x = F.avg_pool2d(x, 2) if self.average else x[:, :, ::2, ::2]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution with padding 1 and without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class OptionABlock(nn.Module):
    """ResNet's basic block for CIFAR, N_C_H_W; its shortcut pads channels with zeros (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else ZeroChannels(inputs, outputs, average=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> the block's sum."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _option_a_stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = OptionABlock(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(
        first, *(OptionABlock(outputs, outputs, 1) for _ in range(blocks - 1))
    )


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels; state-dict keys of the public CIFAR checkpoints."""

    def __init__(self, blocks: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = _option_a_stage(16, 16, blocks)
        self.layer2 = _option_a_stage(16, 32, blocks)
        self.layer3 = _option_a_stage(32, 64, blocks)
        self.dropout, self.linear = nn.Dropout(drop_rate), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> logits N_K."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.dropout(x.mean((2, 3))))


class BiRealBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and Hardtanh; skips: 1 around both, 2 around each."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, skips: int, downsample: nn.Module
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample, self.skips = downsample, skips

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> the block's sum."""
        identity = self.downsample(x)
        y = self.bn1(self.conv1(x))
        y = F.hardtanh(y + identity if self.skips == 2 else y)
        return F.hardtanh(
            self.bn2(self.conv2(y)) + (y if self.skips == 2 else identity)
        )


class BiRealResNet(nn.Module):
    """stem: "cifar" (3×3) or "imagenet" (7×7, max pool, weighted shortcuts). N_3_H_W in, N_num_classes out."""

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        num_classes: int,
        *,
        stem: str = "cifar",
        skips: int = 2,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if skips not in (1, 2):
            raise ValueError(
                f"skips must be 1 (around a block) or 2 (around every convolution), got {skips}"
            )
        large = stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
            if large
            else conv3x3(3, widths[0])
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages, inputs = nn.Sequential(), widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stride = 1 if stage == 0 else 2
            first = BiRealBlock(
                inputs,
                width,
                stride,
                skips,
                _downsample(inputs, width, stride, weighted=large),
            )
            rest = [
                BiRealBlock(width, width, 1, skips, nn.Identity())
                for _ in range(count - 1)
            ]
            self.stages.append(nn.Sequential(first, *rest))
            inputs = width
        self.norm, self.dropout = nn.BatchNorm1d(inputs), nn.Dropout(drop_rate)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> logits N_K."""
        x = self.pool(F.hardtanh(self.bn1(self.conv1(x))))
        return self.fc(self.dropout(self.norm(self.stages(x).mean((2, 3)))))


def _downsample(inputs: int, outputs: int, stride: int, weighted: bool) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    if not weighted:
        return ZeroChannels(inputs, outputs, average=True)
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        convolution,
        nn.BatchNorm2d(outputs),
    )


class VggSmall(nn.Module):
    """Six 3×3 convolutions; every second one halves the image before its batch norm."""

    WIDTHS = (128, 128, 256, 256, 512, 512)

    def __init__(self, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        inputs = (3, *self.WIDTHS[:-1])
        self.convs = nn.ModuleList(
            conv3x3(i, o) for i, o in zip(inputs, self.WIDTHS, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in self.WIDTHS)
        self.pool = nn.MaxPool2d(2)
        self.dropout, self.fc = (
            nn.Dropout(drop_rate),
            nn.Linear(512 * 4 * 4, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x N_C_H_W -> logits N_K."""
        for index, (convolution, norm) in enumerate(
            zip(self.convs, self.norms, strict=True)
        ):
            x = convolution(x)
            x = F.hardtanh(norm(self.pool(x) if index % 2 else x))
        return self.fc(self.dropout(x.flatten(1)))


def cifar_resnet20(num_classes: int = 10, **options: Any) -> nn.Module:
    """ResNet-20 for 32 px, in full precision."""
    return _described(CifarResNet(3, num_classes, **options), 32, "conv1", "linear")


def bireal_cifar_resnet20(num_classes: int = 10, **options: Any) -> nn.Module:
    """ResNet-20 for 32 px with a shortcut around every convolution."""
    return _described(
        BiRealResNet((16, 32, 64), (3, 3, 3), num_classes, **options), 32, "conv1", "fc"
    )


def bireal_cifar_resnet18(
    num_classes: int = 10, skips: int = 1, **options: Any
) -> nn.Module:
    """ResNet-18 for 32 px; skips: shortcuts per block, 1 or 2."""
    net = BiRealResNet(
        (64, 128, 256, 512), (2, 2, 2, 2), num_classes, skips=skips, **options
    )
    return _described(net, 32, "conv1", "fc")


def bireal_vgg_small(num_classes: int = 10, **options: Any) -> nn.Module:
    """VGG-Small for 32 px: six convolutions and one linear layer."""
    return _described(VggSmall(num_classes, **options), 32, "convs.0", "fc")


def bireal_resnet18(num_classes: int = 1000, **options: Any) -> nn.Module:
    """Bi-Real ResNet-18 for 224 px."""
    net = BiRealResNet(
        (64, 128, 256, 512), (2, 2, 2, 2), num_classes, stem="imagenet", **options
    )
    return _described(net, 224, "conv1", "fc")


def bireal_resnet34(num_classes: int = 1000, **options: Any) -> nn.Module:
    """Bi-Real ResNet-34 for 224 px."""
    net = BiRealResNet(
        (64, 128, 256, 512), (3, 4, 6, 3), num_classes, stem="imagenet", **options
    )
    return _described(net, 224, "conv1", "fc")


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": cifar_resnet20,
    "bireal_cifar_resnet20": bireal_cifar_resnet20,
    "bireal_cifar_resnet18": bireal_cifar_resnet18,
    "bireal_vgg_small": bireal_vgg_small,
    "bireal_resnet18": bireal_resnet18,
    "bireal_resnet34": bireal_resnet34,
}


def _described(model: nn.Module, image_size: int, first: str, last: str) -> nn.Module:
    """Leave on the model the record that timm's own models carry: input, first layer, classifier."""
    record = IMAGENET | {
        "input_size": (3, image_size, image_size),
        "first_conv": first,
        "classifier": last,
    }
    model.default_cfg = model.pretrained_cfg = record  # type: ignore[assignment]
    return model
