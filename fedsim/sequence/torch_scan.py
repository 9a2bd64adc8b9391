"""The selective scan in torch operations, in parallel and in bounded memory; letters as in `fedsim.sequence.scan`.

*How it is parallel.* A chunk of tokens is discretised, read and differentiated all at once; only the recurrence itself
has an order. It is cut into ``lanes``: stretches of tokens that are scanned side by side, each with its running product
of decays, then joined by their last states, so T tokens take ``T / lanes + lanes`` steps instead of T. Lanes double the
work of the recurrence, so by default they are used only where one token's cells do not fill the device; with one lane
the recurrence is one fused multiply-add a token over a block of channels, which on a CPU is hard to beat.
Decays are only multiplied, or exponentiated at exponents of one sign: nothing is divided by a product that underflows.

*Memory.* Blocks of channels (then sequences) and chunks of tokens are sized so that all temporaries fit ``budget_mib``.
Nothing of ``[S, L, P, n]`` is kept: the backward pass computes the state before every chunk by a reduction, then goes
through the chunks from the last to the first, recomputing their states, with the adjoint scanned in reverse.
Inside, states are ``[S, T, n, P]``, channels innermost, so that every operation runs along memory.
"""

from __future__ import annotations

from itertools import pairwise
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fedsim.sequence.blocks import Work

_LOG2_E = 1 / log(2)  # exp2 is several times faster than exp on many CPUs


def _cells(x: Tensor, A: Tensor) -> tuple[int, int, int, int]:
    """``[S, T, n, P]`` of x ``[S, T, P]`` and A ``[n, P]``."""
    return x.shape[0], x.shape[1], A.shape[0], x.shape[2]


def time_left(delta: Tensor) -> Tensor:
    """Sum of the deltas after each token, along axis 1; summed from the end, so that what is small is exact."""
    return pad(delta, (0, 0, 0, 1))[:, 1:].flip(1).cumsum(1).flip(1)


