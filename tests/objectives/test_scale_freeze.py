"""Gradient disorder and the masks it makes (`docs/algorithms.md`, GAQAT), against hand-made branches and NumPy."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from qat.objectives.contract import Gradients, erm
from qat.objectives.scale_freeze import FreezeRule, ScaleFreezer
from qat.objectives.sharpness import sagm
from tests.narrow import present
from tests.nearness import ROUNDING, assert_near
from tests.objectives.nets import OneScale, Problem, one_scale, one_scale_gradients

MIX = (0.5, 0.5)


def flips(signs: list[float]) -> float:
    """Sign flips per comparison, counted the slow way."""
    last, count = 0.0, 0
    for value in signs:
        if value != 0:
            count += last != 0 and (value > 0) != (last > 0)
            last = value
    return count / (len(signs) - 1)


class Branches:
    """Feeds a freezer with given task and smooth gradients of some scales and keeps what `.grad` became."""

    def __init__(self, sizes: list[int], rule: FreezeRule, weights: list[bool] | None = None) -> None:
        self.scales = [Parameter(torch.ones(n) if n > 1 else torch.tensor(1.0)) for n in sizes]
        self.freezer = ScaleFreezer(
            [f"s{i}" for i in range(len(sizes))], self.scales, weights or [True] * len(sizes), rule
        )

    def step(self, task: list[Tensor], smooth: list[Tensor]) -> list[Tensor | None]:
        for scale, t, s in zip(self.scales, task, smooth, strict=True):
            scale.grad = (MIX[0] * t + MIX[1] * s).view_as(scale)
        self.seen = self.freezer.mask(Gradients(torch.tensor(0.0), task, smooth, MIX), self.scales)
        return [None if s.grad is None else s.grad.clone() for s in self.scales]


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor(float(v)) for v in values]


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ([1, 1, 1, 1], 0),
        ([1, -1, 1, -1], 1),
        ([1, 1, -1, -1], 1 / 3),
        ([1, 0, 1], 0),
        ([1, 0, -1], 1 / 2),
        ([0, 0, 1], 0),
    ],
)
def test_disorder_of_hand_made_branches(signs: list[float], expected: float) -> None:
    branches = Branches([1], FreezeRule(window=len(signs), policy="never"))
    for sign in signs:
        branches.step(tensors(sign), tensors(0.0))
    assert float(branches.seen.disorder) == pytest.approx(expected)


def test_the_freezer_sees_the_same_disorder_as_the_formula() -> None:
    draw = np.random.default_rng(0).normal(size=(20, 3))
    branches = Branches([1, 1, 1], FreezeRule(window=20, policy="never"))
    for row in draw:
        branches.step(tensors(*row), tensors(0.0, 0.0, 0.0))
    expected = [flips(list(draw[:, i])) for i in range(3)]
    assert_near(branches.seen.disorder, expected, 4 * ROUNDING, of=1.0)  # shares, in float32


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5]), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_the_freezer_counts_zeros_as_the_sign_before_them(branch: list[float]) -> None:
    branches = Branches([1], FreezeRule(window=len(branch), policy="never"))
    for value in branch:
        branches.step(tensors(value), tensors(0.0))
    assert float(branches.seen.disorder) == pytest.approx(flips(branch))


def test_per_channel_scales_pool_their_flips_and_report_cosine_and_conflict() -> None:
    branches = Branches([2], FreezeRule(window=4, policy="never"))
    for first, second in ((1.0, 1.0), (1.0, -1.0), (1.0, 1.0), (1.0, -1.0)):
        branches.step([torch.tensor([first, second])], [torch.tensor([-1.0, second])])
    assert float(branches.seen.disorder) == pytest.approx((0 + 3) / 6)
    assert float(branches.seen.conflict) == 0.5
    assert float(branches.seen.cosine) == pytest.approx(((1 * -1) + (-1 * -1)) / 2)


def settled(step: int) -> list[Tensor]:
    """A scale whose task gradient has settled, and one whose gradient alternates."""
    return tensors(1.0, 1.0 if step % 2 else -1.0)


@pytest.mark.parametrize("branch", ["task", "smooth", "both"])
def test_the_settled_scale_loses_the_named_branch_and_the_other_nothing(branch: str) -> None:
    branches = Branches([1, 1], FreezeRule(window=10, threshold=0.3, branch=branch))  # type: ignore[arg-type]
    for step in range(10):
        before = branches.step(settled(step), tensors(-3.0, -3.0))
        assert before[0] == 0.5 * 1.0 + 0.5 * -3.0  # nothing freezes before a window has passed
    frozen, free = branches.step(settled(10), tensors(-3.0, -3.0))
    assert frozen == {"task": -1.5, "smooth": 0.5, "both": None}[branch]
    assert free == 0.5 * settled(10)[1] - 1.5


def test_rescaled_branches_keep_the_weight_of_both() -> None:
    branches = Branches([1, 1], FreezeRule(window=10, threshold=0.3, rescale=True))
    for step in range(11):
        last = branches.step(settled(step), tensors(-3.0, -3.0))
    assert last[0] == -3.0 and last[1] == 0.5 * settled(10)[1] - 1.5


def test_a_planted_conflict_is_found_within_two_windows_and_released_when_it_ends() -> None:
    draw = np.random.default_rng(1)
    branches = Branches([1, 1], FreezeRule(window=50, z=3.0))

    def run(steps: int, settled_task: bool) -> None:
        for _ in range(steps):
            noise = draw.normal(size=2)
            task = (1 + 0.1 * noise[0], noise[1]) if settled_task else (noise[0], noise[1])
            branches.step(tensors(*task), tensors(-1.0, 0.1))

    run(100, settled_task=True)
    assert branches.freezer.frozen.tolist() == [True, False]
    run(50, settled_task=True)
    assert branches.freezer.frozen.tolist() == [True, False]  # seen while frozen: the history goes on
    run(50, settled_task=False)
    assert branches.freezer.frozen.tolist() == [False, False]


def test_z_is_a_significance_against_coin_flips_and_r_a_plain_bound() -> None:
    window = 101  # 100 comparisons: the bound of z = 3 is 0.5 - 3 · 0.05 = 0.35
    for below, flip_count in ((True, 34), (False, 36)):
        branch = [1.0] * (window - flip_count) + [(-1.0) ** (i + 1) for i in range(flip_count)]
        assert flips(branch) == pytest.approx(flip_count / 100)
        branches = Branches([1], FreezeRule(window=window, z=3.0))
        for value in branch:
            branches.step(tensors(value), tensors(0.0))
        assert bool(branches.freezer.frozen[0]) is below


def test_above_freezes_the_disordered_one() -> None:
    branches = Branches([1, 1], FreezeRule(window=10, threshold=0.3, when="above"))
    for step in range(10):
        branches.step(settled(step), tensors(0.0, 0.0))
    assert branches.freezer.frozen.tolist() == [False, True]


def test_thresholds_and_targets_apart() -> None:
    half = [1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0]  # disorder 4/9
    for rule, expected in (
        (FreezeRule(window=10, threshold=0.3, weight_threshold=0.6), [True, False]),
        (FreezeRule(window=10, threshold=0.6, weight_threshold=0.3), [False, True]),
        (FreezeRule(window=10, threshold=0.6, targets="weights"), [True, False]),
        (FreezeRule(window=10, threshold=0.6, targets="activations"), [False, True]),
    ):
        branches = Branches([1, 1], rule, weights=[True, False])
        for value in half:
            branches.step(tensors(value, value), tensors(0.0, 0.0))
        assert branches.freezer.frozen.tolist() == expected, rule


def test_channels_decided_together_or_each_by_itself() -> None:
    for per_channel, expected in ((False, [False] * 3), (True, [True, False, False])):
        branches = Branches([3], FreezeRule(window=10, threshold=0.3, per_channel=per_channel))
        for step in range(10):
            sign = 1.0 if step % 2 else -1.0
            branches.step([torch.tensor([1.0, sign, sign])], [torch.zeros(3)])
        assert branches.freezer.frozen.tolist() == expected


@pytest.mark.parametrize("per_channel", [False, True])
def test_scales_without_gradient_are_not_taken_for_calm(per_channel: bool) -> None:
    """A dead scale stays free, and dead channels do not make an alternating channel look calm."""
    branches = Branches([1, 4], FreezeRule(window=10, threshold=0.3, per_channel=per_channel))
    for step in range(10):
        alternating = torch.tensor([1.0 if step % 2 else -1.0, 0.0, 0.0, 0.0])
        branches.step([torch.tensor(0.0), alternating], [torch.tensor(1.0), torch.ones(4)])
    assert not branches.freezer.frozen.any()


def test_policies() -> None:
    def frozen_after(policy: str, steps: int) -> list[list[bool]]:
        branches, found = Branches([1] * 8, FreezeRule(window=10, threshold=0.3, policy=policy)), []  # type: ignore[arg-type]
        for step in range(steps):
            calm = step < 10
            sign = 1.0 if calm or step % 2 else -1.0
            branches.step(tensors(sign, sign, *([1.0 if step % 2 else -1.0] * 6)), tensors(*[0.0] * 8))
            if (step + 1) % 10 == 0:
                found.append(branches.freezer.frozen.tolist())
        return found

    two = [True, True] + [False] * 6
    assert frozen_after("disorder", 20) == [two, [False] * 8]
    assert frozen_after("permanent", 20) == [two, two]
    assert frozen_after("always", 20) == [[True] * 8] * 2
    assert frozen_after("never", 20) == [[False] * 8] * 2
    drawn = frozen_after("random", 20)
    assert sum(drawn[0]) == 2 and drawn[1] == [False] * 8


def test_one_branch_is_refused_and_so_is_a_window_of_one() -> None:
    branches = Branches([1], FreezeRule())
    with pytest.raises(ValueError, match="two branches"):
        branches.freezer.mask(Gradients(torch.tensor(0.0)), branches.scales)
    with pytest.raises(ValueError, match="at least 2 steps"):
        FreezeRule(window=1)


def numpy_steps(problem: Problem, rho: float) -> tuple[np.ndarray, np.ndarray]:
    model: OneScale = problem.model  # type: ignore[assignment]
    values = np.array([p.item() for p in (model.w1, model.w2, model.quantizer.raw_scale)])
    x, t = problem.x.double().numpy(), problem.target.double().numpy()
    scale = model.quantizer.gradient_scale(problem.x)

    def gradients(values: np.ndarray) -> np.ndarray:
        w1, w2, s = values
        return one_scale_gradients(w1, w2, s, x, t, scale)

    task = gradients(values)
    return task, gradients(values + rho * task / np.linalg.norm(task))


def sagm_step(problem: Problem, rule: FreezeRule, rho: float = 0.05) -> list[float]:
    model: OneScale = problem.model  # type: ignore[assignment]
    parameters = problem.parameters
    freezer = ScaleFreezer(["middle"], [model.quantizer.raw_scale], [False], rule)
    gradients = sagm(problem.closure, parameters, rho=rho, alpha=0.0)
    freezer.mask(gradients, parameters)
    return [float(p.grad) for p in parameters]  # type: ignore[arg-type]


def test_branches_of_a_quantized_net_against_numpy_and_their_mixes() -> None:
    task, smooth = numpy_steps(one_scale(), 0.05)
    assert abs(task[2] - smooth[2]) > 1e-3  # else the next lines show nothing
    mixed = sagm_step(one_scale(), FreezeRule(policy="never"))
    np.testing.assert_allclose(mixed, 0.5 * task + 0.5 * smooth, rtol=1e-4)  # float32 model
    masked = sagm_step(one_scale(), FreezeRule(policy="always"))
    np.testing.assert_allclose(masked, [*(0.5 * task + 0.5 * smooth)[:2], 0.5 * smooth[2]], rtol=1e-4)


def trajectory(rule: FreezeRule | None, steps: int = 30, *, rho: float = 0.05, alpha: float = 1e-3) -> list[Tensor]:
    """Parameters after some Adam steps of SAGM, with a freezer or without."""
    problem = one_scale()
    model: OneScale = problem.model  # type: ignore[assignment]
    parameters = problem.parameters
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    freezer = None if rule is None else ScaleFreezer(["middle"], [model.quantizer.raw_scale], [False], rule)
    for _ in range(steps):
        gradients = sagm(problem.closure, parameters, rho=rho, alpha=alpha)
        if freezer is not None:
            freezer.mask(gradients, parameters)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_impossible_thresholds_never_or_always_freeze() -> None:
    plain = trajectory(None)
    assert same(trajectory(FreezeRule(window=5, threshold=0.0)), plain)
    always = trajectory(FreezeRule(window=5, policy="always"))
    assert not same(always, plain)
    # r > 1 freezes from the first window's end on: after 5 unfrozen steps every later one is masked.
    problem = one_scale()
    model: OneScale = problem.model  # type: ignore[assignment]
    freezer = ScaleFreezer(["middle"], [model.quantizer.raw_scale], [False], FreezeRule(window=5, threshold=1.1))
    shares = []
    for _ in range(12):
        shares.append(float(freezer.mask(sagm(problem.closure, problem.parameters), problem.parameters).frozen))
    assert shares == [0.0] * 5 + [1.0] * 7


def test_without_perturbation_gaqat_is_plain_lsq() -> None:
    problem = one_scale()
    optimizer = torch.optim.Adam(problem.parameters, lr=1e-2)
    for _ in range(30):
        erm(problem.closure, problem.parameters)
        optimizer.step()
    plain = [p.detach().clone() for p in problem.parameters]
    assert same(trajectory(FreezeRule(window=5, policy="never"), rho=0.0, alpha=0.0), plain)


@pytest.mark.parametrize("branch", ["task", "both"])
def test_a_frozen_scale_does_not_move_in_100_steps_at_learning_rate_0(branch: str) -> None:
    problem = one_scale()
    model: OneScale = problem.model  # type: ignore[assignment]
    start = model.quantizer.raw_scale.detach().clone()
    optimizer = torch.optim.Adam(problem.parameters, lr=0.0)
    freezer = ScaleFreezer(
        ["middle"],
        [model.quantizer.raw_scale],
        [False],
        FreezeRule(policy="always", branch=branch),  # type: ignore[arg-type]
    )
    for _ in range(100):
        freezer.mask(sagm(problem.closure, problem.parameters, rho=0.3), problem.parameters)
        optimizer.step()
    assert torch.equal(model.quantizer.raw_scale.detach(), start)


def test_a_scale_frozen_in_both_branches_does_not_coast_on_momentum() -> None:
    problem = one_scale()
    model: OneScale = problem.model  # type: ignore[assignment]
    optimizer = torch.optim.Adam(problem.parameters, lr=1e-2)
    freezer = ScaleFreezer(
        ["middle"], [model.quantizer.raw_scale], [False], FreezeRule(window=5, threshold=1.1, branch="both")
    )
    moved = []
    for _ in range(15):
        before = model.quantizer.raw_scale.detach().clone()
        freezer.mask(sagm(problem.closure, problem.parameters), problem.parameters)
        optimizer.step()
        moved.append(not torch.equal(before, model.quantizer.raw_scale.detach()))
    assert moved == [True] * 5 + [False] * 10


def test_state_survives_saving_and_foreign_state_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(4).normal(size=(60, 3))
    rule = FreezeRule(window=10, threshold=0.5, policy="random")
    whole, first = Branches([1, 1, 1], rule), Branches([1, 1, 1], rule)
    second = Branches([1, 1, 1], rule)
    masks: list[list[list[bool]]] = [[], []]
    for row in draw:
        whole.step(tensors(*row), tensors(0.0, 0.0, 0.0))
        masks[0].append(whole.freezer.frozen.tolist())
    for i, row in enumerate(draw):
        if i == 27:  # in the middle of a window
            torch.save(first.freezer.state_dict(), tmp_path / "freezer.pt")
            second.freezer.load_state_dict(torch.load(tmp_path / "freezer.pt", weights_only=True))
        active = first if i < 27 else second
        active.step(tensors(*row), tensors(0.0, 0.0, 0.0))
        masks[1].append(active.freezer.frozen.tolist())
    assert masks[0] == masks[1] and any(any(m) for m in masks[0])
    with pytest.raises(ValueError, match="other scales"):
        Branches([1], rule).freezer.load_state_dict(copy.deepcopy(first.freezer.state_dict()))


def test_partial_objectives_carry_their_options() -> None:
    """What the training step builds: a partial whose freezer sees the branches of the very parameters it is given."""
    problem, same, other = one_scale(), one_scale(), one_scale()
    found = partial(sagm, rho=0.1)(problem.closure, problem.parameters)
    assert len(found.task) == len(problem.parameters) and found.branch_weights == MIX
    expected = sagm(same.closure, same.parameters, rho=0.1)
    default = sagm(other.closure, other.parameters)
    assert all(torch.equal(present(a), present(b)) for a, b in zip(found.perturbed, expected.perturbed, strict=True))
    assert not all(torch.equal(present(a), present(b)) for a, b in zip(found.perturbed, default.perturbed, strict=True))
