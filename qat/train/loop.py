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
from qat.runs.provenance import provenance
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
    written = recipe
    recipe = in_steps(recipe, split)
    set_seed(recipe.optimization.seed)
    _require_trackers(recipe.tracking.trackers)
    accelerator = Accelerator(
        mixed_precision=recipe.optimization.mixed_precision,
        log_with=list(recipe.tracking.trackers) or None,
    )
    processes = Processes(accelerator)
    processes.require_even(recipe.optimization)
    start = start_state(recipe, split)
    is_taken_over = start is not None and takes_over(recipe)
    built = build(
        recipe,
        len(split.classes),
        load_weights=start is None and not recipe.tracking.resume,
        # Of full precision: loaded before the model is quantized
        start=None if is_taken_over else start,
    )
    teacher = teacher_of(recipe, split, built)
    rows = None
    if is_taken_over:
        source = Path(str(recipe.init_from)) / "checkpoint.pt"
        load_state(built.model, {"model": start}, source)
    elif recipe.quantization is not None and not recipe.tracking.resume:
        rows = calibrated(recipe, built, split, processes)
    processes.wait()  # all have looked at --out, which process 0 is about to fill
    folder = _shared_folder(written, processes)
    try:
        if rows is not None and processes.writes:
            entries = [vars(row) | {"spec": str(row.spec)} for row in rows]
            write_json(folder / "calibration.json", entries)
        trainer = _Trainer(recipe, split, built, processes, folder, teacher)
    except BaseException:
        folder.discard()
        raise
    trainer.fit()
    return folder


