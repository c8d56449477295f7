"""Quantizers on the results of functional operations, applied while the model's own forward runs.

The quantized model's class is a subclass of its own class, made on the spot, whose forward runs under `SiteMode`; its
submodules, parameters and state-dict keys stay where they were. The site quantizers live in `stream_quantizers`.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from qat.quantizers.contract import Quantizer
from qat.quantizers.lsq import LSQ
from qat.quantizers.recompute import recomputed
from qat.surgery.plan import JOINS, MULTIPLIES
from qat.surgery.trace import Location, kind_of

NOTHING: AbstractContextManager[None] = nullcontext()
KEEPING = {"mul", "matmul"}  # joins that keep their operands for backward
NORMS = {"layer_norm"}  # read the quantized residual stream, and keep it


class StreamQuantizers(nn.ModuleDict):
    """Address -> quantizer; dots of the address are written as slashes, which module names allow."""

    def __init__(self, addresses: dict[str, LSQ], joins: frozenset[str], relus: dict[str, LSQ]) -> None:
        super().__init__({_key(address): quantizer for address, quantizer in addresses.items()})
        self.joins, self.relus = joins, relus
        self.watched = {(address.split("#")[0], _kind(address)) for address in (*addresses, *joins, *relus)}

    def at(self, address: str, must_be_known: bool) -> LSQ | None:
        quantizer = self._modules.get(_key(address))
        if quantizer is None and must_be_known and address not in self.joins:
            raise RuntimeError(
                f"{address}: this operation was not there when the model was quantized, so nothing quantizes its result; "
                "quantize the model again with an example that takes this path"
            )
        return quantizer  # type: ignore[return-value]


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
        is_join = kind in JOINS and _joins_tensors(args)
        if (path, kind) not in self.quantizers.watched and not is_join:
            with recomputed(args[0]) if kind in NORMS else NOTHING:
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
        with recomputed(*args[:2]) if is_join and kind in KEEPING else NOTHING:
            out = func(*args, **(kwargs or {}))
        return out if quantizer is None else quantizer(out)


def _joins_tensors(args: tuple[Any, ...]) -> bool:
    operands = args[0] if args and isinstance(args[0], (list, tuple)) else args[:2]
    return sum(hasattr(a, "dim") and a.dim() > 1 for a in operands) > 1


def run_with_sites(
    model: nn.Module, quantizers: dict[str, LSQ], joins: frozenset[str], layers: frozenset[str], relus: dict[str, LSQ]
) -> None:
    """Make `model`'s forward apply `quantizers` at their addresses; `layers` are the quantized layers' paths.

    relus: addresses of ReLUs in front of a quantizer that clips as they do. In training they are passed over, which saves a
    pass over memory forward and one backward and changes no bit: an unsigned quantizer's own clip at 0 is the ReLU.
    """
    model.stream_quantizers = StreamQuantizers(quantizers, joins, relus)
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
