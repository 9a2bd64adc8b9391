"""No sequence at all: a query is answered from itself, so what a learner gains over it, it gains from the past.

Letters as in `fedsim.sequence.learner`; query q [k]:

    answer = q + silu(q W_down + b) W_up        [k]     n hidden units

W_up is zero at first: the learner starts by giving every query back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fedsim.sequence.learner import Learner, Memory


class MLP(Learner):
    """Memory: empty."""

    gives_back = True

    def __init__(self, width: int, state_size: int, generator: torch.Generator) -> None:
        super().__init__(width, state_size, generator)
        self.W_down = nn.Parameter(torch.randn(width, state_size, generator=generator) / math.sqrt(width))
        self.b = nn.Parameter(torch.zeros(state_size))
        self.W_up = nn.Parameter(torch.zeros(state_size, width))

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        return self.read({}, tokens)

    def remember(self, tokens: Tensor) -> Memory:
        return {}

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return query + silu(query @ self.W_down + self.b) @ self.W_up
