"""The state-space dual as a learner: the memory of `fedsim.sequence.ssm` with one step size a token.

Dao & Gu, "Transformers are SSMs", ICML 2024, arXiv 2405.21060. All channels of a part fade alike, so a scan becomes
matrix products (`fedsim.sequence.dual`), several times cheaper than S6's. Letters and deviations as in ``ssm.py``:

    delta_j = softplus(<e_j, w_delta> + b)       scalar
    h_j = exp(delta_j A) h_{j-1} + delta_j B_j x_j^T       [n, k], A a scalar
    y(q) = C^T h
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from fedsim.sequence.dual import dual_final_state, dual_scan
from fedsim.sequence.learner import Learner, Memory
from fedsim.sequence.ssm import orthonormal, softplus, softplus_inverse
from fedsim.sequence.torch_scan import time_left


class StateSpaceDual(Learner):
    """SSD over k channels, of one head.

    Args:
        width: k.
        state_size: n.
        generator: draws the projections.
        half_life: tokens after which half of a token is left, at the start.
        budget_mib: memory for the states that the backward pass recomputes; None: what suits the device.
    """

    of_any_size = True

    def __init__(
        self,
        width: int,
        state_size: int,
        generator: torch.Generator,
        half_life: float = 100.0,
        budget_mib: float | None = None,
    ) -> None:
        super().__init__(width, state_size, generator)
        self.budget_mib = budget_mib
        key = orthonormal(width, state_size, generator)
        self.W_B = nn.Parameter(key)
        self.W_C = nn.Parameter(key.clone())
        self.w_delta = nn.Parameter(0.1 * torch.randn(width, generator=generator))
        self.b = nn.Parameter(torch.full((1,), softplus_inverse(math.log(2) / half_life)))
        self.A_log = nn.Parameter(torch.zeros(1))

    def delta(self, directions: Tensor) -> Tensor:
        """Step sizes ``[S, L, 1]`` of tokens of unit length ``[S, L, k]``, positive."""
        return softplus((directions @ self.w_delta)[..., None] + self.b)

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        directions = normalize(tokens, dim=-1)
        delta = self.delta(directions) * written[:, None]
        queries = pad(directions[:, 1:] @ self.W_C, (0, 0, 0, 1))
        keys = (directions @ self.W_B)[:, :, None]
        inputs = tokens, delta, -self.A_log.exp(), keys, queries[:, :, None]
        answers, _ = dual_scan(*inputs, budget_mib=self.budget_mib)
        return pad(answers[:, :-1], (0, 0, 1, 0))

    def remember(self, tokens: Tensor, before: Memory | None = None) -> Memory:
        """The state ``{"h": [S, n, k]}``; with the memory so far, only the new tokens are needed (streaming)."""
        directions = normalize(tokens, dim=-1)
        h0 = None if before is None else before["h"]
        keys = (directions @ self.W_B)[:, :, None]
        return {"h": dual_final_state(tokens, self.delta(directions), -self.A_log.exp(), keys, h0)}

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return normalize(query, dim=-1) @ self.W_C @ memory["h"]

    def attention(self, tokens: Tensor, query: Tensor) -> Tensor:
        directions = normalize(tokens, dim=-1)
        delta = self.delta(directions)
        fading = (torch.exp(time_left(delta) * -self.A_log.exp()) * delta)[..., 0]
        return (normalize(query, dim=-1) @ self.W_C @ (directions @ self.W_B).mT) * fading[:, None]
