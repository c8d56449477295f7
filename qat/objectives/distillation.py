"""Knowledge distillation (Hinton et al., arXiv 1503.02531) from the full-precision run, as LSQ combines it (§3.1).

L = (1 - w) · CE(student, label) + w · T² · KL(softmax(teacher / T) ‖ softmax(student / T)),    LSQ: T = 1, w = ½
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation:
    """Cross entropy mixed with the divergence from `teacher`, which stays in eval mode and gets no gradient."""

    def __init__(
        self, teacher: nn.Module, weight: float = 0.5, temperature: float = 1.0
    ) -> None:
        if not 0 <= weight <= 1 or temperature <= 0:
            raise ValueError(
                f"distillation: weight {weight} must lie in [0, 1], temperature {temperature} above 0"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    def __call__(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """images N_C_H_W, the student's logits N_K, its task loss -> the mixed scalar loss."""
        with torch.no_grad():
            taught = F.log_softmax(
                self.teacher(images).float() / self.temperature, dim=1
            )
        student = F.log_softmax(logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(student, taught, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence
