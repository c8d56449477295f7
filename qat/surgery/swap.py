"""`quantize_`: turn a float backbone into a quantized one in place, with every layer accounted for."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ, Init
from qat.quantizers.spec import QuantSpec
from qat.surgery.binarize import BIPER, Binarizer, activation_quantizer
from qat.surgery.layers import FLOAT, LayerSpec, QuantConv2d, QuantLinear, wraps
from qat.surgery.operands import QuantOperands
from qat.surgery.plan import JOINS, Plan, is_join, plan_sites
from qat.surgery.sites import run_with_sites
from qat.surgery.table import LayerRow, OperationRow, QuantizationTable
from qat.surgery.trace import MULTIPLIES, Call, Trace, trace_calls
from qat.surgery.witness import check_witnessed

Rules = Sequence[tuple[str, LayerSpec]]

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
WRAPPERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: QuantConv2d.from_float,
    nn.Linear: QuantLinear.from_float,
}


def uniform_rules(
    weight_bits: int, input_bits: int, first_and_last: Iterable[str] = (), edge_bits: int = 8
) -> list[tuple[str, LayerSpec]]:
    """The usual rules: the named first and last layers at `edge_bits`, all others at the given bits.

    Weights are signed with one step per output channel, inputs have one step and take their sign from data.
    """

    def spec(weights: int, inputs: int) -> LayerSpec:
        return LayerSpec(QuantSpec.of_weight(weights), QuantSpec(inputs))

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
    edge = edge or LayerSpec(QuantSpec.of_weight(8), QuantSpec(8))
    spared = list(first_and_last)
    left = [name for name, m in model.named_modules() if isinstance(m, WEIGHTED) and name not in spared]
    found = [glob for glob in keep if any(fnmatch.fnmatchcase(name, glob) for name in left)]
    binary = LayerSpec(QuantSpec.of_weight(weight_bits), QuantSpec(input_bits), binarizer)
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

    A weight that is computed or used outside its layer is quantized where it is used, under the name of the layer or the
    parameter. Layers that the example's pass does not run, or runs on constants alone, are left and listed.

    Raises ValueError, before anything is changed: a rule that decides nothing, a layer no rule reaches, a weight with two
    users, an operation that cannot be quantized yet, multiply-adds that PyTorch's dispatcher sees and the trace does not
    (`qat/surgery/witness.py`). Raises RuntimeError in a later forward pass for a convolution, linear
    or join that the example's pass did not have.
    """
    if quantizers(model):
        raise ValueError("quantize_: the model is quantized already")
    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, WEIGHTED)}
    _open_attention(model)
    trace = trace_calls(model, example, frozenset(layers))
    calls = _calls_by_layer(trace, layers)
    awake = calls.keys() | {name.removesuffix(".weight") for call in trace.calls for name in call.parameters}
    asleep = {n: "constant" if n in trace.on_constants else "idle" for n in layers if n not in awake}
    specs = _decide(list(dict.fromkeys((*layers, *calls))), rules, asleep)
    binary = frozenset(n for n, s in specs.items() if s.input is not None and s.input.bits == 1)
    in_float = frozenset(n for n, s in specs.items() if s == FLOAT)
    plan = plan_sites(trace, binary, in_float) if stream is not None else Plan((), frozenset())
    witnessed = check_witnessed(model, example, trace)
    wrapped: dict[str, nn.Module] = {}
    operands: dict[str, QuantOperands] = {}
    for name, asked in specs.items():
        if asked == FLOAT:
            continue
        spec = _input_from_stream(asked, stream) if stream is not None and name in plan.on_grid else asked
        its = calls.get(name, [])
        if all(call.path == name for call in its) and (not its or wraps(layers[name])):
            wrapped[name] = _wrap(layers[name], spec, name, weight_init)
        else:
            (call,) = its
            operands[call.address] = QuantOperands(name, call.kind, spec, trace.weights[call.address], weight_init)
    for name, layer in wrapped.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    quantized = wrapped | {o.name: o for o in operands.values()}
    sites = {} if stream is None else {address: activation_quantizer(stream, address) for address in plan.sites}
    joins = frozenset(trace.constant | {call.address for call in trace.calls if call.kind in JOINS or is_join(call)})
    relus = _relus_taken_over(plan, quantized)
    in_sight = frozenset(trace.weights) - operands.keys()
    run_with_sites(model, sites, operands, joins, frozenset(wrapped), relus, in_sight)
    _move_like(model)
    rows = _rows(specs, layers, quantized, calls, asleep, len(example))
    return QuantizationTable(tuple(rows), plan.sites, *_operations(trace, plan, len(example)), witnessed)


