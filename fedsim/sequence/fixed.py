"""Learners that learn nothing: what a trained one must beat.

Letters as in `fedsim.sequence.learner`; tokens x_j [k], query q [k]:

    Last        answer = q
    Mean        answer = sum_j x_j / L      over the L written tokens; 0 where there is none
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from fedsim.sequence.learner import Learner, Memory


class Last(Learner):
    """Memory: empty."""

    of_any_size = True

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        return tokens

    def remember(self, tokens: Tensor) -> Memory:
        return {}

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return query


class Mean(Learner):
    """Memory: ``mean [S, k]``."""

    of_any_size = True

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        sums = pad(tokens[:, written].cumsum(1), (0, 0, 1, 0))  # [S, W + 1, k], the first of no token
        seen = (written.cumsum(0) - written.long()).to(tokens.device)
        return sums[:, seen] / seen.clamp(min=1)[:, None]

    def remember(self, tokens: Tensor) -> Memory:
        return {"mean": tokens.sum(1) / max(tokens.shape[1], 1)}

    def attention(self, tokens: Tensor, query: Tensor) -> Tensor:
        return tokens.new_full((*query.shape[:2], tokens.shape[1]), 1 / max(tokens.shape[1], 1))

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return memory["mean"][:, None].expand_as(query)
