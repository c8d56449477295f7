"""The part of a loader's batch that a quantized model's forward takes, judged by the example of `quantize_`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat.surgery.example import Arguments, Example, arguments_of, tensors_in
from qat.surgery.points import example_of

FORMS = "give a tensor, (images, labels) or a dict of tensors"


def inputs_of(
    model: nn.Module, batch: Any, where: str, example: Example | None = None
) -> Arguments:
    """Arguments of one call of `model`, taken out of a batch: images, (images, labels), or a dict of what forward takes and
    more.

    where: how messages begin. example: what the batch is compared with; None: what `quantize_` was given. Sizes may differ
    from it.
    Raises ValueError naming what the batch is and what forward takes.
    """
    args, kwargs = arguments_of(model, example_of(model, example))
    taken = _taken(args, kwargs, batch, where)
    parameter = next(model.parameters())
    pairs = zip(tensors_in(list(taken)), tensors_in([args, kwargs]), strict=False)
    for given, wanted in pairs:
        possible = {wanted.dtype}
        if wanted.is_floating_point():
            possible.add(parameter.dtype)
        if given.dtype not in possible or given.dim() != wanted.dim():
            raise ValueError(
                f"{where}: holds {_described(given)} where forward takes {_described(wanted)}, as the example of quantize_ "
                f"says; {FORMS}"
            )
    return taken


def _taken(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, where: str
) -> Arguments:
    """What forward takes of a batch of unknown form: a dict, a tensor, or several parts of which labels may be one."""
    if isinstance(batch, Mapping):
        return _from_dict(args, kwargs, batch, where)
    if isinstance(batch, Tensor):
        return _in_place_of(args, kwargs, [batch], where)
    if not isinstance(batch, (tuple, list)) or not batch:
        raise ValueError(f"{where}: is a {type(batch).__name__}; {FORMS}")
    first = batch[0]
    takes_one_argument = not kwargs and len(args) == 1
    takes_one_list = takes_one_argument and isinstance(args[0], (tuple, list))
    if takes_one_list and isinstance(first, Tensor):
        return _as_one_list(args, batch, where)
    if not kwargs and not takes_one_argument:
        return _in_place_of(args, kwargs, batch, where)
    count = len(list(tensors_in([args, kwargs])))
    if isinstance(first, Tensor) and count > 1:
        return _in_place_of(args, kwargs, batch, where)
    if not isinstance(first, (Tensor, Mapping, tuple, list)):
        raise ValueError(f"{where}: begins with a {type(first).__name__}; {FORMS}")
    return _taken(args, kwargs, first, where)


def _as_one_list(args: tuple[Any, ...], batch: Any, where: str) -> Arguments:
    """The first parts of a batch as the one list, or tuple, of tensors that forward takes."""
    (example,) = args
    if len(batch) < len(example):
        raise ValueError(
            f"{where}: has {len(batch)} parts, forward takes {_listed(args, {})}; {FORMS}"
        )
    return (type(example)(batch[: len(example)]),), {}


def _in_place_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, where: str
) -> Arguments:
    """The example's arguments with the batch's parts where the example has its tensors, in forward's order."""
    values = [*args, *kwargs.values()]
    wanted = sum(isinstance(value, Tensor) for value in values)
    if len(batch) < wanted or not wanted:
        raise ValueError(
            f"{where}: has {len(batch)} parts, forward takes {_listed(args, kwargs)}; {FORMS}"
        )
    parts = iter(batch)
    taken = [next(parts) if isinstance(value, Tensor) else value for value in values]
    positional = tuple(taken[: len(args)])
    by_name = dict(zip(kwargs, taken[len(args) :], strict=True))
    return positional, by_name


def _from_dict(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: Mapping[str, Any], where: str
) -> Arguments:
    is_one_dict = not kwargs and len(args) == 1 and isinstance(args[0], Mapping)
    wanted: Mapping[str, Any] = args[0] if is_one_dict else kwargs
    if not wanted:
        return (_only_image(args, batch, where),), {}
    for key, value in wanted.items():
        if isinstance(value, Tensor) and key not in batch:
            raise ValueError(
                f"{where}: has no {key!r}, which the example of quantize_ had"
            )
    taken = {key: batch.get(key, value) for key, value in wanted.items()}
    if is_one_dict:
        return (taken,), {}
    return (), taken


def _only_image(args: tuple[Any, ...], batch: Mapping[str, Any], where: str) -> Tensor:
    """The one tensor of a dict that has as many axes as the one that forward takes by position."""
    first = next(tensors_in(list(args)))
    images = []
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() == first.dim():
            images.append(value)
    if len(images) != 1 or len(args) != 1:
        raise ValueError(
            f"{where}: is a dict of {', '.join(map(str, batch))}, and forward takes {_listed(args, {})}; give the "
            "tensors, or quantize_ the model with a dict as example"
        )
    return images[0]


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join(_described(tensor) for tensor in tensors_in([args, kwargs]))


def _described(tensor: Tensor) -> str:
    return f"a {str(tensor.dtype).removeprefix('torch.')} tensor of {tensor.dim()} axes"
