"""Which tensor operations a model performs, at which address (`qat/surgery/frames.py`), and what flows where.

timm's residual adds, concatenations and pools are functions, not modules, so the model is run under a `TorchFunctionMode`;
forward hooks tell the mode which module is at work. The model's code is not rewritten. Values are followed through writes in
place, casts and properties; what leaves PyTorch (numpy, Python numbers) is refused by name, since nothing can follow it.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.surgery.counting import multiplications
from qat.surgery.example import Example, arguments_of, tensors_in, twice
from qat.surgery.frames import Location
from qat.surgery.open_forms import Unquantizable, is_weight, open_form

MULTIPLIES = {"conv1d", "conv2d", "linear"}  # of an activation and a weight
# Names of one operation: a function's, its operators' and its properties'.
ALIASES = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "matmul": "matmul",
    "rmatmul": "matmul",
    "bmm": "matmul",
    "mm": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "relu": "clip",
    "relu6": "clip",
    "hardtanh": "clip",
    "clamp": "clip",
    "clamp_min": "clip",
    "clamp_max": "clip",
    "native_batch_norm": "batch_norm",
    "T": "t",
    "H": "t",
    "mT": "transpose",
    "mH": "transpose",
    "data": "detach",
}
# Where a value leaves PyTorch, so that nothing can follow it.
LEAVES = {
    "numpy",
    "tolist",
    "item",
    "array",
    "bool",
    "int",
    "float_number",
    "index",
    "tensor",
}
NUMBERS = {"__bool__", "__int__", "__float__", "__index__"}
CASTS = {"to", "type", "type_as", "float", "half", "double", "bfloat16"}
# Write into buffers that the same pass does not read
STATISTICS = {"batch_norm", "instance_norm"}
WRITES = {
    "setitem",
    "index_put",
    "index_copy",
    "index_fill",
    "index_add",
    "scatter",
    "scatter_add",
    "masked_scatter",
}
TORCH = str(Path(torch.__file__).parent)


@lru_cache(maxsize=4096)
def kind_of(function: Callable[..., Any]) -> str:
    """The operation's plain name: `add_`, `__iadd__` and `Tensor.add` are all `add`; of a property, the property's."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name == "__float__":
        return "float_number"
    name = name.strip("_")
    return ALIASES.get(name, name)


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
    # Of a ReLU, its upper clip (inf where it has none); None for anything else
    ceiling: float | None = None
    output_shape: tuple[int, ...] = ()
    # Whether it leaves a part of the tensor that it writes to as it was
    writes_a_part: bool = False
    layer: str = ""
    multiplications: int = 0


