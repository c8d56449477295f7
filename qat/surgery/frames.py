"""Where in a model execution is: a stack of frames, one for each call of a module, and addresses counted within a frame.

An address is `module path # kind ordinal`, for example `layer1.0#add0`: the first addition that module `layer1.0` performs
itself (`exp2_0`, where the kind ends in a digit). Ordinals count within one call of the parent, so a ReLU module that a block
uses twice makes `clip0` and `clip1`, and
the block has its addresses whoever calls it: the whole model, `forward_features`, a user who runs single children, or
activation checkpointing that runs it again in backward.
"""

import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

IMAGE = re.compile(r"#input\d+")


def path_of(address: str) -> str:
    """The module that makes the operation."""
    return address.rpartition("#")[0]


def kind_in(address: str) -> str:
    """The operation's kind."""
    return address.rpartition("#")[2].rstrip("0123456789").removesuffix("_")


def image_address(position: int) -> str:
    """Of the model's tensor argument at this position."""
    return f"#input{position}"


def is_image(address: str) -> bool:
    """Whether it is the address of one of the model's own inputs."""
    return IMAGE.fullmatch(address) is not None


class Frame:
    """One call of the module at `path`, in training mode or not.

    counts:   operations of each kind so far. children: frames of the modules that it called; a module that it calls again
              goes on in its frame. times: how often it was entered.
    is_known: whether the addresses of this call can be told: not in a method that the model's forward does not use.
    """

    def __init__(
        self,
        path: str,
        training: bool = False,
        counts: dict[str, int] | None = None,
        is_known: bool = True,
    ) -> None:
        self.path, self.training, self.is_known = path, training, is_known
        self.counts: dict[str, int] = {} if counts is None else dict(counts)
        self.children: dict[str, Frame] = {}
        self.times = 1
        self.can_record = torch.is_grad_enabled()

    def address(self, kind: str) -> str:
        """Address of the call being made; counts it."""
        ordinal = self.counts.get(kind, 0)
        self.counts[kind] = ordinal + 1
        # `exp2` and ordinal 0 is not `exp` and ordinal 20
        between = "_" if kind[-1:].isdigit() else ""
        return f"{self.path}#{kind}{between}{ordinal}"

    def child(self, path: str, training: bool) -> "Frame":
        """The frame of a module that this one calls, for the first time or again."""
        frame = self.children.get(path)
        if frame is None:
            frame = Frame(path, training)
            self.children[path] = frame
        else:
            frame.times += 1
            frame.training, frame.can_record = training, torch.is_grad_enabled()
        return frame


class Location:
    """The frames of one model, in each thread that runs it. A copy of the model gets a new location without frames."""

    def __init__(self) -> None:
        self.stacks: dict[int, list[Frame]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Location":
        return Location()

    def __reduce__(self) -> tuple[Callable[[], "Location"], tuple[()]]:
        return Location, ()

    @property
    def stack(self) -> list[Frame]:
        """The frames of this thread, the innermost last."""
        # While it compiles, a model runs in one thread, whose number would become part of the compiled code.
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        return self.stacks.setdefault(thread, [])

    @property
    def path(self) -> str:
        """Path of the module that runs now."""
        return self.stack[-1].path

    def address(self, kind: str) -> str:
        """`path#kind0`: the name of the next operation of `kind` in the module that runs now."""
        return self.stack[-1].address(kind)

    def watch(
        self, model: nn.Module, skip: type[nn.Module] | tuple[()] = ()
    ) -> list[Any]:
        """Hook every module of `model` but the root and those of type `skip`, which count as their parents; returns the
        handles. A module with several names counts by its first."""
        handles = []
        for path, module in model.named_modules():
            if path and not isinstance(module, skip):
                handles.append(module.register_forward_pre_hook(_Enter(self, path)))
                handles.append(
                    module.register_forward_hook(_Leave(self), always_call=True)
                )
        return handles

    def begin(self) -> None:
        """Start of a forward pass of the root."""
        self.stack[:] = [Frame("")]

    def end(self) -> None:
        """Forget all modules: a forward pass has ended, or was left by an exception."""
        self.stack.clear()


# Hooks are objects and not closures so that a copied or pickled model takes its own Location along. Outside a pass of the
# model there is no frame: a child that runs alone and has no quantizers needs none.
class _Enter:
    def __init__(self, location: Location, path: str) -> None:
        self.location, self.path = location, path

    def __call__(self, module: nn.Module, args: Any) -> None:
        stack = self.location.stack
        if stack:
            stack.append(stack[-1].child(self.path, module.training))


class _Leave:
    def __init__(self, location: Location) -> None:
        self.location = location

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self.location.stack
        if stack:
            stack.pop()
