"""The run folder: what is written where, atomically.

recipe.json      the resolved recipe                 results.json     final accuracies
checkpoint.pt    the selected model                  last.pt          everything to resume from
metrics.jsonl    one JSON object per log entry       samples.npz      real images for certificates and latency
model.onnx, certificate.json, report.html            written by `qat export`, `qat certify`, `qat report`
"""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeqat.files import (
    Kind,
    read_json,
    read_text,
    reason_of,
    require_entries,
    require_readable,
    write_atomically,
    write_json,
    write_text,
)
from qat.runs import earlier
from qat.runs.log import read_log
from qat.runs.parts import RecipeError
from qat.runs.ranges import flag
from qat.runs.recipe import Recipe, from_json, to_json

ARRAYS_OF_A_DOMAIN = ("predicted", "label")
SAVED = ("last.pt", "checkpoint.pt", "results.json")  # what makes a folder a run's
# Entries that a checkpoint, and last.pt, must have.
CHECKPOINT: dict[str, Kind] = {"model": dict, "classes": list}
RESUMABLE: dict[str, Kind] = {
    "optimizer": dict, "schedule": dict, "progress": dict, "step": dict, "average": dict, "valley": dict, "scale_sizes": dict,
    "rng": Tensor,
}  # fmt: skip
# Of a run that is resumed, these may grow: it goes on for longer, on the schedule of the new length.
MAY_GROW = ("steps", "epochs", "stage2_steps", "stage2_epochs")
# Entries of a recipe that may differ from the ones a net was begun with: where files lie, how a run is measured, shown and
# loaded, and its length.
MAY_CHANGE = {
    *MAY_GROW,
    "evaluate_every",
    "data_root",
    "official_lists",
    "out",
    "resume",
    "workers",
    "tensorboard",
    "weights",
    "init_from",
    "teacher",
    "refine_from",
    "rules",
}


