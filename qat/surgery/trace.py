"""Which tensor operations a model performs, at which address, and what flows where.

An address is `module path # kind ordinal`, for example `layer1.0#add0`: the first addition that module `layer1.0` performs
itself in a forward pass. timm's residual adds, concatenations and pools are functions, not modules, so the model is run
under a `TorchFunctionMode`; forward hooks tell the mode which module is at work. The model's code is not rewritten.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.surgery.counting import multiplications

MULTIPLIES = {"conv1d", "conv2d", "linear"}  # of an activation and a weight
ALIASES = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "multiply": "mul", "matmul": "matmul"}
ALIASES |= {"rmatmul": "matmul", "bmm": "matmul", "concat": "cat", "concatenate": "cat", "hardtanh": "clip"}
ALIASES |= {"relu6": "clip", "clamp": "clip", "clamp_min": "clip", "clamp_max": "clip", "relu": "clip"}
ALIASES |= {
    "native_batch_norm": "batch_norm",
    "isub": "sub",
    "rsub": "sub",
    "itruediv": "div",
    "truediv": "div",
}


@lru_cache(maxsize=4096)
def kind_of(function: Callable[..., Any]) -> str:
    """The operation's plain name: `add_`, `__iadd__` and `Tensor.add` are all `add`."""
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    return ALIASES.get(name, name)


class Location:
    """Where in the module tree execution is, kept by forward hooks; copied with the model it belongs to."""

    def __init__(self) -> None:
        self.stack: list[str] = [""]
        self.ordinals: dict[tuple[str, str], int] = defaultdict(int)

    def reset(self) -> None:
        """Start of a forward pass; also clears what an exception in an earlier pass left behind."""
        self.stack[:] = [""]
        self.ordinals.clear()

    @property
    def path(self) -> str:
        return self.stack[-1]

    def address(self, kind: str) -> str:
        """Address of the call being made; counts it."""
        key = (self.path, kind)
        ordinal = self.ordinals[key]
        self.ordinals[key] = ordinal + 1
        return f"{self.path}#{kind}{ordinal}"

    def watch(self, model: nn.Module, skip: type[nn.Module] | tuple[()] = ()) -> list[Any]:
        """Hook every module of `model` but those of type `skip`, which count as their parents; returns the handles."""
        handles = []
        for path, module in model.named_modules():
            if path and not isinstance(module, skip):
                handles.append(module.register_forward_pre_hook(_Enter(self, path)))
                handles.append(module.register_forward_hook(_Leave(self)))
        return handles


# Hooks are objects and not closures so that copy.deepcopy(model) takes the copied Location along.
class _Enter:
    def __init__(self, location: Location, path: str) -> None:
        self.location, self.path = location, path

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.location.stack.append(self.path)


class _Leave:
    def __init__(self, location: Location) -> None:
        self.location = location

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.location.stack.pop()


@dataclass(frozen=True)
class Call:
    """One operation: the values it reads and writes are numbered; values outside the data flow are left out.

    layer: of a convolution or linear, its name: that of the module that owns the weight, whoever makes the call; of the
           parameter, where no layer owns it; else of the module that computes the weight.
    multiplications: of the whole call, all samples of the example together.
    """

    address: str
    path: str
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    pools_space: bool = False
    ceiling: float | None = None  # of a ReLU, its upper clip (inf where it has none); None for anything else
    output_shape: tuple[int, ...] = ()
    layer: str = ""
    multiplications: int = 0


@dataclass
class Trace:
    """The calls of one forward pass in order; `model_inputs` and `model_outputs` are value numbers.

    weights: address -> the weight that a convolution or linear was called with.
    on_constants: names of the layers that were called without anything that depends on the image.
    constant: addresses of all calls of that kind.
    """

    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    on_constants: set[str] = field(default_factory=set)
    constant: set[str] = field(default_factory=set)
    model_inputs: tuple[int, ...] = ()
    model_outputs: tuple[int, ...] = ()

    def producer(self) -> dict[int, Call]:
        return {value: call for call in self.calls for value in call.outputs}

    def consumers(self) -> dict[int, list[Call]]:
        readers: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            for value in call.inputs:
                readers[value].append(call)
        return readers


