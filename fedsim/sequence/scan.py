"""The selective scan of Mamba's S6: a sequential oracle, a parallel scan, and the last state alone.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752 (2023), eq. 2 and Alg. 2,
for every sequence s, token k and channel p (``h`` has n entries a channel):

    h_k = exp(delta_k A) h_{k-1} + delta_k B_k x_k          y_k = h_k C_k + D x_k

Glossary (letter here = symbol in Mamba):

    S = B       sequences (Mamba's batch)
    L = L       tokens
    P = D       channels; P here, because D is the skip weight
    n = N       state size: entries of h per channel
    x       [S, L, P]   tokens
    delta   [S, L, P]   step sizes (Mamba's Delta), positive
    A       [P, n]      negative: the decay of token k is ``exp(delta_k A)``
    B, C    [S, L, n]   what a token is filed under; what is asked for
    D       [P]         skip weight
    h       [S, P, n]   state

As in Mamba's code, A is discretised by zero-order hold and B by Euler's rule (``delta B``, not eq. 4's exact integral).

The parallel scan has three kinds, equal but for rounding; `kind_for` chooses:

    torch       any device; blocks of channels, chunks of tokens: `fedsim.sequence.torch_scan`
    triton      CUDA: one kernel forward, one backward: `fedsim.sequence.triton_scan`
    mamba_ssm   CUDA, where that package is installed: the authors' own kernel
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.sequence.torch_scan import KnownLast, TorchLast, TorchScan

Kind = Literal["torch", "triton", "mamba_ssm"]


def selective_scan_sequential(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, h0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token after token: the oracle of `selective_scan_with_state`.

    Args:
        x, delta: ``[S, L, P]``.
        A: ``[P, n]``, negative.
        B, C: ``[S, L, n]``.
        D: ``[P]``; without it, no skip.
        h0: ``[S, P, n]``, the state before the first token; zero by default.

    Returns:
        y ``[S, L, P]`` and the state after the last token ``[S, P, n]``.
    """
    h = _start(x, A, h0)
    y = []
    for x_k, delta_k, B_k, C_k in zip(*(t.unbind(1) for t in (x, delta, B, C)), strict=True):
        h = torch.exp(delta_k[..., None] * A) * h + (delta_k * x_k)[..., None] * B_k[:, None]
        y.append((h @ C_k[..., None]).squeeze(2))
    memory = torch.stack(y, 1)
    return (memory if D is None else memory + D * x), h


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **how: Any
) -> Tensor:
    """y ``[S, L, P]`` of `selective_scan_with_state`, and what else it takes."""
    return selective_scan_with_state(x, delta, A, B, C, D, **how)[0]


def selective_scan_with_state(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    budget_mib: float | None = None,
    lanes: int | None = None,
    kind: Kind | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_sequential`, in parallel and in bounded memory; differentiable once, in every tensor.

    Args:
        x, delta, A, B, C, D, h0: as in `selective_scan_sequential`.
        budget_mib: memory for the temporaries of the torch kind; by default what suits the caches of a CPU (16), or
            1,024 on other devices.
        lanes: stretches of tokens that the torch kind scans side by side; by default as many as fill the device.
        kind: by default what `kind_for` says.

    Returns:
        y ``[S, L, P]`` and the state after the last token ``[S, P, n]``.
    """
    kind = kind or kind_for(x, h0)
    if kind == "mamba_ssm":
        memory, h = _by_mamba_ssm(x, delta, A, B, C, h0, budget_mib)
    elif kind == "triton":
        from fedsim.sequence.triton_scan import TritonScan

        memory, h = TritonScan.apply(x, delta, A, B, C, _start(x, A, h0))
    else:
        memory, h = TorchScan.apply(x, delta, A.t(), B, C, _start(x, A, h0).transpose(1, 2), budget_mib, lanes)
        h = h.transpose(1, 2)
    return (memory if D is None else memory + D * x), h


def final_state(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h0: Tensor | None = None, *, budget_mib: float | None = None
) -> Tensor:
    """The state after the last token only: a weighted sum, no scan, in bounded memory; differentiable once.

    ``h = exp(A T_0) h0 + sum_k exp(A T_k) delta_k B_k x_k``, where ``T_k`` is the sum of the deltas after token k.

    Args:
        x, delta, A, B, h0, budget_mib: as in `selective_scan_with_state`.

    Returns:
        The state ``[S, P, n]``.
    """
    return TorchLast.apply(x, delta, A.t(), B, _start(x, A, h0).transpose(1, 2), budget_mib).transpose(1, 2)


def kind_for(x: Tensor, h0: Tensor | None) -> Kind:
    """The fastest kind for tokens ``x`` from state ``h0``: mamba_ssm knows no h0 and no float64, Triton no half."""
    if not x.is_cuda:
        return "torch"
    if h0 is None and x.dtype == torch.float32 and find_spec("mamba_ssm"):
        return "mamba_ssm"
    return "triton" if x.dtype in (torch.float32, torch.float64) and find_spec("triton") else "torch"


def _by_mamba_ssm(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, budget_mib: float | None
) -> tuple[Tensor, Tensor]:
    """``(h C, last h)`` by mamba_ssm's operator: channels before tokens, A ``[P, n]``, B and C ``[S, n, L]``.

    The operator ignores the gradient of the last state, so that one is ours.
    """
    if h0 is not None:
        raise ValueError("mamba_ssm's selective scan cannot start from a state: h0 must be None, or kind another")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, step, B_last, C_last = (t.transpose(1, 2).contiguous() for t in (x, delta, B, C))
    memory, h = selective_scan_fn(u, step, A.contiguous(), B_last, C_last, return_last_state=True)
    start = _start(x, A, None).transpose(1, 2)
    h = KnownLast.apply(x, delta, A.t(), B, start, budget_mib, h.detach().transpose(1, 2))
    return memory.transpose(1, 2), h.transpose(1, 2)


def _start(x: Tensor, A: Tensor, h0: Tensor | None) -> Tensor:
    return x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
