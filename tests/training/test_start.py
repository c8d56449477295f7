"""What a run starts from: schedules, delayed quantization (QT-DoG), a teacher; and what of the neighbours the loop owes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.domains.splits import leave_one_domain_out
from qat.domains.synthetic import synthetic_domains
from qat.runs.build import build
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, recipe_of
from qat.runs.recipe_checks import check
from qat.runs.run_folder import RunFolder
from qat.surgery.backbones import clip_gradients
from qat.surgery.calibrate import begin, pause, paused
from qat.surgery.swap import quantizers
from qat.train import loop
from qat.train import step as training_step
from qat.train.from_recipe import scale_groups
from qat.train.loop import run
from qat.train.start import is_sgd, refined, schedule_of, teacher_of
from tests.narrow import tensor
from tests.quick import slow_but

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "steps": 6, "batch_size": 4, "evaluate_every": 2, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe_of("fp", **TINY, out=tmp_path_factory.mktemp("start") / "fp"), DOMAINS).path


def by_the_book(norms: list[float], power: int) -> list[float]:
    """Algorithm 1, one step at a time: median window of a tenth, first norm before the run, mirrored after it."""
    total, half = len(norms), int(0.1 * len(norms)) // 2
    smooth = []
    for t in range(total):
        window = []
        for k in range(t - half, t + half + 1):
            k = max(k, 0)
            window.append(norms[k if k < total else 2 * (total - 1) - k])
        smooth.append(sorted(window)[half])
    weights = [g**-power for g in smooth]
    rates = [weights[t] * sum(weights[t + 1 :]) for t in range(total)]
    return [r / max(rates) for r in rates]


@pytest.mark.parametrize("power", [1, 2])
def test_the_refined_schedule_is_the_papers(power: int) -> None:
    norms = np.random.default_rng(0).uniform(0.5, 3, size=83) * np.linspace(4, 1, 83)
    assert np.allclose(refined(norms, 83, power), by_the_book(norms.tolist(), power), atol=1e-12)


def test_constant_norms_refine_to_linear_decay_and_small_norms_late_to_larger_rates() -> None:
    factors = refined(np.ones(400), 100, 1)
    assert np.allclose(factors, np.arange(99, -1, -1) / 99)
    falling = refined(np.linspace(10, 1, 100), 100, 2)
    assert falling.argmax() > 50 and falling[-1] == 0 and falling.max() == 1


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("sgd", True), ("lookahead_sgdw", True), ("momentum", True), ("adam", False), ("lion", False)],
)
def test_which_optimizers_step_along_the_gradient(optimizer: str, expected: bool) -> None:
    assert is_sgd(optimizer) is expected


def test_schedules_at_their_ends() -> None:
    at = {
        name: schedule_of(recipe_of("fp", schedule=name, steps=10).optimization)
        for name in ("cosine", "linear", "constant")
    }
    assert [at["linear"](t) for t in (0, 5, 9, 10)] == [1, 0.5, pytest.approx(0.1), 0]
    assert [at["cosine"](t) for t in (0, 5, 10)] == [1, pytest.approx(0.5), pytest.approx(0)]
    assert at["constant"](10) == 1


def test_a_run_can_refine_the_schedule_of_the_last_one(teacher: Path, tmp_path: Path) -> None:
    for optimizer, entry, power in (("adam", "gradient_l1_norm", 1), ("sgd", "gradient_norm", 2)):
        recipe = recipe_of("fp", **TINY, schedule="refined", refine_from=teacher, optimizer=optimizer)
        norms = [e[entry] for e in RunFolder.open(teacher).metrics() if entry in e]
        assert len(norms) == 6
        found = [schedule_of(recipe.optimization)(t) for t in range(6)]
        assert np.allclose(found, by_the_book(norms, power), atol=1e-9)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    with pytest.raises(RecipeError, match=r"--refine-from .*gradient_l1_norm"):
        schedule_of(recipe_of("fp", schedule="refined", refine_from=tmp_path).optimization)


def test_the_recorded_norms_are_those_of_the_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def watch(parameters, clipped, limit, mode):  # type: ignore[no-untyped-def]
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double().numpy()
        seen.append((np.abs(flat).sum(), np.sqrt((flat**2).sum())))
        return clip_gradients(parameters, clipped, limit, mode)

    monkeypatch.setattr(training_step, "clip_gradients", watch)
    folder = run(recipe_of("fp", **TINY | {"steps": 2}, clip=1e-3, out=tmp_path / "run"), DOMAINS)
    found = [(e["gradient_l1_norm"], e["gradient_norm"]) for e in folder.metrics() if "gradient_norm" in e]
    assert np.allclose(found, seen, rtol=1e-4)


def test_agc_clips_by_units_and_leaves_the_classifier_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = []

    def watch(parameters, clipped, limit, mode):  # type: ignore[no-untyped-def]
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        norm = clip_gradients(parameters, clipped, limit, mode)
        inside = {id(p) for p in clipped}
        for p, old in zip(parameters, before, strict=True):
            if old is None:
                continue
            if id(p) not in inside:
                assert torch.equal(p.grad, old)
                checked.append(tuple(p.shape))
            elif p.dim() == 4:
                for row in range(len(p)):
                    allowed = limit * max(float(p.detach()[row].norm()), 1e-3)
                    assert float(p.grad[row].norm()) == pytest.approx(min(float(old[row].norm()), allowed), rel=1e-4)
        return norm

    monkeypatch.setattr(training_step, "clip_gradients", watch)
    run(recipe_of("fp", **TINY | {"steps": 2}, clip=0.01, clip_mode="agc", out=tmp_path / "run"), DOMAINS)
    assert {len(shape) for shape in checked} == {1, 2}  # the head's weight and bias, every step


def qtdog(out: Path, **changes: object) -> Recipe:
    return recipe_of("qtdog", **TINY | {"steps": 8} | changes, quant_start_step=4, out=out)


@pytest.mark.slow
def test_delayed_quantization_is_full_precision_before_and_its_scales_move_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scales are in the optimizer from the beginning (QT-DoG's published code forgets them), stand still until the start,
    and train after it; before it, weights and predictions are exactly those of a full-precision run."""
    history: list[dict[str, torch.Tensor]] = []
    whole = loop._Trainer._train

    def watched(self: loop._Trainer, *args: object) -> None:
        whole(self, *args)  # type: ignore[arg-type]
        found = quantizers(self.built.model)
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert all(id(q.raw_scale) in owned for q in found.values())
        history.append({n: q.raw_scale.detach().clone() for n, q in found.items()})

    monkeypatch.setattr(loop._Trainer, "_train", watched)
    folder = run(qtdog(tmp_path / "qtdog"), DOMAINS)
    assert len(history) == 8 and history[0]
    for name in history[0]:
        assert torch.equal(history[0][name], history[3][name])
        assert not torch.equal(history[4][name], history[7][name]), f"{name} never moved"
    monkeypatch.undo()
    plain = run(recipe_of("fp", **TINY | {"steps": 8}, lr=5e-4, out=tmp_path / "fp"), DOMAINS)
    losses = [[e["loss"] for e in f.metrics() if "loss" in e] for f in (folder, plain)]
    assert losses[0][:4] == losses[1][:4] and losses[0][4] != losses[1][4]
    assert folder.results()["selected_step"] > 4  # what is selected is quantized


