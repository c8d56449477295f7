"""Second step of `quantize_`: what is quantized, how and why. Reads an `Observation`, changes nothing."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qat.quantizers.spec import QuantSpec
from qat.surgery.frames import path_of
from qat.surgery.layers import FLOAT, LayerSpec, wraps
from qat.surgery.observe import Observation
from qat.surgery.plan import MERGES, Placement, is_merge, plan_points
from qat.surgery.points import Addresses
from qat.surgery.training_paths import in_training, tallies

Rules = Sequence[tuple[str, LayerSpec]]
NAMES_SHOWN = 8  # in a message


@dataclass(frozen=True)
class OperandsPlan:
    """A convolution or linear whose operands are quantized where it multiplies them."""

    name: str
    kind: str
    spec: LayerSpec
    weight: Tensor


@dataclass(frozen=True)
class QuantizationPlan:
    """What `quantize_` is going to do.

    specs:   what the rules ask for, by layer. patterns: the rule that decided each.
    wrapped: the layers whose modules are replaced. operands: by address, those quantized where they multiply.
    shared:  layers with one weight among them, which get one weight quantizer.
    placement: the 8-bit quantizers of results: of merges, and of layers that others than one layer read.
    known:   addresses, for the modules that apply them.
    """

    specs: Mapping[str, LayerSpec]
    patterns: Mapping[str, str]
    wrapped: Mapping[str, LayerSpec]
    operands: Mapping[str, OperandsPlan]
    shared: tuple[tuple[str, ...], ...]
    placement: Placement
    known: Addresses


def plan_quantization(
    seen: Observation, rules: Rules, stream: QuantSpec | None
) -> QuantizationPlan:
    """Decide every layer and every operation of an observed model.

    stream: grid of the tensors that merge (residual adds, concats, pools); None: no such quantizers.
    Raises ValueError naming a layer that no rule reaches, a rule that decides nothing, an operation that needs a FLOAT rule,
    layers with one weight and different rules.
    """
    asked, patterns = _by_rules(seen, rules)
    _require_licences(seen, asked)
    specs = dict(asked)
    for name in seen.asleep:
        specs[name] = FLOAT
    specs, shared = _with_shared_weights(seen, specs)
    placement = _placement(seen, specs, stream)
    wrapped: dict[str, LayerSpec] = {}
    operands: dict[str, OperandsPlan] = {}
    for name, spec in specs.items():
        if spec == FLOAT:
            continue
        if stream is not None and name in placement.on_grid:
            spec = _input_from_stream(spec, stream)
        if _is_wrapped(name, seen):
            wrapped[name] = spec
        else:
            call = seen.calls[name][0]
            weight = seen.trace.weights[call.address]
            operands[call.address] = OperandsPlan(name, call.kind, spec, weight)
    known = _addresses(seen, placement, wrapped, operands)
    return QuantizationPlan(
        specs, patterns, wrapped, operands, shared, placement, known
    )


def _placement(
    seen: Observation, specs: Mapping[str, LayerSpec], stream: QuantSpec | None
) -> Placement:
    """Where the quantizers of results stand; nowhere without `stream`."""
    if stream is None:
        return Placement((), frozenset())
    one_bit_inputs = set()
    in_float = set()
    without_table = set()
    for name, spec in specs.items():
        if spec.input is not None and spec.input.bits == 1:
            one_bit_inputs.add(name)
        if spec == FLOAT:
            in_float.add(name)
        if not spec.table or spec.input is None or spec.weight is None:
            without_table.add(name)
    return plan_points(
        seen.trace,
        frozenset(one_bit_inputs),
        frozenset(in_float),
        frozenset(without_table),
    )


def _is_wrapped(name: str, seen: Observation) -> bool:
    """Whether a layer's module is replaced; where others call its weight, operands are quantized where they multiply."""
    calls = seen.calls.get(name, [])
    if not calls:
        return True
    is_called_by_itself = all(call.path == name for call in calls)
    # Another tensor may stand in for the parameter, as in torch.func.functional_call
    has_its_own_weight = all(c.address in seen.trace.parameter_of for c in calls)
    return is_called_by_itself and has_its_own_weight and wraps(seen.layers[name])


