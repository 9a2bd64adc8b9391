"""A transformer block as a sequence learner: the past is kept token by token, and searched by content and age.

Vaswani et al., "Attention Is All You Need", arXiv 1706.03762 (2017), eq. 1, with ages as in Press et al., "Train Short,
Test Long", arXiv 2108.12409 (2021, ALiBi). Letters as in `fedsim.sequence.learner`; tokens x_j [k], query q [k], e = x
W_down [n], H = n // 16 heads (at least one), in every head:

    a_j = softmax_j((LN(e_q) W_Q) . (LN(e_j) W_K) / sqrt(n / H) - m age_j)      over written tokens, and one zero token
    u = e_q + (sum_j a_j LN(e_j) W_V) W_O               [n]     the heads side by side
    z = u + gelu(LN(u) W_1 + b_1) W_2                   [n]     4 n hidden units
    answer = q + z W_up                                 [k]

age_j counts written tokens: 1 for the last one. Deviations from a textbook decoder, and why:

- One block, so a token is encoded by itself alone, and a memory grows by its n entries.
- A query does not attend to its own key (its residual path has it), but to a token with zero key and value (PyTorch's
  ``add_zero_attn``): an empty memory answers 0, and a query may find nothing alike.
- Head i's slope m is ``2^(-8 (i - 1/2) / H)``, the middle of its part of ALiBi's range, not its end: ALiBi's one head
  would have 2^-8, which cannot tell the rounds of a short history apart.
- LN before attention and MLP (Xiong et al., arXiv 2002.04745), and none at the end: one block cannot grow far, and an
  answer keeps the size of its query.
- W_up is zero at first: the learner starts by giving every query back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from fedsim.sequence.learner import Learner, Memory


class Transformer(Learner):
    """Memory: ``e [S, L, n]``, the tokens' projections."""

    gives_back = True

    def __init__(self, width: int, state_size: int, generator: torch.Generator) -> None:
        super().__init__(width, state_size, generator)
        k, n = width, state_size

        def draw(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / math.sqrt(rows))

        # The most heads of at least 16 entries that share n evenly.
        self.num_heads = next(H for H in range(max(1, n // 16), 0, -1) if n % H == 0)
        self.W_down, self.W_up = draw(k, n), nn.Parameter(torch.zeros(n, k))
        self.W_Q, self.W_K, self.W_V, self.W_O = (draw(n, n) for _ in range(4))
        self.W_1, self.b_1, self.W_2 = draw(n, 4 * n), nn.Parameter(torch.zeros(4 * n)), draw(4 * n, n)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(n), nn.LayerNorm(n)

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        seen = (written.cumsum(0) - written.long()).to(tokens.device)
        return self._ask(tokens, self.remember(tokens)["e"][:, written], seen)

    def remember(self, tokens: Tensor) -> Memory:
        return {"e": tokens @ self.W_down}

    def read(self, memory: Memory, query: Tensor) -> Tensor:
        seen = torch.full((query.shape[1],), memory["e"].shape[1], device=query.device)
        return self._ask(query, memory["e"], seen)

    def _ask(self, query: Tensor, e: Tensor, seen: Tensor) -> Tensor:
        """Answers to queries ``[S, Q, k]`` against the first ``seen [Q]`` of the written tokens ``e [S, W, n]``."""
        u = query @ self.W_down
        q, key = self._keys(u, e)
        value = pad(self._heads(self.norm_attention(e) @ self.W_V), (0, 0, 1, 0))
        found = scaled_dot_product_attention(q, key, value, self._bias(seen, e))  # [S, H, Q, n / H]
        u = u + found.transpose(1, 2).flatten(2) @ self.W_O
        return query + (u + gelu(self.norm_mlp(u) @ self.W_1 + self.b_1) @ self.W_2) @ self.W_up

    def attention(self, tokens: Tensor, query: Tensor) -> Tensor:
        """``a_j``, the mean over heads; what falls to the zero token is in none of them."""
        q, key = self._keys(query @ self.W_down, tokens @ self.W_down)
        seen = torch.full((query.shape[1],), tokens.shape[1], device=query.device)
        scores = q @ key.mT / math.sqrt(q.shape[-1]) + self._bias(seen, tokens)
        return scores.softmax(-1)[..., 1:].mean(1)

    def _keys(self, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries ``[S, H, Q, n / H]`` and of tokens, the zero token first, ``[S, H, 1 + W, n / H]``."""
        q, key = self.norm_attention(u) @ self.W_Q, self.norm_attention(e) @ self.W_K
        return self._heads(q), pad(self._heads(key), (0, 0, 1, 0))

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, seen: Tensor, e: Tensor) -> Tensor:
        """``-m age [H, Q, 1 + W]``, the zero token first; minus infinity where a token was not yet written."""
        H = self.num_heads
        slope = torch.exp2(-8 * (torch.arange(H, dtype=e.dtype, device=e.device) + 0.5) / H)
        age = (seen[:, None] - torch.arange(e.shape[1], device=e.device)).to(e.dtype)
        bias = (-slope[:, None, None] * age).masked_fill(age < 1, -math.inf)
        return pad(bias, (1, 0))
