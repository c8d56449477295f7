"""Settling: a trained net takes the form in which it ships, so that what is measured is what is deployed.

An integer kernel adds a bias in units of its sums, u = s_x · s_w / c, as k · u with k an int32; scales are moved by parts per
million where a result would lie at a tie that runtimes round differently (`export/ties.py`). Both change the function a
little, and a net of few bits carries a little far: the same net may answer otherwise on every other image. So both are
written back into the trained net before its accuracy is measured and its checkpoint written. What an export rounds afterwards
is on the grid already. A third change keeps PyTorch's float sums from deciding what integers decide otherwise: weight
scales move by less than 1 in 1,000, to where no sum of codes is next to a tie.

    s_y   <- s_y · (1 + ppm · 1e-6)       into the quantizer's scale
    s_w   <- s_w · f                      into γ of the layer's batch norm, or its weights and their scales: the codes stay
    b     <- k · u,  k = round(b / u)     into β of its batch norm, or the layer's own bias

`export` is imported inside the functions: training needs neither onnx nor onnxruntime until it ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeqat.extras import require
from qat.quantizers.contract import Quantizer
from qat.surgery.example import Example
from qat.surgery.layers import QuantConv2d, QuantLinear
from qat.surgery.points import example_of
from qat.surgery.swap import quantizers
from qat.surgery.wrappers import require_float32, unwrapped

if TYPE_CHECKING:
    from export.lowered import LoweredModel

LARGE_SHIFT = 0.5  # codes: from here on rounding biases exceeds rounding activations


@dataclass(frozen=True)
class Settlement:
    """What `settle_` changed.

    biases:  layers whose bias was rounded.
    shifts:  layer -> how far that moves its results at most, in codes of the quantizer that reads them; layers whose
             results stay in floating point, and biases that decide a threshold exactly, are left out.
    scaled:  layers whose weight scales were moved off ties.
    moved:   quantizer -> parts per million by which its scale was moved.
    left:    layer or quantizer -> why it stays as it was trained; its file differs by the rounding.
    """

    biases: int
    shifts: dict[str, float]
    scaled: int
    moved: dict[str, int]
    left: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        return asdict(self)


@torch.no_grad()
def settle_(model: nn.Module, example: Example | None = None) -> Settlement:
    """Round the biases and move the scales of a trained, quantized `model` in place, as every target for ONNX Runtime has
    them. Settling twice is settling once.

    example: what forward takes, of the size the file will have; None: as it was given to `quantize_`.

    Raises ExportError, with the model as it was, when it cannot be lowered to integers; the message names the layer. Raises
    ValueError for a model that is not float32.
    """
    require("onnx", "onnxruntime", "onnxscript")
    from export.lower import lower, lowered_anew
    from export.passes import to_integers

    model = unwrapped(model)
    given = example_of(model, example)
    require_float32(model, "settle_")
    before = lower(model, given)
    lowered = to_integers(lowered_anew(before, model, given))
    left: dict[str, str] = {}
    moved = _settle_scales(model, lowered, left)
    scaled = _settle_weight_scales(model, lowered)
    if scaled:  # a bias is rounded in units of the scales as the model now holds them
        lowered = to_integers(lowered_anew(before, model, given))
    shifts, biases = _settle_biases(model, lowered, left)
    return Settlement(biases, shifts, scaled, moved, left)


def _settle_scales(
    model: nn.Module, lowered: LoweredModel, left: dict[str, str]
) -> dict[str, int]:
    """Write moved scales into the activation quantizers; returns by how much, in ppm."""
    by_name = quantizers(model)
    moved: dict[str, int] = {}
    for name, grid in lowered.quantizers.items():
        if not grid.moved_ppm:
            continue
        if name not in by_name:
            left[name] = "it runs several times, on grids that differ"
        elif _move_scale(by_name[name], float(grid.scale)):
            moved[name] = grid.moved_ppm
        else:
            left[name] = "its zero point would move with its scale"
    return moved


def _move_scale(quantizer: Quantizer, scale: float) -> bool:
    """Set an activation's scale; False, with the scale as it was, where the zero point would change."""
    scale_before = quantizer.raw_scale.clone()
    zero_point_before = quantizer.zero_point
    quantizer.raw_scale.fill_(scale)
    if quantizer.zero_point == zero_point_before:
        return True
    quantizer.raw_scale.copy_(scale_before)
    return False


