"""LSTM and GRU as sequence learners: the past in a state of n entries, asked by one more step.

Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; Cho et al., "Learning Phrase
Representations using RNN Encoder-Decoder for Statistical Machine Translation", arXiv 1406.1078 (2014). Letters as in
`fedsim.sequence.learner`; tokens x_j [k], query q [k]:

    h_j = cell(x_j W_down, h_{j-1})     [n]     LSTM: with a second state c_j [n]
    h_q = cell(q W_down, h_L)           [n]     one more step, which is forgotten again
    answer = q + h_q W_up               [k]

The cells are PyTorch's. Deviations from the textbooks, and why:

- W_up is zero at first: a learner starts by giving every query back.
- The bias of the LSTM's forget gate is 1 at first (Jozefowicz et al., ICML 2015), and that of the GRU's update gate,
  which in PyTorch keeps the past too; all other biases are 0. So both cells start by keeping about 0.73 of their state.
- PyTorch's GRU resets after the product with W_hh, not before it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fedsim.sequence.learner import Learner, Memory


class _Recurrent(Learner):
    """What LSTM and GRU share."""

    gives_back = True
    cell_type: type[nn.RNNCellBase]
    parts: tuple[str, ...]  # names of the states, h among them

    def __init__(self, width: int, state_size: int, generator: torch.Generator) -> None:
        super().__init__(width, state_size, generator)
        n = state_size
        self.W_down = nn.Parameter(torch.randn(width, n, generator=generator) / math.sqrt(width))
        self.W_up = nn.Parameter(torch.zeros(n, width))
        self.cell = skip_init(self.cell_type, n, n)
        with torch.no_grad():
            for p in self.cell.parameters():
                bound = 1 / math.sqrt(n) if p.dim() == 2 else 0
                p.uniform_(-bound, bound, generator=generator)
            self.cell.bias_ih[n : 2 * n] = 1  # the second gate: forget in i, f, g, o; update in r, z, n

    @abstractmethod
    def _step(self, memory: Memory, x: Tensor) -> Memory:
        """The states ``[B, n]`` after one more projected token ``[B, n]``."""

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        states = list(self._states((tokens @ self.W_down)[:, written]))
        seen = (written.cumsum(0) - written.long()).to(tokens.device)
        before = {part: torch.stack([memory[part] for memory in states], 1)[:, seen] for part in self.parts}
        return self._ask(tokens, before)

    def remember(self, tokens: Tensor) -> Memory:
        return deque(self._states(tokens @ self.W_down), maxlen=1)[0]

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        return self._ask(query, {part: h[:, None].expand(-1, query.shape[1], -1) for part, h in memory.items()})

    def _states(self, x: Tensor) -> Iterator[Memory]:
        """Before the first of the projected tokens ``[S, L, n]``, and after each."""
        start = {part: x.new_zeros(x.shape[0], self.state_size) for part in self.parts}
        return accumulate(x.unbind(1), self._step, initial=start)

    def _ask(self, query: Tensor, memory: Memory) -> Tensor:
        """Answers to queries ``[S, Q, k]``, each against states ``[S, Q, n]`` of its own."""
        flat = {part: h.flatten(0, 1) for part, h in memory.items()}
        h = self._step(flat, (query @ self.W_down).flatten(0, 1))["h"]
        return query + h.view(*query.shape[:2], self.state_size) @ self.W_up


class LSTM(_Recurrent):
    """Memory: ``h`` and ``c``, ``[S, n]`` each."""

    cell_type = nn.LSTMCell
    parts = ("h", "c")

    def _step(self, memory: Memory, x: Tensor) -> Memory:
        h, c = self.cell(x, (memory["h"], memory["c"]))
        return {"h": h, "c": c}


class GRU(_Recurrent):
    """Memory: ``h [S, n]``."""

    cell_type = nn.GRUCell
    parts = ("h",)

    def _step(self, memory: Memory, x: Tensor) -> Memory:
        return {"h": self.cell(x, memory["h"])}
