"""`quantize_`: turn a float backbone into a quantized one in place, with every layer accounted for."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ, Init
from qat.quantizers.spec import QuantSpec
from qat.surgery.binarize import BIPER, Binarizer, activation_quantizer
from qat.surgery.layers import FLOAT, LayerSpec, QuantConv2d, QuantLinear
from qat.surgery.plan import JOINS, MULTIPLIES, Plan, is_join, plan_sites
from qat.surgery.sites import run_with_sites
from qat.surgery.trace import Call, Trace, trace_calls

Rules = Sequence[tuple[str, LayerSpec]]

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
WRAPPERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: QuantConv2d.from_float,
    nn.Linear: QuantLinear.from_float,
}


@dataclass(frozen=True)
class LayerRow:
    """One conv or linear: its specs (None: float), multiply-accumulates per sample, and weights."""

    name: str
    kind: str
    weight: QuantSpec | None
    input: QuantSpec | None
    reads_stream: bool
    macs: int
    weights: int


@dataclass(frozen=True)
class QuantizationTable:
    """What `quantize_` did: a row for every conv and linear, and the addresses of the 8-bit stream quantizers."""

    rows: tuple[LayerRow, ...]
    sites: tuple[str, ...]

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.rows), default=5)
        lines = [f"{'layer':<{width}}  {'kind':<7} {'weight':>9} {'input':>7} {'MACs':>12} {'weights':>10}"]
        for row in self.rows:
            source = "stream" if row.reads_stream else str(row.input or "float")
            weight = str(row.weight or "float")
            lines.append(
                f"{row.name:<{width}}  {row.kind:<7} {weight:>9} {source:>7} {row.macs:>12,} {row.weights:>10,}"
            )
        low = sum(r.macs for r in self.rows if r.weight is not None) / max(sum(r.macs for r in self.rows), 1)
        lines.append(
            f"{len(self.rows)} layers, {low:.1%} of the MACs quantized; {len(self.sites)} stream quantizers of 8 bits"
        )
        return "\n".join(lines)


def uniform_rules(
    weight_bits: int, input_bits: int, first_and_last: Iterable[str] = (), edge_bits: int = 8
) -> list[tuple[str, LayerSpec]]:
    """The usual rules: the named first and last layers at `edge_bits`, all others at the given bits.

    Weights are signed with one step per output channel, inputs have one step and take their sign from data.
    """

    def spec(weights: int, inputs: int) -> LayerSpec:
        return LayerSpec(QuantSpec(weights, signed=True, axis=0), QuantSpec(inputs))

    return [(name, spec(edge_bits, edge_bits)) for name in first_and_last] + [("*", spec(weight_bits, input_bits))]


UNBINARIZED = ("*downsample*", "*shortcut*")  # weighted shortcuts of timm's nets and ours


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
    edge = edge or LayerSpec(QuantSpec(8, signed=True, axis=0), QuantSpec(8))
    spared = list(first_and_last)
    left = [name for name, m in model.named_modules() if isinstance(m, WEIGHTED) and name not in spared]
    found = [glob for glob in keep if any(fnmatch.fnmatchcase(name, glob) for name in left)]
    binary = LayerSpec(QuantSpec(weight_bits, signed=True, axis=0), QuantSpec(input_bits), binarizer)
    return [(name, edge) for name in (*spared, *found)] + [("*", binary)]


def quantize_(
    model: nn.Module,
    rules: Rules,
    example: Tensor,
    *,
    stream: QuantSpec | None = QuantSpec(8),  # noqa: B008  (frozen)
    weight_init: Init = "lsq",
) -> QuantizationTable:
    """Quantize `model` in place.

    rules:   ordered (glob over layer names, LayerSpec); the first match decides.
    example: N_C_H_W float input for the one pass that finds every operation.
    stream:  grid of the tensors that join integer operations (residual adds, concats, pools); None: no such quantizers,
             for weight-only quantization.
    weight_init: how weight steps start, "lsq" (the paper's) or "mse" (least squared error).

    Raises ValueError, before anything is changed: a rule that decides nothing, a layer no rule reaches, a layer that the
    example's pass never runs, a weight used outside its layer, an operation that cannot be quantized yet.
    """
    if any(isinstance(m, (QuantConv2d, QuantLinear)) for m in model.modules()):
        raise ValueError("quantize_: the model is quantized already")
    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, WEIGHTED)}
    specs = _decide(layers, rules)
    _open_attention(model)
    trace = trace_calls(model, example)
    _check_coverage(layers, specs, trace)
    binary = frozenset(n for n, s in specs.items() if s.input is not None and s.input.bits == 1)
    in_float = frozenset(n for n, s in specs.items() if s == FLOAT)
    plan = plan_sites(trace, binary, in_float) if stream is not None else Plan((), frozenset())
    quantized = {
        name: _wrap(
            layers[name],
            _input_from_stream(spec, stream) if stream is not None and name in plan.on_grid else spec,
            name,
            weight_init,
        )
        for name, spec in specs.items()
        if spec != FLOAT
    }
    for name, layer in quantized.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    sites = {} if stream is None else {address: activation_quantizer(stream, address) for address in plan.sites}
    joins = frozenset(call.address for call in trace.calls if call.kind in JOINS or is_join(call))
    run_with_sites(model, sites, joins, frozenset(quantized), _relus_taken_over(plan, quantized))
    _move_like(model)
    return QuantizationTable(tuple(_rows(specs, layers, quantized, trace)), plan.sites)


def _relus_taken_over(plan: Plan, quantized: dict[str, nn.Module]) -> dict[str, LSQ]:
    """Address of each ReLU -> the input quantizer behind it, which from here on has the ReLU's upper clip."""
    relus: dict[str, LSQ] = {}
    for address, path, ceiling in plan.relus:
        quantizer = getattr(quantized.get(path), "input_quantizer", None)
        if isinstance(quantizer, LSQ) and address not in plan.sites:
            quantizer.ceiling, relus[address] = ceiling, quantizer
    return relus


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of the model by its name: `<layer>.weight`, `<layer>.input`, or a site's address."""
    return {m.name: m for m in model.modules() if isinstance(m, Quantizer)}


def quantized_weights(model: nn.Module) -> list[tuple[nn.Parameter, Quantizer]]:
    """Latent weight and weight quantizer of every layer that has one, in the model's order."""
    layers = [m for m in model.modules() if isinstance(m, (QuantConv2d, QuantLinear))]
    return [(cast(nn.Parameter, m.weight), m.weight_quantizer) for m in layers if m.weight_quantizer is not None]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    step_lr: float,
    *,
    step_sizes: Mapping[str, float] | None = None,
    decay_norms: bool = False,
) -> list[dict[str, object]]:
    """Optimizer groups: weights with decay; biases and norms without, unless `decay_norms`; steps without, at
    their own learning rate.

    step_sizes: by quantizer, what `step_lr` is multiplied with (`sizes_of_steps`). Adam and its kind move every parameter by
    about its learning rate, and the steps of one model lie between 0.001 and 1: with one rate for all, the large ones stand
    still or the small ones are thrown about.
    """
    known = {id(p) for q in quantizers(model).values() for p in q.parameters()}
    named = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, object]] = [
        {"params": [p for p in named if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.dim() <= 1], "weight_decay": weight_decay if decay_norms else 0.0},
    ]
    by_size: dict[float, list[nn.Parameter]] = {}
    for name, quantizer in quantizers(model).items():
        size = 1.0 if step_sizes is None else step_sizes[name]
        by_size.setdefault(size, []).extend(quantizer.parameters())
    groups += [{"params": by_size[size], "weight_decay": 0.0, "lr": step_lr * size} for size in sorted(by_size)]
    return [group for group in groups if group["params"]]