@dataclass
class Trace:
    """The calls of one forward pass in order; `model_inputs` and `model_outputs` are value numbers.

    weights: address -> the weight that a convolution or linear was called with.
    on_constants: names of the layers that were called without anything that depends on the image.
    constant: addresses of all calls of that kind.
    written_back: addresses of operations in place whose result is read through the tensor that they wrote to.
    starts: (module path, method) -> how many operations of each kind the module had made when its forward called the method;
            None where that differs from call to call.
    where: address -> the Python code that makes the operation, outwards to its module's call: it tells two of one kind apart.
    parameter_of: address of a convolution or linear -> the parameter it multiplies by, and whether that is turned round.
    repeated: paths of the modules that their parent called several times.
    """

    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    on_constants: set[str] = field(default_factory=set)
    constant: set[str] = field(default_factory=set)
    model_inputs: tuple[int, ...] = ()
    model_outputs: tuple[int, ...] = ()
    written_back: set[str] = field(default_factory=set)
    starts: dict[tuple[str, str], dict[str, int] | None] = field(default_factory=dict)
    where: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    parameter_of: dict[str, tuple[str, bool]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def producer(self) -> dict[int, Call]:
        """Value -> the call that made it."""
        return {value: call for call in self.calls for value in call.outputs}

    def consumers(self) -> dict[int, list[Call]]:
        """Value -> the calls that read it, in order."""
        readers: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            for value in call.inputs:
                readers[value].append(call)
        return readers


@dataclass
class _Value:
    """A tensor's number in the flow, and how often its memory had been written to when it got it.

    written_by: address of an operation in place that gave the tensor this value under another Python object.
    """

    number: int
    writes: int
    written_by: str = ""


@dataclass(frozen=True)
class _Operation:
    """A function of PyTorch as the model calls it."""

    function: Any
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(TorchFunctionMode):
    """Runs every operation as it is, numbers the tensors it reads and makes, and notes it in `trace`."""

    def __init__(
        self,
        location: Location,
        model: nn.Module,
        layers: frozenset[str],
        training: bool,
    ) -> None:
        super().__init__()
        self.location = location
        self.layers = layers
        # Where a loss may be logged: what leaves PyTorch then is not in the file
        self.training = training
        self.parameter_names = {id(p): name for name, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.trace = Trace()
        self.values: dict[int, _Value] = {}
        self.writes: dict[int, int] = defaultdict(int)  # by address of the memory
        self.writers: dict[int, str] = {}
        # Ids and addresses stay unique only while their tensors live
        self.alive: list[Any] = []
        self.methods: dict[int, tuple[FrameType, str]] = {}
        self.count = 0

    def number(self, tensor: Tensor) -> int:
        """A new number for what `tensor` holds now."""
        self.alive.append(tensor)
        self.values[id(tensor)] = _Value(self.count, self.writes[_memory(tensor)])
        self.count += 1
        return self.count - 1

    def read(self, tensor: Tensor) -> int | None:
        """The number of what `tensor` holds; None when it does not depend on the image.

        Raises ValueError when something else was written into its memory since.
        """
        value = self.values.get(id(tensor))
        memory = _memory(tensor)
        known_writes = 0 if value is None else value.writes
        if self.writes.get(memory, 0) > known_writes:
            raise ValueError(
                f"{self.writers[memory]}: writes in place into a tensor that is read again through another view of it; "
                "quantize_ cannot follow that, write it as an expression (torch.cat, torch.where, x = x + y)"
            )
        if value is None:
            return None
        if value.written_by:
            self.trace.written_back.add(value.written_by)
        return value.number

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        opened = open_form(kind, args, kwargs)
        if opened is not None:
            with self:
                return _in_the_open(opened, self.location.path, args, kwargs)
        operation = _Operation(func, kind, args, kwargs)
        operands = list(tensors_in((args, kwargs)))
        inputs = self.read_all(operands)
        sees_image = bool(inputs)
        if kind in LEAVES and sees_image and not self.training:
            raise _leaves_pytorch(self.location.path, func)

        versions = [_version(operand) for operand in operands]
        out = func(*args, **kwargs)
        written = _written(operands, versions)
        produced = _produced(kind, out, written)

        address = self._next_address(kind, bool(produced))
        layer = ""
        if kind in MULTIPLIES:
            layer = self._note_weight(address, args, kwargs, sees_image)
        if not produced:
            return out
        if not sees_image:
            self.trace.constant.add(address)
            return out
        if kind in STATISTICS:
            written = []
        if written:
            out, produced = self._note_writes(written, out, produced, address)
        outputs = tuple(self.number(result) for result in produced)
        first = produced[0]
        self._same_value(written, first, address)
        call = self._call(operation, operands, inputs, outputs, first)
        self.trace.calls.append(replace(call, address=address, layer=layer))
        return out

    def read_all(self, operands: list[Tensor]) -> tuple[int, ...]:
        """The numbers of those operands that depend on the image."""
        numbers = []
        for operand in operands:
            number = self.read(operand)
            if number is not None:
                numbers.append(number)
        return tuple(numbers)

    def _call(
        self,
        operation: _Operation,
        operands: list[Tensor],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        result: Tensor,
    ) -> Call:
        """What the plan needs to know of an operation, without its address and layer; `result` is its first one."""
        args = operation.args
        kwargs = operation.kwargs
        flow_kind = _flow_kind(operation.kind, kwargs, operands[0], result)
        if operation.kind == "copy":
            # What was there before is gone
            inputs = inputs[-1:]
        return Call(
            address="",
            path=self.location.path,
            kind=flow_kind,
            inputs=inputs,
            outputs=outputs,
            parameters=self._parameters_among(operands),
            pools_space=_pools_space(operation.kind, args, result),
            ceiling=_ceiling(operation.function, args, kwargs),
            output_shape=tuple(result.shape),
            writes_a_part=_writes_a_part(operation.kind, args),
            multiplications=multiplications(flow_kind, args, kwargs, result),
        )

    def _parameters_among(self, operands: list[Tensor]) -> tuple[str, ...]:
        """Names of those operands that are parameters of the model."""
        names = []
        for operand in operands:
            if id(operand) in self.parameter_names:
                names.append(self.parameter_names[id(operand)])
        return tuple(names)

    def _next_address(self, kind: str, is_located: bool) -> str:
        """Address of the operation that was just made; notes the code that made it, where it gave a tensor."""
        frame = self.location.stack[-1]
        if frame.times > 1:
            self.trace.repeated.add(frame.path)
        counts = dict(frame.counts)
        address = frame.address(kind)
        where = self._where(counts) if is_located else ()
        self.trace.where.setdefault(address, where)
        return address

    def _note_weight(
        self,
        address: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sees_image: bool,
    ) -> str:
        """Note what a convolution or linear multiplies by; returns its name."""
        weight = weight_operand(args, kwargs)
        layer = self.layer_of(weight, address)
        self.trace.weights[address] = weight.detach()
        parameter = self._parameter(weight)
        if parameter is not None:
            self.trace.parameter_of[address] = parameter
        if not sees_image:
            self.trace.on_constants.add(layer)
        return layer

    def _note_writes(
        self, written: list[Tensor], out: Any, produced: list[Tensor], address: str
    ) -> tuple[Any, list[Tensor]]:
        """Count the writes. Gives the result another Python object, which tells its readers from those of the tensor that
        was written to."""
        for tensor in written:
            memory = _memory(tensor)
            self.writes[memory] += 1
            self.writers[memory] = address
        if isinstance(out, Tensor) and any(out is tensor for tensor in written):
            out = out.view_as(out)
            produced = [out]
        return out, produced

    def _same_value(self, written: list[Tensor], result: Tensor, address: str) -> None:
        """What was written to holds the result's value from here on."""
        value = self.values[id(result)]
        for tensor in written:
            self.alive.append(tensor)
            self.values[id(tensor)] = _Value(value.number, value.writes, address)

    def _where(self, counts: dict[str, int]) -> tuple[tuple[str, int], ...]:
        """The Python code at work, from the operation out to its module's call, without PyTorch's own; notes at what counts
        the methods on the way began."""
        module = self.modules.get(self.location.path)
        where: list[tuple[str, int]] = []
        # Who called the function that this mode watches
        frame: FrameType | None = sys._getframe(3)
        while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
            code = frame.f_code
            if not code.co_filename.startswith(TORCH):
                where.append((f"{code.co_filename}:{code.co_qualname}", frame.f_lasti))
                self._note_method(frame, module, counts)
            frame = frame.f_back
        return tuple(where)

    def _note_method(
        self, frame: FrameType, module: nn.Module | None, counts: dict[str, int]
    ) -> None:
        """Note how many operations of each kind `module` had made when it began this method, once per method call."""
        name = frame.f_code.co_name
        if module is None or id(frame) in self.methods:
            return
        if name == "forward" or not hasattr(type(module), name):
            return
        if frame.f_locals.get("self") is not module:
            return
        self.methods[id(frame)] = frame, name
        key = self.location.path, name
        before = self.trace.starts.get(key, counts)
        self.trace.starts[key] = counts if before == counts else None

    def _parameter(self, weight: Tensor) -> tuple[str, bool] | None:
        """Name of the parameter that `weight` is, or is the transpose of."""
        if id(weight) in self.parameter_names:
            return self.parameter_names[id(weight)], False
        base = weight._base
        if is_weight(weight) and base is not None and id(base) in self.parameter_names:
            return self.parameter_names[id(base)], weight.stride() != base.stride()
        return None

    def layer_of(self, weight: Tensor, address: str) -> str:
        """Name of a convolution or linear after its weight; see `Call`."""
        path = self.location.path
        is_layer = path in self.layers
        if is_layer and getattr(self.modules[path], "weight", None) is weight:
            return path
        name = self.parameter_names.get(id(weight))
        owner = None if name is None else name.rpartition(".")[0]
        if owner in self.layers and name == f"{owner}.weight":
            return owner
        if is_layer:
            return path  # it computes its weight from its parameters
        if name is not None:
            return name
        return address.replace("#", "." if path else "")


def _in_the_open(
    form: Callable[..., Any], path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        return form(*args, **kwargs)
    except Unquantizable as error:
        raise ValueError(f"{_words(path)}: {error}") from error


def _flow_kind(
    kind: str, kwargs: Mapping[str, Any], source: Tensor, result: Tensor
) -> str:
    """The kind as the plan reads it: casts that round and interpolation that only repeats values have names apart."""
    stays_real = source.is_floating_point() and result.is_floating_point()
    if kind in CASTS and not stays_real:
        return "cast"  # to integers or back
    if kind == "interpolate" and "nearest" in str(kwargs.get("mode", "nearest")):
        return "nearest"
    return kind


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0  # a layout without a storage cannot be written to through a view


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _leaves_pytorch(path: str, function: Any) -> ValueError:
    return ValueError(
        f"{_words(path)}: takes what depends on the image out of PyTorch ({function.__name__}), where quantize_ cannot "
        "follow it; write it with tensor operations (torch.where for a decision)"
    )


def _produced(kind: str, out: Any, written: list[Tensor]) -> list[Tensor]:
    """The tensors that an operation makes: those it returns, or those it wrote to."""
    returned = list(tensors_in(out))
    if kind == "set" or (written and not returned):
        return written
    return returned


def _written(operands: list[Tensor], versions: list[int]) -> list[Tensor]:
    """The operands whose memory was written to since they had these versions."""
    written = []
    for operand, version in zip(operands, versions, strict=True):
        if _version(operand) != version:
            written.append(operand)
    return written


def _words(path: str) -> str:
    return f"module {path!r}" if path else "the model's own forward"


def weight_operand(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The weight of a call of `conv2d` or `linear`."""
    return args[1] if len(args) > 1 else kwargs["weight"]


def _ceiling(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float | None:
    """Of a ReLU, its upper clip, inf where it has none; None for any other function."""
    match getattr(function, "__name__", "").strip("_"):
        case "relu":
            return math.inf
        case "relu6":
            return 6.0
        case "hardtanh":
            return _upper_clip(args, kwargs)
    return None


def _upper_clip(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The upper clip of a `hardtanh` that clips below at 0; None for one that does not."""
    if len(args) == 2:
        return None  # the lower clip by position, and the upper one by name
    by_name = (kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0))
    low, high = args[1:3] or by_name
    return float(high) if low == 0 else None


def _writes_a_part(kind: str, args: tuple[Any, ...]) -> bool:
    """Whether it writes to chosen elements of a tensor. `x[...] = y` and `x[:, 0:] = y` write to all, of any size."""
    if kind not in WRITES:
        return False
    if kind != "setitem":
        return True
    index = args[1]
    places = index if isinstance(index, tuple) else (index,)
    return not all(_is_everything(place) for place in places)


def _is_everything(place: object) -> bool:
    """Whether an index takes a whole axis. One that ends at a number does not: another batch may be longer."""
    if place is Ellipsis:
        return True
    if not isinstance(place, slice) or place.stop is not None:
        return False
    starts_first = place.start is None or place.start == 0
    takes_each = place.step is None or place.step == 1
    return starts_first and takes_each


def _pools_space(kind: str, args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether the call averages over H and W alone, as every form of average pooling does."""
    if "avg_pool" in kind:
        return True
    if kind != "mean" or not args or args[0].dim() != 4:
        return False
    return out.numel() == args[0].shape[0] * args[0].shape[1]


@torch.no_grad()
def trace_calls(
    model: nn.Module,
    example: Example,
    layers: frozenset[str] = frozenset(),
    *,
    training: bool = False,
) -> Trace:
    """Run `model` once on `example` and return its calls; the model is left as it was.

    layers: names of its convolution and linear modules, which their calls are named after.
    training: in training mode, on every sample twice, instead of in eval mode.
    Raises ValueError naming the module for a value that cannot be followed.
    """
    location = Location()
    args, kwargs = arguments = arguments_of(model, example)
    if training:
        args, kwargs = twice(arguments)
    recorder = _Recorder(location, model, layers, training)
    with in_mode(model, training), watched(location, model):
        # Some models fill a cache in their first pass, with operations that do not come again
        model(*args, **kwargs)
        location.begin()
        sources = tuple(
            recorder.number(tensor) for tensor in tensors_in((args, kwargs))
        )
        with recorder:
            out = model(*args, **kwargs)
        results = recorder.read_all(list(tensors_in(out)))
    recorder.methods.clear()
    recorder.trace.model_inputs = sources
    recorder.trace.model_outputs = results
    return recorder.trace


@contextmanager
def watched(location: Location, model: nn.Module) -> Iterator[None]:
    """While it is open, `location` knows which module is at work."""
    handles = location.watch(model)
    try:
        yield
    finally:
        location.end()
        for handle in handles:
            handle.remove()


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run `model` in training or eval mode without a trace: modes, buffers and random numbers are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = []
    if training:
        for buffer in model.buffers():
            buffers.append((buffer, buffer.clone()))
    gpus = set()
    for parameter in model.parameters():
        if parameter.device.type == "cuda":
            gpus.add(parameter.device)
    try:
        with torch.random.fork_rng(sorted(gpus, key=str)):
            model.train(training)
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
