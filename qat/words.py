"""The words that command lines and functions share as choices. No PyTorch is loaded for them."""

from typing import Literal

# How a quantizer's scale starts: LSQ's mean magnitude, or least squared error
Init = Literal["lsq", "mse"]
# N of LSQ's gradient scale: elements that share a scale in one sample, or in the whole tensor
GradientCount = Literal["per_sample", "numel"]
# How the scales of a binarized layer's channels start
AlphaInit = Literal["least-squares", "uniform"]
# What batch norms learn and follow
NormMode = Literal["normal", "frozen-statistics", "frozen"]
# The gradient that a frozen scale loses
Branch = Literal["task", "smooth", "both"]
# Which scales freeze
Policy = Literal["disorder", "never", "always", "permanent", "random"]

# How state dicts of before version 0.2 call a quantizer's `raw_scale`
EARLIER_NAME = "raw_step"
