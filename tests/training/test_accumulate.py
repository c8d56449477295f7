"""Gradient accumulation: N microbatches are one batch, and the weights are quantized once for all of them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.domains.synthetic import synthetic_domains
from qat.quantizers.lsq import LSQ, FakeQuantizeLSQ
from qat.quantizers.weight_cache import weight_cache
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, recipe_of
from qat.runs.recipe_checks import check
from qat.surgery.batchnorm import set_norm_mode
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import binary_rules, parameter_groups, quantize_, quantized_weights, uniform_rules
from qat.train import step as step_module
from qat.train.from_recipe import training_step
from qat.train.loop import run
from qat.train.step import microbatches
from tests.nearness import ROUNDING, assert_all_near
from tests.surgery.nets import TinyNet, with_random_norms
from tests.training.test_run import TINY, killed_and_resumed, same_model

DOMAINS = synthetic_domains(per_class=6, image_size=32, seed=0)
IMAGES = 11  # no multiple of the microbatches: their means must be weighed


class Plain:
    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def quantized(rules: Callable[[nn.Module], Any] = lambda model: uniform_rules(4, 4)) -> nn.Module:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    quantize_(model, rules(model), torch.zeros(1, 3, 33, 29))
    calibrate(model, [torch.randn(8, 3, 33, 29)])
    return model.double().train()


def gradients(recipe: Recipe, model: nn.Module, norms: str = "frozen-statistics") -> dict[str, Tensor]:
    """What one step leaves in .grad; float64, so that no activation changes its code because sums are taken in another
    order."""
    model = copy.deepcopy(model)
    set_norm_mode(model, norms)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0), lr=0.0)
    step = training_step(recipe, model, model, optimizer, Plain(), domains=2)
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 33, 29, generator=draw, dtype=torch.float64)
    labels, domains = torch.randint(0, 5, (IMAGES,), generator=draw), torch.arange(IMAGES) * 2 // IMAGES
    outcome = step(images, labels, domains)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": outcome.loss, "logits": outcome.logits}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any("raw_scale" in name for name in found)
    # The loss and its derivative by the logits are float32: some roundings each, and all else float64.
    assert_all_near(found, expected, 16 * ROUNDING)


OBJECTIVES = [
    recipe_of("lsq"),
    recipe_of("sagm-lsq", flatness="sam"),
    recipe_of("sagm-lsq", flatness="gsam", perturb="quantized", rho=0.5),
    recipe_of("gaqat", per_domain=True),
    recipe_of("lsq", damping=0.3),
]


@pytest.mark.parametrize(
    "recipe", OBJECTIVES, ids=lambda r: f"{r.method}-{r.entries().get('flatness', '')}{r.oscillation.damping}"
)
def test_microbatches_are_one_batch(recipe: Recipe) -> None:
    model = quantized()
    whole, parts = (gradients(recipe.changed(accumulate=n), model) for n in (1, 3))
    assert_close(parts, whole)


@pytest.mark.parametrize("recipe", [recipe_of("lsq"), recipe_of("sagm-lsq")], ids=lambda r: r.method)
def test_the_weight_cache_changes_no_gradient(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.changed(accumulate=4)
    once = gradients(recipe, quantized(), "normal")
    monkeypatch.setattr(step_module, "weight_cache", lambda model: nullcontext())
    every_time = gradients(recipe, quantized(), "normal")
    assert_close(once, every_time)


def test_binary_weights_are_quantized_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("biper", accumulate=3, epochs=None)
    once = gradients(recipe, quantized(lambda m: binary_rules(m, ("stem", "head"), input_bits=4)))
    monkeypatch.setattr(step_module, "weight_cache", lambda model: nullcontext())
    assert_close(once, gradients(recipe, quantized(lambda m: binary_rules(m, ("stem", "head"), input_bits=4))))


@pytest.mark.parametrize(
    ("recipe", "passes"), [(recipe_of("lsq", accumulate=5), 1), (recipe_of("sagm-lsq", accumulate=5), 2)]
)
def test_weight_quantizers_run_once_a_pass(recipe: Recipe, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = quantized(), {"forward": 0, "backward": 0}
    whole, back = LSQ.forward, FakeQuantizeLSQ.backward
    shapes = {weight.shape for weight, _ in quantized_weights(model)}

    def counted(self: LSQ, x: Tensor) -> Tensor:
        calls["forward"] += self.is_weight
        return whole(self, x)

    def counted_back(ctx: Any, upstream: Tensor) -> Any:
        calls["backward"] += upstream.shape in shapes
        return back(ctx, upstream)

    monkeypatch.setattr(LSQ, "forward", counted)
    monkeypatch.setattr(FakeQuantizeLSQ, "backward", staticmethod(counted_back))
    gradients(recipe, model)
    assert calls == {"forward": 6 * passes, "backward": 6 * passes}


def weight_quantizer() -> tuple[nn.Module, nn.Parameter, LSQ]:
    model = quantized()
    weight, quantizer = quantized_weights(model)[0]
    assert isinstance(quantizer, LSQ)
    return model, weight, quantizer


@pytest.mark.parametrize("changed", ["weight", "scale"])
def test_a_weight_or_scale_that_changes_in_between_is_no_stale_one(changed: str) -> None:
    model, weight, quantizer = weight_quantizer()
    with weight_cache(model):
        before = quantizer(weight)
        assert quantizer(weight) is before
        with torch.no_grad():
            (weight if changed == "weight" else quantizer.raw_scale).mul_(2.5)
        with pytest.raises(RuntimeError, match=r"'stem\.weight'.* written to between two microbatches"):
            quantizer(weight)
    after = quantizer(weight)
    assert not torch.equal(after, before) and torch.equal(
        after, quantizer.codes(weight) * quantizer.scale[:, None, None, None]
    )
    with weight_cache(model):
        assert torch.equal(quantizer(weight), after)


def test_nothing_is_kept_whatever_happens_inside() -> None:
    model, weight, quantizer = weight_quantizer()
    with pytest.raises(ZeroDivisionError), weight_cache(model):
        quantizer(weight).sum().backward()
        raise ZeroDivisionError
    assert weight.grad is None and "forward" not in vars(quantizer)
    quantizer(weight).sum().backward()
    assert weight.grad is not None


def test_computed_weights_and_evaluation_pass_through() -> None:
    model, weight, quantizer = weight_quantizer()
    with weight_cache(model):
        with torch.no_grad():
            assert not quantizer(weight).requires_grad
        assert quantizer(weight * 2).grad_fn is not None and quantizer(weight * 2) is not quantizer(weight * 2)
        assert quantizer(weight).is_leaf


def test_every_image_is_in_one_microbatch_and_domains_are_shared_out() -> None:
    assert [list(range(12))[p] for p in microbatches(12, 3)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [list(range(2))[p] for p in microbatches(2, 3)] == [[0], [1]]


@pytest.mark.slow
def test_a_run_in_microbatches_is_the_run_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = TINY | {"batch_size": 2, "steps": 3, "evaluate_every": 1, "norms": "frozen-statistics"}
    parts = recipe_of("lsq", **small, accumulate=2, out=tmp_path / "parts")
    whole = run(parts.changed(batch_size=4, accumulate=1, out=tmp_path / "whole"), DOMAINS)
    folder = run(parts, DOMAINS)
    first, second = ([e["loss"] for e in f.metrics() if "loss" in e] for f in (folder, whole))
    assert len(first) == 3
    # The first step sees the same weights; an activation at a rounding edge may fall either way in another batch size.
    assert first[0] == pytest.approx(second[0], rel=1e-3)
    resumed = killed_and_resumed(parts.changed(out=tmp_path / "cut"), 1, monkeypatch)
    assert same_model(folder, resumed)


def test_impossible_values_are_named() -> None:
    with pytest.raises(RecipeError, match="--accumulate must be at least 1, got 0"):
        check(recipe_of("fp", accumulate=0))
    with pytest.raises(RecipeError, match="--accumulate: groupdro"):
        check(recipe_of("fp", accumulate=2, domain_loss="groupdro"))
