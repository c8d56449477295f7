"""One training run, from a recipe and domains to a finished run folder. The one door to accelerate.

Each step: the objective fills `.grad` through the closure, the optimizer steps, the schedule steps. Every
`evaluate_every` steps the held-out images of the source domains are measured; the best mean accuracy over them selects
the checkpoint (DomainBed's training-domain validation), and only that checkpoint ever meets the target domain.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat.domains.batches import EqualDomainBatches, EvalImages, TrainImages
from qat.domains.folders import Domain
from qat.domains.splits import LeaveOneDomainOut, Subset, leave_one_domain_out
from qat.domains.transforms import eval_transform, train_transform
from qat.objectives.contract import Gradients, Objective, erm
from qat.surgery.calibrate import CalibrationRow, calibrate
from qat.surgery.swap import parameter_groups, quantizers
from qat.training.checkpoint import Built, RunFolder, Samples, build, load_state, write_json
from qat.training.evaluate import accuracy, predictions, predictor
from qat.training.recipe import LsqRecipe, Recipe, RecipeError, check
from qat.training.tracking import Tracker

EVAL_BATCH = 64
SAMPLES = 128

OBJECTIVES: dict[str, Objective] = {"fp": erm, "lsq": erm}


def run(recipe: Recipe, domains: Sequence[Domain]) -> RunFolder:
    """Train `recipe` on `domains` and return its finished folder. Bad input raises ValueError before training starts."""
    check(recipe)
    split = leave_one_domain_out(
        domains, recipe.test_domain, holdout_fraction=recipe.holdout, trial_seed=recipe.trial_seed
    )
    set_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    start = _start_state(recipe, split)
    built = build(recipe, len(split.classes), load_weights=start is None and not recipe.resume, start=start)
    if isinstance(recipe, LsqRecipe) and not recipe.resume:
        clipped = _calibrate(recipe, built, split)
    folder = RunFolder.create(recipe)
    if isinstance(recipe, LsqRecipe) and not recipe.resume:
        write_json(folder / "calibration.json", [vars(row) | {"spec": str(row.spec)} for row in clipped])
    trainer = _Trainer(recipe, split, built, accelerator, folder)
    trainer.fit()
    return folder


@dataclass
class _Progress:
    """What a resumed run must know."""

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0


class _Trainer:
    def __init__(
        self,
        recipe: Recipe,
        split: LeaveOneDomainOut,
        built: Built,
        accelerator: Accelerator,
        folder: RunFolder,
    ) -> None:
        self.recipe, self.split, self.built, self.folder, self.accelerator = (
            recipe,
            split,
            built,
            folder,
            accelerator,
        )
        self.progress = _Progress()
        groups = parameter_groups(built.model, recipe.weight_decay, recipe.lr * getattr(recipe, "step_lr_ratio", 1.0))
        optimizer = torch.optim.Adam(groups, lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of(recipe))
        resumed = folder.load("last.pt") if recipe.resume else None
        if resumed is not None:
            load_state(built.model, resumed, folder / "last.pt")
            optimizer.load_state_dict(resumed["optimizer"])
            schedule.load_state_dict(resumed["schedule"])
            self.progress = _Progress(**resumed["progress"])
            torch.set_rng_state(resumed["rng"])
        self.model, self.optimizer, self.loader = accelerator.prepare(built.model, optimizer, self._train_loader())
        self.schedule = schedule
        self.objective = OBJECTIVES[recipe.method]

    def fit(self) -> None:
        recipe, started = self.recipe, time.perf_counter()
        tracker = Tracker(
            self.folder.path, steps=recipe.steps, tensorboard=recipe.tensorboard, resume_at=self.progress.step
        )
        with tracker:
            self.model.train()
            for images, labels, _ in self.loader:
                self._step(images, labels, tracker)
                if self.progress.step % recipe.evaluate_every == 0 or self.progress.step == recipe.steps:
                    self._evaluate(tracker)
        self._finish(time.perf_counter() - started)

    def _step(self, images: Tensor, labels: Tensor, tracker: Tracker) -> None:
        began, seen = time.perf_counter(), dict[str, Tensor]()

        def closure() -> Tensor:
            with self.accelerator.autocast():
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            self.accelerator.backward(loss)
            seen.setdefault("logits", logits.detach())
            return loss.detach()

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients: Gradients = self.objective(closure, parameters)
        self.optimizer.step()
        self.schedule.step()
        self.progress.step += 1
        self._report(gradients, seen["logits"], labels, time.perf_counter() - began, tracker)

    def _report(self, gradients: Gradients, logits: Tensor, labels: Tensor, seconds: float, tracker: Tracker) -> None:
        loss = float(gradients.loss)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"step {self.progress.step}: the loss is {loss}; lower --lr (now {self.recipe.lr:g}). The last good state "
                f"is {self.folder / 'last.pt'}"
            )
        correct = float((logits.argmax(1) == labels).float().mean())
        rate = len(labels) / max(seconds, 1e-9)
        tracker.show(self.progress.step, loss=loss, accuracy=correct, images_per_second=rate)
        tracker.log(self.progress.step, {"loss": loss, "accuracy": correct, "images_per_second": rate})

    def _evaluate(self, tracker: Tracker) -> None:
        found = {s.name: self._accuracy(s) for s in self.split.validation}
        mean = float(np.mean(list(found.values())))
        entry: dict[str, float | Mapping[str, float]] = {"source_validation": found, "source_mean": mean}
        tracker.log(self.progress.step, entry | {"steps": mean_steps(self.accelerator.unwrap_model(self.model))})
        if mean > self.progress.best_accuracy:
            self.progress.best_accuracy, self.progress.best_step = mean, self.progress.step
            self.folder.save("checkpoint.pt", self._state())
        full = self._state() | {
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress), "rng": torch.get_rng_state(),
        }  # fmt: skip
        self.folder.save("last.pt", full)

    def _finish(self, seconds: float) -> None:
        model = self.accelerator.unwrap_model(self.model)
        load_state(model, self.folder.load("checkpoint.pt"), self.folder / "checkpoint.pt")
        images = self.recipe.batch_size * len(self.split.train) * self.recipe.steps
        measured = {s.name: self._predictions(s) for s in (*self.split.validation, self.split.target_in)}
        self.folder.write_predictions(measured)
        right = {name: float((predicted == labels).mean()) for name, (predicted, labels) in measured.items()}
        target = right.pop(self.split.target_in.name)
        results = {
            "method": self.recipe.method,
            "test_domain": self.recipe.test_domain,
            "selection": "training-domain validation: best mean held-out accuracy over the source domains",
            "selected_step": self.progress.best_step,
            "source_validation": right,
            "target": target,
            "target_holdout": self._accuracy(self.split.target_out),
            "train_seconds": seconds,
            "images_per_second": images / seconds,
            "classes": list(self.split.classes),
            "split": {"trial_seed": self.recipe.trial_seed, "holdout": self.recipe.holdout},
        }
        self.folder.write_samples(collect_samples(self.split, self.recipe, self.built))
        write_json(self.folder / "results.json", results)

    def _state(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        sites = list(self.built.table.sites) if self.built.table else []
        return {"model": model.state_dict(), "classes": list(self.split.classes), "sites": sites}

    def _accuracy(self, subset: Subset) -> float:
        batches = eval_batches(subset, self.recipe, self.built)
        predict = predictor(self.accelerator.unwrap_model(self.model), self.accelerator.device)
        return accuracy(predict, batches, len(self.split.classes))

    def _predictions(self, subset: Subset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        predict = predictor(self.accelerator.unwrap_model(self.model), self.accelerator.device)
        predicted, labels = predictions(predict, eval_batches(subset, self.recipe, self.built))
        return predicted.numpy(), labels.numpy()

    def _train_loader(self) -> DataLoader[Any]:
        return train_loader(self.split, self.recipe, self.built, start_step=self.progress.step)


def schedule_of(recipe: Recipe) -> Callable[[int], float]:
    """Learning-rate factor by step."""
    match recipe.schedule:
        case "cosine":
            return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1)))
        case "linear":
            return lambda step: max(1 - step / recipe.steps, 0.0)
        case "constant":
            return lambda step: 1.0


def mean_steps(model: nn.Module) -> dict[str, float]:
    """Mean step of every quantizer by name, for the report."""
    return {name: float(q.step.mean()) for name, q in quantizers(model).items()}


def train_loader(split: LeaveOneDomainOut, recipe: Recipe, built: Built, start_step: int = 0) -> DataLoader[Any]:
    sampler = EqualDomainBatches(
        [len(s) for s in split.train],
        recipe.batch_size,
        recipe.seed,
        start_step=start_step,
        steps=recipe.steps,
    )
    images = TrainImages(split.train, train_transform(recipe.image_size, built.mean, built.std))
    return DataLoader(
        images, batch_sampler=sampler, num_workers=recipe.workers, persistent_workers=recipe.workers > 0,
        generator=torch.Generator(),  # else every pass over a loader draws from the generator that training uses
    )  # fmt: skip


def eval_batches(subset: Subset, recipe: Recipe, built: Built) -> DataLoader[Any]:
    images = EvalImages(subset, eval_transform(recipe.image_size, built.mean, built.std))
    return DataLoader(images, batch_size=EVAL_BATCH, generator=torch.Generator())


def collect_samples(split: LeaveOneDomainOut, recipe: Recipe, built: Built) -> Samples:
    """A few held-out images of every domain, the target included, spread evenly, as the model sees them."""
    subsets = (*split.validation, split.target_out)
    each = -(-SAMPLES // len(subsets))
    images, labels, domains = [], [], []
    for subset in subsets:
        data = EvalImages(subset, eval_transform(recipe.image_size, built.mean, built.std))
        for index in np.linspace(0, len(data) - 1, min(each, len(data))).astype(int):
            image, label = data[int(index)]
            images.append(image.numpy())
            labels.append(label)
            domains.append(subset.name)
    return Samples(np.stack(images), np.array(labels, np.int64), np.array(domains))


def _start_state(recipe: Recipe, split: LeaveOneDomainOut) -> dict[str, Tensor] | None:
    """State dict of the full-precision run named by --init-from, checked to be of the same model and split."""
    if not isinstance(recipe, LsqRecipe) or recipe.init_from is None:
        return None
    source = RunFolder.open(recipe.init_from)
    given = source.recipe()
    if given.method != "fp":
        raise RecipeError(f"--init-from {recipe.init_from}: is a {given.method} run; start from a full-precision one")
    for name in (
        "backbone",
        "image_size",
        "test_domain",
        "pad_type",
        "normalization",
        "trial_seed",
        "holdout",
    ):
        if getattr(given, name) != getattr(recipe, name):
            raise RecipeError(
                f"--init-from {recipe.init_from}: was run with --{name.replace('_', '-')} {getattr(given, name)}, this run "
                f"has {getattr(recipe, name)}; use the same"
            )
    state = source.load("checkpoint.pt")
    if tuple(state["classes"]) != tuple(split.classes):
        raise RecipeError(
            f"--init-from {recipe.init_from}: was trained on other classes: {', '.join(state['classes'])}"
        )
    return state["model"]


def _calibrate(recipe: LsqRecipe, built: Built, split: LeaveOneDomainOut) -> list[CalibrationRow]:
    loader = train_loader(split, dataclasses.replace(recipe, workers=0), built)
    images = (batch[0] for batch in itertools.islice(loader, recipe.calibration_batches))
    return calibrate(built.model, images, recipe.init)
