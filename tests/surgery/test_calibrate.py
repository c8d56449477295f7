import numpy as np
import pytest
import torch
from torch import Tensor

from qat.quantizers.lsq import least_squares_scale
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.rules import with_options
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from qat.words import Init
from tests.narrow import present
from tests.surgery.nets import TinyNet, with_random_norms

X = torch.randn(2, 3, 33, 29, generator=torch.Generator().manual_seed(0))


def fresh() -> TinyNet:
    torch.manual_seed(0)
    model = with_random_norms(TinyNet())
    quantize_(model, uniform_rules(4, 4, ("stem", "head")), X)
    return model


def test_sign_comes_from_data() -> None:
    model = fresh()
    rows = {row.name: row.spec for row in calibrate(model, [X])}
    assert rows["stem.input"].signed and not rows["block.conv2.input"].signed and rows["block.bn2#batch_norm0"].signed
    model = fresh()
    assert not {row.name: row.spec for row in calibrate(model, [X.abs()])}["stem.input"].signed


def test_a_branch_that_starts_at_zero_can_come_to_life() -> None:
    """Residual branches often end in a norm whose gamma is 0 at first; its gradient must pass the quantizer that follows."""
    model = fresh()
    model.block.bn2.weight.data.zero_()
    model.block.bn2.bias.data.zero_()
    calibrate(model, [X])
    model.train()(X).square().mean().backward()
    assert bool((model.block.bn2.weight.grad != 0).all())


@pytest.mark.parametrize("init", ["lsq", "mse"])
def test_calibration_is_idempotent_and_leaves_batch_norm_and_mode_alone(init: Init) -> None:
    model = fresh().train()
    statistics = model.bn.running_mean.clone()
    first = calibrate(model, [X, X + 1], init)
    second = calibrate(model, [X, X + 1], init, overwrite=True)
    assert first == second
    assert model.training and model.block.training
    assert torch.equal(present(model.bn.running_mean), statistics)


def test_clipped_share_and_scale_against_numpy() -> None:
    model = fresh()
    row = next(r for r in calibrate(model, [X], "lsq") if r.name == "stem.input")
    x = X.numpy()
    scale = 2 * np.abs(x).mean() / np.sqrt(127)
    # the calibration sample adds each batch's two extremes to every element
    assert row.scale == pytest.approx(scale, rel=2e-3)
    share = ((x / row.scale < -128.5) | (x / row.scale > 127.5)).mean()
    assert row.clipped == pytest.approx(share, abs=1e-3)


def test_least_squares_scale_beats_its_neighbours() -> None:
    values = torch.randn(20_001, generator=torch.Generator().manual_seed(1)).relu_()
    spec = QuantSpec(3, signed=False)
    best = float(least_squares_scale(values, spec))

    def error(scale: float) -> float:
        v = values.numpy()
        return float(((np.clip(np.rint(v / scale), 0, 7) * scale - v) ** 2).mean())

    assert all(error(best) <= error(best * factor) for factor in (0.7, 0.85, 1.15, 1.4))


def test_least_squares_scales_per_channel_are_those_of_each_channel_alone() -> None:
    weight = (
        torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
        * torch.tensor([1.0, 0.01, 7, 0])[:, None, None]
    )
    scales = least_squares_scale(weight, QuantSpec(4, signed=True, axis=0))
    alone = [float(least_squares_scale(w, QuantSpec(4, signed=True))) for w in weight]
    assert scales.tolist() == alone
    assert scales[3] > 0


def test_no_batch_and_an_unreached_quantizer_raise() -> None:
    with pytest.raises(ValueError, match="no batch"):
        calibrate(fresh(), [])
    model = fresh()
    model.head.forward = lambda input: input  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"no batch reached quantizer 'head.input'"):
        calibrate(model, [X])


def test_uncalibrated_model_raises_naming_the_first_quantizer() -> None:
    model = fresh()
    with pytest.raises(RuntimeError, match=r"'stem.input' has no scale yet"):
        model(X)
    assert all(q.initialized == q.is_weight for q in quantizers(model).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_set_no_scale(bad: float) -> None:
    model = fresh()
    images = X.clone()
    images[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"batch 1: 1 of 5,742 values"):
        calibrate(model, [X, images])
    assert not any(q.initialized for q in quantizers(model).values() if not q.is_weight)


def test_a_layer_that_gives_nan_is_found_by_the_quantizer_after_it_and_nothing_is_set() -> None:
    model = fresh()
    model.block.bn1.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"quantizer 'block\.[^']*': .* values are nan"):
        calibrate(model, [X])
    assert not any(q.initialized for q in quantizers(model).values() if not q.is_weight)


@pytest.mark.parametrize("init", ["lsq", "mse"])
def test_a_weight_that_is_not_finite_gets_no_scale(init: Init) -> None:
    model = with_random_norms(TinyNet())
    model.stem.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'stem\.weight'.*nan"):
        quantize_(model, uniform_rules(4, 4, ("stem", "head")), X, weight_init=init)


def test_learned_scales_are_not_overwritten_unasked() -> None:
    model = fresh()
    calibrate(model, [X])
    learned = {name: q.raw_scale.detach().mul_(1.25).clone() for name, q in quantizers(model).items()}
    with pytest.raises(ValueError, match="have their scales already"):
        calibrate(model, [X])
    assert all(torch.equal(q.raw_scale, learned[name]) for name, q in quantizers(model).items())
    loaded = fresh()
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="have their scales already"):
        calibrate(loaded, [X])
    calibrate(loaded, [X], overwrite=True)
    assert not torch.equal(quantizers(loaded)["head.input"].raw_scale, learned["head.input"])


@pytest.mark.parametrize(
    ("bits", "message"), [((3, 3), "bits 4, this model has bits 3"), ((4, 3), "bits 4"), ((3, 4), "bits 4")]
)
def test_a_state_dict_of_another_grid_is_refused(bits: tuple[int, int], message: str) -> None:
    trained = fresh()
    calibrate(trained, [X])
    other = with_random_norms(TinyNet())
    quantize_(other, uniform_rules(*bits, ("stem", "head")), X)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(trained.state_dict())


@pytest.mark.parametrize("change", [{"power_of_two": True}, {"symmetric": True}])
def test_a_state_dict_of_another_kind_of_grid_is_refused(change: dict[str, bool]) -> None:
    trained = fresh()
    other = with_random_norms(TinyNet())
    rules = with_options(uniform_rules(4, 4, ("stem", "head")), weight=change, source={})
    quantize_(other, rules, X)
    with pytest.raises(ValueError, match=f"this model has {next(iter(change))} True"):
        other.load_state_dict(trained.state_dict())


@pytest.mark.parametrize("had_grid", [True, False])
def test_a_state_dict_of_earlier_versions_still_loads(had_grid: bool) -> None:
    """They saved a dict; the first ones without the grid."""
    trained = fresh()
    calibrate(trained, [X])
    old = trained.state_dict()
    for name, quantizer in quantizers(trained).items():
        spec = quantizer.spec
        entry: dict[str, object] = {"signed": spec.signed, "initialized": quantizer.initialized}
        if had_grid:
            fields = ("bits", "axis", "offset", "power_of_two", "symmetric")
            entry["grid"] = {field: getattr(spec, field) for field in fields}
        (key,) = [path for path, module in trained.named_modules() if module is quantizer]
        assert isinstance(old[f"{key}._extra_state"], Tensor), name
        old[f"{key}._extra_state"] = entry
    model = fresh()
    model.load_state_dict(old)
    assert torch.equal(model.eval()(X), trained.eval()(X))