def _shared_folder(recipe: Recipe, processes: Processes) -> RunFolder:
    """The run folder that process 0 makes, for all to read."""
    if processes.writes:
        folder = RunFolder.create(recipe)
        processes.from_first(folder.path)
        return folder
    path = processes.from_first(Path())
    return RunFolder(path, writes=False)


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
    """Takes the steps of a run and measures in between: evaluation, selection, averages, what is logged and saved."""

    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        built: Built,
        processes: Processes,
        folder: RunFolder,
        teacher: nn.Module | None,
    ) -> None:
        self.recipe = recipe
        self.split = split
        self.built = built
        self.folder = folder
        self.processes = processes
        self.progress = _Progress()
        self.accelerator = processes.accelerator
        self.described = to_json(folder.recipe())
        self.clock = time.perf_counter()
        self.cross_entropies: list[float] = []  # of the steps since the last evaluation
        if recipe.model.channels_last:
            built.model.to(memory_format=torch.channels_last)
        set_norm_mode(built.model, recipe.model.norms)
        resumed = folder.load("last.pt") if recipe.tracking.resume else None
        if resumed is None:
            self.scale_sizes = sizes_of_scales(built.model)
        else:
            self.scale_sizes = resumed["scale_sizes"]
        optimizer = self._make_optimizer()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, schedule_of(recipe.optimization)
        )
        if resumed is not None:
            self._load_model_and_optimizer(resumed, optimizer)
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
        averaging = recipe.averaging
        self.average = Average(
            averaging.ema_decay if averaging.averaging == "ema" else None
        )
        self.valley = VALLEYS.get(averaging.averaging, LossValley)()
        if resumed is not None:
            self._load_step_and_averages(resumed)
        elif processes.rank:
            # Dropout is drawn apart in each process
            torch.manual_seed(recipe.optimization.seed + processes.rank)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optimization = self.recipe.optimization
        groups = groups_of(self.recipe, self.built.model, self.scale_sizes)
        return create_optimizer(optimization.optimizer, groups, optimization.lr)

    def _load_model_and_optimizer(
        self, resumed: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> None:
        """First half of what last.pt holds, before accelerate wraps the model and the optimizer."""
        load_state(self.built.model, resumed, self.folder / "last.pt")
        optimizer.load_state_dict(resumed["optimizer"])
        self.schedule.load_state_dict(resumed["schedule"])
        follow(self.schedule)
        self.progress = _Progress(**resumed["progress"])

    def _load_step_and_averages(self, resumed: dict[str, Any]) -> None:
        """Second half of what last.pt holds, once the step and the averages are made."""
        self.step.load_state_dict(resumed["step"])
        self.average.load_state_dict(resumed["average"])
        self.valley.load_state_dict(resumed["valley"])
        self.cross_entropies = list(resumed.get("cross_entropies", []))
        restore_randomness(resumed, self.processes)
        scaler = self.accelerator.scaler
        if scaler is not None and resumed.get("scaler"):
            scaler.load_state_dict(resumed["scaler"])

    def fit(self) -> None:
        """Take all steps that are left, then measure what was selected. Raises Interrupted after a signal."""
        recipe = self.recipe
        services = recipe.tracking.trackers
        if services:
            self._start_trackers()
        tracker = Tracker(
            self.folder.path,
            services=self.accelerator.log if services else None,
            steps=recipe.optimization.steps,
            tensorboard=recipe.tracking.tensorboard,
            resume_at=self.progress.step,
            writes=self.processes.writes,
        )
        scales = self._scale_log()
        with tracker, nullcontext() if scales is None else closing(scales):
            with StopRequest() as stop:
                self._take_steps(tracker, scales, stop)
            if not recipe.optimization.steps:
                self._evaluate(tracker)
        self._finish()
        if services:
            self.accelerator.end_training()

    def _start_trackers(self) -> None:
        """Tell accelerate's trackers what the run is."""
        config = {}
        for name, value in self.recipe.entries().items():
            is_number = isinstance(value, (int, float))
            config[name] = value if is_number else str(value)
        self.accelerator.init_trackers("edgeqat", config)

    def _scale_log(self) -> ScaleLog | None:
        """Where the scales' gradients are logged: for GAQAT, in the process that writes."""
        freezer = self.step.freezer
        if freezer is None or not self.processes.writes:
            return None
        window = freezer.rule.window
        return ScaleLog(self.folder.path, freezer.names, window, self.progress.step)

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
        """One step; `tracker` and `scales` record it."""
        if self.quant_start and self.progress.step == self.quant_start:
            self._begin_quantization()
        began = time.perf_counter()
        outcome = self.step(images, labels, domains)
        self.progress.step += 1
        is_averaging = self.recipe.averaging.averaging != "none"
        if is_averaging and self.progress.step > self.quant_start:
            self.average.update(self.built.model)
        if scales is not None and outcome.seen is not None:
            scales.write(outcome.seen)
        self._report(outcome, labels, time.perf_counter() - began, tracker)

    def _begin_quantization(self) -> None:
        """Calibrate the quantizers that the recipe delays, and let them round from here on."""
        quantization = self.recipe.quantization
        assert quantization is not None
        batches = self._source_batches(quantization.calibration_batches)
        begin(self.built.model, batches, quantization.scale_init)
        if self.step.oscillation is not None:
            self.step.oscillation.restart()

    def _report(
        self, outcome: Outcome, labels: Tensor, seconds: float, tracker: Tracker
    ) -> None:
        """Log what a step showed. Raises RecipeError for a loss or gradient that is not finite."""
        loss = float(outcome.loss)
        norm = float(outcome.norm)
        self._require_finite_step(loss, norm)
        entropy = cross_entropy(outcome.logits.float(), labels)
        is_right = outcome.logits.argmax(1) == labels
        mine = [loss, float(entropy), float(is_right.float().mean())]
        mean_loss, mean_entropy, accuracy_of_step = self.processes.mean(mine)
        self.cross_entropies.append(mean_entropy)
        images = len(labels) * self.processes.count
        values: dict[str, float | Mapping[str, float]] = {
            "loss": mean_loss,
            "accuracy": accuracy_of_step,
            "images_per_second": images / max(seconds, 1e-9),
        }
        tracker.show(self.progress.step, **values)  # type: ignore[arg-type]
        values["gradient_norm"] = norm
        values["gradient_l1_norm"] = float(outcome.l1_norm)
        values["learning_rate"] = outcome.rate
        if outcome.swung is not None:
            values["oscillating"] = outcome.swung
        if outcome.seen is not None and self.step.freezer is not None:
            values |= scale_scalars(outcome.seen, self.step.freezer)
        tracker.log(self.progress.step, values)

    def _require_finite_step(self, loss: float, norm: float) -> None:
        step = self.progress.step
        if not math.isfinite(loss):
            raise RecipeError(
                f"step {step}: the loss is {loss}; {self._what_to_change()}"
            )
        # fp16's scaler leaves out steps whose gradients are not finite
        may_overflow = self.recipe.optimization.mixed_precision == "fp16"
        if not math.isfinite(norm) and not may_overflow:
            raise RecipeError(
                f"step {step}: the loss is finite, and the norm of its gradient is {norm}; {self._what_to_change()}"
            )

    def _what_to_change(self) -> str:
        advice = f"lower --lr (now {self.recipe.optimization.lr:g}) or clip gradients with --clip"
        last = self.folder / "last.pt"
        if not last.exists():
            return advice
        return f"{advice}. The last good state is {last}"

    def _how_to_go_on(self) -> str:
        return (
            f"stopped after step {self.progress.step} of {self.recipe.optimization.steps}, all saved; to go on, repeat the "
            f"command with --resume --out {self.folder.path}"
        )

    def _require_convergence(self) -> None:
        """Raises RecipeError where the steps since the last evaluation were far worse than guessing, on average."""
        if not self.cross_entropies:
            return
        mean = float(np.mean(self.cross_entropies))
        guessing = math.log(len(self.split.classes))
        if mean > DIVERGED * guessing:
            raise RecipeError(
                f"step {self.progress.step}: training has diverged, the cross entropy of the last "
                f"{len(self.cross_entropies)} steps is {mean:.3g}, guessing has {guessing:.2g}; {self._what_to_change()}"
            )
        self.cross_entropies.clear()

    def _require_finite_parameters(self) -> None:
        """Raises RecipeError where the last steps left nan or an infinity, which must not be saved over a good state."""
        for name, parameter in self.built.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise RecipeError(
                    f"step {self.progress.step}: {name} holds values that are nan or infinite; {self._what_to_change()}"
                )

    def _evaluate(self, tracker: Tracker) -> None:
        """Measure on the held-out images of the source domains, save the best net so far, and what the run goes on from."""
        self._require_convergence()
        self._require_finite_parameters()
        self.processes.agree_on_buffers(self.built.model)
        with self._averaged():
            accuracies = {}
            for subset in self.split.validation:
                tracker.measuring(subset.name)
                accuracies[subset.name] = self._accuracy(subset)
            mean = float(np.mean(list(accuracies.values())))
            tracker.measured(self.progress.step, mean)
            if self._is_selected(mean):
                self.progress.best_accuracy = mean
                self.progress.best_step = self.progress.step
                self.folder.save("checkpoint.pt", self._state())
        entry: dict[str, float | Mapping[str, float]] = {
            "source_validation": accuracies,
            "source_mean": mean,
        }
        if self.recipe.averaging.averaging in VALLEYS and self.average.count:
            loss = float(np.mean([self._loss(s) for s in self.split.validation]))
            self.valley.push(loss, self.average)
            self.average = Average()
            entry["source_loss"] = loss
        if self.step.oscillation is not None:
            entry["oscillating_often"] = self.step.oscillation.share_above()
        entry["scales"] = mean_scales(self.built.model)
        tracker.log(self.progress.step, entry)
        self._save_progress()

    def _is_selected(self, mean_accuracy: float) -> bool:
        """Whether the net of this step takes the place of the one in checkpoint.pt."""
        is_delayed = self.quant_start and self.progress.step <= self.quant_start
        if is_delayed:
            return False  # not quantized yet
        if self.recipe.tracking.select == "last":
            return True
        return mean_accuracy > self.progress.best_accuracy

    def _save_progress(self) -> None:
        """Write last.pt, from which the run can go on bit for bit."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now
        scaler = self.accelerator.scaler
        state = self._state() | states_of_randomness(self.processes)
        state |= {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": vars(self.progress),
            "step": self.step.state_dict(),
            "average": self.average.state_dict(),
            "valley": self.valley.state_dict(),
            "scale_sizes": self.scale_sizes,
            "cross_entropies": self.cross_entropies,
        }
        self.folder.save("last.pt", state)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The exponential average in the model's place, where there is one."""
        if self.recipe.averaging.averaging != "ema" or not self.average.count:
            yield
            return
        model = self.built.model
        saved = {}
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                saved[name] = value.clone()
        try:
            self._use_average(self.average)
            yield
        finally:
            model.load_state_dict(saved, strict=False)

    def _use_average(self, average: Average) -> None:
        """Put an average of weights into the model, with batch norm statistics that fit it."""
        average.copy_to(self.built.model)
        batches = self._source_batches(NORM_BATCHES)
        restore_norm_statistics(self.built.model, batches)

    def _source_batches(self, count: int) -> Iterator[Tensor]:
        """Images of the first training batches."""
        return some_images(self.split, self.recipe, self.built, count)

    def _select_valley(self) -> str:
        """SWAD's weights become the checkpoint; returns how they were chosen."""
        chosen = self.valley.result()
        if chosen is None:
            return (
                "training-domain validation (the loss found no valley to average over)"
            )
        self._use_average(chosen)
        self.folder.save("checkpoint.pt", self._state())
        what = "steps" if self.recipe.averaging.averaging == "swad" else "spans"
        return f"SWAD: mean of {chosen.count} {what} in the valley of the source validation loss"

    def _finish(self) -> None:
        """Measure the selected net and write the results."""
        seconds = self.progress.seconds
        selection = self._select()
        settled = self._settle()
        accuracies = self._final_accuracies()
        target = accuracies.pop(self.split.target_in.name)
        target_out = self.split.target_out
        target_holdout = None if target_out is None else self._accuracy(target_out)
        second = self.split.also_left_out
        of_second = None if second is None else self._accuracy(second)
        if not self.processes.writes:
            return
        results = {
            "method": self.recipe.method,
            "test_domain": self.split.target_in.name,
            "selection": selection,
            "settled": settled,
            "selected_step": self.progress.best_step,
            "steps": self.recipe.optimization.steps,
            "source_validation": accuracies,
            "target": target,
            "target_holdout": target_holdout,
            "also_left_out": of_second,
            "train_seconds": seconds,
            "images_per_second": self._images_trained_on() / seconds,
            "classes": list(self.split.classes),
            "split": {
                "trial_seed": self.recipe.images.trial_seed,
                "holdout": self.recipe.images.holdout,
            },
            "made": provenance(),
        }
        self.folder.write_samples(collect_samples(self.split, self.recipe, self.built))
        write_json(self.folder / "results.json", results)

    def _select(self) -> str:
        """Load the net that the recipe selects into the model and checkpoint.pt; returns how it was chosen."""
        averaging = self.recipe.averaging
        selection = "training-domain validation: best mean held-out accuracy over the source domains"
        if self.recipe.tracking.select == "last":
            selection = "last step"
        if averaging.averaging in VALLEYS:
            selection = self._select_valley()
        self.processes.wait()
        self._load_checkpoint()
        if averaging.norm_batches:
            batches = self._source_batches(averaging.norm_batches)
            restore_norm_statistics(self.built.model, batches)
            self.folder.save("checkpoint.pt", self._state())
            selection += f"; batch norm statistics then taken again from {averaging.norm_batches} batches"
        return selection

    def _final_accuracies(self) -> dict[str, float]:
        """Accuracy on the held-out images of each source domain and on the target domain; writes the predictions."""
        measured = {}
        accuracies = {}
        for subset in (*self.split.validation, self.split.target_in):
            predicted, labels = self._predictions(subset)
            measured[subset.name] = (predicted, labels)
            accuracies[subset.name] = float((predicted == labels).mean())
        self.folder.write_predictions(measured)
        return accuracies

    def _images_trained_on(self) -> int:
        optimization = self.recipe.optimization
        per_domain = optimization.batch_size * optimization.accumulate
        return per_domain * len(self.split.train) * optimization.steps

    def _settle(self) -> dict[str, object] | None:
        """Give a quantized net the biases and scales of its file, so that everything measured from here on is of the net that
        ships; returns what that changed. A net that no target can run stays as it was trained, and the reason is kept."""
        if self.built.table is None:
            return None
        before = {s.name: self._accuracy(s) for s in self.split.validation}
        size = self.recipe.model.image_size
        example = torch.zeros(1, 3, size, size)
        changes: dict[str, object] = {}
        if self.processes.writes:
            try:
                changes = settle_(self.built.model, example).to_json()
                self.folder.save("checkpoint.pt", self._state())
            except ValueError as error:  # ExportError is one
                changes = {"reason": str(error)}
        changes = self.processes.from_first(changes)
        if not self.processes.writes:
            self._load_checkpoint()
        return {"source_validation_before": before} | changes

    def _load_checkpoint(self) -> None:
        """The model as process 0 saved it last."""
        path = self.folder / "checkpoint.pt"
        load_state(self.built.model, self.folder.load("checkpoint.pt"), path)

    def _state(self) -> dict[str, Any]:
        points = list(self.built.table.points) if self.built.table else []
        return {
            "model": self.built.model.state_dict(),
            "classes": list(self.split.classes),
            "sites": points,
            "recipe": self.described,
        }

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
    optimization = recipe.optimization
    quantization = recipe.quantization
    scale_lr = optimization.lr
    sizes = None
    if quantization is not None:
        scale_lr *= quantization.scale_lr_ratio
        if quantization.scale_lr_unit == "scale":
            sizes = scale_sizes
    return parameter_groups(
        model,
        optimization.weight_decay,
        scale_lr,
        decay_norms=optimization.decay_norms,
        scale_sizes=sizes,
    )
