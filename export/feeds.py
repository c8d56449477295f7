"""Inputs of a net that has several: named arrays with one first axis, of samples."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Feeds(Mapping[str, NDArray[Any]]):
    """Arrays by input name, N_... each. Its length is N, and a slice of it is a slice of every array.

    Raises ValueError for arrays of different lengths.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = dict(arrays)
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"inputs have different numbers of samples: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Feeds({name: array[key] for name, array in self.arrays.items()})
        return self.arrays[key]


def named(images: NDArray[Any] | Feeds, names: list[str]) -> dict[str, NDArray[Any]]:
    """What a graph with inputs `names` is fed: one array goes to the first. Raises ValueError for a name that is missing."""
    if not isinstance(images, Feeds):
        return {names[0]: np.asarray(images)}
    missing = [name for name in names if name not in images.arrays]
    if missing:
        raise ValueError(
            f"no input {missing[0]!r} was given; there are {', '.join(images.arrays)}"
        )
    return {name: images.arrays[name] for name in names}


# Images of a net with one input, or all inputs of one with several
Given = NDArray[np.float32] | Feeds
