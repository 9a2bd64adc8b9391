"""A selective state space model as a memory of tokens that is addressed by content and forgets.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752 (2023), eq. 2-4 and Alg.
2 (S6). Token j is ``x_j [k]``, its direction ``e_j = x_j / |x_j|``; letters as in `fedsim.sequence.scan` with P = k:

    delta_j = softplus(e_j W_down W_up + b)          [k]    how much is taken in of the token, how fast the past fades
    B_j = e_j W_B                                    [n]    what the token is filed under
    h_j = exp(delta_j A) h_{j-1} + delta_j B_j x_j   [k, n]
    y(q) = h C,  C = e_q W_C                         [k]    what the memory answers to a query q

Unrolled, ``y(q) = sum_j <W_B e_j, W_C e_q> (fading) x_j``: what is alike is summed up, the opposite is turned round.

Deviations from Mamba, and why:

- One S6 layer: no input and output projections (k x k), no conv1d (neighbouring tokens are different clients, not
  neighbouring letters), no SiLU branch (an answer must stay linear in the tokens). The skip ``D x`` and the norm of the
  output (Mamba-2's) are in the calibration: ``algorithms/pfedseq.py``.
- B, C and delta are read from a token's direction, x carries its length.
- A is one number, -1 at first, not ``-(1 .. n)`` for every channel (S4D-real): the entries of a state are here
  directions to look in, not time scales, and all of them are wanted for as long; delta gives every channel its pace.
  So the last state is one matrix product, ``sum_j (exp(A T_j) delta_j x_j) B_j^T`` with T_j the deltas after token j,
  and all answers in training are one masked product, as long as the tokens fade little; else it is the parallel scan.
- delta starts equal on all channels, at what gives the asked half-life: unequal gains would turn a token's direction.
- W_B and W_C start equal and orthonormal: key = query, so what is alike is found before anything is trained.
- delta has rank ``rank`` (Mamba: d / 16, which would be a k x k / 16 matrix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from fedsim.sequence.learner import Learner, Memory
from fedsim.sequence.scan import final_state, selective_scan
from fedsim.sequence.torch_scan import time_left
from fedsim.threads import side_by_side

LOG2_E = 1 / math.log(2)  # exp2 takes a quarter of exp's time on a CPU
CACHED_ELEMENTS = 2**17  # of one temporary array, of about five
MOST_FADING = 40.0  # log-decay over all tokens that is still divided by: exp(40) is far from float32's largest
STRAIGHT = 20.0  # from here on softplus(x) is taken for x, as in torch's: exp(-20) is 2e-9
SHORTEST = 1e-12  # of a token's length, as in torch's `normalize`
SAMPLED_CHANNELS = 64  # at least, for the mean fading of a token that `attention` tells


class SelectiveSSM(Learner):
    """S6 over k channels. No matrix is k x k.

    Args:
        width: k.
        state_size: n, entries of the state per channel.
        generator: draws the projections.
        half_life: tokens after which half of a token is left, at the start.
        rank: of the map from a token to its delta.
        budget_mib: memory for the temporaries of a scan; None: what suits the device.
    """

    of_any_size = True

    def __init__(
        self,
        width: int,
        state_size: int,
        generator: torch.Generator,
        half_life: float = 100.0,
        rank: int = 4,
        budget_mib: float | None = None,
    ) -> None:
        super().__init__(width, state_size, generator)
        self.budget_mib = budget_mib
        key = orthonormal(width, state_size, generator)
        self.W_B = nn.Parameter(key)
        self.W_C = nn.Parameter(key.clone())
        self.W_down = nn.Parameter(torch.randn(width, rank, generator=generator))
        # A tenth of Mamba's scale: at first a token moves its deltas by some per cent, and channels stay in step.
        self.W_up = nn.Parameter((torch.rand(rank, width, generator=generator) * 2 - 1) * 0.1 / math.sqrt(rank))
        self.b = nn.Parameter(torch.full((width,), softplus_inverse(math.log(2) / half_life)))
        self.A_log = nn.Parameter(torch.zeros(()))

    def delta(self, directions: Tensor) -> Tensor:
        """Step sizes ``[..., k]`` of tokens of unit length ``[..., k]``, positive."""
        return self._delta(directions @ self.W_down, slice(None))

    def _delta(self, low: Tensor, channels: slice) -> Tensor:
        """Step sizes of some channels, from ``low [..., rank]``."""
        step = torch.addmm(self.b[channels], low.flatten(0, -2), self.W_up[:, channels])
        return softplus(step).unflatten(0, low.shape[:-1])

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        directions = normalize(tokens, dim=-1)
        # A token that is not written takes no time.
        delta, A = self.delta(directions) * written[:, None], -self.A_log.exp()
        keys, queries = directions @ self.W_B, directions @ self.W_C
        faded = (delta * A).cumsum(1)
        if self._fits(tokens) and -faded[:, -1:].detach().amin() < MOST_FADING:
            return _all_at_once(tokens, delta, faded, keys, queries)
        # Position j reads the state after j - 1: its query, one place up.
        queries = pad(queries[:, 1:], (0, 0, 0, 1))
        A = A.expand(self.width, self.state_size)
        answers = selective_scan(tokens, delta, A, keys, queries, budget_mib=self.budget_mib)
        return pad(answers[:, :-1], (0, 0, 1, 0))

    def _fits(self, tokens: Tensor) -> bool:
        """Whether all answers at once do, with what autograd keeps: by token, 4 weights a token and 8 a channel."""
        S, L, k = tokens.shape
        return self.budget_mib is None or S * L * (4 * L + 8 * k) * tokens.element_size() <= self.budget_mib * 2**20

    def remember(self, tokens: Tensor, before: Memory | None = None) -> Memory:
        """The state ``{"h": [S, k, n]}``; with the memory so far, only the new tokens are needed (streaming)."""
        A = -self.A_log.exp()
        if torch.is_grad_enabled():  # where it does not fit: in blocks of channels, computed again on the way back
            directions = normalize(tokens, dim=-1)
            delta, keys = self.delta(directions), directions @ self.W_B
            start = None if before is None else before["h"]
            if start is None and self._fits(tokens):
                return {"h": (torch.exp(time_left(delta) * A) * delta * tokens).mT @ keys}
            A = A.expand(self.width, self.state_size)
            return {"h": final_state(tokens, delta, A, keys, start, budget_mib=self.budget_mib)}

        h = tokens.new_empty(tokens.shape[0], self.width, self.state_size)
        read, rate = torch.cat([self.W_B, self.W_down], 1), A * LOG2_E

        def fill(piece: tuple[slice, list[slice]]) -> None:
            s, channels = piece
            own = tokens[s].flip(1)  # the newest first: what a token loses is the sum of the deltas before it
            keys, low = (own @ read / _length(own)).tensor_split([self.state_size], -1)
            for p in channels:
                delta = self._delta(low, p)
                since = torch.empty_like(delta)
                since[:, :1] = 0
                torch.cumsum(delta[:, :-1], 1, out=since[:, 1:])
                kept = since.mul_(rate).exp2_().mul_(delta).mul_(own[..., p])
                torch.bmm(kept.mT, keys, out=h[s, p])
                if before is not None:
                    h[s, p] += torch.exp(delta.sum(1) * A)[..., None] * before["h"][s, p]

        side_by_side(fill, pieces(*tokens.shape))
        return {"h": h}

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return query @ self.W_C / _length(query) @ memory["h"].mT

    def attention(self, tokens: Tensor, query: Tensor) -> Tensor:
        length = _length(tokens)
        sampled = slice(None, None, max(1, self.width // SAMPLED_CHANNELS))
        delta = self._delta(tokens @ self.W_down / length, sampled)
        fading = (torch.exp(time_left(delta) * -self.A_log.exp()) * delta).mean(2)
        return (query @ self.W_C / _length(query) @ (tokens @ self.W_B / length).mT) * fading[:, None]


def _all_at_once(tokens: Tensor, delta: Tensor, faded: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """What position j is answered by the tokens before it, as a masked matrix product: the dual form of Mamba-2.

    ``y_j = exp(a_{j-1}) sum_{i<j} <B_i, C_j> exp(-a_i) delta_i x_i`` with ``a_i`` the log-decay from the start through
    token i: A is one number, so what is left of a token is a quotient for each channel, whatever the state's size.

    Args:
        tokens, delta: ``[S, L, k]``.
        faded: the log-decays ``[S, L, k]``, small enough that no quotient of them overflows.
        keys, queries: ``[S, L, n]``.

    Returns:
        ``[S, L, k]``.
    """
    weights = (queries @ keys.mT).tril(-1)
    return torch.exp(pad(faded[:, :-1], (0, 0, 1, 0))) * (weights @ (torch.exp(-faded) * delta * tokens))


def pieces(S: int, L: int, k: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of sequences, each with slices of channels, so that ``[S, L, k]`` is cut to what a CPU's cache holds."""
    channels = max(1, min(k, CACHED_ELEMENTS // max(L, 1)))
    sequences = max(1, CACHED_ELEMENTS // (max(L, 1) * k))
    for s in range(0, S, sequences):
        yield slice(s, s + sequences), [slice(p, p + channels) for p in range(0, k, channels)]


def _length(tokens: Tensor) -> Tensor:
    """Of tokens ``[..., k]``, ``[..., 1]``, to divide by."""
    return tokens.norm(dim=-1, keepdim=True).clamp(min=SHORTEST)


def orthonormal(width: int, state_size: int, generator: torch.Generator) -> Tensor:
    """A random projection ``[k, n]`` that keeps lengths on average: orthonormal columns, or rows where k < n."""
    drawn = torch.randn(max(width, state_size), min(width, state_size), generator=generator)
    columns = torch.linalg.qr(drawn).Q * math.sqrt(max(1.0, width / state_size))
    return (columns if width >= state_size else columns.t()).contiguous()


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, to the last digit or two: a fifth of the time of torch's on a CPU, whose log1p is slow."""
    return _Softplus.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        t = x.clamp(max=STRAIGHT).exp_()
        u = t + 1
        lost = t.sub_(u - 1).div_(u)  # of t in u, relative to u: the first term of the logarithm's error
        return u.log_().add_(lost).add_((x - STRAIGHT).clamp_(min=0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x)  # type: ignore[no-any-return]


def softplus_inverse(value: float) -> float:
    return value + math.log(-math.expm1(-value))  # log(exp(value) - 1), which would overflow
