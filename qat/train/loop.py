"""One training run, from a recipe and domains to a finished run folder. The one door to accelerate.

`qat/train/step.py` takes each step. Every `evaluate_every` steps the held-out images of the source domains are measured; the
best mean accuracy over them selects the checkpoint (DomainBed's training-domain validation), and only that checkpoint ever
meets the target domain.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgeqat.files import write_json
from edgeqat.interrupts import Interrupted, StopRequest
from qat.domains.folders import Domain
from qat.domains.splits import Split, Subset
from qat.objectives.averaging import VALLEYS, Average, LossValley
from qat.runs.build import Built, build, load_state
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, to_json
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder, check_out
from qat.runs.scale_log import ScaleLog
from qat.settle import settle_
from qat.surgery.backbones import create_optimizer
from qat.surgery.batchnorm import restore_norm_statistics, set_norm_mode
from qat.surgery.calibrate import begin, pause
from qat.surgery.swap import parameter_groups, sizes_of_scales
from qat.train.data import in_steps, split_domains
from qat.train.evaluate import mean_loss, predictions, predictor
from qat.train.from_recipe import training_step
from qat.train.loaders import collect_samples, eval_batches, some_images, train_loader
from qat.train.processes import (
    Processes,
    restore_randomness,
    states_of_randomness,
)
from qat.train.scale_scalars import mean_scales, scale_scalars
from qat.train.start import (
    calibrated,
    schedule_of,
    start_state,
    takes_over,
    teacher_of,
)
from qat.train.step import Outcome
from qat.train.tracking import Tracker

# Times the cross entropy of guessing, on average between two evaluations
DIVERGED = 100
# Training batches that batch norm statistics of averaged weights are taken from
NORM_BATCHES = 8


def run(recipe: Recipe, data: Sequence[Domain] | Split) -> RunFolder:
    """Train `recipe` on `data`, domains of which one is left out or a split, and return its finished folder.

    Bad input raises ValueError before training starts.
    """
    check(recipe)
    check_out(recipe)
    split = data if isinstance(data, Split) else split_domains(recipe.images, data)
    written, recipe = recipe, in_steps(recipe, split)
    set_seed(recipe.optimization.seed)
    _require_trackers(recipe.tracking.trackers)
    accelerator = Accelerator(
        mixed_precision=recipe.optimization.mixed_precision,
        log_with=list(recipe.tracking.trackers) or None,
    )
    processes = Processes(accelerator)
    processes.require_even(recipe.optimization)
    start = start_state(recipe, split)
    # Loaded before the model is quantized
    before = None if takes_over(recipe) else start
    built = build(
        recipe,
        len(split.classes),
        load_weights=start is None and not recipe.tracking.resume,
        start=before,
    )
    teacher = teacher_of(recipe, split, built)
    rows = None
    if start is not None and before is None:
        source = Path(str(recipe.init_from)) / "checkpoint.pt"
        load_state(built.model, {"model": start}, source)
    elif recipe.quantization is not None and not recipe.tracking.resume:
        rows = calibrated(recipe, built, split, processes)
    processes.wait()  # all have looked at --out, which process 0 is about to fill
    folder = RunFolder.create(written) if processes.writes else None
    path = processes.from_first(Path() if folder is None else folder.path)
    if folder is None:
        folder = RunFolder(path, writes=False)
    try:
        if rows is not None and processes.writes:
            write_json(
                folder / "calibration.json",
                [vars(row) | {"spec": str(row.spec)} for row in rows],
            )
        trainer = _Trainer(recipe, split, built, processes, folder, teacher)
    except BaseException:
        folder.discard()
        raise
    trainer.fit()
    return folder


def _require_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError where the library of a tracker is not installed: accelerate would leave it out without a word."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            library = name.replace("_", "-")
            raise RecipeError(
                f"--trackers {name}: {library} is not installed; add it with: pip install {library}"
            )


@dataclass
class _Progress:
    """What a resumed run must know."""

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0


class _Trainer:
    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        built: Built,
        processes: Processes,
        folder: RunFolder,
        teacher: nn.Module | None,
    ) -> None:
        self.recipe, self.split, self.built, self.folder = recipe, split, built, folder
        self.processes, self.progress = processes, _Progress()
        self.accelerator = processes.accelerator
        self.described = to_json(folder.recipe())
        self.clock = time.perf_counter()
        self.cross_entropies: list[float] = []  # of the steps since the last evaluation
        if recipe.model.channels_last:
            built.model.to(memory_format=torch.channels_last)
        set_norm_mode(built.model, recipe.model.norms)
        resumed = folder.load("last.pt") if recipe.tracking.resume else None
        self.scale_sizes = (
            sizes_of_scales(built.model) if resumed is None else resumed["scale_sizes"]
        )
        groups = groups_of(recipe, built.model, self.scale_sizes)
        optimizer = create_optimizer(
            recipe.optimization.optimizer, groups, recipe.optimization.lr
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, schedule_of(recipe.optimization)
        )
        if resumed is not None:
            load_state(built.model, resumed, folder / "last.pt")
            optimizer.load_state_dict(resumed["optimizer"])
            self.schedule.load_state_dict(resumed["schedule"])
            follow(self.schedule)
            self.progress = _Progress(**resumed["progress"])
        self.quant_start = 0 if recipe.delay is None else recipe.delay.quant_start_step
        if self.progress.step < self.quant_start:
            pause(built.model)
        self.loader = train_loader(
            split,
            recipe,
            built,
            self.progress.step,
            rank=processes.rank,
            processes=processes.count,
        )
        self.model, self.optimizer = self.accelerator.prepare(built.model, optimizer)
        self.step = training_step(
            recipe,
            self.model,
            built.model,
            self.optimizer,
            self.accelerator,
            domains=len(split.train),
            classes=len(split.classes),
            teacher=teacher,
            schedule=self.schedule,
        )
        self.average, self.valley = (
            Average(
                recipe.averaging.ema_decay
                if recipe.averaging.averaging == "ema"
                else None
            ),
            VALLEYS.get(recipe.averaging.averaging, LossValley)(),
        )
        if resumed is not None:
            self.step.load_state_dict(resumed["step"])
            self.average.load_state_dict(resumed["average"])
            self.valley.load_state_dict(resumed["valley"])
            self.cross_entropies = list(resumed.get("cross_entropies", []))
            restore_randomness(resumed, processes)
            if self.accelerator.scaler is not None and resumed.get("scaler"):
                self.accelerator.scaler.load_state_dict(resumed["scaler"])
        elif processes.rank:
            # Dropout is drawn apart in each process
            torch.manual_seed(recipe.optimization.seed + processes.rank)

    def fit(self) -> None:
        recipe, freezer = self.recipe, self.step.freezer
        services = recipe.tracking.trackers
        if services:
            config = {
                name: value if isinstance(value, (int, float)) else str(value)
                for name, value in recipe.entries().items()
            }
            self.accelerator.init_trackers("edgeqat", config)
        tracker = Tracker(
            self.folder.path,
            services=self.accelerator.log if services else None,
            steps=recipe.optimization.steps,
            tensorboard=recipe.tracking.tensorboard,
            resume_at=self.progress.step,
            writes=self.processes.writes,
        )
        scales = None
        if freezer is not None and self.processes.writes:
            path, window = self.folder.path, freezer.rule.window
            scales = ScaleLog(path, freezer.names, window, self.progress.step)
        with tracker, nullcontext() if scales is None else closing(scales):
            with StopRequest() as stop:
                self._take_steps(tracker, scales, stop)
            if not recipe.optimization.steps:
                self._evaluate(tracker)
        self._finish()
        if services:
            self.accelerator.end_training()

    def _take_steps(
        self, tracker: Tracker, scales: ScaleLog | None, stop: StopRequest
    ) -> None:
        recipe = self.recipe
        # Delayed quantizers have no scales yet
        if self.progress.step == 0 and not self.quant_start:
            tracker.log(0, {"scales": mean_scales(self.built.model)})
        self.model.train()
        self.clock = time.perf_counter()
        for batch in self.loader:
            images, labels, domains = (t.to(self.accelerator.device) for t in batch)
            self._train(images, labels, domains, tracker, scales)
            is_measured = self.progress.step % recipe.tracking.evaluate_every == 0
            is_last = self.progress.step == recipe.optimization.steps
            # A signal reaches the processes at different steps, and all must end at the same one
            signal = max(self.processes.all(stop.number or 0))
            if scales is not None and (is_measured or is_last or signal):
                scales.flush()
            if is_measured or is_last:
                self._evaluate(tracker)
            elif signal:
                self._save_progress()
            if signal:
                raise Interrupted(signal, self._how_to_go_on())

    def _train(
        self,
        images: Tensor,
        labels: Tensor,
        domains: Tensor,
        tracker: Tracker,
        scales: ScaleLog | None,
    ) -> None:
        if self.quant_start and self.progress.step == self.quant_start:
            assert self.recipe.quantization is not None
            calibration = some_images(
                self.split,
                self.recipe,
                self.built,
                self.recipe.quantization.calibration_batches,
            )
            begin(self.built.model, calibration, self.recipe.quantization.scale_init)
            if self.step.oscillation is not None:
                self.step.oscillation.restart()
        began = time.perf_counter()
        outcome = self.step(images, labels, domains)
        self.progress.step += 1
        if (
            self.recipe.averaging.averaging != "none"
            and self.progress.step > self.quant_start
        ):
            self.average.update(self.built.model)
        if scales is not None and outcome.seen is not None:
            scales.write(outcome.seen)
        self._report(outcome, labels, time.perf_counter() - began, tracker)

    def _report(
        self, outcome: Outcome, labels: Tensor, seconds: float, tracker: Tracker
    ) -> None:
        loss = float(outcome.loss)
        if not math.isfinite(loss):
            raise RecipeError(
                f"step {self.progress.step}: the loss is {loss}; {self._what_to_change()}"
            )
        norm = float(outcome.norm)
        # Whose scaler leaves such steps out
        if (
            not math.isfinite(norm)
            and self.recipe.optimization.mixed_precision != "fp16"
        ):
            raise RecipeError(
                f"step {self.progress.step}: the loss is finite, and the norm of its gradient is {norm}; "
                f"{self._what_to_change()}"
            )
        shown = [
            loss,
            float(cross_entropy(outcome.logits.float(), labels)),
            float((outcome.logits.argmax(1) == labels).float().mean()),
        ]
        loss, entropy, accuracy_of_step = self.processes.mean(shown)
        self.cross_entropies.append(entropy)
        values: dict[str, float | Mapping[str, float]] = {
            "loss": loss,
            "accuracy": accuracy_of_step,
            "images_per_second": len(labels)
            * self.processes.count
            / max(seconds, 1e-9),
        }
        tracker.show(self.progress.step, **values)  # type: ignore[arg-type]
        values |= {"gradient_norm": norm, "gradient_l1_norm": float(outcome.l1_norm)}
        values["learning_rate"] = outcome.rate
        if outcome.swung is not None:
            values["oscillating"] = outcome.swung
        if outcome.seen is not None and self.step.freezer is not None:
            values |= scale_scalars(outcome.seen, self.step.freezer)
        tracker.log(self.progress.step, values)

    def _what_to_change(self) -> str:
        advice = f"lower --lr (now {self.recipe.optimization.lr:g}) or clip gradients with --clip"
        kept = self.folder / "last.pt"
        return f"{advice}. The last good state is {kept}" if kept.exists() else advice

    def _how_to_go_on(self) -> str:
        return (
            f"stopped after step {self.progress.step} of {self.recipe.optimization.steps}, all saved; to go on, repeat the "
            f"command with --resume --out {self.folder.path}"
        )

    def _require_convergence(self) -> None:
        """Raises RecipeError where the steps since the last evaluation were far worse than guessing, on average."""
        if not self.cross_entropies:
            return
        mean, guessing = (
            float(np.mean(self.cross_entropies)),
            math.log(len(self.split.classes)),
        )
        if mean > DIVERGED * guessing:
            raise RecipeError(
                f"step {self.progress.step}: training has diverged, the cross entropy of the last "
                f"{len(self.cross_entropies)} steps is {mean:.3g}, guessing has {guessing:.2g}; {self._what_to_change()}"
            )
        self.cross_entropies.clear()

    def _require_finite_parameters(self) -> None:
        """Raises RecipeError where the last steps left nan or an infinity, which must not be saved over a good state."""
        name = next(
            (
                n
                for n, p in self.built.model.named_parameters()
                if not bool(p.isfinite().all())
            ),
            "",
        )
        if name:
            raise RecipeError(
                f"step {self.progress.step}: {name} holds values that are nan or infinite; {self._what_to_change()}"
            )

    def _evaluate(self, tracker: Tracker) -> None:
        self._require_convergence()
        self._require_finite_parameters()
        self.processes.agree_on_buffers(self.built.model)
        with self._averaged():
            found = {}
            for subset in self.split.validation:
                tracker.measuring(subset.name)
                found[subset.name] = self._accuracy(subset)
            mean = float(np.mean(list(found.values())))
            tracker.measured(self.progress.step, mean)
            better = (
                mean > self.progress.best_accuracy
                or self.recipe.tracking.select == "last"
            )
            if better and (
                self.progress.step > self.quant_start or not self.quant_start
            ):
                self.progress.best_accuracy, self.progress.best_step = (
                    mean,
                    self.progress.step,
                )
                self.folder.save("checkpoint.pt", self._state())
        entry: dict[str, float | Mapping[str, float]] = {
            "source_validation": found,
            "source_mean": mean,
        }
        if self.recipe.averaging.averaging in VALLEYS and self.average.count:
            loss = float(np.mean([self._loss(s) for s in self.split.validation]))
            self.valley.push(loss, self.average)
            self.average = Average()
            entry["source_loss"] = loss
        if self.step.oscillation is not None:
            entry["oscillating_often"] = self.step.oscillation.share_above()
        tracker.log(
            self.progress.step, entry | {"scales": mean_scales(self.built.model)}
        )
        self._save_progress()

    def _save_progress(self) -> None:
        """Write last.pt, from which the run can go on bit for bit."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now
        scaler = self.accelerator.scaler
        full = self._state() | states_of_randomness(self.processes) | {
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(), "progress": vars(self.progress),
            "step": self.step.state_dict(), "average": self.average.state_dict(), "valley": self.valley.state_dict(),
            "scale_sizes": self.scale_sizes, "cross_entropies": self.cross_entropies,
        }  # fmt: skip
        self.folder.save("last.pt", full)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The exponential average in the model's place, where there is one."""
        if self.recipe.averaging.averaging != "ema" or not self.average.count:
            yield
            return
        kept = {
            name: value.clone()
            for name, value in self.built.model.state_dict().items()
            if isinstance(value, Tensor)
        }
        try:
            self._put(self.average)
            yield
        finally:
            self.built.model.load_state_dict(kept, strict=False)

    def _put(self, average: Average) -> None:
        average.copy_to(self.built.model)
        restore_norm_statistics(
            self.built.model,
            some_images(self.split, self.recipe, self.built, NORM_BATCHES),
        )

    def _select_valley(self) -> str:
        """SWAD's weights become the checkpoint; returns how they were chosen."""
        chosen = self.valley.result()
        if chosen is None:
            return (
                "training-domain validation (the loss found no valley to average over)"
            )
        self._put(chosen)
        self.folder.save("checkpoint.pt", self._state())
        what = "steps" if self.recipe.averaging.averaging == "swad" else "spans"
        return f"SWAD: mean of {chosen.count} {what} in the valley of the source validation loss"

    def _finish(self) -> None:
        seconds = self.progress.seconds
        selection = (
            "last step"
            if self.recipe.tracking.select == "last"
            else "training-domain validation: best mean held-out accuracy over the source domains"
        )
        if self.recipe.averaging.averaging in VALLEYS:
            selection = self._select_valley()
        self.processes.wait()
        self._load_checkpoint()
        if self.recipe.averaging.norm_batches:
            batches = some_images(
                self.split, self.recipe, self.built, self.recipe.averaging.norm_batches
            )
            restore_norm_statistics(self.built.model, batches)
            self.folder.save("checkpoint.pt", self._state())
            selection += f"; batch norm statistics then taken again from {self.recipe.averaging.norm_batches} batches"
        settled = self._settle()
        images = (
            self.recipe.optimization.batch_size
            * self.recipe.optimization.accumulate
            * len(self.split.train)
            * self.recipe.optimization.steps
        )
        measured = {
            s.name: self._predictions(s)
            for s in (*self.split.validation, self.split.target_in)
        }
        self.folder.write_predictions(measured)
        right = {
            name: float((predicted == labels).mean())
            for name, (predicted, labels) in measured.items()
        }
        target = right.pop(self.split.target_in.name)
        target_out = self.split.target_out
        target_holdout = None if target_out is None else self._accuracy(target_out)
        if not self.processes.writes:
            return
        results = {
            "method": self.recipe.method,
            "test_domain": self.recipe.images.test_domain,
            "selection": selection,
            "settled": settled,
            "selected_step": self.progress.best_step,
            "source_validation": right,
            "target": target,
            "target_holdout": target_holdout,
            "train_seconds": seconds,
            "images_per_second": images / seconds,
            "classes": list(self.split.classes),
            "split": {
                "trial_seed": self.recipe.images.trial_seed,
                "holdout": self.recipe.images.holdout,
            },
        }
        self.folder.write_samples(collect_samples(self.split, self.recipe, self.built))
        write_json(self.folder / "results.json", results)

    def _settle(self) -> dict[str, object] | None:
        """Give a quantized net the biases and scales of its file, so that everything measured from here on is of the net that
        ships; returns what that changed. A net that no target can run stays as it was trained, and the reason is kept."""
        if self.built.table is None:
            return None
        before = {s.name: self._accuracy(s) for s in self.split.validation}
        example = torch.zeros(
            1, 3, self.recipe.model.image_size, self.recipe.model.image_size
        )
        found: dict[str, object] = {}
        if self.processes.writes:
            try:
                found = settle_(self.built.model, example).to_json()
                self.folder.save("checkpoint.pt", self._state())
            except ValueError as error:  # ExportError is one
                found = {"reason": str(error)}
        found = self.processes.from_first(found)
        if not self.processes.writes:
            self._load_checkpoint()
        return {"source_validation_before": before} | found

    def _load_checkpoint(self) -> None:
        """The model as process 0 saved it last."""
        path = self.folder / "checkpoint.pt"
        load_state(self.built.model, self.folder.load("checkpoint.pt"), path)

    def _state(self) -> dict[str, Any]:
        points = list(self.built.table.points) if self.built.table else []
        return {
            "model": self.built.model.state_dict(), "classes": list(self.split.classes), "sites": points,
            "recipe": self.described,
        }  # fmt: skip

    def _accuracy(self, subset: Subset) -> float:
        predicted, labels = self._predictions(subset)
        return float((predicted == labels).mean())

    def _loss(self, subset: Subset) -> float:
        """Mean cross entropy, each process measuring its share."""
        share = self.processes.share_of(subset)
        total = 0.0
        if len(share):
            predict = predictor(self.built.model, self.accelerator.device)
            batches = eval_batches(share, self.recipe, self.built)
            total = mean_loss(predict, batches) * len(share)
        return sum(self.processes.all(total)) / len(subset)

    def _predictions(
        self, subset: Subset
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(predicted classes, labels) of all images of `subset` in order, each process measuring its share."""
        share = self.processes.share_of(subset)
        mine = np.empty(0, np.int64)
        if len(share):
            predict = predictor(self.built.model, self.accelerator.device)
            batches = eval_batches(share, self.recipe, self.built)
            mine = predictions(predict, batches)[0].numpy()
        predicted = self.processes.joined(mine, len(subset))
        return predicted, subset.domain.labels[subset.indices]


def follow(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rates that `schedule` has at its step: a run that goes on for longer has another schedule."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(
        groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)


def groups_of(
    recipe: Recipe, model: nn.Module, scale_sizes: dict[str, float]
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups. scale_sizes: as they were when the run began."""
    if recipe.quantization is None:
        return parameter_groups(
            model,
            recipe.optimization.weight_decay,
            recipe.optimization.lr,
            decay_norms=recipe.optimization.decay_norms,
        )
    return parameter_groups(
        model,
        recipe.optimization.weight_decay,
        recipe.optimization.lr * recipe.quantization.scale_lr_ratio,
        decay_norms=recipe.optimization.decay_norms,
        scale_sizes=scale_sizes
        if recipe.quantization.scale_lr_unit == "scale"
        else None,
    )