@dataclass(frozen=True)
class Samples:
    """Images as the model sees them (N_3_H_W float32, normalised), labels int64, and the domain of each."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    domains: NDArray[np.str_]


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """writes: False for the processes of a run that leave writing to another; then nothing is saved."""
        self.path = path
        self.writes = writes
        self.is_new = False  # whether `create` made it

    @classmethod
    def create(cls, recipe: Recipe) -> "RunFolder":
        """A new folder for `recipe`: its `out`, or a free default. Raises RecipeError when `out` holds a run or is a file."""
        check_out(recipe)
        path = recipe.tracking.out or default_folder(recipe)
        is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"--out {path}: cannot be made ({reason_of(error)})"
            ) from error
        folder = cls(path)
        folder.is_new = is_new
        if recipe.grids is not None and recipe.grids.rules is not None:
            # The folder is complete without the file it was made from
            copy = path / f"rules{recipe.grids.rules.suffix}"
            if not recipe.tracking.resume:
                write_text(copy, read_text(recipe.grids.rules))
        write_json(path / "recipe.json", to_json(recipe))
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run folder. Raises RecipeError where there is none."""
        if path.is_file():
            raise RecipeError(f"{path}: is a file; name the run folder")
        if not path.is_dir():
            raise RecipeError(f"{path}: no such run folder")
        return cls(path)

    def discard(self) -> None:
        """Remove the folder of a run that could not begin, if `create` made it."""
        if self.is_new and not self.has_run:
            shutil.rmtree(self.path)

    @property
    def has_run(self) -> bool:
        """Whether a run got so far that something of it was saved."""
        return any((self / name).exists() for name in SAVED)

    def require(self, name: str) -> Path:
        """The path of one of its files. Raises RecipeError where there is none."""
        if not (self / name).exists():
            raise RecipeError(
                f"{self / name}: no such file; is {self.path} the folder of a finished run?"
            )
        return self / name

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def recipe(self) -> Recipe:
        """The recipe that the run recorded, its rules read from the folder's own copy."""
        recipe = from_json(read_json(self.require("recipe.json")), self / "recipe.json")
        if recipe.grids is not None and recipe.grids.rules is not None:
            return recipe.changed(rules=self / f"rules{recipe.grids.rules.suffix}")
        return recipe

    def results(self) -> dict[str, Any]:
        """What the finished run measured; `qat/runs/records.py` checks its entries. Raises FileError."""
        path = self.require("results.json")
        results = require_entries(read_json(path), {}, str(path))
        is_measured = (self / "predictions.npz").exists()
        if results.get("test_domain") != "test" or not is_measured:
            return results
        return earlier.results_entries(results, self.predictions().keys())

    def metrics(self) -> list[dict[str, Any]]:
        """The log entries, oldest first. The last line of a run that was killed may be half-written: it is left out."""
        path = self / "metrics.jsonl"
        return read_log(path) if path.exists() else []

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint `name` atomically."""
        if not self.writes:
            return
        write_atomically(self / name, lambda p: torch.save(state, p))

    def load(self, name: str) -> dict[str, Any]:
        """A checkpoint. Raises RecipeError when it is missing, damaged (by a single bit), or lacks what a run needs."""
        path = self.require(name)
        require_readable(path)
        try:
            with zipfile.ZipFile(path) as archive:
                # Torch does not compare the checksums that it writes
                damaged = archive.testzip()
            state = None
            if damaged is None:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RecipeError(
                f"{path}: is not a readable checkpoint ({reason_of(error)})"
            ) from error
        if damaged is not None:
            raise RecipeError(
                f"{path}: is damaged, the checksum of {damaged} is wrong; take another copy of it"
            )
        entries = CHECKPOINT | RESUMABLE if name == "last.pt" else CHECKPOINT
        if isinstance(state, dict):
            state = earlier.checkpoint_entries(state)
        return require_entries(state, entries, str(path))

    def write_predictions(
        self, predictions: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        """Per domain: predicted classes and labels of the images its accuracy was measured on, in a fixed order."""
        if not self.writes:
            return
        arrays = {}
        for domain, both in predictions.items():
            for kind, values in zip(ARRAYS_OF_A_DOMAIN, both, strict=True):
                arrays[f"{domain}/{kind}"] = values

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        write_atomically(self / "predictions.npz", write)

    def predictions(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Per domain: predicted classes and labels, both int64 of shape (images,). Raises RecipeError."""
        arrays = self._arrays("predictions.npz")
        nothing = np.empty(0)
        by_domain = {}
        for domain in dict.fromkeys(name.rsplit("/", 1)[0] for name in arrays):
            predicted, labels = (
                arrays.get(f"{domain}/{kind}", nothing) for kind in ARRAYS_OF_A_DOMAIN
            )
            are_classes = _holds_classes(predicted) and _holds_classes(labels)
            if not are_classes or predicted.shape != labels.shape:
                raise RecipeError(
                    f"{self / 'predictions.npz'}: domain {domain!r} has no predicted classes and labels, as many of each"
                )
            by_domain[domain] = (predicted, labels)
        return by_domain

    def _arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What an .npz file of the folder holds. Raises RecipeError for a missing or damaged one."""
        path = self.require(name)
        require_readable(path)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except Exception as error:
            raise RecipeError(f"{path}: cannot be read ({reason_of(error)})") from error

    def write_samples(self, samples: Samples) -> None:
        """Write samples.npz: images, labels and domains of a few test images."""

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(
                    file,
                    images=samples.images,
                    labels=samples.labels,
                    domains=samples.domains,
                )

        write_atomically(self / "samples.npz", write)

    def samples(self) -> Samples:
        """The real images that the run keeps. Raises RecipeError when they are missing, damaged or not images."""
        path = self / "samples.npz"
        arrays = self._arrays("samples.npz")
        for name in ("images", "labels", "domains"):
            if name not in arrays:
                raise RecipeError(f"{path}: has no array {name!r}")
        images = arrays["images"]
        labels = arrays["labels"]
        domains = arrays["domains"]
        is_batch = images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
        is_batch = is_batch and images.dtype == np.float32
        if not is_batch or not np.isfinite(images).all():
            raise RecipeError(
                f"{path}: its images are not finite float32 numbers of shape (images, 3, height, width)"
            )
        size = self.recipe().model.image_size
        if images.shape[2:] != (size, size):
            raise RecipeError(
                f"{path}: its images have {images.shape[2:]} pixels, the run was trained with {size} × {size}"
            )
        count = len(images)
        has_labels = labels.shape == (count,) and labels.dtype == np.int64
        if not has_labels or len(domains) != count:
            raise RecipeError(
                f"{path}: holds {count} images, but not as many labels and domains"
            )
        return Samples(images, labels, domains)


def _holds_classes(array: NDArray[Any]) -> bool:
    """Whether it is a vector of int64, not empty."""
    return array.dtype == np.int64 and array.ndim == 1 and len(array) > 0


def check_out(recipe: Recipe) -> None:
    """Raises RecipeError when --out and --resume do not fit what is there. A run that stopped before anything was saved does
    not block its folder."""
    out = recipe.tracking.out
    resume = recipe.tracking.resume
    if out is None:
        if resume:
            raise RecipeError("--resume needs --out, the folder of the interrupted run")
        return
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is a file; name a folder")
    folder = RunFolder(out)
    if resume:
        _require_same_run(folder, recipe)
    elif folder.has_run:
        raise RecipeError(
            f"--out {out}: holds a run already; choose another folder, or --resume it"
        )


def _require_same_run(folder: RunFolder, recipe: Recipe) -> None:
    """Raises RecipeError where the folder does not hold an interrupted run of `recipe`."""
    if not (folder / "last.pt").exists():
        raise RecipeError(
            f"--resume: {folder.path} holds no interrupted run (no last.pt); leave --resume out to begin it"
        )
    begun = folder.recipe()
    _require_no_shorter(begun, recipe)
    different = different_entries(to_json(begun), to_json(recipe))
    if different:
        raise RecipeError(
            f"--resume: {folder.path} was begun with {different}; repeat the command that began it"
        )


def _require_no_shorter(begun: Recipe, recipe: Recipe) -> None:
    """Raises RecipeError where a run would be resumed for fewer steps than it was begun with."""
    before = begun.entries()
    now = recipe.entries()
    for name in MAY_GROW:
        old = before.get(name)
        new = now.get(name)
        counts_otherwise = (old is None) != (new is None)
        if counts_otherwise or (old is not None and new < old):
            raise RecipeError(
                f"--resume: {recipe.tracking.out} was begun with {flag(name)} {old}, which may grow but not become {new}"
            )


def different_entries(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The entries of two recipes that decide a net and differ, as text; empty where none does.

    Where files lie, and how a run is shown and loaded, may change.
    """
    different = []
    for name, now in second.items():
        before = first.get(name)
        if name not in MAY_CHANGE and before != now:
            different.append(f"{flag(name)} {before} (now {now})")
    return ", ".join(different)


def default_folder(recipe: Recipe) -> Path:
    """runs/<method>-…, numbered when it exists."""
    return _free(Path("runs") / _default_name(recipe))


def _default_name(recipe: Recipe) -> str:
    named = [recipe.method, recipe.precision.lower(), recipe.images.test_domain]
    named += [recipe.model.backbone, f"s{recipe.optimization.seed}"]
    return "-".join(name for name in named if name)


def _free(path: Path) -> Path:
    free = path
    number = 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
