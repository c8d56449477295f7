"""Predict from a file alone: what a device runs. Needs onnxruntime, onnx, numpy and pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeqat.images import ImageError, open_image
from export import session
from export.lowered import ExportError
from export.metadata import image_input, read_metadata
from export.onnx_file import read


@dataclass(frozen=True)
class Prediction:
    """Best class of one image file and its softmax probability."""

    image: Path
    label: str
    probability: float


def predict(model: Path, images: Sequence[Path]) -> list[Prediction]:
    """Classify image files. Raises ExportError naming the model or the image that cannot be read."""
    proto = read(model)
    expected = image_input(read_metadata(proto, str(model)), str(model))
    loaded = session.load(proto, name=str(model))
    return [_predict(loaded, expected, path) for path in images]


def _predict(
    loaded: session.Session, expected: dict[str, Any], path: Path
) -> Prediction:
    logits = logits_of(loaded, preprocess(path, expected), len(expected["classes"]))[0]
    if not np.isfinite(logits).all():
        raise ExportError(
            f"{loaded.name}: answers {path} with numbers that are not finite"
        )
    shifted = np.exp(logits - logits.max())
    best = int(shifted.argmax())
    return Prediction(
        path, expected["classes"][best], float(shifted[best] / shifted.sum())
    )


def logits_of(
    loaded: session.Session, images: NDArray[np.float32], classes: int
) -> NDArray[np.float64]:
    """The answers N_K of a file to N images, K the number of its `classes`.

    Raises ExportError where it answers with something else.
    """
    answers = np.asarray(next(iter(loaded.run(images).values())))
    if answers.shape != (len(images), classes) or answers.dtype.kind != "f":
        raise ExportError(
            f"{loaded.name}: answers {len(images)} image(s) with {answers.dtype} {list(answers.shape)}, and its metadata "
            f"names {classes} classes"
        )
    return answers.astype(np.float64)


def preprocess(path: Path, expected: dict[str, Any]) -> NDArray[np.float32]:
    """One image file as 1_3_H_W float32, as the metadata's `input` says."""
    try:
        image = open_image(path)
    except ImageError as error:
        raise ExportError(str(error)) from error
    resized = image.resize((expected["size"],) * 2, Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / 255
    normalized = (pixels - np.float32(expected["mean"])) / np.float32(expected["std"])
    return np.ascontiguousarray(normalized.transpose(2, 0, 1)[None], np.float32)
