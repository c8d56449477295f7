"""scales.f16: what every quantizer scale showed in every step, eight bytes a scale and step.

Rows of float16 (scales, 4) in the order of `Seen`: disorder of the task branch over its window so far, share of channels
whose two gradients disagree in sign, cosine between them, share of channels frozen. scales.json names the scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeqat.files import read_json, require_readable, write_json
from qat.objectives.scale_freeze import Seen
from qat.runs.parts import RecipeError
from qat.runs.records import TEXT, WHOLE, require

COLUMNS = ("disorder", "conflict", "cosine", "frozen")
QUANTIZER_KINDS = ("weight", "input", "stream")


class ScaleLog:
    """Appends a row a step. resume_at: steps already there that count; later ones are dropped."""

    def __init__(
        self, folder: Path, names: Sequence[str], window: int, resume_at: int = 0
    ) -> None:
        self.path, self.row = folder / "scales.f16", len(names) * len(COLUMNS) * 2
        write_json(
            folder / "scales.json",
            {"names": list(names), "window": window, "columns": COLUMNS},
        )
        self.path.touch()
        with self.path.open("r+b") as file:
            file.truncate(resume_at * self.row)
        self.file = self.path.open("ab")

    def write(self, seen: Seen) -> None:
        """Append one step: a row of float16 per scale."""
        values = torch.stack([getattr(seen, name) for name in COLUMNS], dim=1)
        self.file.write(values.to(torch.float16).cpu().numpy().tobytes())

    def flush(self) -> None:
        """Hand what was written to the file system."""
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@dataclass(frozen=True)
class ScaleHistory:
    """A run's scale log. values: float16 (steps, scales, 4), read from disk as needed."""

    names: tuple[str, ...]
    window: int
    values: NDArray[np.float16]

    def column(self, name: str) -> NDArray[np.float32]:
        """(steps, scales) float32."""
        return self.values[:, :, COLUMNS.index(name)].astype(np.float32)


def read_scales(folder: Path) -> ScaleHistory | None:
    """The scale log of a run folder; None where the run kept none. Raises ValueError naming the file that is damaged."""
    header = folder / "scales.json"
    if not header.exists():
        return None
    found = read_json(header)
    require(found, {"names": [TEXT], "window": WHOLE}, header)
    if not found["names"] or found["window"] < 2:
        raise RecipeError(
            f"{header}: names {len(found['names'])} scales over windows of {found['window']} steps; 2 are needed"
        )
    values = folder / "scales.f16"
    require_readable(values)
    flat = np.fromfile(values, np.float16)
    width = len(found["names"]) * len(COLUMNS)
    steps = len(flat) // width
    return ScaleHistory(
        tuple(found["names"]),
        found["window"],
        flat[: steps * width].reshape(steps, len(found["names"]), len(COLUMNS)),
    )


def kind_of(name: str) -> str:
    """One of QUANTIZER_KINDS, from a quantizer's name; "stream" is where operations join."""
    return "stream" if "#" in name else name.rsplit(".", 1)[-1]


def layer_of(name: str) -> str:
    """A quantizer's name without its kind; the whole address of a stream quantizer."""
    return name if "#" in name else name.rpartition(".")[0]