def test_begin_sets_weight_scales_from_the_weights_of_now() -> None:
    split = leave_one_domain_out(DOMAINS, "sketch", holdout_fraction=0.2, trial_seed=0)
    built = build(qtdog(Path("unused")), len(split.classes))
    model, x = built.model.eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = build(recipe_of("fp", **TINY), len(split.classes)).model.eval()
    floats = {k: v for k, v in model.state_dict().items() if "quantizer" not in k}
    reference.load_state_dict(floats)
    pause(model)
    assert paused(model) and torch.equal(model(x), reference(x))
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "weight_quantizer"):
                layer.weight.mul_(10)
    begin(model, [x], "lsq")
    assert not paused(model)
    for layer in model.modules():
        if hasattr(layer, "weight_quantizer"):
            weight = tensor(layer.weight)
            w = weight.detach().double().numpy().reshape(len(weight), -1)
            expected = 2 * np.abs(w).mean(1) / np.sqrt(63)
            assert np.allclose(tensor(layer.weight_quantizer.scale), expected, rtol=1e-5)


@pytest.mark.slow
def test_oscillation_and_damping_rest_until_quantization_begins(tmp_path: Path) -> None:
    recipe = qtdog(tmp_path / "run", freeze_oscillating=0.005, damping=1e-3)
    folder = run(recipe, DOMAINS)
    plain = run(qtdog(tmp_path / "plain"), DOMAINS)
    losses = [[e["loss"] for e in f.metrics() if "loss" in e] for f in (folder, plain)]
    assert losses[0][:4] == losses[1][:4] and losses[0][4] > losses[1][4]
    assert [e["step"] for e in folder.metrics() if "oscillating" in e] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "averaging", [pytest.param("ema", marks=pytest.mark.slow), pytest.param("swad", marks=pytest.mark.slow)]
)
def test_an_averaged_and_delayed_run_resumes_to_the_same_result(
    averaging: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = 1 if averaging == "swad" else 3
    options = {"averaging": averaging, "steps": 9, "evaluate_every": every, "oscillation": True}
    if averaging == "ema":
        options["ema_decay"] = 0.6
    whole = loop._Trainer._train

    def dies(self: loop._Trainer, *args: object) -> None:
        if self.progress.step == 8:
            raise KeyboardInterrupt
        whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop._Trainer, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        run(qtdog(tmp_path / "cut", **options), DOMAINS)
    monkeypatch.setattr(loop._Trainer, "_train", whole)
    resumed = run(qtdog(tmp_path / "cut", resume=True, **options), DOMAINS)
    straight = run(qtdog(tmp_path / "whole", **options), DOMAINS)
    first, second = resumed.load("checkpoint.pt")["model"], straight.load("checkpoint.pt")["model"]
    assert all(torch.equal(v, second[k]) for k, v in first.items() if isinstance(v, torch.Tensor))
    assert resumed.results()["selection"] == straight.results()["selection"]


def test_distillation_from_a_run_changes_the_loss_and_refuses_what_cannot_teach(teacher: Path, tmp_path: Path) -> None:
    base = {"init_from": teacher} | TINY | {"steps": 2}
    plain = run(recipe_of("lsq", **base, out=tmp_path / "plain"), DOMAINS)
    taught = run(recipe_of("lsq", **base, teacher=teacher, out=tmp_path / "taught"), DOMAINS)
    losses = [next(e["loss"] for e in f.metrics() if "loss" in e) for f in (plain, taught)]
    assert losses[0] != losses[1]
    split = leave_one_domain_out(DOMAINS, "sketch", holdout_fraction=0.2, trial_seed=0)
    recipe = recipe_of("lsq", **TINY, teacher=teacher)
    built = build(recipe, len(split.classes))
    with pytest.raises(RecipeError, match="--test-domain"):
        teacher_of(recipe.changed(test_domain="photo"), split, built)
    with pytest.raises(RecipeError, match="normalised by other means"):
        teacher_of(recipe, split, dataclasses.replace(built, mean=(0.1, 0.2, 0.3)))
    with pytest.raises(RecipeError, match="distil from a full-precision one"):
        teacher_of(recipe.changed(teacher=plain.path), split, built)


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [
        (recipe_of("lsq", distill_weight=1.5), "--distill-weight"),
        (recipe_of("lsq", damping=-1), "--damping"),
        (recipe_of("lsq", freeze_oscillating=1.0), "--freeze-oscillating"),
        (recipe_of("fp", ema_decay=1.0), "--ema-decay"),
        (recipe_of("fp", dropout=1.0), "--dropout"),
        (recipe_of("fp", clip=0.0), "--clip"),
        (recipe_of("sagm", per_domain=True, domain_loss="coral"), "--per-domain"),
    ],
)
def test_impossible_options_name_their_flag(recipe: Recipe, flag: str) -> None:
    with pytest.raises(RecipeError, match=flag):
        check(recipe)


def test_scale_groups_by_layer_or_each_by_itself() -> None:
    model = build(recipe_of("lsq", **TINY), 7).model
    found = quantizers(model)
    by_layer, each = scale_groups(model), scale_groups(model, each=True)
    assert len(each) == len(found) and all(len(g) == 1 for g in each)
    assert max(len(g) for g in by_layer) == 2 and sum(len(g) for g in by_layer) == len(found)


@pytest.mark.parametrize("loss", slow_but(["coral"], ["groupdro", "coral", "hessian"]))
def test_domain_losses_train_with_two_passes(loss: str, tmp_path: Path) -> None:
    folder = run(recipe_of("sagm-lsq", **TINY | {"steps": 2}, domain_loss=loss, out=tmp_path / loss), DOMAINS)
    assert all(np.isfinite(e["loss"]) for e in folder.metrics() if "loss" in e)
    if loss == "groupdro":
        weights = folder.load("last.pt")["step"]["domain_weights"]
        assert weights.sum() == pytest.approx(1, abs=1e-6) and not torch.equal(weights, torch.full((3,), 1 / 3))
