"""The interface of the sequence learners.

Letters, in this folder:

====== ====================================================================================
``S``  sequences: pieces of a row, or the pieces of every client
``L``  tokens of a sequence, in time order
``Q``  queries
``k``  channels of a token (a piece's length)
``n``  state size: what a learner keeps of a token, besides its channels
====== ====================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

Memory = dict[str, Tensor]
"""What a learner remembers of ``S`` sequences: tensors with a leading axis S."""


class Learner(nn.Module, ABC):
    """From past tokens, and a query, to an answer.

    Attributes:
        of_any_size: whether answers are as large as tokens are; else these best have entries of about unit size.
        gives_back: whether it starts by giving every query back, so that to rebuild a query from itself is no lesson.
    """

    of_any_size = False
    gives_back = False

    def __init__(self, width: int, state_size: int, generator: torch.Generator) -> None:
        """``width``: k; ``state_size``: n; ``generator``: draws the parameters, all of them."""
        super().__init__()
        self.width, self.state_size = width, state_size

    @abstractmethod
    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Every token as a query against what was written before it: all positions at once (teacher forcing).

        Args:
            tokens: ``[S, L, k]``.
            written: ``[L] bool``, the tokens that enter the memory; the others only ask.

        Returns:
            Answers ``[S, L, k]``.
        """

    @abstractmethod
    def remember(self, tokens: Tensor) -> Memory:
        """The memory after all tokens ``[S, L, k]``; L may be 0."""

    @abstractmethod
    def read(self, memory: Memory, query: Tensor) -> Tensor:
        """Answers ``[S, Q, k]`` to queries ``[S, Q, k]``, each against its sequence's memory, which stays as it is."""

    def attention(self, tokens: Tensor, query: Tensor) -> Tensor | None:
        """How much of each token ``[S, L, k]`` is in the answers to queries ``[S, Q, k]``: weights ``[S, Q, L]``.

        ``None`` where answers are not weighted sums of tokens. Weights that differ by channel are averaged.
        """
        return None
