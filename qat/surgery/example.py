"""The example that a model is traced with: a tensor, a tuple of the model's arguments, or a dict of them by name."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(model: nn.Module, example: Example) -> Arguments:
    """Positional and named arguments for one call of `model`.

    A dict whose keys are all parameters of `model.forward` is passed by name, in forward's order whatever the dict's: the
    exporter numbers a file's inputs in it. Any other dict is the model's one argument.
    Raises TypeError for what holds no tensor.
    """
    if isinstance(example, Tensor):
        args: tuple[Any, ...] = (example,)
        kwargs: dict[str, Any] = {}
    elif isinstance(example, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if set(example) <= set(parameters):
            args, kwargs = (
                (),
                {name: example[name] for name in parameters if name in example},
            )
        else:
            args, kwargs = (example,), {}
    elif isinstance(example, (tuple, list)):
        args, kwargs = tuple(example), {}
    else:
        raise TypeError(
            f"example: is a {type(example).__name__}; pass a tensor, a tuple of them or a dict of them"
        )
    if not any(True for _ in tensors_in((args, kwargs))):
        raise TypeError("example: holds no tensor; pass what the model's forward takes")
    return args, kwargs


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of nested dicts, lists and tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)


def with_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with every tensor changed, its dicts, lists and tuples as they were."""
    return with_leaves(
        tree, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf
    )


def with_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """`tree` with everything changed but its dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: with_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(with_leaves(value, change) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_leaves(value, change) for value in tree)
    return change(tree)


def samples_of(example: Example) -> int:
    """Number of images: the length of the first tensor."""
    first = next(tensors_in(example))
    return len(first) if first.dim() else 1


def twice(arguments: Arguments) -> Arguments:
    """Every sample two times: batch norm in training mode takes no statistics from one value."""
    args, kwargs = with_tensors(
        list(arguments), lambda t: torch.cat([t, t]) if t.dim() else t
    )
    return args, kwargs
