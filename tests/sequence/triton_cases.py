"""The Triton kernels in Triton's interpreter, on the CPU, against the sequential oracle.

Not collected by itself: ``TRITON_INTERPRET=1`` must be set before the first import, so `test_triton_scan` runs this
file in a process of its own.
"""

import pytest
import torch
from torch.nn.functional import softplus

from fedsim.sequence.scan import selective_scan_sequential, selective_scan_with_state


def _inputs(S: int, L: int, P: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, delta, A, B, C, D, h0, all with a gradient."""
    g = torch.Generator().manual_seed(L)
    x, delta, B, C = (torch.randn(S, L, size, generator=g) for size in (P, P, n, n))
    A, D, h0 = torch.randn(P, n, generator=g), torch.randn(P, generator=g), torch.randn(S, P, n, generator=g)
    return [t.to(dtype).requires_grad_() for t in (x, softplus(delta - 1), -A.exp(), B, C, D, h0)]


# One token; chunks that do not divide L; a state that is no power of two; channels in one block, and in two.
@pytest.mark.parametrize(
    ("S", "L", "P", "n"), [(1, 1, 1, 1), (2, 2, 3, 2), (1, 7, 5, 3), (2, 16, 4, 4), (1, 11, 70, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_the_oracles(S, L, P, n, dtype):
    inputs = _inputs(S, L, P, n, dtype)
    outputs = selective_scan_with_state(*inputs, kind="triton"), selective_scan_sequential(*inputs)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(*outputs, **tolerance)
    losses = [sum((t * t.detach().cos()).sum() for t in pair) for pair in outputs]
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses), **tolerance)


def test_shared_and_strided_inputs():
    x, delta, _, B, C, *_ = (t.detach() for t in _inputs(2, 6, 4, 3, torch.float64))
    A = -torch.arange(1, 4, dtype=torch.float64).expand(4, -1)
    inputs = x.transpose(0, 1).contiguous().transpose(0, 1), delta, A, B, C
    torch.testing.assert_close(selective_scan_with_state(*inputs, kind="triton"), selective_scan_sequential(*inputs))


def test_two_halves_with_the_state_carried_are_one_scan():
    x, delta, A, B, C, D, h0 = _inputs(1, 9, 3, 2, torch.float64)
    first, state = selective_scan_with_state(x[:, :4], delta[:, :4], A, B[:, :4], C[:, :4], D, h0, kind="triton")
    second, state = selective_scan_with_state(x[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], D, state, kind="triton")
    whole = selective_scan_with_state(x, delta, A, B, C, D, h0, kind="triton")
    torch.testing.assert_close((torch.cat([first, second], 1), state), whole)
