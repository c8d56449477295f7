import numpy as np
import pytest
import torch

from qat.quantizers.lsq import least_squares_step
from qat.quantizers.spec import QuantSpec
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, quantizers, uniform_rules
from tests.surgery.nets import TinyNet, with_random_norms

X = torch.randn(2, 3, 33, 29, generator=torch.Generator().manual_seed(0))


def fresh() -> torch.nn.Module:
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
    """Residual branches often end in a norm whose gamma is 0 at first; its gradient must pass the quantizer behind it."""
    model = fresh()
    model.block.bn2.weight.data.zero_()
    model.block.bn2.bias.data.zero_()
    calibrate(model, [X])
    model.train()(X).square().mean().backward()
    assert bool((model.block.bn2.weight.grad != 0).all())


@pytest.mark.parametrize("init", ["lsq", "mse"])
def test_calibration_is_idempotent_and_leaves_batch_norm_and_mode_alone(init: str) -> None:
    model = fresh().train()
    statistics = model.bn.running_mean.clone()
    first = calibrate(model, [X, X + 1], init)
    second = calibrate(model, [X, X + 1], init)
    assert first == second
    assert model.training and model.block.training
    assert torch.equal(model.bn.running_mean, statistics)


def test_clipped_share_and_step_against_numpy() -> None:
    model = fresh()
    row = next(r for r in calibrate(model, [X], "lsq") if r.name == "stem.input")
    x = X.numpy()
    step = 2 * np.abs(x).mean() / np.sqrt(127)
    # the calibration sample adds each batch's two extremes to every element
    assert row.step == pytest.approx(step, rel=2e-3)
    share = ((x / row.step < -128.5) | (x / row.step > 127.5)).mean()
    assert row.clipped == pytest.approx(share, abs=1e-3)


def test_least_squares_step_beats_its_neighbours() -> None:
    values = torch.randn(20_001, generator=torch.Generator().manual_seed(1)).relu_()
    spec = QuantSpec(3, signed=False)
    best = float(least_squares_step(values, spec))

    def error(step: float) -> float:
        v = values.numpy()
        return float(((np.clip(np.rint(v / step), 0, 7) * step - v) ** 2).mean())

    assert all(error(best) <= error(best * factor) for factor in (0.7, 0.85, 1.15, 1.4))


def test_least_squares_steps_per_channel_are_those_of_each_channel_alone() -> None:
    weight = (
        torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
        * torch.tensor([1.0, 0.01, 7, 0])[:, None, None]
    )
    steps = least_squares_step(weight, QuantSpec(4, signed=True, axis=0))
    alone = [float(least_squares_step(w, QuantSpec(4, signed=True))) for w in weight]
    assert steps.tolist() == alone
    assert steps[3] > 0


def test_no_batch_and_an_unreached_quantizer_raise() -> None:
    with pytest.raises(ValueError, match="no batch"):
        calibrate(fresh(), [])
    model = fresh()
    model.head.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"no batch reached quantizer 'head.input'"):
        calibrate(model, [X])


def test_uncalibrated_model_raises_naming_the_first_quantizer() -> None:
    model = fresh()
    with pytest.raises(RuntimeError, match=r"'stem.input' has no step yet"):
        model(X)
    assert all(q.initialized == q.is_weight for q in quantizers(model).values())
