"""SAM, ASAM, GSAM and SAGM against NumPy in float64, and what a perturbation may leave after_quantizer: nothing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qat.objectives.contract import Gradients, erm
from qat.objectives.replay import replay_of
from qat.objectives.sharpness import Perturbation, asam, gsam, perturbed, sagm, sam
from qat.quantizers.lsq import LSQWeight
from qat.quantizers.spec import QuantSpec
from tests.nearness import assert_near
from tests.objectives.nets import Problem, one_scale, two_layer_gradients, two_layers

NORM = 1e-9  # of the largest gradient: float64, and the published codes' 1e-12 in the denominators


def numpy_branches(problem: Problem, move) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Flat task and perturbed gradients; `move(flat gradient, flat parameters)` displaces the parameters."""
    a, b = (p.detach().numpy() for p in problem.parameters)
    x, labels = problem.x.numpy(), problem.target.numpy()
    _, by_a, by_b = two_layer_gradients(a, b, x, labels)
    task, values = np.concatenate([by_a.ravel(), by_b.ravel()]), np.concatenate([a.ravel(), b.ravel()])
    there = values + move(task, values)
    _, by_a, by_b = two_layer_gradients(there[: a.size].reshape(a.shape), there[a.size :].reshape(b.shape), x, labels)
    return task, np.concatenate([by_a.ravel(), by_b.ravel()])


def flat(problem: Problem) -> np.ndarray:
    return torch.cat([p.grad.flatten() for p in problem.parameters]).numpy()


def test_sam_against_numpy() -> None:
    problem = two_layers()
    task, there = numpy_branches(problem, lambda g, _: 0.3 * g / np.linalg.norm(g))
    seen = sam(problem.closure, problem.parameters, rho=0.3)
    assert_near(flat(problem), there, NORM)
    assert_near(torch.cat([g.flatten() for g in seen.task]).numpy(), task, NORM)


def test_asam_against_numpy() -> None:
    problem = two_layers()

    def move(g: np.ndarray, values: np.ndarray) -> np.ndarray:
        t = np.abs(values) + 0.01
        return 0.5 * t**2 * g / np.linalg.norm(t * g)

    _, there = numpy_branches(problem, move)
    asam(problem.closure, problem.parameters, rho=0.5)
    assert_near(flat(problem), there, NORM)


def test_gsam_against_numpy() -> None:
    problem = two_layers()
    task, there = numpy_branches(problem, lambda g, _: 0.3 * g / np.linalg.norm(g))
    unit = there / np.linalg.norm(there)
    across = task - (task @ unit) * unit
    gsam(problem.closure, problem.parameters, rho=0.3, alpha=0.7)
    assert_near(flat(problem), there - 0.7 * across, NORM)


def test_sagm_against_numpy() -> None:
    problem = two_layers()
    task, there = numpy_branches(problem, lambda g, _: (0.3 / np.linalg.norm(g) - 0.2) * g)
    sagm(problem.closure, problem.parameters, rho=0.3, alpha=0.2)
    assert_near(flat(problem), 0.5 * task + 0.5 * there, NORM)


@pytest.mark.parametrize("objective", [sam, asam, gsam, sagm])
def test_without_radius_the_plain_gradient_comes_back_bit_for_bit(objective) -> None:  # type: ignore[no-untyped-def]
    problem = two_layers()
    erm(problem.closure, problem.parameters)
    plain = [p.grad.clone() for p in problem.parameters]
    options = {"alpha": 0.0} if objective in (gsam, sagm) else {}
    objective(problem.closure, problem.parameters, rho=0.0, **options)
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.parameters, plain, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [sam, asam, gsam, sagm])
def test_parameters_are_restored_bit_for_bit(objective) -> None:  # type: ignore[no-untyped-def]
    problem = two_layers()
    before = copy.deepcopy(problem.model.state_dict())
    for _ in range(3):
        objective(problem.closure, problem.parameters, rho=1.7)
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())


def test_restored_although_the_second_pass_fails() -> None:
    problem, passes = two_layers(), [0]
    before = copy.deepcopy(problem.model.state_dict())

    def closure() -> torch.Tensor:
        passes[0] += 1
        if passes[0] == 2:
            raise RuntimeError("out of memory")
        return problem.closure()

    with pytest.raises(RuntimeError, match="out of memory"):
        sagm(closure, problem.parameters, rho=1.0)
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())


