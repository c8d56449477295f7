"""The Objective contract: a function that fills `.grad` and returns what it saw.

    gradients = objective(closure, parameters, replay)      # .grad of every parameter is set
    freezer.mask(gradients, ...)                            # GAQAT: some branches of some scales are taken out
    optimizer.step()

`closure()` computes the loss of the current batch, adds its gradients to `.grad`, and returns the loss; an objective may
call it more than once on the same batch, every time but the first inside `with replay():`. Nothing hides in optimizers:
the order stands in `qat/train/step.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Parameter

Closure = Callable[[], Tensor]
Replay = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Gradients:
    """What an objective saw in one step.

    loss:      the batch's loss at the current parameters, scalar, detached.
    task:      gradient of that loss per parameter, in the order of `parameters`; None where there is none. Empty for
               objectives that have only one branch and keep no copy.
    perturbed: gradient of the perturbed (flatness) loss, likewise.
    branch_weights: `.grad` = branch_weights[0] · task + branch_weights[1] · perturbed.
    """

    loss: Tensor
    task: Sequence[Tensor | None] = field(default_factory=tuple)
    perturbed: Sequence[Tensor | None] = field(default_factory=tuple)
    branch_weights: tuple[float, float] = (1.0, 0.0)


Objective = Callable[[Closure, Sequence[Parameter], Replay], Gradients]


def erm(
    closure: Closure, parameters: Sequence[Parameter], replay: Replay = nullcontext
) -> Gradients:
    """Empirical risk minimisation: the plain gradient of the batch's mean loss."""
    for parameter in parameters:
        parameter.grad = None
    return Gradients(closure())
