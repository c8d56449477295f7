"""First step of `quantize_`: what the model computes, in eval mode and in training, before anything is changed."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from qat.surgery.example import Example, samples_of
from qat.surgery.plan import unsupported
from qat.surgery.trace import MULTIPLIES, Call, Trace, trace_calls
from qat.surgery.witness import check_witnessed, witness

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Observation:
    """What one pass in each mode shows.

    layers:    every convolution and linear module by name; the first, where it has several.
    aliases:   all names of a layer that has more than one.
    trace:     the calls in eval mode. trained: in training mode; None where the model does not run in it on the example.
    calls:     name of a layer -> its calls: convolutions and linears.
    unquantizable: name of a module -> its calls that multiply in a way that no quantizer reaches.
    asleep:    layers that the example does not reach: "idle", or "constant" where they see nothing of the image.
    in_training_alone: those of them that run in training.
    tied:      name of a parameter -> the layers that multiply by it, where they are several. turned: those parameters of
               which one layer uses the transpose.
    witnessed: multiply-adds by module path, as PyTorch's dispatcher counts them.
    samples:   images in the example.
    """

    layers: Mapping[str, nn.Module]
    aliases: Mapping[str, list[str]]
    trace: Trace
    trained: Trace | None
    calls: Mapping[str, list[Call]]
    unquantizable: Mapping[str, list[Call]]
    asleep: Mapping[str, str]
    in_training_alone: list[str]
    tied: Mapping[str, list[str]]
    turned: frozenset[str]
    witnessed: Counter[str]
    samples: int

    @property
    def names(self) -> list[str]:
        """All that rules decide: layers, computed weights, and modules that multiply in another way."""
        return list(dict.fromkeys((*self.layers, *self.calls, *self.unquantizable)))


def observe(model: nn.Module, example: Example) -> Observation:
    """Run `model` on `example` and note what it computes; the model is left as it was.

    Raises ValueError naming what cannot be followed, and a weight that depends on the image.
    """
    layers = _layers(model)
    trace = trace_calls(model, example, frozenset(layers))
    trace.calls = _named_apart(trace.calls)
    calls = _calls_of_layers(model, trace)
    unquantizable: dict[str, list[Call]] = defaultdict(list)
    for call in unsupported(trace):
        unquantizable[call.path or call.address].append(call)
    reached = calls.keys() | unquantizable.keys() | _parameters_read(trace)
    asleep = {}
    for name in layers:
        if name not in reached:
            asleep[name] = "constant" if name in trace.on_constants else "idle"
    trained = _in_training(model, example, frozenset(layers))
    running = _multiplying_layers(trained)
    tied, turned = _tied(trace)
    witnessed = witness(model, example)
    check_witnessed(witnessed, trace, frozenset(unquantizable))
    return Observation(
        layers=layers,
        aliases=_aliases(model),
        trace=trace,
        trained=trained,
        calls=calls,
        unquantizable=dict(unquantizable),
        asleep=asleep,
        in_training_alone=[name for name in asleep if name in running],
        tied=tied,
        turned=turned,
        witnessed=witnessed,
        samples=samples_of(example),
    )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear module by name."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            layers[name] = module
    return layers


def _calls_of_layers(model: nn.Module, trace: Trace) -> dict[str, list[Call]]:
    """Name of a layer -> its calls. Raises ValueError for an operation that no file can compute."""
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in trace.calls:
        if call.writes_a_part:
            raise ValueError(
                f"{call.address}: writes what depends on the image into a part of a tensor ({call.kind}), which no integer "
                "file can; build the tensor with torch.cat or torch.where"
            )
        if call.kind == "batch_norm":
            _require_running_statistics(model.get_submodule(call.path), call)
        if call.kind in MULTIPLIES:
            _require_one_activation(call)
            calls[call.layer].append(call)
    return dict(calls)


def _parameters_read(trace: Trace) -> set[str]:
    """Names of the parameters that calls read, without `.weight`: so those of weights are their layers'."""
    names = set()
    for call in trace.calls:
        for name in call.parameters:
            names.add(name.removesuffix(".weight"))
    return names


def _multiplying_layers(trace: Trace | None) -> set[str]:
    """Names of the layers that run in `trace`."""
    if trace is None:
        return set()
    return {call.layer for call in trace.calls if call.kind in MULTIPLIES}


def _require_one_activation(call: Call) -> None:
    if len(call.inputs) > 1:
        raise ValueError(
            f"{call.address}: the weight of this {call.kind} depends on the image; quantize_ cannot quantize it, compute the "
            "product with torch.matmul, which takes two activations"
        )


def _require_running_statistics(module: nn.Module, call: Call) -> None:
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if is_norm and module.running_mean is None:
        raise ValueError(
            f"{call.path or call.address}: has no running statistics, so its result for an image depends on the others of "
            "its batch, and no file answers so; make it with track_running_stats=True and train it, or take a GroupNorm"
        )


def _named_apart(calls: list[Call]) -> list[Call]:
    """Each user of a weight under another name: the module that owns it keeps the weight's, or else the first user."""
    owners: dict[str, str] = {}
    for call in calls:
        if call.kind not in MULTIPLIES:
            continue
        if call.path == call.layer:
            owners[call.layer] = call.path
        elif call.layer not in owners:
            owners[call.layer] = call.address
    renamed = []
    for call in calls:
        if call.kind in MULTIPLIES:
            owner = owners[call.layer]
            if owner not in (call.path, call.address):
                call = replace(call, layer=_layer_at(call))
        renamed.append(call)
    return renamed


def _layer_at(call: Call) -> str:
    """A name for the layer of a call by where it is made."""
    if not call.path:
        return call.address.removeprefix("#")
    return call.address.replace("#", ".")


def _tied(trace: Trace) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Name of a parameter -> the layers that multiply by it, where they are several; those that one of them turns round."""
    users: dict[str, list[str]] = defaultdict(list)
    turned: dict[str, set[bool]] = defaultdict(set)
    for call in trace.calls:
        parameter = trace.parameter_of.get(call.address)
        if call.kind not in MULTIPLIES or parameter is None:
            continue
        name, is_turned = parameter
        turned[name].add(is_turned)
        if call.layer not in users[name]:
            users[name].append(call.layer)
    tied = {name: layers for name, layers in users.items() if len(layers) > 1}
    turned_by_one = [name for name in tied if len(turned[name]) > 1]
    return tied, frozenset(turned_by_one)


def _in_training(
    model: nn.Module, example: Example, layers: frozenset[str]
) -> Trace | None:
    """None for a model whose forward in training mode wants more than the example, such as targets."""
    try:
        return trace_calls(model, example, layers, training=True)
    except Exception:
        return None


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WEIGHTED):
            names[id(module)].append(name)
    return {several[0]: several for several in names.values() if len(several) > 1}
