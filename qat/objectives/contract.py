"""The Objective contract: a function that fills `.grad` and returns what it saw.

    gradients = objective(closure, parameters)      # .grad of every parameter is set
    optimizer.step()

`closure()` computes the loss of the current batch, adds its gradients to `.grad`, and returns the loss; an objective may
call it more than once on the same batch. Nothing hides in optimizers: the order stands in `qat/training/loop.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Parameter

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Gradients:
    """What an objective saw in one step.

    loss:      the batch's loss at the current parameters, scalar, detached.
    task:      gradient of that loss per parameter, in the order of `parameters`; None where there is none. Empty for
               objectives that keep no copy.
    perturbed: gradient of the perturbed (flatness) loss, likewise.
    """

    loss: Tensor
    task: Sequence[Tensor | None] = field(default_factory=tuple)
    perturbed: Sequence[Tensor | None] = field(default_factory=tuple)


Objective = Callable[[Closure, Sequence[Parameter]], Gradients]


def erm(closure: Closure, parameters: Sequence[Parameter]) -> Gradients:
    """Empirical risk minimisation: the plain gradient of the batch's mean loss."""
    for parameter in parameters:
        parameter.grad = None
    return Gradients(closure())