def _settle_weight_scales(model: nn.Module, lowered: LoweredModel) -> int:
    """Move weight scales off ties, in γ or in the weights and their scales; returns the number of layers."""
    from export.names import bias_of, gamma_of
    from export.skeleton import reading_quantizer, weight_layer
    from export.ties import factors_off_ties

    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    uses = Counter(layer.bias_parameter for layer in lowered.layers.values())
    scaled = 0
    for node in lowered.skeleton.graph:
        layer = weight_layer(node, lowered)
        written = reading_quantizer(node, lowered)
        if layer is None or written is None or written.is_binary:
            continue
        if not layer.input_quantizer or layer.bias_only_channels:
            continue
        source = lowered.quantizers[layer.input_quantizer]
        factors = torch.from_numpy(factors_off_ties(layer, source, written))
        bias = layer.bias_parameter
        is_shared = bool(bias) and uses[bias] > 1
        if is_shared or bool((factors == 1).all()):
            continue
        gamma = parameters.get(gamma_of(bias))
        if bias not in ("", bias_of(layer.name)) and gamma is not None:
            gamma.copy_(_scaled(gamma, factors))
            scaled += 1
            continue
        module = modules.get(layer.name)
        # Elsewhere the weight is computed, and has no module
        if isinstance(module, (QuantConv2d, QuantLinear)):
            scaled += _scale_weight(module.weight, module.weight_quantizer, factors)
    return scaled


def _scale_weight(weight: Tensor, grid: Quantizer | None, factors: Tensor) -> bool:
    """Move the scales of a weight, and the weight where its codes would change otherwise; False, with both as they were,
    where they change even so, or the grid has no scale for each channel that may move."""
    if grid is None or grid.spec.power_of_two:
        return False
    if grid.raw_scale.shape != factors.shape:
        return False
    codes = grid.codes(weight)
    scale = grid.raw_scale.clone()
    latent = weight.clone()
    grid.raw_scale.copy_(_scaled(scale, factors))
    if torch.equal(grid.codes(weight), codes):
        return True
    weight.copy_(_scaled(latent, factors))
    if torch.equal(grid.codes(weight), codes):
        return True
    grid.raw_scale.copy_(scale)
    weight.copy_(latent)
    return False


def _scaled(parameter: Tensor, factors: Tensor) -> Tensor:
    """`parameter`, O_... or (O,), times one factor per output channel."""
    channels = factors.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
    return (parameter.double() * channels).to(parameter.dtype)


def _settle_biases(
    model: nn.Module, lowered: LoweredModel, left: dict[str, str]
) -> tuple[dict[str, float], int]:
    """Write rounded biases into the model; returns by how many codes at most, by layer, and the number of layers."""
    from export.rounding import bias_roundings

    parameters = dict(model.named_parameters())
    rounded: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}
    for name, rounding in bias_roundings(lowered).items():
        owner = lowered.layer(name).bias_parameter
        if not owner and not rounding.change.any():
            continue
        if owner not in parameters:
            left[name] = "its bias is not a parameter of the model"
            continue
        parameter = parameters[owner]
        change = torch.from_numpy(rounding.change).to(parameter.device)
        value = parameter.double() + change.view_as(parameter)
        value = value.to(parameter.dtype)
        if not torch.equal(rounded.setdefault(owner, value), value):
            left[name] = f"{owner} serves other layers too, where it rounds differently"
            continue
        if rounding.in_codes is not None:
            shifts[name] = rounding.largest
    for name, value in rounded.items():
        parameters[name].copy_(value)
    return shifts, len(rounded)
