"""`quantize_`: turn a float backbone into a quantized one in place, with every layer accounted for."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ
from qat.quantizers.spec import QuantSpec
from qat.surgery.binarize import BIPER, Binarizer, activation_quantizer
from qat.surgery.decide import QuantizationPlan, Rules, plan_quantization
from qat.surgery.example import Example
from qat.surgery.layers import LayerSpec, QuantConv2d, QuantLinear
from qat.surgery.observe import WEIGHTED, Observation, observe
from qat.surgery.operands import QuantOperands
from qat.surgery.plan import Placement
from qat.surgery.points import run_with_points
from qat.surgery.table import QuantizationTable, table_of
from qat.surgery.wrappers import unwrapped
from qat.words import Init

WRAPPERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: QuantConv2d.from_float,
    nn.Linear: QuantLinear.from_float,
}


def uniform_rules(
    weight_bits: int,
    input_bits: int | None = None,
    first_and_last: Iterable[str] = (),
    edge_bits: int = 8,
) -> list[tuple[str, LayerSpec]]:
    """The usual rules: the named first and last layers at `edge_bits`, all others at the given bits; inputs have as many as
    weights unless `input_bits` says otherwise.

    Weights are signed with one scale per output channel, inputs have one scale and take their sign from data.
    """

    def spec(weights: int, inputs: int) -> LayerSpec:
        return LayerSpec(QuantSpec.of_weight(weights), QuantSpec(inputs))

    if input_bits is None:
        input_bits = weight_bits
    edges = [(name, spec(edge_bits, edge_bits)) for name in first_and_last]
    return [*edges, ("*", spec(weight_bits, input_bits))]


# Weighted shortcuts of timm's nets and ours
UNBINARIZED = ("*downsample*", "*shortcut*")


def binary_rules(
    model: nn.Module,
    first_and_last: Iterable[str],
    *,
    weight_bits: int = 1,
    input_bits: int = 1,
    edge: LayerSpec | None = None,
    keep: Sequence[str] = UNBINARIZED,
    binarizer: Binarizer = BIPER,
) -> list[tuple[str, LayerSpec]]:
    """Rules of a binary network: everything binary but the first, the last and the shortcut layers.

    edge: what those get, FLOAT as published or (default) 8 bits, at which the file stays in integers.
    keep: globs of further layers that get `edge`; those that match no layer of the model are left out.
    """
    edge = edge or LayerSpec(QuantSpec.of_weight(8), QuantSpec(8))
    edges = list(first_and_last)
    others = []
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and name not in edges:
            others.append(name)
    globs = []
    for glob in keep:
        if any(fnmatch.fnmatchcase(name, glob) for name in others):
            globs.append(glob)
    weight = QuantSpec.of_weight(weight_bits)
    binary = LayerSpec(weight, QuantSpec(input_bits), binarizer)
    rules = [(name, edge) for name in (*edges, *globs)]
    return [*rules, ("*", binary)]


def quantize_(
    model: nn.Module,
    rules: Rules,
    example: Example,
    *,
    stream: QuantSpec | None = QuantSpec(8),  # noqa: B008  (frozen)
    weight_init: Init = "lsq",
) -> QuantizationTable:
    """Quantize `model` in place.

    rules:   ordered (glob over layer names, LayerSpec); the first match decides.
    example: what the model's forward takes, for the passes that find every operation: a tensor (N_C_H_W for images), a
             tuple of its arguments, or a dict of them by name.
    stream:  grid of the tensors that join integer operations (residual adds, concats, pools); None: no such quantizers,
             for weight-only quantization.
    weight_init: how weight scales start, "lsq" (the paper's) or "mse" (least squared error).

    A weight that is computed or used outside its layer is quantized where it is used, under the name of the layer or the
    parameter; a weight with several users gets one scale for all. Layers that the example's pass does not run, or runs on
    constants alone, are left and listed.

    Three steps, each to be read by itself: `observe` traces the model, `plan_quantization` decides, `apply` changes it.

    Raises ValueError, before anything is changed: a rule that decides nothing, a layer no rule reaches, an operation that
    cannot be quantized without a FLOAT rule, a value that cannot be followed, multiply-adds that PyTorch's dispatcher sees
    and the trace does not (`qat/surgery/witness.py`). Raises RuntimeError in a later forward pass for a convolution, linear
    or join that the example's pass did not have.
    """
    require_plain(model)
    _open_attention(model)
    seen = observe(model, example)
    plan = plan_quantization(seen, rules, stream)
    quantized = apply(model, seen, plan, example, stream, weight_init)
    return table_of(seen, plan, quantized)


def require_plain(model: nn.Module) -> None:
    """Raises ValueError for a model that is quantized already, or inside a wrapper that hides its code."""
    if quantizers(model):
        raise ValueError("quantize_: the model is quantized already")
    if unwrapped(model) is not model:
        raise ValueError(
            f"quantize_: the model is inside {type(model).__name__}; quantize the model itself, calibrate it, and wrap or "
            "compile it after that"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "quantize_: a scripted or traced model has no Python code to follow; quantize the model it came from"
        )


def apply(
    model: nn.Module,
    seen: Observation,
    plan: QuantizationPlan,
    example: Example,
    stream: QuantSpec | None,
    weight_init: Init,
) -> dict[str, nn.Module]:
    """Third step of `quantize_`: put the plan's quantizers into `model`; returns the quantized layers by name."""
    quantized: dict[str, nn.Module] = {}
    for name, spec in plan.wrapped.items():
        quantized[name] = _wrap(seen.layers[name], spec, name, weight_init)
    layers = dict(quantized)
    operands = {}
    for address, asked in plan.operands.items():
        module = QuantOperands(
            asked.name, asked.kind, asked.spec, asked.weight, weight_init
        )
        operands[address] = module
        quantized[module.name] = module
    for names in plan.shared:
        sharing = [quantized[name] for name in names if name in quantized]
        _share_weight_quantizer(sharing)
    for name, layer in layers.items():
        for alias in seen.aliases.get(name, [name]):
            _replace(model, alias, layer)
    points = {}
    if stream is not None:
        for address in plan.placement.points:
            points[address] = activation_quantizer(stream, address)
    relus = _relus_taken_over(plan.placement, quantized)
    run_with_points(model, points, operands, relus, plan.known, example)
    _move_like(model)
    return quantized


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _share_weight_quantizer(layers: Sequence[nn.Module]) -> None:
    """Layers with one weight have one scale: the parameters of the first one's quantizer."""
    first, *others = layers
    for other in others:
        for name, parameter in first.weight_quantizer.named_parameters():  # type: ignore[union-attr]
            setattr(other.weight_quantizer, name, parameter)


def _relus_taken_over(
    placement: Placement, quantized: dict[str, nn.Module]
) -> dict[str, LSQ]:
    """Address of each ReLU -> the input quantizer after it, which from here on has the ReLU's upper clip."""
    relus: dict[str, LSQ] = {}
    for address, path, ceiling in placement.relus:
        quantizer = getattr(quantized.get(path), "input_quantizer", None)
        if isinstance(quantizer, LSQ) and address not in placement.points:
            quantizer.ceiling = ceiling
            relus[address] = quantizer
    return relus


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of the model by its name: `<layer>.weight`, `<layer>.input`, or a quantization point's address."""
    by_name = {}
    for module in model.modules():
        if isinstance(module, Quantizer):
            by_name[module.name] = module
    return by_name


def quantized_weights(model: nn.Module) -> list[tuple[nn.Parameter, Quantizer]]:
    """Latent weight and weight quantizer of every layer that has one, in the model's order."""
    pairs = []
    for module in model.modules():
        if not isinstance(module, (QuantConv2d, QuantLinear)):
            continue
        if module.weight_quantizer is not None:
            weight = cast(nn.Parameter, module.weight)
            pairs.append((weight, module.weight_quantizer))
    return pairs


def computed_weights(model: nn.Module) -> list[QuantOperands]:
    """The quantizers of weights that no quantized layer holds: they are seen only where they are used."""
    return [m for m in model.modules() if isinstance(m, QuantOperands)]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    scale_lr: float | None = None,
    *,
    scale_sizes: Mapping[str, float] | None = None,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer groups: weights with decay; biases and norms without, unless `decay_norms`; scales without, at
    their own learning rate.

    scale_lr: of the quantizers' scales; None: the optimizer's own.
    scale_sizes: by quantizer, what `scale_lr` is multiplied with (`sizes_of_scales`). Adam and its kind move every parameter
    by about its learning rate, and the scales of one model lie between 0.001 and 1: with one rate for all, the large ones
    stand still or the small ones are thrown about. Raises ValueError for scale_sizes without a scale_lr.
    """
    if scale_sizes is not None and scale_lr is None:
        raise ValueError("parameter_groups: scale_sizes multiply scale_lr; give both")
    scales_by_size = _scales_by_size(model, scale_sizes)
    scales = {id(scale) for same in scales_by_size.values() for scale in same}
    weights = []
    biases_and_norms = []
    for parameter in model.parameters():
        if not parameter.requires_grad or id(parameter) in scales:
            continue
        if parameter.dim() > 1:
            weights.append(parameter)
        else:
            biases_and_norms.append(parameter)
    decay_of_norms = weight_decay if decay_norms else 0.0
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": biases_and_norms, "weight_decay": decay_of_norms},
    ]
    for size in sorted(scales_by_size):
        group: dict[str, Any] = {"params": scales_by_size[size], "weight_decay": 0.0}
        if scale_lr is not None:
            group["lr"] = scale_lr * size
        groups.append(group)
    return [group for group in groups if group["params"]]


def _scales_by_size(
    model: nn.Module, scale_sizes: Mapping[str, float] | None
) -> dict[float, list[nn.Parameter]]:
    """Size -> the quantizers' parameters of that size, each once: layers that share a weight share its scale."""
    by_size: dict[float, list[nn.Parameter]] = {}
    grouped: set[int] = set()
    for name, quantizer in quantizers(model).items():
        size = 1.0 if scale_sizes is None else scale_sizes[name]
        group = by_size.setdefault(size, [])
        for parameter in quantizer.parameters():
            if id(parameter) not in grouped:
                grouped.add(id(parameter))
                group.append(parameter)
    return by_size


def sizes_of_scales(model: nn.Module) -> dict[str, float]:
    """By quantizer, the power of two next to the mean magnitude of its scale; 1 where it has none yet."""
    sizes = {}
    for name, quantizer in quantizers(model).items():
        mean = float(quantizer.raw_scale.detach().abs().mean())
        has_size = math.isfinite(mean) and mean > 0
        sizes[name] = 2.0 ** round(math.log2(mean)) if has_size else 1.0
    return sizes


def _open_attention(model: nn.Module) -> None:
    """Have timm's attention modules compute their two products in the open, where they can be quantized."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]


def _wrap(layer: nn.Module, spec: LayerSpec, name: str, init: Init) -> nn.Module:
    for kind, wrap in WRAPPERS.items():
        if isinstance(layer, kind):
            return wrap(layer, spec, name, init)
    raise ValueError(
        f"layer {name!r}: {type(layer).__name__} cannot be quantized yet; give it a FLOAT rule"
    )


def _move_like(model: nn.Module) -> None:
    device = next(p.device for n, p in model.named_parameters() if "raw_scale" not in n)
    for quantizer in quantizers(model).values():
        quantizer.to(device)
