"""The images of an unseen domain that most runs answer wrongly."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from edgeqat.files import FileError
from qat.domains.folders import DataError
from qat.runs.parts import RecipeError
from qat.runs.records import classes_of
from qat.runs.run_folder import RunFolder
from qat.train.data import split_of

THUMBNAIL = 72  # pixels, its longer side


@dataclass(frozen=True)
class HardImage:
    """One image that runs answer wrongly. wrong: how many of `runs`; mistaken_for: the class that most of them say; png: a
    thumbnail, base64."""

    label: str
    mistaken_for: str
    wrong: int
    runs: int
    png: str


def hardest_images(folders: Sequence[RunFolder], count: int = 8) -> list[HardImage]:
    """The `count` images of the test domain that most of the runs in `folders` answer wrongly, the worst first; of equals the
    earlier ones. The runs have one test domain and one split.

    Raises RecipeError where their predictions are not of the same images, or the images are no longer where the first run
    found them.
    """
    first = folders[0]
    target = first.recipe().images.test_domain
    found = [folder.predictions().get(target) for folder in folders]
    predicted, labels = [], None
    for folder, pair in zip(folders, found, strict=True):
        if pair is None or (labels is not None and not np.array_equal(pair[1], labels)):
            raise RecipeError(
                f"{folder.path}: its predictions are not of the images that {first.path} has"
            )
        labels = pair[1]
        predicted.append(pair[0])
    assert labels is not None
    answers = np.stack(predicted)
    wrong = (answers != labels).sum(axis=0)
    order = np.argsort(-wrong, kind="stable")[:count]
    try:
        subset = split_of(first.recipe()).target_in
    except (DataError, FileError, RecipeError) as error:
        raise RecipeError(f"{first.path}: its images are gone ({error})") from error
    if len(subset) != len(labels):
        raise RecipeError(
            f"{first.path}: {target} has {len(subset)} images now and had {len(labels)}"
        )
    classes = classes_of(first)
    hard = []
    for index in order.tolist():
        if not wrong[index]:
            break
        mistakes = Counter(a for a in answers[:, index].tolist() if a != labels[index])
        mistaken_for, _ = mistakes.most_common(1)[0]
        image = subset.domain.images[int(subset.indices[index])]
        hard.append(
            HardImage(
                classes[int(labels[index])],
                classes[mistaken_for],
                int(wrong[index]),
                len(folders),
                _thumbnail(image),
            )
        )
    return hard


def _thumbnail(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
