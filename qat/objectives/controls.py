"""GAQAT and its controls: what each does to the two branches of a scale's gradient, the task's and the perturbed one.

"alternate" does it to the gradients of all parameters.
"""

from dataclasses import dataclass
from typing import Literal

from qat.words import Branch, Policy

ControlName = Literal[
    "gaqat",
    "never",
    "always",
    "permanent",
    "random",
    "smooth",
    "both",
    "above",
    "alternate",
    "project",
    "min-norm",
]


@dataclass(frozen=True)
class Control:
    """One row of the table.

    policy:   which scales freeze (`FreezeRule.policy`).
    branch:   the gradient that a frozen scale loses.
    above:    freeze what lies above the threshold, whatever --freeze-when says.
    combined: how the two gradients become one where nothing freezes: "alternate" takes them in turns, a window each;
              "project" and "min-norm" are functions of `qat/objectives/conflict.py`; "" adds them.
    """

    policy: Policy = "disorder"
    branch: Branch = "task"
    above: bool = False
    combined: str = ""

    @property
    def freezes(self) -> bool:
        """Whether any scale may freeze."""
        return self.policy != "never"

    @property
    def decides(self) -> bool:
        """Whether a rule chooses scales, so that its options act."""
        return self.policy not in ("never", "always")


CONTROLS: dict[ControlName, Control] = {
    "gaqat": Control(),  # the method
    "never": Control("never"),
    "always": Control("always"),
    "permanent": Control("permanent"),
    "random": Control("random"),
    "smooth": Control(branch="smooth"),
    "both": Control(branch="both"),
    "above": Control(above=True),
    "alternate": Control("never", combined="alternate"),
    "project": Control("never", combined="project"),
    "min-norm": Control("never", combined="min-norm"),
}
