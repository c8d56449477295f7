"""Which quantizer a layer's spec asks for: LSQ from 2 bits up, a binarizer at one bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from qat.quantizers.binary import BinaryWeight, SignWeight
from qat.quantizers.biper import PeriodicWeight, Stage
from qat.quantizers.bireal import BinaryActivation
from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ, LSQWeight
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.recu import RectifiedWeight
from qat.quantizers.spec import QuantSpec
from qat.words import AlphaInit, Init


@dataclass(frozen=True)
class Binarizer:
    """How one-bit operands are binarized.

    weights:          "biper", or a baseline: "sign" (straight-through), "recu" (clamped to a quantile).
    stage:            BiPer's 1 (a sine) or 2 (its sign).
    frequency:        BiPer's ω₀; learn_frequency makes it a parameter of each layer.
    alpha_init:       how the channels' scales start.
    tau:              ReCU's quantile.
    standardize:      take the activation surrogate at unit variance per sample.
    published_deviation: the variance as BiPer's code has it, unbiased and in training only.
    learn_thresholds: learn a threshold for each input channel.
    """

    weights: Literal["biper", "sign", "recu"] = "biper"
    stage: Stage = 2
    frequency: float = 20.0
    learn_frequency: bool = False
    alpha_init: AlphaInit = "least-squares"
    tau: float = 0.99
    standardize: bool = True
    published_deviation: bool = False
    learn_thresholds: bool = False


BIPER = Binarizer()


def weight_quantizer(
    spec: QuantSpec, weight: Tensor, name: str, init: Init, binarizer: Binarizer
) -> Quantizer:
    """The quantizer of a layer's weight, started from it."""
    if spec.bits > 1:
        return LSQWeight(spec, weight, name, init)
    match binarizer.weights:
        case "biper":
            return PeriodicWeight(
                spec,
                weight,
                name,
                frequency=binarizer.frequency,
                stage=binarizer.stage,
                learn_frequency=binarizer.learn_frequency,
                alpha_init=binarizer.alpha_init,
            )
        case "sign":
            return SignWeight(spec, weight, name, alpha_init=binarizer.alpha_init)
        case "recu":
            return RectifiedWeight(
                spec, weight, name, tau=binarizer.tau, alpha_init=binarizer.alpha_init
            )


def input_quantizer(
    spec: QuantSpec, name: str, channels: int, binarizer: Binarizer
) -> Quantizer:
    """The quantizer of a layer's input of so many channels."""
    if spec.bits > 1:
        return activation_quantizer(spec, name)
    learned = channels if binarizer.learn_thresholds else None
    return BinaryActivation(
        spec,
        name,
        standardize=binarizer.standardize,
        published_deviation=binarizer.published_deviation,
        channels=learned,
    )


def activation_quantizer(spec: QuantSpec, name: str) -> LSQ:
    """LSQ, or LSQ+ where the spec has an offset."""
    return LSQPlus(spec, name) if spec.offset else LSQ(spec, name=name)


def hardtanh_for_relu_(model: nn.Module) -> int:
    """Replace every ReLU and ReLU6 module in place by Hardtanh, whose results have both signs; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(parent, name, nn.Hardtanh())
                count += 1
    return count


@contextmanager
def signs_seen(model: nn.Module) -> Iterator[None]:
    """While open, watch every one-bit activation's input; raise ValueError at the end for one that was never negative."""
    lowest: dict[str, float] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        name = str(module.name)
        value = float(args[0].min())
        lowest[name] = min(lowest.get(name, value), value)

    handles = []
    for module in model.modules():
        if isinstance(module, BinaryActivation) and module.threshold is None:
            handles.append(module.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, value in lowest.items():
        if value >= 0:
            raise ValueError(
                f"quantizer {name!r}: its input is never negative, so every code would be +1; is there a ReLU before it? "
                "hardtanh_for_relu_(model) before quantize_ replaces them"
            )


def binary_weights(model: nn.Module) -> Iterator[tuple[BinaryWeight, Tensor]]:
    """(quantizer, latent weight) of every binarized layer."""
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, BinaryWeight):
            yield quantizer, module.weight  # type: ignore[misc]


def periodic_weights(model: nn.Module) -> list[tuple[PeriodicWeight, Tensor]]:
    """(quantizer, latent weight) of every layer that BiPer binarizes."""
    return [(q, w) for q, w in binary_weights(model) if isinstance(q, PeriodicWeight)]
