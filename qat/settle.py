"""Settling: a trained net takes the form in which it ships, so that what is measured is what is deployed.

An integer kernel adds a bias in units of its sums, b = k · s_x · s_w / c with k an int32, and scales are moved by parts per
million where a result would lie at a tie that runtimes round differently (`export/ties.py`). Both change the function a
little, and a net of few bits carries a little far: the same net may answer otherwise on every other image. So the rounded
biases and the moved scales are written back into the trained net, before its accuracy is measured and its checkpoint
written. What an export rounds afterwards is on the grid already.

    b  <- k · s_x · s_w / c,  k = round(b · c / (s_x · s_w))        into the layer's bias, or the β of its batch norm
    s  <- s · (1 + ppm · 1e-6)                                      into the quantizer's step

`export` is imported inside the function: training needs neither onnx nor onnxruntime until it ends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from qat.surgery.swap import quantizers

LARGE_SHIFT = 0.5  # codes: from here on rounding biases is no longer small beside rounding activations


@dataclass(frozen=True)
class Settlement:
    """What `settle_` changed.

    shifts:  layer -> how far rounding its bias moves its results at most, in codes of the quantizer that reads them; layers
             whose results stay in floating point, and biases that decide a threshold exactly, are left out.
    moved:   quantizer -> parts per million by which its step was moved.
    left:    layer or quantizer -> why it stays as it was trained; its file differs by the rounding.
    """

    biases: int
    shifts: dict[str, float]
    moved: dict[str, int]
    left: dict[str, str]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def settle_(model: nn.Module, example: Tensor) -> Settlement:
    """Round the biases and move the scales of a trained, quantized `model` in place, as every target for ONNX Runtime has
    them. Settling twice is settling once.

    example: N_C_H_W float32 images, of the size the file will have. Raises ExportError, with the model as it was, when it
    cannot be lowered to integers; the message names the layer.
    """
    from export.lower import lower
    from export.passes import to_integers
    from export.rounding import bias_roundings

    lowered = to_integers(lower(model, example))
    parameters = dict(model.named_parameters())
    rounded: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}
    left: dict[str, str] = {}
    for name, rounding in bias_roundings(lowered).items():
        owner = lowered.layers[f"{name}.weight"].bias_parameter
        if not owner and not rounding.change.any():
            continue
        if owner not in parameters:
            left[name] = "its bias is no parameter of the model"
            continue
        parameter = parameters[owner]
        change = torch.from_numpy(rounding.change).to(parameter.device).view_as(parameter)
        value = (parameter.double() + change).to(parameter.dtype)
        if not torch.equal(rounded.setdefault(owner, value), value):
            left[name] = f"{owner} serves other layers too, where it rounds differently"
            continue
        if rounding.in_codes is not None:
            shifts[name] = rounding.largest
    found = quantizers(model)
    movable, moved = {}, {}
    for name, grid in lowered.quantizers.items():
        if not grid.moved_ppm:
            continue
        if name not in found or found[name].spec.power_of_two:
            left[name] = (
                "its step is a power of two" if name in found else "it runs several times, on grids that differ"
            )
            continue
        movable[name], moved[name] = float(grid.scale), grid.moved_ppm
    for name, value in rounded.items():
        parameters[name].copy_(value)
    for name, scale in movable.items():
        found[name].raw_step.fill_(scale)
    return Settlement(len(rounded), shifts, moved, left)