def sizes_of_steps(model: nn.Module) -> dict[str, float]:
    """By quantizer, the power of two next to the mean magnitude of its step; 1 where it has none yet."""
    means = {name: float(q.raw_step.detach().abs().mean()) for name, q in quantizers(model).items()}
    return {n: 2.0 ** round(math.log2(m)) if math.isfinite(m) and m > 0 else 1.0 for n, m in means.items()}


def _open_attention(model: nn.Module) -> None:
    """Have timm's attention modules compute their two products in the open, where they can be quantized."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]


def _decide(layers: dict[str, nn.Module], rules: Rules) -> dict[str, LayerSpec]:
    decided: dict[str, LayerSpec] = {}
    used: set[str] = set()
    for name in layers:
        for pattern, spec in rules:
            if fnmatch.fnmatchcase(name, pattern):
                decided[name] = spec
                used.add(pattern)
                break
    if missed := [name for name in layers if name not in decided]:
        raise ValueError(
            f"quantize_: no rule reaches {', '.join(missed)}; add a rule (FLOAT leaves a layer in floating point)"
        )
    for pattern, _ in rules:
        if pattern not in used:
            matches = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
            why = (
                f"earlier rules take all it matches ({', '.join(matches)})"
                if matches
                else "it matches no conv or linear"
            )
            raise ValueError(f"quantize_: rule {pattern!r} decides nothing: {why}")
    return decided


def _check_coverage(layers: dict[str, nn.Module], specs: dict[str, LayerSpec], trace: Trace) -> None:
    run = [call for call in trace.calls if call.kind in MULTIPLIES]
    for call in run:
        if call.path not in layers or f"{call.path}.weight" not in call.parameters:
            weights = ", ".join(call.parameters) or "a tensor that is no parameter"
            raise ValueError(
                f"{call.address}: {call.kind} uses {weights} outside the layer that owns it; quantize_ cannot quantize a "
                "weight it does not see, make the operation a Conv2d or Linear of its own"
            )
    for name in layers.keys() - {call.path for call in run}:
        if specs[name] != FLOAT:
            raise ValueError(f"layer {name!r} never runs in forward(example): remove it, or give it a FLOAT rule")


def _input_from_stream(spec: LayerSpec, stream: QuantSpec) -> LayerSpec:
    """A layer that wants at least the stream's bits reads the stream's codes as they are."""
    if spec.input is not None and spec.input.bits >= stream.bits:
        return replace(spec, input=None)
    return spec


def _wrap(layer: nn.Module, spec: LayerSpec, name: str, init: Init) -> nn.Module:
    for kind, wrap in WRAPPERS.items():
        if isinstance(layer, kind):
            return wrap(layer, spec, name, init)
    raise ValueError(f"layer {name!r}: {type(layer).__name__} cannot be quantized yet; give it a FLOAT rule")


def _rows(
    specs: dict[str, LayerSpec], layers: dict[str, nn.Module], quantized: dict[str, nn.Module], trace: Trace
) -> Iterator[LayerRow]:
    calls: dict[str, list[Call]] = {}
    for call in trace.calls:
        if call.kind in MULTIPLIES:
            calls.setdefault(call.path, []).append(call)
    for name, spec in specs.items():
        weight: Tensor = layers[name].weight  # type: ignore[assignment]
        per_output = weight[0].numel()
        outputs = sum(torch.Size(c.output_shape[1:]).numel() for c in calls.get(name, []))
        reads_stream = name in quantized and getattr(quantized[name], "input_quantizer", None) is None
        kind = "linear" if isinstance(layers[name], nn.Linear) else "conv"
        yield LayerRow(name, kind, spec.weight, spec.input, reads_stream, per_output * outputs, weight.numel())


def _move_like(model: nn.Module) -> None:
    device = next(p.device for n, p in model.named_parameters() if "raw_step" not in n)
    for quantizer in quantizers(model).values():
        quantizer.to(device)