def test_a_parameter_without_gradient_in_the_second_pass_is_restored_too() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])
    passes = [0]

    def closure() -> torch.Tensor:
        passes[0] += 1
        loss = model[0].square().sum() + (model[1].square().sum() if passes[0] == 1 else 0)
        loss.backward()
        return loss.detach()

    sam(closure, list(model), rho=1.0)
    assert torch.equal(model[0].detach(), torch.ones(3)) and torch.equal(model[1].detach(), torch.ones(3))
    assert model[0].grad is not None and model[1].grad is None


def test_only_the_chosen_kinds_are_perturbed() -> None:
    problem = two_layers()
    a, b = (p.detach().numpy() for p in problem.parameters)
    x, labels = problem.x.numpy(), problem.target.numpy()
    _, by_a, _ = two_layer_gradients(a, b, x, labels)
    _, then_a, then_b = two_layer_gradients(a + 0.4 * by_a / np.linalg.norm(by_a), b, x, labels)
    sam(problem.closure, problem.parameters, rho=0.4, where=Perturbation(mask=[True, False]))
    assert_near(flat(problem), np.concatenate([then_a.ravel(), then_b.ravel()]), NORM)


class QuantizedLine(nn.Module):
    """y = x · Q(w), so the quantizer's output is the weight that acts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.31, -0.62, 0.13]]))
        self.weight_quantizer = LSQWeight(QuantSpec(2, signed=True), self.weight)
        self.acting: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_quantizer(self.weight)
        self.acting.append(weight.detach().clone())
        return (x * weight).sum(1)


def acting_weights(rho: float, after_quantizer: bool) -> list[torch.Tensor]:
    model = QuantizedLine()
    problem = Problem(model, torch.tensor([[0.3, 0.2, -0.5], [0.1, 0.9, 0.4]]), torch.tensor([1.0, -1.0]))
    where = Perturbation(
        mask=[p is model.weight for p in problem.parameters],
        after_quantizer=((model.weight_quantizer, model.weight),) if after_quantizer else (),
    )
    sam(problem.closure, problem.parameters, rho=rho, where=where)
    return model.acting


def test_a_small_latent_perturbation_is_rounded_away_and_one_after_the_quantizer_is_not() -> None:
    first, second = acting_weights(1e-3, after_quantizer=False)
    assert torch.equal(first, second)  # SAQ's "diminishment"
    first, second = acting_weights(1e-3, after_quantizer=True)
    assert float((second - first).norm()) == pytest.approx(1e-3, rel=1e-4)  # float32


def test_the_move_after_the_quantizer_follows_the_quantized_weights_gradient() -> None:
    first, second = acting_weights(0.2, after_quantizer=True)
    x, t = np.array([[0.3, 0.2, -0.5], [0.1, 0.9, 0.4]]), np.array([1.0, -1.0])
    weight = first.numpy()[0]
    gradient = ((x @ weight - t)[:, None] * x).mean(0)
    assert_near((second - first)[0], 0.2 * gradient / np.linalg.norm(gradient), 1e-5)  # float32


class Noisy(nn.Module):
    """Batch norm and dropout: both must see a second pass as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.norm(x)))


def test_statistics_move_once_a_step_and_both_passes_draw_the_same_mask() -> None:
    torch.manual_seed(0)
    model = Noisy()
    problem = Problem(model, torch.randn(8, 5), torch.arange(8) % 3)
    once = copy.deepcopy(model)
    state = torch.get_rng_state()
    seen: Gradients = sagm(
        problem.closure, problem.parameters, replay_of(model, torch.device("cpu")), rho=0.0, alpha=0.0
    )
    assert all(torch.equal(a, b) for a, b in zip(seen.task, seen.perturbed, strict=True))  # type: ignore[arg-type]
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    Problem(once, problem.x, problem.target).closure()
    assert torch.equal(after, torch.get_rng_state())  # the branch goes on as after one pass
    assert torch.equal(model.norm.running_mean, once.norm.running_mean)  # type: ignore[arg-type]
    assert int(model.norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_perturbed_refuses_unequal_lists() -> None:
    problem = one_scale()
    with pytest.raises(ValueError), perturbed(problem.parameters, []):
        pass
