"""Quantizers on the results of functional operations, applied while the model's own code runs.

Every module that makes such an operation gets a subclass of its class, made on the spot, whose forward runs under
`PointMode`; its submodules, parameters and state-dict keys stay where they were. So the quantizers are there whoever calls
the module: the model, `forward_features`, a user who runs single children, or activation checkpointing in backward. They
live in the root's `stream_quantizers`, and there too those of convolutions and linears that are called outside a quantized
layer (`qat/surgery/operands.py`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ
from qat.quantizers.recompute import recomputed
from qat.surgery.example import Example, with_tensors
from qat.surgery.frames import (
    Frame,
    Location,
    image_address,
    is_image,
    kind_in,
    path_of,
)
from qat.surgery.open_forms import open_form
from qat.surgery.operands import QuantOperands
from qat.surgery.plan import MERGES
from qat.surgery.trace import MULTIPLIES, kind_of

NOTHING: AbstractContextManager[None] = nullcontext()
# What may read a quantized tensor outside a quantized layer, and keeps its operands for backward. The pools keep the whole
# input though only its shape or their indices are used: after a stem that is the largest tensor of the net.
KEEPING = {"mul", "matmul", "layer_norm", "max_pool2d", "avg_pool2d"}


@dataclass(frozen=True)
class Addresses:
    """What is known of a model's operations.

    merges:      merges that were there when the model was quantized, with or without a quantizer, and every operation on
                 constants.
    other_weighted: convolutions and linears whose operands are not quantized at their address: those inside quantized layers
                 and those that stay in floating point.
    layers:      paths of the quantized layers.
    written_back: operations in place whose result is read through the tensor that they wrote to.
    in_training: address in training mode -> address in eval mode, where they differ; None: only training makes it.
    tallies:     path -> how many operations of each kind that has quantizers its module makes in training.
    repeated:    paths of modules that their parent calls several times.
    starts:      (path, method) -> how many operations of each kind come before the method; None: not always as many.
    """

    merges: frozenset[str]
    other_weighted: frozenset[str]
    layers: frozenset[str]
    written_back: frozenset[str] = frozenset()
    in_training: Mapping[str, str | None] = field(default_factory=dict)
    tallies: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    starts: Mapping[tuple[str, str], Mapping[str, int] | None] = field(
        default_factory=dict
    )


class StreamQuantizers(nn.ModuleDict):
    """Address -> quantizer; dots of the address are written as slashes, which module names allow.

    operands: address of a convolution or linear outside the quantized layers -> its quantizers.
    relus: addresses of ReLUs before a quantizer that clips as they do. In training they are passed over, which saves a
           pass over memory forward and one backward and changes no bit: an unsigned quantizer's own clip at 0 is the ReLU.
    example:  what the model was quantized with, without its numbers.
    """

    def __init__(
        self,
        quantizers: dict[str, LSQ],
        operands: dict[str, QuantOperands],
        relus: dict[str, LSQ],
        known: Addresses,
        example: Example = (),
    ) -> None:
        super().__init__()
        for address, quantizer in quantizers.items():
            self[_key(address)] = quantizer
        if operands:
            self.operands = nn.ModuleDict()
            for address, module in operands.items():
                self.operands[_key(address)] = module
        self.relus = relus
        self.known = known
        # Shapes alone
        self.example = with_tensors(example, lambda tensor: tensor.to("meta"))
        # Whether another library's layers stand in for ours, with quantization of their own
        self.guests = False
        watched = (*quantizers, *known.merges, *relus)
        self.watched = {(path_of(address), kind_in(address)) for address in watched}
        self.images = [address for address in quantizers if is_image(address)]

    def forward(self, x: Any) -> Any:
        """Identity: an `nn.Sequential` that was quantized runs all its members, this one last."""
        return x

    def at(self, address: str, must_be_known: bool) -> LSQ | None:
        """The quantizer of an operation's result, None where the plan has none.

        Raises RuntimeError for an operation that the plan does not know, if `must_be_known`.
        """
        quantizer = self._modules.get(_key(address))
        if quantizer is None and must_be_known and address not in self.known.merges:
            raise _unknown(address, "result")
        return quantizer  # type: ignore[return-value]

    def operands_at(self, address: str) -> QuantOperands | None:
        """What quantizes the operands of a convolution or linear; None where the plan leaves them.

        Raises RuntimeError for one that the plan does not know.
        """
        operands = None
        if "operands" in self._modules:
            operands = self.operands._modules.get(_key(address))
        is_known = self.guests or address in self.known.other_weighted
        if operands is None and not is_known:
            raise _unknown(address, "operands")
        return operands  # type: ignore[return-value]

    def quantize_images(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, those tensors quantized that have a quantizer."""
        position = -1

        def quantize(tensor: Tensor) -> Tensor:
            nonlocal position
            position += 1
            quantizer = self._modules.get(_key(image_address(position)))
            return tensor if quantizer is None else quantizer(tensor)

        changed: tuple[tuple[Any, ...], dict[str, Any]] = with_tensors(
            (args, kwargs), quantize
        )
        return changed


