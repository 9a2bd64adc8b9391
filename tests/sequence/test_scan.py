"""The scan against numbers worked by hand, against the sequential oracle, and its laws."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.sequence.scan import final_state, selective_scan, selective_scan_sequential, selective_scan_with_state
from fedsim.sequence.torch_scan import time_left

LN2 = math.log(2)
SCANS = {
    "sequential": selective_scan_sequential,
    "one lane": partial(selective_scan_with_state, lanes=1),
    "three lanes": partial(selective_scan_with_state, lanes=3),
    "small blocks": partial(selective_scan_with_state, budget_mib=1e-3),
}


def _inputs(S: int, L: int, P: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, delta, A, B, C, D, h0, all with a gradient."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    tensors = [
        draw(S, L, P),
        softplus(draw(S, L, P) - 1),
        -torch.exp(draw(P, n)),
        draw(S, L, n),
        draw(S, L, n),
        draw(P),
        draw(S, P, n),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


def _by_hand() -> list[Tensor]:
    """One channel, one state, decay 1/2 a token."""
    x = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64).view(1, 3, 1).requires_grad_()
    delta, A = torch.full_like(x, LN2), torch.tensor([[-1.0]], dtype=torch.float64)
    B = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1)
    C = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64).view(1, 3, 1)
    return [x, delta, A, B, C, torch.tensor([10.0], dtype=torch.float64)]


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_three_tokens_by_hand(scan):
    x, *rest = _by_hand()
    y, h = scan(x, *rest)
    # h = ln 2 (2, 2/2 + 4, 5/2 + 16) and y = h C + 10 x
    torch.testing.assert_close(y.flatten().tolist(), [2 * LN2 + 20, 15 * LN2 + 40, 18.5 * LN2 + 80])
    torch.testing.assert_close(h.item(), 18.5 * LN2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    # A unit of x_1 is in y_1, y_2, y_3 with C B / 2^age = 1, 3/2, 1/4; of x_2 with 3, 1/2; of x_3 with 2.
    torch.testing.assert_close(dx.flatten().tolist(), [2.75 * LN2 + 10, 3.5 * LN2 + 10, 2 * LN2 + 10])


def test_the_answers_alone():
    inputs = _by_hand()
    assert torch.equal(selective_scan(*inputs), selective_scan_with_state(*inputs)[0])


def test_final_state_by_hand():
    x, delta, A, B, *_ = _by_hand()
    h = final_state(x, delta, A, B, torch.full((1, 1, 1), 8.0, dtype=torch.float64))
    torch.testing.assert_close(h.item(), 18.5 * LN2 + 1)
    (dx,) = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(dx.flatten().tolist(), [LN2 / 4, LN2 / 2, 2 * LN2])


@pytest.mark.parametrize("lanes", [None, 1, 5])
@pytest.mark.parametrize("with_h0", [False, True])
def test_agrees_with_the_oracle_at_every_length(lanes, with_h0):
    x, delta, A, B, C, D, h0 = (t.detach() for t in _inputs(1, 300, 4, 3, torch.float32))
    h0 = h0 if with_h0 else None
    expected, _ = selective_scan_sequential(x, delta, A, B, C, D, h0)
    state = h0
    for L in range(1, 301):
        new = slice(L - 1, L)
        _, state = selective_scan_sequential(x[:, new], delta[:, new], A, B[:, new], C[:, new], D, state)
        y, h = selective_scan_with_state(x[:, :L], delta[:, :L], A, B[:, :L], C[:, :L], D, h0, lanes=lanes)
        torch.testing.assert_close(y, expected[:, :L], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, state, atol=1e-5, rtol=1e-5)
        alone = final_state(x[:, :L], delta[:, :L], A, B[:, :L], h0)
        torch.testing.assert_close(alone, state, atol=1e-5, rtol=1e-5)


def _published_reference(u, raw_delta, delta_bias, A, B, C, D):
    """What mamba's ``selective_scan_ref`` computes for real A and token-dependent B and C, softplus included.

    Its layout: u, raw_delta ``[B, D, L]``, delta_bias, D ``[D]``, A ``[D, N]``, B, C ``[B, N, L]``.

    Returns:
        out ``[B, D, L]`` and the state after every token ``[B, D, L, N]``.
    """
    delta = softplus(raw_delta + delta_bias[:, None])
    decay = torch.einsum("bdl,dn->bdln", delta, A).exp()
    states = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    for k in range(1, u.shape[2]):
        states[:, :, k] += decay[:, :, k] * states[:, :, k - 1]
    return torch.einsum("bdln,bnl->bdl", states, C) + D[:, None] * u, states


def test_agrees_with_the_published_reference_at_every_length():
    g = torch.Generator().manual_seed(0)
    u, raw_delta = torch.randn(2, 2, 5, 300, generator=g)
    B, C = torch.randn(2, 2, 3, 300, generator=g)
    A, (delta_bias, D) = -torch.exp(torch.randn(5, 3, generator=g)), torch.randn(2, 5, generator=g)
    out, states = _published_reference(u, raw_delta, delta_bias, A, B, C, D)
    x, delta, B, C = u.mT, softplus(raw_delta.mT + delta_bias), B.mT, C.mT
    for L in range(1, 301):
        y, h = selective_scan_with_state(x[:, :L], delta[:, :L], A, B[:, :L], C[:, :L], D)
        torch.testing.assert_close(y.mT, out[:, :, :L], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, states[:, :, L - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("L", [1, 2, 16, 17, 40, 97])
@pytest.mark.parametrize("scan", list(SCANS)[1:])
def test_gradients_agree_with_the_oracle(scan, L):
    inputs = _inputs(2, L, 5, 3)
    loss = [sum((t * t.detach().cos()).sum() for t in f(*inputs)) for f in (SCANS[scan], selective_scan_sequential)]
    torch.testing.assert_close(torch.autograd.grad(loss[0], inputs), torch.autograd.grad(loss[1], inputs))


@pytest.mark.parametrize("budget_mib", [None, 1e-3])
@pytest.mark.parametrize("L", [1, 40])
def test_gradients_of_the_final_state_agree_with_the_oracle(L, budget_mib):
    x, delta, A, B, C, D, h0 = _inputs(2, L, 5, 3)
    inputs = [x, delta, A, B, h0]
    h = [final_state(*inputs, budget_mib=budget_mib), selective_scan_sequential(x, delta, A, B, C, D, h0)[1]]
    weights = torch.randn_like(h[0])
    grads = [torch.autograd.grad((t * weights).sum(), inputs) for t in h]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scan", list(SCANS)[1:])
def test_gradcheck_of_the_scan(scan):
    assert torch.autograd.gradcheck(SCANS[scan], _inputs(2, 18, 2, 2))


def test_gradcheck_of_the_final_state():
    x, delta, A, B, _, _, h0 = _inputs(2, 18, 2, 2)
    assert torch.autograd.gradcheck(final_state, (x, delta, A, B, h0))


@pytest.mark.parametrize("cut", [1, 20, 49])
def test_two_halves_with_the_state_carried_are_one_scan(cut):
    x, delta, A, B, C, D, h0 = _inputs(2, 50, 3, 4)
    y, h = selective_scan_with_state(x, delta, A, B, C, D, h0)
    first, state = selective_scan_with_state(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h0)
    second, state = selective_scan_with_state(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, state)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(state, h)
    old = final_state(x[:, :cut], delta[:, :cut], A, B[:, :cut], h0)
    torch.testing.assert_close(final_state(x[:, cut:], delta[:, cut:], A, B[:, cut:], old), h)


def test_no_start_is_a_zero_start_and_no_skip_a_zero_skip():
    x, delta, A, B, C, D, h0 = _inputs(2, 20, 3, 4)
    y, h = selective_scan_with_state(x, delta, A, B, C)
    expected_y, expected_h = selective_scan_with_state(x, delta, A, B, C, torch.zeros_like(D), torch.zeros_like(h0))
    assert torch.equal(y, expected_y) and torch.equal(h, expected_h)


def test_no_tokens_leave_the_state_as_it_is():
    x, delta, A, B, _, _, h0 = _inputs(1, 4, 3, 2)
    assert torch.equal(final_state(x[:, :0], delta[:, :0], A, B[:, :0], h0), h0)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_steps_that_keep_or_forget_everything(scale, lanes):
    x, delta, A, B, C, D, h0 = _inputs(1, 64, 3, 4, torch.float32)
    delta = (delta.detach() * scale).requires_grad_()
    inputs = [x, delta, A, B, C, D, h0]
    (y, h), (expected_y, expected_h) = (
        selective_scan_with_state(*inputs, lanes=lanes),
        selective_scan_sequential(*inputs),
    )
    torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h, expected_h, atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + h.sum(), inputs))


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.nbytes = max(self.nbytes, t.untyped_storage().nbytes() if isinstance(t, Tensor) else 0)
        return result


@pytest.mark.parametrize("lanes", [1, 4])
def test_memory_stays_in_the_budget(lanes):
    S, L, P, n = 2, 128, 64, 16
    inputs = _inputs(S, L, P, n)
    x, delta, A, B, *_, h0 = inputs
    saved = []

    def save(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        y, h = selective_scan_with_state(*inputs, budget_mib=0.25, lanes=lanes)
        grads = torch.autograd.grad(y.sum() + h.sum(), inputs)
        torch.autograd.grad(final_state(x, delta, A, B, h0, budget_mib=0.25).sum(), [x, delta, A, B, h0])
    assert largest.nbytes <= x.nbytes
    assert max(t.numel() for t in saved) <= x.numel()

    with _Largest() as largest:
        y_roomy, h_roomy = selective_scan_with_state(*inputs, budget_mib=1024, lanes=lanes)
        grads_roomy = torch.autograd.grad(y_roomy.sum() + h_roomy.sum(), inputs)
    assert largest.nbytes >= S * L * P * n * x.element_size()
    torch.testing.assert_close((y, h, *grads), (y_roomy, h_roomy, *grads_roomy), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 100, 1025])
def test_what_follows_a_token_is_summed_exactly(length: int) -> None:
    delta = torch.ones(2, length, 3)
    delta[:, -1:] = 2**-20  # beside sums of a thousand ones, float32 would lose it
    expected = [2**-20 + after if after >= 0 else 0.0 for after in range(length - 2, -2, -1)]
    assert time_left(delta)[1, :, 2].tolist() == torch.tensor(expected).tolist()
