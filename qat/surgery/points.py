"""Quantizers on the results of functional operations, applied while the model's own code runs.

Every module that makes such an operation gets a subclass of its class, made on the spot, whose forward runs under
`PointMode`; its submodules, parameters and state-dict keys stay where they were. So the quantizers are there whoever calls
the module: the model, `forward_features`, a user who runs single children, or activation checkpointing in backward. They
live in the root's `stream_quantizers`, and there too those of convolutions and linears that are called outside a quantized
layer (`qat/surgery/operands.py`).
"""

import functools
from collections.abc import Callable, Mapping
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

    merges:      addresses that were there when the model was quantized, with or without a quantizer.
    multiplies:  convolutions and linears that stay in floating point.
    layers:      paths of the quantized layers.
    written_back: operations in place whose result is read through the tensor that they wrote to.
    in_training: address in training mode -> address in eval mode, where they differ; None: only training makes it.
    tallies:     path -> how many operations of each kind that has quantizers its module makes in training.
    repeated:    paths of modules that their parent calls several times.
    starts:      (path, method) -> how many operations of each kind come before the method; None: not always as many.
    """

    merges: frozenset[str]
    multiplies: frozenset[str]
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
        super().__init__(
            {_key(address): quantizer for address, quantizer in quantizers.items()}
        )
        if operands:
            self.operands = nn.ModuleDict(
                {_key(address): module for address, module in operands.items()}
            )
        self.relus, self.known = relus, known
        # Shapes alone
        self.example = with_tensors(example, lambda tensor: tensor.to("meta"))
        # Whether another library's layers stand in for ours and multiply as they please
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
        """What quantizes the operands of a product; None where the plan leaves them.

        Raises RuntimeError for a product that the plan does not know.
        """
        found = (
            self.operands._modules.get(_key(address))
            if "operands" in self._modules
            else None
        )
        if found is None and address not in self.known.multiplies and not self.guests:
            raise _unknown(address, "operands")
        return found  # type: ignore[return-value]

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
        self.quantizers, self.location, self.layers = (
            quantizers,
            location,
            quantizers.known.layers,
        )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind, frame = kind_of(func), self.location.stack[-1]
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
            with recomputed(*args[:2]) if kind in KEEPING else NOTHING:
                return func(*args, **kwargs)
        address = self._address(frame, kind)
        quantizer = (
            self.quantizers.at(address, is_merge and not frame.training)
            if address
            else None
        )
        if quantizer is not None:
            _require_recording(frame, address)
        clips = self.quantizers.relus.get(address) if frame.training and args else None
        if clips is not None and clips.clips_as_relu():
            return args[0] if quantizer is None else quantizer(args[0])
        with recomputed(*args[:2]) if kind in KEEPING else NOTHING:
            out = func(*args, **kwargs)
        if quantizer is None:
            return out
        if address in self.quantizers.known.written_back:
            # Others read the sum through the tensor that it was written to
            return out.copy_(quantizer(out.clone()))
        return _quantized(out, quantizer)

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
        operands = self.quantizers.operands_at(address) if address else None
        if operands is not None:
            _require_recording(frame, address)
            args, kwargs = operands.quantized(args, kwargs)
        with recomputed(*args[:2]) if operands is not None else NOTHING:
            out = func(*args, **kwargs)
        quantizer = (
            self.quantizers.at(address, must_be_known=False) if address else None
        )
        return out if quantizer is None else quantizer(out)

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


def _quantized(out: Any, quantizer: LSQ) -> Any:
    """A result quantized; of several results, such as a sort's, those in floating point."""
    if isinstance(out, Tensor):
        return quantizer(out)
    return with_tensors(
        out, lambda tensor: quantizer(tensor) if tensor.is_floating_point() else tensor
    )


def _merges_tensors(args: tuple[Any, ...]) -> bool:
    operands = args[0] if args and isinstance(args[0], (list, tuple)) else args[:2]
    return (
        sum(
            isinstance(a, Tensor) and a.dim() > 1 and a.is_floating_point()
            for a in operands
        )
        > 1
    )


class Entry:
    """What a module needs to run under its model's `PointMode`: where it is in the model, and the model's quantizers."""

    def __init__(
        self, path: str, location: Location, quantizers: StreamQuantizers
    ) -> None:
        self.path, self.location, self.quantizers = path, location, quantizers

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
        within = depth > 0 and stack[-1].path == self.path
        if within and (stack[-1].is_known or start is None):
            out = method(module, *args, **kwargs)
            self._check_tally(stack[-1], name)
            return out
        is_known = start is not None or (
            name == "forward" and not (depth == 0 and self.path in self._repeated)
        )
        frame = Frame(
            self.path, module.training, None if start is None else dict(start), is_known
        )
        quantizers = module.stream_quantizers if self.path == "" else self.quantizers
        if depth == 0:
            _refuse_tracers(args)
            args, kwargs = self._with_images(quantizers, name, args, kwargs)
        stack.append(frame)
        try:
            if depth:
                out = method(module, *args, **kwargs)
            else:
                with PointMode(quantizers, self.location):  # type: ignore[arg-type]
                    out = method(module, *args, **kwargs)
            self._check_tally(frame, name)
        finally:
            del stack[depth:]
        return out

    @property
    def _repeated(self) -> frozenset[str]:
        return self.quantizers.known.repeated

    def _with_images(
        self, quantizers: Any, name: str, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        if self.path or not quantizers.images:
            return args, kwargs
        if name != "forward":
            raise RuntimeError(
                f"{name}: the image has a quantizer, which forward applies; call the model itself, or quantize the part "
                "that you call"
            )
        return quantizers.quantize_images(args, kwargs)

    def _check_tally(self, frame: Frame, name: str) -> None:
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
        "_of": (base, methods),
    }
    for name in ("forward", *methods):
        namespace[name] = _in_frame(name, getattr(base, name))
    namespace["__reduce_ex__"] = _reduce
    made = type(f"Quantized{base.__name__}", (base,), namespace)
    _classes[base, methods] = made
    return made


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
    owners = {"", *(path_of(address) for address in (*quantizers, *operands, *relus))}
    location.watch(model, skip=Quantizer)
    for path in owners:
        module: Any = model.get_submodule(path)
        traced = {name for owner, name in known.starts if owner == path}
        others = {name for name in dir(type(module)) if name.startswith("forward_")}
        methods = tuple(
            sorted(
                name
                for name in traced | others
                if callable(getattr(type(module), name, None))
            )
        )
        module._entry = Entry(path, location, model.stream_quantizers)
        module.__class__ = _class_with_quantizers(type(module), methods)
