"""From tokens to calibrations: a learner for every bank of parts, its memory, and its training by replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from fedsim.sequence.learner import Learner
from fedsim.sequence.parts import Parts

Memories = list[dict[str, Any]]
"""For each bank, its ``"memory"``, and the ``"scale"`` by which its tokens were divided, if the learner wants that."""

SHORTEST = 1e-12  # of an answer's length; what is shorter says nothing
ELEMENTS_LOOKED_AT = 2**11  # of a token, in each bank


class Calibrator(nn.Module):
    """Learners over the parts of a row. A token is a row ``[d]``, or ``views`` rows side by side ``[views d]``.

    What is remembered is ``arranged`` once, when it enters the history, so that it need not be each time it is read.

    Args:
        parts: the row's parts.
        make: a learner for tokens of so many channels.
        views: rows that make up a token.
    """

    def __init__(self, parts: Parts, make: Callable[[int], Learner], views: int = 1) -> None:
        super().__init__()
        self.parts, self.views = parts, views
        self.learners = nn.ModuleList([make(views * bank.shape[1]) for bank in parts.banks])

    @property
    def gives_back(self) -> bool:
        """Of its learners, which are all of a kind (`Learner.gives_back`)."""
        return any(learner.gives_back for learner in self.learners)

    def arranged(self, tokens: Tensor) -> Tensor:
        """``[N, views d]`` with part lying after part, in each view."""
        views = [self.parts.arranged(view) for view in tokens.chunk(self.views, 1)]
        return views[0] if self.views == 1 else torch.cat(views, 1)

    def _banks(self, arranged: Tensor) -> list[Tensor]:
        """Arranged tokens ``[N, views d]`` as one ``[G, N, views k]`` a bank."""
        views = [self.parts.cut(view) for view in arranged.chunk(self.views, 1)]
        return views[0] if self.views == 1 else [torch.cat(banks, 2) for banks in zip(*views, strict=True)]

    def remember(self, arranged: Tensor, before: Memories | None = None) -> Memories:
        """The memories after all tokens ``[L, views d]``, or after those before and these."""
        return [
            _remember(learner, bank, None if before is None else before[b])
            for b, (learner, bank) in enumerate(zip(self.learners, self._banks(arranged), strict=True))
        ]

    def remember_each(self, arranged: Tensor) -> Memories:
        """A memory for every client, of its tokens ``[C, K, views d]`` alone; older places empty (zero).

        K is part of the arithmetic: recurrent learners pass through empty places, too.
        """
        banks = [bank.unflatten(1, arranged.shape[:2]) for bank in self._banks(arranged.flatten(0, 1))]  # [G, C, K, k]
        return [_remember_each(learner, bank) for learner, bank in zip(self.learners, banks, strict=True)]

    def answers(self, memories: Memories, query: Tensor, each: bool = False, like: Tensor | None = None) -> Tensor:
        """What the memories answer to queries ``[Q, views d]``: ``[Q, d]``, of the tokens' first rows.

        Nothing here is arranged. ``each``: the memories are those of ``remember_each``, one query a client. ``like
        [Q, d]``: every part of an answer is made as long as that of it, and is that of it where there is no answer.
        """
        asked = self._banks(self.arranged(query))
        banks = zip(self.learners, memories, asked, strict=True)
        answers = [_read(learner, memory, bank, each) for learner, memory, bank in banks]
        answers = [answer[..., : answer.shape[2] // self.views] for answer in answers]
        if like is not None:
            lengths = asked if like is query else self.parts.split(like)
            answers = [_rescaled(answer, own) for answer, own in zip(answers, lengths, strict=True)]
        return self.parts.join(answers)

    def attention(self, memories: Memories, arranged: Tensor, asking: Tensor) -> Tensor | None:
        """Shares of the tokens ``[L, views d]`` in the answers to ``[Q, views d]``: ``[Q, L]``, the mean over parts.

        A share is a weight's absolute value over the sum of all; ``None`` for learners that are no weighted sums. Of
        every bank a few parts stand for all: this is for people to look at, and must not cost what the answers cost.
        Both are arranged; ``memories``: those of the tokens, in whose scale they are looked at.
        """
        shares: list[Tensor] = []
        banks = zip(self.learners, memories, self._banks(arranged), self._banks(asking), strict=True)
        for learner, memory, bank, asked in banks:
            few = slice(None, None, -(-bank.shape[0] * bank.shape[2] // ELEMENTS_LOOKED_AT))
            bank, asked = bank[few], asked[few]
            if not learner.of_any_size:
                scale = memory["scale"].clamp(min=1e-12)
                bank, asked = bank / scale, asked / scale
            weights = learner.attention(bank, asked)  # type: ignore[operator]
            if weights is None:
                return None
            shares.append(normalize(weights.abs(), p=1, dim=2))
        return torch.cat(shares).mean(0)

    def replay_loss(
        self,
        sequences: Tensor,
        written: Tensor,
        asks: Tensor,
        targets: Tensor,
        share: float,
        generator: torch.Generator,
    ) -> Tensor:
        """How badly tokens are foretold from what was written before: one parallel pass over all positions.

        The mean over parts and over pairs (j, t) of ``1 - cos(y(x_j), x_t)``, weighted by ``|x_t|``; y knows the
        tokens before j that were written.

        Args:
            sequences: ``[C, L, views d]``, arranged, in time order; places that are zero neither ask nor are asked for.
            written: ``[L] bool``, tokens that enter the memory.
            asks, targets: ``[P] int64``, the pairs' positions.
            share: of the parts of each bank that are replayed, drawn anew each time; at least one is.
            generator: draws them.
        """
        loss, total = torch.zeros(()), torch.zeros(())
        for learner, bank in zip(self.learners, self._banks(sequences.flatten(0, 1)), strict=True):
            drawn = torch.randperm(len(bank), generator=generator)[: max(1, round(share * len(bank)))]
            some = bank[drawn].unflatten(1, sequences.shape[:2]).flatten(0, 1)
            answers = learner(some / _scale(some).clamp(min=1e-12), written)[:, asks]
            asking, target = some[:, asks], some[:, targets]
            weights = target.norm(dim=2) * asking.any(2)
            loss = loss + (weights * (1 - cosine_similarity(answers, target, dim=2))).sum()
            total = total + weights.sum()
        return loss / total.clamp(min=1e-12)


def _remember(learner: nn.Module, tokens: Tensor, before: dict[str, Any] | None) -> dict[str, Any]:
    """The memory of ``[S, L, k]``, or of what was before and these: of learners whose memory is a state."""
    if learner.of_any_size:
        own = [before["memory"]] if before else []
        return {"memory": learner.remember(tokens, *own), "scale": torch.ones(())}  # type: ignore[operator]
    scale = _scale(tokens)
    return {"memory": learner.remember(tokens / scale.clamp(min=1e-12)), "scale": scale}  # type: ignore[operator]


def _remember_each(learner: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The memories of ``[G, C, K, k]``, of every client's G parts; its scale is that of its own tokens, ``[C, 1]``."""
    scale = torch.ones(())
    if not learner.of_any_size:
        own = tokens.any(3).any(0).sum(1) * tokens.shape[0] * tokens.shape[3]  # elements of each client's tokens
        scale = (torch.linalg.vector_norm(tokens, dim=(0, 2, 3)) / own.clamp(min=1) ** 0.5)[:, None]
        tokens = tokens / scale.clamp(min=1e-12)[:, None]
    return {"memory": learner.remember(tokens.flatten(0, 1)), "scale": scale}  # type: ignore[operator]


def _read(learner: nn.Module, bank: dict[str, Any], query: Tensor, each: bool) -> Tensor:
    """Answers ``[G, Q, k]`` from the memories of G parts, or (``each``) from those of the G parts of Q clients."""
    if learner.of_any_size and not each:
        return learner.read(bank["memory"], query)  # type: ignore[no-any-return, operator]
    scaled = query / bank["scale"].clamp(min=1e-12)
    answers = learner.read(bank["memory"], scaled.flatten(0, 1)[:, None] if each else scaled)  # type: ignore[operator]
    return answers.view(query.shape) * bank["scale"]


def _scale(tokens: Tensor) -> Tensor:
    """Root mean square of all elements, so that a learner sees numbers of about unit size; 0 without any."""
    return torch.linalg.vector_norm(tokens) / tokens.numel() ** 0.5 if tokens.numel() else torch.zeros(())


def _rescaled(answers: Tensor, like: Tensor) -> Tensor:
    """Answers ``[G, Q, k]``, each as long as that of ``like``; where there is none, ``like`` itself."""
    length = answers.norm(dim=2, keepdim=True)
    return torch.where(length > SHORTEST, answers * (like.norm(dim=2, keepdim=True) / length.clamp(min=SHORTEST)), like)
