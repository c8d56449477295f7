"""Quantizers on the results of functional operations, applied while the model's own forward runs.

The quantized model's class is a subclass of its own class, made on the spot, whose forward runs under `SiteMode`; its
submodules, parameters and state-dict keys stay where they were. The site quantizers live in `stream_quantizers`, and
there too the quantizers of convolutions and linears that are called outside a quantized layer (`qat/surgery/operands.py`).
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ
from qat.quantizers.recompute import recomputed
from qat.surgery.operands import QuantOperands
from qat.surgery.plan import JOINS
from qat.surgery.trace import MULTIPLIES, Location, kind_of

NOTHING: AbstractContextManager[None] = nullcontext()
# What may read a quantized tensor outside a quantized layer, and keeps its operands for backward. The pools keep the whole
# input though only its shape or their indices are used: behind a stem that is the largest tensor of the net.
KEEPING = {"mul", "matmul", "layer_norm", "max_pool2d", "avg_pool2d"}


class StreamQuantizers(nn.ModuleDict):
    """Address -> quantizer; dots of the address are written as slashes, which module names allow.

    joins: addresses that were there when the model was quantized, with or without a quantizer.
    relus: see `run_with_sites`. multiplies: addresses of convolutions and linears that stay in floating point.
    """

    def __init__(
        self,
        addresses: dict[str, LSQ],
        operands: dict[str, QuantOperands],
        joins: frozenset[str],
        relus: dict[str, LSQ],
        multiplies: frozenset[str],
    ) -> None:
        super().__init__({_key(address): quantizer for address, quantizer in addresses.items()})
        if operands:
            self.operands = nn.ModuleDict({_key(address): module for address, module in operands.items()})
        self.joins, self.relus, self.multiplies = joins, relus, multiplies
        self.guests = False  # whether another library's layers stand in for ours and multiply as they please
        self.watched = {(address.split("#")[0], _kind(address)) for address in (*addresses, *joins, *relus)}

    def forward(self, x: Any) -> Any:
        """Identity: an `nn.Sequential` that was quantized runs all its members, this one last."""
        return x

    def at(self, address: str, must_be_known: bool) -> LSQ | None:
        quantizer = self._modules.get(_key(address))
        if quantizer is None and must_be_known and address not in self.joins:
            raise _unknown(address, "result")
        return quantizer  # type: ignore[return-value]

    def operands_at(self, address: str) -> QuantOperands | None:
        found = self.operands._modules.get(_key(address)) if "operands" in self._modules else None
        if found is None and address not in self.multiplies and not self.guests:
            raise _unknown(address, "operands")
        return found  # type: ignore[return-value]


def _unknown(address: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{address}: this operation was not there when the model was quantized, so nothing quantizes its {what}; "
        "quantize the model again with an example that takes this path"
    )


def _key(address: str) -> str:
    return address.replace(".", "/")


def _kind(address: str) -> str:
    return address.split("#")[1].rstrip("0123456789")


class SiteMode(TorchFunctionMode):
    """Applies the quantizer registered for a call's address to the call's result."""

    def __init__(
        self, quantizers: StreamQuantizers, location: Location, layers: frozenset[str], training: bool
    ) -> None:
        super().__init__()
        self.quantizers, self.location, self.layers, self.training = quantizers, location, layers, training

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind, path = kind_of(func), self.location.path
        if kind in MULTIPLIES and path not in self.layers:
            return self._multiply(func, kind, args, kwargs or {})
        is_join = kind in JOINS and _joins_tensors(args)
        if (path, kind) not in self.quantizers.watched and not is_join:
            with recomputed(*args[:2]) if kind in KEEPING else NOTHING:
                return func(*args, **(kwargs or {}))
        if path in self.layers and kind not in MULTIPLIES:
            return func(*args, **(kwargs or {}))  # a quantizer's own arithmetic
        address = self.location.address(kind)
        quantizer = self.quantizers.at(address, not self.training and is_join)
        if (
            self.training
            and args
            and (clips := self.quantizers.relus.get(address)) is not None
            and clips.clips_as_relu()
        ):
            return args[0] if quantizer is None else quantizer(args[0])
        with recomputed(*args[:2]) if kind in KEEPING else NOTHING:
            out = func(*args, **(kwargs or {}))
        return out if quantizer is None else quantizer(out)

    def _multiply(self, func: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A convolution or linear that is no quantized layer's own."""
        address = self.location.address(kind)
        operands = self.quantizers.operands_at(address)
        if operands is not None:
            args, kwargs = operands.quantized(args, kwargs)
        with recomputed(*args[:2]) if operands is not None else NOTHING:
            out = func(*args, **kwargs)
        quantizer = self.quantizers.at(address, must_be_known=False)
        return out if quantizer is None else quantizer(out)


def _joins_tensors(args: tuple[Any, ...]) -> bool:
    operands = args[0] if args and isinstance(args[0], (list, tuple)) else args[:2]
    return sum(isinstance(a, Tensor) and a.dim() > 1 and a.is_floating_point() for a in operands) > 1


def run_with_sites(
    model: nn.Module,
    quantizers: dict[str, LSQ],
    operands: dict[str, QuantOperands],
    joins: frozenset[str],
    layers: frozenset[str],
    relus: dict[str, LSQ],
    multiplies: frozenset[str],
) -> None:
    """Make `model`'s forward apply `quantizers` at their addresses; `layers` are the quantized layers' paths.

    operands: address of a convolution or linear outside those layers -> its quantizers. multiplies: addresses of those
    that stay in floating point; any other that comes up later raises.
    relus: addresses of ReLUs in front of a quantizer that clips as they do. In training they are passed over, which saves a
    pass over memory forward and one backward and changes no bit: an unsigned quantizer's own clip at 0 is the ReLU.
    """
    model.stream_quantizers = StreamQuantizers(quantizers, operands, joins, relus, multiplies)
    location = Location()
    base = type(model)

    @functools.wraps(base.forward)  # torch.export reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._location.reset()  # type: ignore[operator,union-attr]
        with SiteMode(self.stream_quantizers, self._location, self._quantized_layers, training=self.training):  # type: ignore[arg-type]
            return base.forward(self, *args, **kwargs)

    model.__class__ = type(f"Quantized{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})
    model._location, model._quantized_layers = location, layers  # type: ignore[assignment]
    location.watch(model, skip=Quantizer)