class _Recorder(TorchFunctionMode):
    def __init__(self, location: Location, parameter_names: dict[int, str], layers: frozenset[str]) -> None:
        super().__init__()
        self.location, self.parameter_names, self.layers = location, parameter_names, layers
        self.trace = Trace()
        self.values: dict[int, int] = {}
        self.alive: list[Any] = []  # ids stay unique only while their tensors live
        self.count = 0

    def number(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        self.values[id(tensor)] = self.count
        self.count += 1
        return self.count - 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = list(_tensors((args, kwargs or {})))
        inputs = tuple(self.values[id(t)] for t in tensors if id(t) in self.values)
        parameters = tuple(self.parameter_names[id(t)] for t in tensors if id(t) in self.parameter_names)
        out = func(*args, **(kwargs or {}))
        produced = [t for t in _tensors(out) if t.is_floating_point()]
        kind = kind_of(func)
        address = self.location.address(kind)
        layer = ""
        if kind in MULTIPLIES:
            weight = weight_operand(args, kwargs or {})
            layer = self.layer_of(weight, address)
            self.trace.weights[address] = weight.detach()
            if not inputs:
                self.trace.on_constants.add(layer)
        if inputs and produced and kind != "get":
            if kind == "interpolate" and "nearest" in str((kwargs or {}).get("mode", "nearest")):
                kind = "nearest"  # only repeats values
            call = Call(
                address, self.location.path, kind, inputs,
                tuple(self.number(t) for t in produced), parameters,
                _pools_space(kind, args, produced[0]), _ceiling(func, args, kwargs or {}), tuple(produced[0].shape),
                layer, multiplications(kind, args, kwargs or {}, produced[0]),
            )  # fmt: skip
            self.trace.calls.append(call)
        elif produced and not inputs:
            self.trace.constant.add(address)
        return out

    def layer_of(self, weight: Tensor, address: str) -> str:
        name = self.parameter_names.get(id(weight))
        owner = None if name is None else name.rpartition(".")[0]
        if owner in self.layers and name == f"{owner}.weight":
            return owner
        if self.location.path in self.layers:
            return self.location.path  # it computes its weight from its parameters
        return name or address.replace("#", "." if self.location.path else "")


def weight_operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The weight of a call of `conv2d` or `linear`."""
    return args[1] if len(args) > 1 else kwargs["weight"]


def _ceiling(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    match getattr(function, "__name__", "").strip("_"):
        case "relu":
            return math.inf
        case "relu6":
            return 6.0
        case "hardtanh":
            low, high = (*args[1:3], kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0))[:2]
            return float(high) if low == 0 and len(args) != 2 else None
    return None


def _pools_space(kind: str, args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether the call averages over H and W alone, as every form of average pooling does."""
    if "avg_pool" in kind:
        return True
    if kind != "mean" or not args or args[0].dim() != 4:
        return False
    return out.numel() == args[0].shape[0] * args[0].shape[1]


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


@torch.no_grad()
def trace_calls(model: nn.Module, example: Tensor, layers: frozenset[str] = frozenset()) -> Trace:
    """Run `model` once in eval mode on `example` (N_C_H_W) and return its calls; the model is left as it was.

    layers: names of its convolution and linear modules, which their calls are named after.
    """
    location, training = Location(), {m: m.training for m in model.modules()}
    handles = location.watch(model)
    recorder = _Recorder(location, {id(p): name for name, p in model.named_parameters()}, layers)
    try:
        model.eval()
        model(example)  # some models fill a cache in their first pass, with operations that do not come again
        location.reset()
        source = recorder.number(example)
        with recorder:
            out = model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    outputs = tuple(recorder.values[id(t)] for t in _tensors(out) if id(t) in recorder.values)
    recorder.trace.model_inputs, recorder.trace.model_outputs = (source,), outputs
    return recorder.trace
