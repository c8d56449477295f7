"""The images of an unseen domain that most runs answer wrongly, and those that one lost against another."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeqat.files import FileError
from qat.domains.folders import DataError
from qat.domains.splits import Subset
from qat.runs.parts import RecipeError
from qat.runs.records import classes_of, results_of
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
    target = results_of(first)["test_domain"]
    answers, labels = _answers(folders, target)
    images = _images(first, len(labels))
    classes = classes_of(first)
    is_wrong = answers != labels
    times_wrong = is_wrong.sum(axis=0)
    order = np.argsort(-times_wrong, kind="stable")[:count]
    hard = []
    for index in order.tolist():
        if times_wrong[index] == 0:
            break
        wrong_answers = answers[is_wrong[:, index], index]
        image = _hard_image(images, index, wrong_answers, classes, len(folders))
        hard.append(image)
    return hard


def lost_images(baseline: RunFolder, run: RunFolder, count: int = 8) -> list[HardImage]:
    """The first `count` images of the test domain that `baseline` answers rightly and `run` wrongly.

    Raises RecipeError as `hardest_images` does.
    """
    target = results_of(run)["test_domain"]
    answers, labels = _answers([baseline, run], target)
    images = _images(run, len(labels))
    classes = classes_of(run)
    is_lost = (answers[0] == labels) & (answers[1] != labels)
    lost = []
    for index in np.flatnonzero(is_lost)[:count].tolist():
        lost.append(_hard_image(images, index, answers[1:, index], classes, 1))
    return lost


def _hard_image(
    images: Subset,
    index: int,
    wrong_answers: NDArray[np.int64],
    classes: Sequence[str],
    runs: int,
) -> HardImage:
    """Image number `index`, to which `wrong_answers` are those of the `runs` that are wrong."""
    mistakes = Counter(wrong_answers.tolist())
    mistaken_for, _ = mistakes.most_common(1)[0]
    source = int(images.indices[index])
    return HardImage(
        label=classes[int(images.domain.labels[source])],
        mistaken_for=classes[mistaken_for],
        wrong=len(wrong_answers),
        runs=runs,
        png=_thumbnail(images.domain.images[source]),
    )


def _answers(
    folders: Sequence[RunFolder], target: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(classes that the runs predict (runs, images), labels (images,)) of the test domain."""
    predicted: list[NDArray[np.int64]] = []
    labels = np.empty(0, np.int64)
    for folder in folders:
        pair = folder.predictions().get(target)
        is_first = not predicted
        if pair is None or not (is_first or np.array_equal(pair[1], labels)):
            raise RecipeError(
                f"{folder.path}: its predictions are not of the images that {folders[0].path} has"
            )
        predicted.append(pair[0])
        labels = pair[1]
    return np.stack(predicted), labels


def _images(folder: RunFolder, count: int) -> Subset:
    """The `count` images that a run was tested on, from where it found them."""
    try:
        images = split_of(folder.recipe()).target_in
    except (DataError, FileError, RecipeError) as error:
        raise RecipeError(f"{folder.path}: its images are gone ({error})") from error
    if len(images) != count:
        raise RecipeError(
            f"{folder.path}: its test domain has {len(images)} images now and had {count}"
        )
    return images


def _thumbnail(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