def _decay(delta: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """``exp(delta A)``: delta ``[S, T, P]``, A ``[n, P]`` -> ``[S, T, n, P]``."""
    return torch.mul(delta[:, :, None], A * _LOG2_E, out=out).exp2_()


def _outer(row: Tensor, column: Tensor, out: Tensor) -> Tensor:
    """row ``[S, T, P]``, column ``[S, T, n]`` -> ``[S, T, n, P]``."""
    return torch.mul(row[:, :, None], column[..., None], out=out)


def _scan_(decay: Tensor, v: Tensor, h: Tensor, work: Work, reverse: bool = False) -> Tensor:
    """Makes ``v_k <- decay_k v_{k-1} + v_k`` of ``v``, in place, from ``h``; from the last token on if ``reverse``.

    Args:
        decay, v: ``[S, T, n, P]``.
        h: ``[S, n, P]``, what stands before the first token (``reverse``: after the last).
        work: its lanes are an upper bound; the largest divisor of T below it is used.

    Returns:
        The last state that was reached, ``[S, n, P]``: a view of ``v``.
    """
    lanes = next(k for k in range(min(work.lanes, v.shape[1]), 0, -1) if v.shape[1] % k == 0)
    order = slice(None, None, -1 if reverse else 1)
    if lanes == 1:
        for decay_k, v_k in zip(decay.unbind(1)[order], v.unbind(1)[order], strict=True):
            h = v_k.addcmul_(decay_k, h)
        return h

    decay, v = decay.unflatten(1, (lanes, -1)), v.unflatten(1, (lanes, -1))
    product = work.array("product", *decay.shape).copy_(decay)
    steps = list(zip(decay.unbind(2), v.unbind(2), product.unbind(2), strict=True))[order]
    for (_, v_before, product_before), (decay_k, v_k, product_k) in pairwise(steps):
        v_k.addcmul_(decay_k, v_before)
        product_k.mul_(product_before)
    _, last, whole = steps[-1]
    starts = torch.empty_like(last)
    for lane in range(lanes)[order]:
        starts[:, lane] = h
        h = torch.addcmul(last[:, lane], whole[:, lane], h)
    v.addcmul_(product, starts[:, :, None])
    return h


def _weighted_sum(tail: Tensor, u: Tensor, A: Tensor, B: Tensor, work: Work) -> Tensor:
    """``sum_k exp(tail_k A) u_k B_k``: tail, u ``[S, T, P]``, A ``[n, P]``, B ``[S, T, n]`` -> ``[S, n, P]``."""
    S, T, n, P = _cells(tail, A)
    weighted = work.array("states", S, n, T, P)
    torch.mul(tail[:, None], (A * _LOG2_E)[:, None], out=weighted).exp2_().mul_(u[:, None])
    return (B.transpose(1, 2)[:, :, None] @ weighted).squeeze(2)


class TorchScan(torch.autograd.Function):
    """(x, delta ``[S, L, P]``, A ``[n, P]``, B, C ``[S, L, n]``, h0 ``[S, n, P]``) -> (h C ``[S, L, P]``, last h)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, h0, *ctx.how = args
        work = Work(x, A.shape[0], *ctx.how)
        y, h_last = x.new_empty(x.shape), torch.empty_like(h0)
        for s, p in work.blocks():
            A_p, h = A[:, p].contiguous(), h0[s, :, p]
            for t in work.chunks():
                delta_t, shape = delta[s, t, p], _cells(delta[s, t, p], A)
                states = _outer(delta_t * x[s, t, p], B[s, t], out=work.array("states", *shape))
                h = _scan_(_decay(delta_t, A_p, out=work.array("decay", *shape)), states, h, work).clone()
                y[s, t, p] = (C[s, t, None] @ states).squeeze(2)
            h_last[s, :, p] = h
        ctx.save_for_backward(x, delta, A, B, C, h0)
        return y, h_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, h0 = ctx.saved_tensors
        return *_gradients(x, delta, A, B, C, h0, dy, dh, *ctx.how), None, None


class TorchLast(torch.autograd.Function):
    """(x, delta ``[S, L, P]``, A ``[n, P]``, B ``[S, L, n]``, h0 ``[S, n, P]``) -> last h ``[S, n, P]``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, delta, A, B, h0, ctx.budget_mib = args
        work, h_last = Work(x, A.shape[0], ctx.budget_mib, lanes=1), torch.empty_like(h0)
        for s, p in work.blocks():
            inputs = x[s, :, p], delta[s, :, p], A[:, p], B[s], h0[s, :, p]
            h_last[s, :, p] = _states_between(*inputs, work.chunks(), work)[-1]
        ctx.save_for_backward(x, delta, A, B, h0)
        return h_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, h0 = ctx.saved_tensors
        dy = x.new_zeros(()).expand_as(x)  # a scan of which nothing but the last state is read
        dx, ddelta, dA, dB, _, dh0 = _gradients(x, delta, A, B, B, h0, dy, dh, ctx.budget_mib, None)
        return dx, ddelta, dA, dB, dh0, None


class KnownLast(TorchLast):
    """`TorchLast` whose value another kernel has already computed; its gradient is computed here, if asked for."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, ctx.budget_mib, h_last = args
        ctx.save_for_backward(*inputs)
        return h_last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        return *TorchLast.backward(ctx, dh), None


def _states_between(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h: Tensor, chunks: list[slice], work: Work
) -> list[Tensor]:
    """The states ``[S, n, P]`` before, between and after chunks, by one reduction a chunk."""
    states = [h]
    for t in chunks:
        new = _weighted_sum(time_left(delta[:, t]), delta[:, t] * x[:, t], A, B[:, t], work)
        states.append(new.addcmul_(torch.exp(delta[:, t].sum(1, keepdim=True) * A), states[-1]))
    return states


def _gradients(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    dy: Tensor,
    dh: Tensor,
    budget_mib: float | None,
    lanes: int | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, A, B, C and h0, from those of y and of the last state; shapes as in `TorchScan`."""
    work = Work(x, A.shape[0], budget_mib, lanes)
    dx, ddelta, dh0 = torch.empty_like(x), torch.empty_like(delta), torch.empty_like(h0)
    dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    chunks = work.chunks()
    for s, p in work.blocks():
        A_p, g = A[:, p].contiguous(), dh[s, :, p]
        starts = _states_between(x[s, :, p], delta[s, :, p], A_p, B[s], h0[s, :, p], chunks[:-1], work)
        for t, h in zip(reversed(chunks), reversed(starts), strict=True):
            inputs = x[s, t, p], delta[s, t, p], A_p, B[s, t], C[s, t], h
            dx[s, t, p], ddelta[s, t, p], dA_t, dB_t, dC_t, g = _chunk_gradients(*inputs, dy[s, t, p], g, work)
            dA[:, p] += dA_t
            dB[s, t] += dB_t
            dC[s, t] += dC_t
        dh0[s, :, p] = g
    return dx, ddelta, dA, dB, dC, dh0


def _chunk_gradients(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, dy: Tensor, g: Tensor, work: Work
) -> tuple[Tensor, ...]:
    """Gradients of one chunk, from the state ``h`` before it and the adjoint ``g`` of the state after it.

    Returns:
        The gradients of x, delta ``[S, T, P]``, A ``[n, P]``, B, C ``[S, T, n]`` and of h ``[S, n, P]``.
    """
    S, T, n, P = shape = _cells(x, A)
    decay = work.array("decay", S, T + 1, n, P)
    _decay(delta, A, out=decay[:, :T])
    decay[:, T] = 1  # the adjoint of token k decays by token k + 1; that of the last one arrives as it is
    u = delta * x
    states = _outer(u, B, out=work.array("states", *shape))
    _scan_(decay[:, :T], states, h, work)
    dC = (dy[:, :, None] @ states.mT).squeeze(2)

    adjoint = _outer(dy, C, out=work.array("adjoint", *shape))
    _scan_(decay[:, 1:], adjoint, g, work, reverse=True)
    dB = (u[:, :, None] @ adjoint.mT).squeeze(2)
    du = (B[:, :, None] @ adjoint).squeeze(2)

    dh = adjoint.mul_(decay[:, :T])[:, 0].clone()
    adjoint[:, 1:].mul_(states[:, :-1])
    adjoint[:, 0].mul_(h)  # now the gradient of the exponent, delta A
    dA = torch.mul(adjoint, delta[:, :, None], out=states).sum((0, 1))
    ddelta = adjoint.mul_(A).sum(2)
    return du * delta, ddelta.addcmul_(du, x), dA, dB, dC, dh