def _by_rules(
    seen: Observation, rules: Rules
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    """The spec of every name, and the pattern that gave it: the first that matches."""
    decided: dict[str, LayerSpec] = {}
    patterns: dict[str, str] = {}
    used: set[str] = set()
    missed: list[str] = []
    for name in seen.names:
        matches = {}
        for alias in seen.aliases.get(name, [name]):
            match = _first_match(alias, rules)
            matches[alias] = match
            if match is not None:
                used.add(match[0])
        match = matches[name]
        if match is None:
            missed.append(name)
            continue
        for alias, other in matches.items():
            if other is None or other[1] != match[1]:
                raise ValueError(
                    f"quantize_: {name} and {alias} are one module, and rules decide them differently; give both names the "
                    "same rule"
                )
        patterns[name], spec = match
        is_float = spec.weight is None and spec.input is None
        decided[name] = FLOAT if is_float else spec
    if missed:
        raise ValueError(
            f"quantize_: no rule reaches {', '.join(missed)}; add a rule (FLOAT leaves a layer in floating point)"
        )
    for pattern, _ in rules:
        if pattern not in used:
            raise ValueError(
                f"quantize_: rule {pattern!r} decides nothing: {_why_unused(pattern, seen.names)}"
            )
    return decided, patterns


def _first_match(name: str, rules: Rules) -> tuple[str, LayerSpec] | None:
    for pattern, spec in rules:
        if fnmatch.fnmatchcase(name, pattern):
            return pattern, spec
    return None


def _why_unused(pattern: str, names: Sequence[str]) -> str:
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if matches:
        return f"earlier rules take all it matches ({', '.join(matches)})"
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    if rest > 0:
        shown += f" and {rest} more"
    return f"it matches no conv or linear; there are {shown}"


def _require_licences(seen: Observation, asked: Mapping[str, LayerSpec]) -> None:
    """What cannot be quantized, and what only training runs, stays in floating point only where a FLOAT rule says so."""
    for name, calls in seen.unquantizable.items():
        if asked[name] != FLOAT:
            raise ValueError(
                f"{calls[0].address}: quantize_ cannot quantize the products of {calls[0].kind}; put ({name!r}, FLOAT) "
                "before the other rules to leave them in floating point"
            )
    unlicensed = [name for name in seen.in_training_alone if asked[name] != FLOAT]
    if unlicensed:
        raise ValueError(
            f"quantize_: {', '.join(unlicensed)} run in training alone, as auxiliary heads do, and will not be in the file; "
            f"put ({unlicensed[0]!r}, FLOAT) before the other rules to train them in floating point"
        )


def _with_shared_weights(
    seen: Observation, specs: Mapping[str, LayerSpec]
) -> tuple[dict[str, LayerSpec], tuple[tuple[str, ...], ...]]:
    """One weight has one grid: with one scale for all of it where it is used turned round, too."""
    specs = dict(specs)
    shared = []
    for parameter, layers in seen.tied.items():
        first, *others = layers
        for other in others:
            if specs[other].weight != specs[first].weight:
                raise ValueError(
                    f"quantize_: {first} and {other} share the weight {parameter}, and rules give it different bits; give "
                    "both the same rule"
                )
        weight = specs[first].weight
        if weight is None:
            continue
        if parameter in seen.turned:
            for name in layers:
                specs[name] = replace(specs[name], weight=replace(weight, axis=None))
        shared.append(tuple(layers))
    return specs, tuple(shared)


def _input_from_stream(spec: LayerSpec, stream: QuantSpec) -> LayerSpec:
    """A layer that wants at least the stream's bits reads the stream's codes as they are."""
    if spec.input is not None and spec.input.bits >= stream.bits:
        return replace(spec, input=None)
    return spec


def _addresses(
    seen: Observation,
    placement: Placement,
    wrapped: Mapping[str, LayerSpec],
    operands: Mapping[str, OperandsPlan],
) -> Addresses:
    """What the quantized model has to know of its operations, so that a new one does not go unnoticed."""
    trace = seen.trace
    merges = set(trace.constant)
    for call in trace.calls:
        if call.kind in MERGES or is_merge(call):
            merges.add(call.address)
    quantized = [*placement.points, *operands]
    relus = [address for address, _, _ in placement.relus]
    shifted: dict[str, str | None] = {}
    counted: dict[str, dict[str, int]] = {}
    other_weighted = set(trace.weights) - operands.keys()
    if seen.trained is not None:
        shifted = in_training(trace, seen.trained, [*quantized, *relus])
        once = [one for one in quantized if path_of(one) not in trace.repeated]
        counted = tallies(seen.trained, once)
        other_weighted.update(_only_in_training(seen, wrapped))
    return Addresses(
        merges=frozenset(merges),
        other_weighted=frozenset(other_weighted),
        layers=frozenset(wrapped),
        written_back=frozenset(trace.written_back.intersection(placement.points)),
        in_training=shifted,
        tallies=counted,
        repeated=frozenset(trace.repeated),
        starts=dict(trace.starts),
    )


def _only_in_training(
    seen: Observation, wrapped: Mapping[str, LayerSpec]
) -> Iterator[str]:
    """Addresses of the convolutions and linears that eval mode does not make."""
    assert seen.trained is not None
    for address in seen.trained.weights:
        path = path_of(address)
        if address not in seen.trace.weights and path not in wrapped:
            yield address