def _calls_by_layer(trace: Trace, layers: Mapping[str, nn.Module]) -> dict[str, list[Call]]:
    """The convolution and linear calls of each layer. Raises ValueError for what one pair of quantizers cannot serve."""
    calls: dict[str, list[Call]] = {}
    for call in trace.calls:
        if call.kind not in MULTIPLIES:
            continue
        if len(call.inputs) > 1:
            raise ValueError(
                f"{call.address}: the weight of this {call.kind} depends on the image; quantize_ cannot quantize it yet"
            )
        before = calls.setdefault(call.layer, [])
        shared = call.layer in layers and wraps(layers[call.layer]) and call.path == call.layer
        if before and not (shared and before[0].path == call.path):  # a module may run several times
            raise ValueError(
                f"{call.address}: {call.kind} uses the weight of {call.layer!r}, which {before[0].address} uses too; "
                "quantize_ cannot quantize a weight with two users yet, give each a layer of its own"
            )
        before.append(call)
    return calls


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


def computed_weights(model: nn.Module) -> list[QuantOperands]:
    """The quantizers of weights that no quantized layer holds: they are seen only where they are used."""
    return [m for m in model.modules() if isinstance(m, QuantOperands)]


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


def _decide(names: Sequence[str], rules: Rules, asleep: Mapping[str, str]) -> dict[str, LayerSpec]:
    decided: dict[str, LayerSpec] = {}
    used: set[str] = set()
    for name in names:
        for pattern, spec in rules:
            if fnmatch.fnmatchcase(name, pattern):
                decided[name] = FLOAT if name in asleep else spec
                used.add(pattern)
                break
    if missed := [name for name in names if name not in decided]:
        raise ValueError(
            f"quantize_: no rule reaches {', '.join(missed)}; add a rule (FLOAT leaves a layer in floating point)"
        )
    for pattern, _ in rules:
        if pattern not in used:
            matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            why = (
                f"earlier rules take all it matches ({', '.join(matches)})"
                if matches
                else "it matches no conv or linear"
            )
            raise ValueError(f"quantize_: rule {pattern!r} decides nothing: {why}")
    return decided


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
    specs: dict[str, LayerSpec],
    layers: dict[str, nn.Module],
    quantized: dict[str, nn.Module],
    calls: dict[str, list[Call]],
    asleep: dict[str, str],
    samples: int,
) -> Iterator[LayerRow]:
    for name, spec in specs.items():
        its = calls.get(name, [])
        linear = its[0].kind == "linear" if its else isinstance(layers[name], nn.Linear)
        reads_stream = name in quantized and getattr(quantized[name], "input_quantizer", None) is None
        weights = math.prod(layers[name].weight.shape) if name in layers else 0  # type: ignore[arg-type]
        macs = sum(call.multiplications for call in its) // samples
        kind = asleep.get(name, "linear" if linear else "conv")
        yield LayerRow(name, kind, spec.weight, spec.input, reads_stream, macs, weights)


def _operations(trace: Trace, plan: Plan, samples: int) -> tuple[tuple[OperationRow, ...], tuple[OperationRow, ...]]:
    """Products of activations that run on integers, and whatever multiplies in floating point."""
    products: list[OperationRow] = []
    in_float: list[OperationRow] = []
    for call in trace.calls:
        row = OperationRow(call.address, call.kind, call.multiplications // samples)
        if row.multiplications and call.kind not in MULTIPLIES and call.address not in plan.absorbed:
            (products if is_join(call) and plan.sites else in_float).append(row)
    return tuple(products), tuple(in_float)


def _move_like(model: nn.Module) -> None:
    device = next(p.device for n, p in model.named_parameters() if "raw_step" not in n)
    for quantizer in quantizers(model).values():
        quantizer.to(device)
