"""Ensembles of quantized runs (EoQ, arXiv 2410.06020): their averaged predictions, measured image by image.

The members answer every image of their split's held-out source parts and target domain; the ensemble answers with the mean
of their softmax probabilities, or of their logits. As all see the same images, ensemble and members are compared in pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

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
        heads = "".join(f"{f'm{i}':>8}" for i in range(len(self.members)))
        lines = [
            f"{'accuracy, %':<{width}}  images{heads}    mean  ensemble  over the mean (95 %)"
        ]
        for name, row in zip(names, self.rows, strict=True):
            members = "".join(f"{value:>8.2f}" for value in row.members)
            low, high = row.interval
            lines.append(
                f"{name:<{width}}  {row.images:>6}{members}{row.ensemble - row.gain:>8.2f}{row.ensemble:>10.2f}"
                f"  {row.gain:+.2f} ({low:+.2f} to {high:+.2f})"
            )
        target = self.rows[-1]
        lines += [
            f"m{i}: {printable(name)}; on {names[-1]} the ensemble is {target.ensemble - target.members[i]:+.2f}, "
            f"McNemar p {target.mcnemar[i]:.3g}"
            for i, name in enumerate(self.members)
        ]
        return "\n".join(
            [
                *lines,
                f"ensemble: mean of the members' {'softmax ' if self.average != 'logits' else ''}{self.average}",
            ]
        )


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
    subsets = (*split.validation, split.target_in)
    answers = {
        s.name: _answers(built, eval_batches(s, recipes[0], built[0])) for s in subsets
    }
    return compare_ensemble(
        [str(run) for run in runs], answers, split.target_in.name, average
    )


def load_members(
    runs: Sequence[Path], data_root: Path | None = None
) -> tuple[list[Recipe], list[Built], Split]:
    """Recipes and models of `runs`, and the split that they share."""
    if len(runs) < 2:
        raise RecipeError("qat ensemble: name at least two run folders")
    recipes, built, classes = [], [], []
    for run in runs:
        folder, recipe, model = load_run(run)
        recipes.append(recipe)
        built.append(model)
        classes.append(classes_of(folder))
        for name in SAME:
            if recipe.entries()[name] != recipes[0].entries()[name]:
                raise RecipeError(
                    f"{runs[0]} and {run} differ in --{name.replace('_', '-')}; the members of an ensemble must agree on it"
                )
        if (model.mean, model.std) != (built[0].mean, built[0].std):
            raise RecipeError(
                f"{runs[0]} and {run} normalise images by other means and deviations"
            )
        if classes[-1] != classes[0]:
            raise RecipeError(f"{runs[0]} and {run} were trained on other classes")
    return recipes, built, split_of(recipes[0], data_root)


@torch.no_grad()
def _answers(built: Sequence[Built], batches: object) -> Answers:
    logits: list[list[Tensor]] = [[] for _ in built]
    labels = []
    for images, label in batches:  # type: ignore[attr-defined]
        for own, member in zip(logits, built, strict=True):
            own.append(member.model(images))
        labels.append(label)
    return Answers(
        torch.stack([torch.cat(own) for own in logits]).numpy(),
        torch.cat(labels).numpy(),
    )


def compare_ensemble(
    members: Sequence[str],
    answers: Mapping[str, Answers],
    target: str,
    average: Average,
) -> EnsembleTable:
    """The table from the members' `answers` by domain; `target` names the held-out one."""
    right = {domain: correct(found, average) for domain, found in answers.items()}
    sources = [both for domain, both in right.items() if domain != target]
    rows = [_row(domain, *both) for domain, both in right.items() if domain != target]
    if sources:
        rows.append(
            _row(
                SOURCES,
                np.concatenate([m for m, _ in sources], 1),
                np.concatenate([e for _, e in sources]),
            )
        )
    rows.append(_row(f"{target} (target)", *right[target]))
    return EnsembleTable(tuple(members), average, tuple(rows))


def correct(
    answers: Answers, average: Average
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images each member (M_N) and the ensemble (N) get right."""
    logits = answers.logits.astype(np.float64)
    if average == "probabilities":
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        scores = (shares / shares.sum(-1, keepdims=True)).mean(0)
    else:
        scores = logits.mean(0)
    return logits.argmax(-1) == answers.labels, scores.argmax(-1) == answers.labels


def _row(
    name: str, members: NDArray[np.bool_], ensemble: NDArray[np.bool_]
) -> EnsembleRow:
    gains = 100 * (ensemble - members.mean(0))
    draws = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    low, high = np.quantile(gains[draws].mean(1), (0.025, 0.975))
    tests = tuple(
        mcnemar(int((m & ~ensemble).sum()), int((~m & ensemble).sum())) for m in members
    )
    return EnsembleRow(
        name,
        len(gains),
        tuple(float(100 * m.mean()) for m in members),
        float(100 * ensemble.mean()),
        float(gains.mean()),
        (float(low), float(high)),
        tests,
    )