def example_of(model: nn.Module, given: Example | None = None) -> Example:
    """`given`, or one like the example that `model` was quantized with: zeros of its shapes.

    Raises ValueError for a model that is not quantized.
    """
    stream = getattr(model, "stream_quantizers", None)
    if not isinstance(stream, StreamQuantizers):
        raise ValueError(
            "the model is not quantized: call quantize_(model, rules, example) first"
        )
    if given is not None:
        return given
    made: Example = with_tensors(
        stream.example, lambda shape: torch.zeros(shape.shape, dtype=shape.dtype)
    )
    return made


def _unknown(address: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{address}: this operation was not there when the model was quantized, so nothing quantizes its {what}. Fuse, "
        "re-parameterise or change a model before quantize_, and give quantize_ an example that takes this path"
    )


def _key(address: str) -> str:
    return address.replace(".", "/")


class PointMode(TorchFunctionMode):
    """Applies the quantizer registered for a call's address to the call's result."""

    def __init__(self, quantizers: StreamQuantizers, location: Location) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.location = location
        self.layers = quantizers.known.layers

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        frame = self.location.stack[-1]
        in_layer = frame.path in self.layers
        if kind in MULTIPLIES and not in_layer:
            return self._multiply(func, kind, frame, args, kwargs)
        if in_layer and kind not in MULTIPLIES:
            return func(*args, **kwargs)  # a quantizer's own arithmetic
        opened = open_form(kind, args, kwargs)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        is_merge = kind in MERGES and _merges_tensors(args)
        if (frame.path, kind) not in self.quantizers.watched and not is_merge:
            return _computed(func, kind, args, kwargs)
        address = self._address(frame, kind)
        quantizer = self._quantizer_of(address, frame, is_merge)
        if args and self._is_passed_over(address, frame):
            out = args[0]
        else:
            out = _computed(func, kind, args, kwargs)
            if quantizer is not None and address in self.quantizers.known.written_back:
                # Others read the sum through the tensor that it was written to
                return out.copy_(quantizer(out.clone()))
        if quantizer is None:
            return out
        return _quantized(out, quantizer)

    def _quantizer_of(self, address: str, frame: Frame, is_merge: bool) -> LSQ | None:
        """The quantizer of the result at `address`; None where nothing quantizes it, and of what only training makes.

        Raises RuntimeError for a merge that was not there when the model was quantized, and where a quantizer could not
        be trained.
        """
        if not address:
            return None
        must_be_known = is_merge and not frame.training
        quantizer = self.quantizers.at(address, must_be_known)
        if quantizer is not None:
            _require_recording(frame, address)
        return quantizer

    def _is_passed_over(self, address: str, frame: Frame) -> bool:
        """Whether the call is a ReLU in training whose quantizer clips as it does: see `StreamQuantizers`."""
        if not frame.training:
            return False
        quantizer = self.quantizers.relus.get(address)
        return quantizer is not None and quantizer.clips_as_relu()

    def _multiply(
        self,
        func: Any,
        kind: str,
        frame: Frame,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A convolution or linear call outside quantized layers."""
        address = self._address(frame, kind)
        if not address:
            return func(*args, **kwargs)
        operands = self.quantizers.operands_at(address)
        if operands is None:
            out = func(*args, **kwargs)
        else:
            _require_recording(frame, address)
            args, kwargs = operands.quantized(args, kwargs)
            with recomputed(*args[:2]):
                out = func(*args, **kwargs)
        quantizer = self.quantizers.at(address, must_be_known=False)
        if quantizer is None:
            return out
        return quantizer(out)

    def _address(self, frame: Frame, kind: str) -> str:
        """The call's address as eval mode counts it; empty for a call that only training makes."""
        if not frame.is_known:
            raise RuntimeError(
                f"{frame.path or 'the model'}: makes operations ({kind}) that have quantizers, in a method that forward does "
                "not use, or alone though the model runs it several times, so their quantizers cannot be told; call the "
                "model itself, checkpoint the parent, or quantize the part that you call"
            )
        address = frame.address(kind)
        if frame.training:
            return self.quantizers.known.in_training.get(address, address) or ""
        return address


def _require_recording(frame: Frame, address: str) -> None:
    """Raises RuntimeError where autograd was switched off within a module: reentrant checkpointing of a part of it."""
    if frame.training and frame.can_record and not torch.is_grad_enabled():
        raise RuntimeError(
            f"{address}: runs without gradients inside a module that has them, as under torch.no_grad or a checkpoint of a "
            "function, where its quantizer would not be trained; checkpoint a whole module, with use_reentrant=False"
        )


def _computed(
    function: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The function's own result; quantized operands that it keeps for backward are made again there."""
    with recomputed(*args[:2]) if kind in KEEPING else NOTHING:
        return function(*args, **kwargs)


def _quantized(out: Any, quantizer: LSQ) -> Any:
    """A result quantized; of several results, such as a sort's, those in floating point."""

    def quantize(tensor: Tensor) -> Tensor:
        return quantizer(tensor) if tensor.is_floating_point() else tensor

    if isinstance(out, Tensor):
        return quantizer(out)
    return with_tensors(out, quantize)


def _merges_tensors(args: tuple[Any, ...]) -> bool:
    """Whether two operands at least may be activations: tensors of real numbers with an axis beside the batch."""
    operands: Sequence[Any] = args[:2]
    if args and isinstance(args[0], (list, tuple)):
        operands = args[0]
    activations = 0
    for operand in operands:
        if not isinstance(operand, Tensor):
            continue
        if operand.dim() > 1 and operand.is_floating_point():
            activations += 1
    return activations > 1


class Entry:
    """What a module needs to run under its model's `PointMode`: where it is in the model, and the model's quantizers."""

    def __init__(
        self, path: str, location: Location, quantizers: StreamQuantizers
    ) -> None:
        self.path = path
        self.location = location
        self.quantizers = quantizers

    def run(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Call `method`, called `name`, of `module` in a new frame, and under `PointMode` if no caller has one."""
        stack = self.location.stack
        depth = len(stack)
        start = self.quantizers.known.starts.get((self.path, name))
        is_within = depth > 0 and stack[-1].path == self.path
        if is_within and (stack[-1].is_known or start is None):
            out = method(module, *args, **kwargs)
            self._check_tally(stack[-1], name)
            return out

        is_outermost = depth == 0
        mode: AbstractContextManager[Any] = NOTHING
        if is_outermost:
            _refuse_tracers(args)
            quantizers = self._quantizers_for(module)
            args, kwargs = self._with_images(quantizers, name, args, kwargs)
            mode = PointMode(quantizers, self.location)
        frame = self._frame(module, name, is_outermost)
        stack.append(frame)
        try:
            with mode:
                out = method(module, *args, **kwargs)
            self._check_tally(frame, name)
        finally:
            del stack[depth:]
        return out

    def _quantizers_for(self, module: nn.Module) -> Any:
        """The model's quantizers; those of a model that was copied are its own."""
        return module.stream_quantizers if self.path == "" else self.quantizers

    def _frame(self, module: nn.Module, name: str, is_outermost: bool) -> Frame:
        """A frame for a call of the method `name`, which counts from where the method began in the model's forward."""
        start = self.quantizers.known.starts.get((self.path, name))
        if start is not None:
            return Frame(self.path, module.training, dict(start), True)
        # One call of a module that its model calls several times could be any of them
        is_ambiguous = is_outermost and self.path in self.quantizers.known.repeated
        is_known = name == "forward" and not is_ambiguous
        return Frame(self.path, module.training, None, is_known)

    def _with_images(
        self, quantizers: Any, name: str, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """The arguments of the whole model, quantized; those of a part of it as they are."""
        if self.path or not quantizers.images:
            return args, kwargs
        if name != "forward":
            raise RuntimeError(
                f"{name}: the image has a quantizer, which forward applies; call the model itself, or quantize the part "
                "that you call"
            )
        return quantizers.quantize_images(args, kwargs)

    def _check_tally(self, frame: Frame, name: str) -> None:
        """Raises RuntimeError where the module made another number of operations than when it was quantized."""
        if name != "forward" or not frame.training:
            return
        for kind, expected in self.quantizers.known.tallies.get(self.path, {}).items():
            seen = frame.counts.get(kind, 0)
            if seen not in (0, expected):
                raise RuntimeError(
                    f"{self.path or 'the model'}: made {seen} operations of kind {kind} in this training step, {expected} "
                    "when it was quantized, so their quantizers cannot be told apart; move what is skipped at random into a "
                    "separate module"
                )


def _refuse_tracers(args: tuple[Any, ...]) -> None:
    if any(isinstance(argument, torch.fx.Proxy) for argument in args):
        raise TypeError(
            "torch.fx.symbolic_trace cannot see the quantizers of a quantized model, which are not in its Python code; use "
            "torch.export.export(model, args, strict=False), or qat.export_onnx for a file"
        )
    if torch.jit.is_tracing():
        raise TypeError(
            "torch.jit.trace cannot record the quantizers' integer codes; use torch.export.export(model, args, "
            "strict=False), or qat.export_onnx for a file"
        )


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _class_with_quantizers(
    base: type[nn.Module], methods: tuple[str, ...]
) -> type[nn.Module]:
    """A subclass of `base` whose forward and `methods` run in frames; it can be copied and pickled."""
    if (base, methods) in _classes:
        return _classes[base, methods]
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_of": (base, methods),
    }
    for name in ("forward", *methods):
        namespace[name] = _in_frame(name, getattr(base, name))
    subclass = type(f"Quantized{base.__name__}", (base,), namespace)
    _classes[base, methods] = subclass
    return subclass


def _in_frame(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)  # torch.export reads the signature
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._entry.run(self, name, method, args, kwargs)

    return run


def _reduce(module: Any, protocol: int) -> Any:
    return _blank, type(module)._of, module.__dict__


def _blank(base: type[nn.Module], methods: tuple[str, ...]) -> nn.Module:
    """A module of the subclass without contents, for copy and pickle to fill."""
    made = _class_with_quantizers(base, methods)
    return made.__new__(made)


def run_with_points(
    model: nn.Module,
    quantizers: dict[str, LSQ],
    operands: dict[str, QuantOperands],
    relus: dict[str, LSQ],
    known: Addresses,
    example: Example = (),
) -> None:
    """Make `model` and its parts apply `quantizers` at their addresses; see `StreamQuantizers`."""
    model.stream_quantizers = StreamQuantizers(
        quantizers, operands, relus, known, example
    )
    location = Location()
    owners = {""}
    for address in (*quantizers, *operands, *relus):
        owners.add(path_of(address))
    location.watch(model, skip=Quantizer)
    for path in owners:
        module: Any = model.get_submodule(path)
        methods = _methods_in_frames(type(module), path, known)
        module._entry = Entry(path, location, model.stream_quantizers)
        module.__class__ = _class_with_quantizers(type(module), methods)


def _methods_in_frames(
    module: type[nn.Module], path: str, known: Addresses
) -> tuple[str, ...]:
    """Beside `forward`, the methods that the model's forward used, and those that users call, such as `forward_features`."""
    names = set()
    for owner, name in known.starts:
        if owner == path:
            names.add(name)
    for name in dir(module):
        if name.startswith("forward_"):
            names.add(name)
    methods = []
    for name in sorted(names):
        if callable(getattr(module, name, None)):
            methods.append(name)
    return tuple(methods)
