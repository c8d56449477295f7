"""`qat inspect`: the scales whose two gradients oppose each other most, from a run's scale log."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.terminal import printable
from qat.analysis.scale_view import ScaleView, open_view
from qat.objectives.scale_freeze import FreezeRule
from qat.runs.parts import RecipeError
from qat.runs.records import metrics_of
from qat.runs.run_folder import RunFolder


@dataclass(frozen=True)
class ConflictedScale:
    """One scale over a run.

    conflict: share of steps (and channels) whose task and smoothing signs differ; cosine: mean over steps; disorder: of the
    last window, None where it got no gradient there, beside fair coins' mean ± two standard deviations; frozen: share of
    steps (and channels); scales: mean over channels at the first and the last recording, None where there is none.
    """

    name: str
    kind: str
    channels: int
    conflict: float
    cosine: float
    disorder: float | None
    coin_low: float
    coin_high: float
    frozen: float
    scale_start: float | None
    scale_end: float | None

    def __str__(self) -> str:
        """The columns after the name."""
        return (
            f"{self.kind:<6}  {self.channels:>8}  {self.conflict:>8.1%}  {self.cosine:>+6.3f}  "
            f"{_disorder(self.disorder):>8} ({self.coin_low:.2f}-{self.coin_high:.2f})  {self.frozen:>7.1%}  "
            f"{_scale(self.scale_start)} -> {_scale(self.scale_end)}"
        )


@dataclass(frozen=True)
class Inspection:
    """scales: most conflicted first. below, coin_below: mean share of scales beyond the threshold at windows' ends, and the
    share fair coins would give; silent: scales that never got a gradient, which count in neither; first_step, last_step:
    training steps of the recorded steps."""

    run: str
    method: str
    steps: int
    window: int
    windows: int
    threshold: str
    below: float
    coin_below: float
    silent: tuple[str, ...]
    first_step: int | None
    last_step: int | None
    scales: tuple[ConflictedScale, ...]

    def __str__(self) -> str:
        names = [printable(s.name) for s in self.scales]
        width = max(map(len, names))
        lines = [
            f"{printable(self.run)}: {printable(self.method)}, {self.steps} steps, {self.windows} windows of "
            f"K = {self.window}; threshold: {self.threshold}",
            f"beyond the threshold: {self.below:.2%} of the scales, mean over windows; fair coins: {self.coin_below:.2%}",
        ]
        if self.silent:
            lines.append(
                f"without any gradient: {len(self.silent)} scales: {_first(self.silent)}"
            )
        lines.append("")
        lines.append(
            f"{'scale':<{width}}  kind    channels  conflict  cosine  disorder (fair coin)   frozen  "
            f"value {_at(self.first_step)} -> {_at(self.last_step)}"
        )
        for name, scale in zip(names, self.scales, strict=True):
            lines.append(f"{name:<{width}}  {scale}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, for a JSON file."""
        return asdict(self)


def inspect_run(path: Path, top: int = 10) -> Inspection:
    """The `top` most conflicted scales of a run. Raises RecipeError for a run without a scale log, and for top < 1."""
    if top < 1:
        raise RecipeError(f"--top must be positive, got {top}")
    view = open_view(path)
    folder = RunFolder.open(path)
    below, coin_below = view.share_below(np.arange(len(view.names)))
    silent = []
    always_silent = np.asarray(view.silent.all(axis=0))
    for index, name in enumerate(view.names):
        if always_silent[index]:
            silent.append(name)
    all_silent = len(silent) == len(view.names)
    metrics = metrics_of(folder)
    recorded = _recorded(metrics)
    return Inspection(
        run=str(path),
        method=folder.recipe().method,
        steps=view.steps,
        window=view.width,
        windows=len(view.ends),
        threshold=threshold_text(view.rule),
        below=0.0 if all_silent else float(np.nanmean(below)),
        coin_below=0.0 if all_silent else float(np.nanmean(coin_below)),
        silent=tuple(silent),
        first_step=recorded[0]["step"] if recorded else None,
        last_step=recorded[-1]["step"] if recorded else None,
        scales=tuple(conflicted(view, metrics, top)),
    )


def conflicted(
    view: ScaleView, metrics: Sequence[Mapping[str, Any]], top: int
) -> list[ConflictedScale]:
    """The first `top` scales by share of steps in sign conflict, ties by cosine. metrics: the run's log entries."""
    recorded = _recorded(metrics)
    first_scales: Mapping[str, float] = {}
    last_scales: Mapping[str, float] = {}
    if recorded:
        first_scales = recorded[0]["scales"]
        last_scales = recorded[-1]["scales"]
    conflict = view.mean("conflict")
    cosine = view.mean("cosine")
    frozen = view.mean("frozen")
    two_deviations = 1 / np.sqrt(view.comparisons)  # of a fair coin
    scales = []
    for index in np.lexsort((cosine, -conflict))[:top]:
        name = view.names[index]
        spread = float(two_deviations[index])
        scale = ConflictedScale(
            name=name,
            kind=view.kinds[index],
            channels=int(view.channels[index]),
            conflict=float(conflict[index]),
            cosine=float(cosine[index]),
            disorder=_or_none(view.disorder[-1, index]),
            coin_low=max(0.0, 0.5 - spread),
            coin_high=min(1.0, 0.5 + spread),
            frozen=float(frozen[index]),
            scale_start=first_scales.get(name),
            scale_end=last_scales.get(name),
        )
        scales.append(scale)
    return scales


def threshold_text(rule: FreezeRule) -> str:
    """The rule's threshold in words."""
    text = f"z = {rule.z:g}"
    if rule.threshold is not None:
        text = f"r = {rule.threshold:g}"
    if rule.weight_threshold is not None:
        text += f", weights r = {rule.weight_threshold:g}"
    if rule.when != "below":
        text += ", above its mirror image"
    return text


def _recorded(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in metrics if entry.get("scales")]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _disorder(value: float | None) -> str:
    return "silent" if value is None else f"{value:.3f}"


def _first(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more


def _at(step: int | None) -> str:
    return "-" if step is None else f"@{step}"


def _scale(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
