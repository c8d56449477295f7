"""Ensembles of quantized runs (EoQ, arXiv 2410.06020): their averaged predictions, measured image by image.

The members answer every image of their split's held-out source parts and target domain; the ensemble answers with the mean
of their softmax probabilities, or of their logits. As all see the same images, ensemble and members are compared in pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeqat.terminal import printable
from qat.analysis.compare import mcnemar
from qat.domains.splits import Split
from qat.runs.build import Built, load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe
from qat.runs.records import classes_of
from qat.train.data import split_of
from qat.train.loaders import eval_batches

Average = Literal["probabilities", "logits"]
SAME = ("test_domain", "image_size", "trial_seed", "holdout")
SOURCES = "source domains"
RESAMPLES = 4000


@dataclass(frozen=True)
class Answers:
    """Of one domain: logits M_N_K float32 of the members, labels N int64."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class EnsembleRow:
    """Accuracies in percent on one group of images. `gain`: ensemble over the members' mean accuracy, with a 95 % interval
    by bootstrap over images; `mcnemar`: per member, p-value that it and the ensemble are equally often right."""

    name: str
    images: int
    members: tuple[float, ...]
    ensemble: float
    gain: float
    interval: tuple[float, float]
    mcnemar: tuple[float, ...]

    def __str__(self) -> str:
        """The columns after the name."""
        members = ""
        for accuracy in self.members:
            members += f"{accuracy:>8.2f}"
        mean = self.ensemble - self.gain
        low, high = self.interval
        return (
            f"{self.images:>6}{members}{mean:>8.2f}{self.ensemble:>10.2f}"
            f"  {self.gain:+.2f} ({low:+.2f} to {high:+.2f})"
        )


@dataclass(frozen=True)
class EnsembleTable:
    """Rows per domain, of the source domains together, and of the target."""

    members: tuple[str, ...]
    average: Average
    rows: tuple[EnsembleRow, ...]

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        names = [printable(row.name) for row in self.rows]
        width = max(map(len, names))
        heads = ""
        for index in range(len(self.members)):
            head = f"m{index}"
            heads += f"{head:>8}"
        lines = [
            f"{'accuracy, %':<{width}}  images{heads}    mean  ensemble  over the mean (95 %)"
        ]
        for name, row in zip(names, self.rows, strict=True):
            lines.append(f"{name:<{width}}  {row}")
        target = self.rows[-1]
        for index, name in enumerate(self.members):
            gain = target.ensemble - target.members[index]
            lines.append(
                f"m{index}: {printable(name)}; on {names[-1]} the ensemble is {gain:+.2f}, "
                f"McNemar p {target.mcnemar[index]:.3g}"
            )
        averaged = "softmax probabilities"
        if self.average == "logits":
            averaged = "logits"
        lines.append(f"ensemble: mean of the members' {averaged}")
        return "\n".join(lines)


def evaluate_ensemble(
    runs: Sequence[Path],
    average: Average = "probabilities",
    data_root: Path | None = None,
) -> EnsembleTable:
    """Measure the ensemble of finished `runs` and its members.

    data_root: where the images are now, if no longer where the runs found them.
    Raises RecipeError for fewer than two runs, or naming two that do not see the same images and classes.
    """
    recipes, built, split = load_members(runs, data_root)
    answers = {}
    for subset in (*split.validation, split.target_in):
        batches = eval_batches(subset, recipes[0], built[0])
        answers[subset.name] = _answers(built, batches)
    names = [str(run) for run in runs]
    return compare_ensemble(names, answers, split.target_in.name, average)


def load_members(
    runs: Sequence[Path], data_root: Path | None = None
) -> tuple[list[Recipe], list[Built], Split]:
    """Recipes and models of `runs`, and the split that they share.

    Raises RecipeError for fewer than two runs, or naming two that do not see the same images and classes.
    """
    if len(runs) < 2:
        raise RecipeError("qat ensemble: name at least two run folders")
    recipes: list[Recipe] = []
    built: list[Built] = []
    classes: list[tuple[str, ...]] = []
    for run in runs:
        folder, recipe, model = load_run(run)
        recipes.append(recipe)
        built.append(model)
        classes.append(classes_of(folder))
        pair = f"{runs[0]} and {run}"
        _require_same_entries(recipes[0].entries(), recipe.entries(), pair)
        if (model.mean, model.std) != (built[0].mean, built[0].std):
            raise RecipeError(f"{pair} normalise images by other means and deviations")
        if classes[-1] != classes[0]:
            raise RecipeError(f"{pair} were trained on other classes")
    return recipes, built, split_of(recipes[0], data_root)


def _require_same_entries(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], pair: str
) -> None:
    """Raises RecipeError naming the flag in which two members differ, of those that decide what they see."""
    for name in SAME:
        if theirs[name] != ours[name]:
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{pair} differ in {flag}; the members of an ensemble must agree on it"
            )


@torch.no_grad()
def _answers(
    built: Sequence[Built], batches: Iterable[tuple[Tensor, Tensor]]
) -> Answers:
    """What every member says of every image of `batches`."""
    logits = []  # M_n_K, of each batch
    labels = []
    for images, labels_of_batch in batches:
        of_members = [member.model(images) for member in built]
        logits.append(torch.stack(of_members))
        labels.append(labels_of_batch)
    return Answers(torch.cat(logits, 1).numpy(), torch.cat(labels).numpy())


def compare_ensemble(
    members: Sequence[str],
    answers: Mapping[str, Answers],
    target: str,
    average: Average,
) -> EnsembleTable:
    """The table from the members' `answers` by domain; `target` names the held-out one."""
    rows = []
    members_right = []
    ensemble_right = []
    for domain, of_domain in answers.items():
        if domain == target:
            continue
        by_member, together = correct(of_domain, average)
        rows.append(_row(domain, by_member, together))
        members_right.append(by_member)
        ensemble_right.append(together)
    if rows:
        by_member = np.concatenate(members_right, 1)
        together = np.concatenate(ensemble_right)
        rows.append(_row(SOURCES, by_member, together))
    by_member, together = correct(answers[target], average)
    rows.append(_row(f"{target} (target)", by_member, together))
    return EnsembleTable(tuple(members), average, tuple(rows))


def correct(
    answers: Answers, average: Average
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images each member (M_N) and the ensemble (N) get right."""
    logits = answers.logits.astype(np.float64)
    scores = logits
    if average == "probabilities":
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        scores = exponentials / exponentials.sum(-1, keepdims=True)
    members_right = logits.argmax(-1) == answers.labels
    ensemble_right = scores.mean(0).argmax(-1) == answers.labels
    return members_right, ensemble_right


def _row(
    name: str, members: NDArray[np.bool_], ensemble: NDArray[np.bool_]
) -> EnsembleRow:
    gains = 100 * (ensemble - members.mean(0))
    images = len(gains)
    draws = np.random.default_rng(0).integers(images, size=(RESAMPLES, images))
    resampled_means = gains[draws].mean(1)
    low, high = np.quantile(resampled_means, (0.025, 0.975))
    accuracies = []
    tests = []
    for member in members:
        member_alone = int((member & ~ensemble).sum())
        ensemble_alone = int((~member & ensemble).sum())
        tests.append(mcnemar(member_alone, ensemble_alone))
        accuracies.append(float(100 * member.mean()))
    return EnsembleRow(
        name=name,
        images=images,
        members=tuple(accuracies),
        ensemble=float(100 * ensemble.mean()),
        gain=float(gains.mean()),
        interval=(float(low), float(high)),
        mcnemar=tuple(tests),
    )
