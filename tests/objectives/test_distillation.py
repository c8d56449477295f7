"""The distilled loss and its gradient against NumPy in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat.objectives.distillation import Distillation
from tests.narrow import gradient

G = torch.Generator().manual_seed(0)
IMAGES, STUDENT = torch.randn(6, 4, generator=G), torch.randn(6, 5, generator=G)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 4.0), (0.0, 2.0), (1.0, 2.0)])
def test_value_and_gradient_against_numpy(weight: float, temperature: float) -> None:
    teacher = nn.Linear(4, 5)
    logits = STUDENT.clone().requires_grad_()
    loss = Distillation(teacher, weight, temperature)(IMAGES, logits, F.cross_entropy(logits, LABELS))
    loss.backward()
    s, t = STUDENT.double().numpy(), teacher(IMAGES).detach().double().numpy()
    p, q = softmax(t / temperature), softmax(s / temperature)
    one_hot = np.eye(5)[LABELS.numpy()]
    cross_entropy = -(one_hot * np.log(softmax(s))).sum(1).mean()
    divergence = (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert loss.item() == pytest.approx((1 - weight) * cross_entropy + weight * temperature**2 * divergence, abs=1e-6)
    expected = ((1 - weight) * (softmax(s) - one_hot) + weight * temperature * (q - p)) / 6
    assert np.allclose(gradient(logits), expected, atol=1e-6)


def test_the_teacher_stays_in_eval_mode_and_gets_no_gradient() -> None:
    teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 5)).train()
    distil = Distillation(teacher)
    logits = STUDENT.clone().requires_grad_()
    losses = [distil(IMAGES, logits, F.cross_entropy(logits, LABELS)) for _ in range(2)]
    losses[0].backward()
    assert losses[0] == losses[1] and not teacher.training and teacher[1].weight.grad is None


@pytest.mark.parametrize(("weight", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0)])
def test_impossible_weights_and_temperatures_raise(weight: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="distillation"):
        Distillation(nn.Linear(4, 5), weight, temperature)
