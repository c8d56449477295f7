"""What a test knows of a value and its type does not say."""

from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def present(value: T | None) -> T:
    assert value is not None
    return value


def gradient(leaf: Tensor) -> Tensor:
    return present(leaf.grad)


def tensor(attribute: Tensor | nn.Module) -> Tensor:
    """An attribute of a module whose class is not known."""
    assert isinstance(attribute, Tensor)
    return attribute
