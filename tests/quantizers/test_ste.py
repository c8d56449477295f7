import numpy as np
import torch

from qat.quantizers.ste import round_ste


def test_rounds_half_to_even_forward_and_is_the_identity_backward() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.4, 0.0], requires_grad=True)
    upstream = torch.arange(7.0)
    y = round_ste(x)
    y.backward(upstream)
    assert np.array_equal(y.detach().numpy(), np.rint(x.detach().numpy()))
    assert torch.equal(x.grad, upstream)
