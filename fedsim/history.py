"""The history: past tokens in time order, by round and client.

A token is what one client's round left behind: a vector ``[d]``. A window says which are kept: the newest few of each
client, or those of the newest rounds. There are never more than ``capacity``; past it, the oldest make room.

They lie in time order in an array that is half as long again: new ones follow the old, and when it is full all that are
still held move to its front. So a round costs what its own tokens cost. Where none between them was dropped, as in a
window of rounds, all are read without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.journal import PART_BYTES, Journaled
from fedsim.store import ALIGNMENT, BUDGET_BYTES, allocate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class History(Journaled):
    """The newest tokens within a window, with their clients and rounds.

    Args:
        capacity: most tokens that it holds.
        dim: d.
        rounds: tokens older than so many rounds, counted back from the newest token's, are dropped.
        per_client: a client's tokens but its so many newest are dropped; they take no room from other clients'.
        dtype: ``fp32``, or ``bf16``: half the bytes, 8 significant bits.
        budget_bytes: where the array is larger, it is a memory-mapped file in the system's temporary folder.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        rounds: int | None = None,
        per_client: int | None = None,
        dtype: str = "fp32",
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        for least, what in ((capacity, "tokens"), (rounds, "rounds"), (per_client, "tokens per client")):
            if least is not None and least < 1:
                raise ValueError(f"a history of {least} {what} holds nothing")
        if dtype not in _DTYPES:
            raise ValueError(f"a history's dtype is one of {', '.join(_DTYPES)}, not {dtype!r}")
        self.capacity, self.dim = capacity, dim
        self._window_rounds, self._per_client = rounds, per_client
        row, rows = _row_bytes(dim, dtype), _rows(capacity)  # in bytes, since numpy has no bfloat16
        stored = allocate((rows, row), np.dtype(np.uint8), on_disk=rows * row > budget_bytes)
        self._padded = torch.from_numpy(stored).view(_DTYPES[dtype])
        self._tokens = self._padded[:, :dim]
        self.clear()

    @staticmethod
    def memory_bytes(capacity: int, dim: int, dtype: str = "fp32", budget_bytes: int = BUDGET_BYTES) -> int:
        """Bytes of memory that the tokens take once it is full, without the copies that reading bf16 makes."""
        return min(_rows(capacity) * _row_bytes(dim, dtype), budget_bytes)

    def clear(self) -> None:
        self._end = 0  # of the rows that were given to tokens
        self._places, self._clients, self._rounds = (torch.zeros(0, dtype=torch.int64) for _ in range(3))
        self._unsaved = 0  # the newest ones, which no checkpoint has yet

    def __len__(self) -> int:
        return len(self._clients)

    def append(self, round: int, clients: Tensor, tokens: Tensor) -> None:
        """Adds copies of the tokens ``[M, d]`` of ``clients [M] int64`` in this round, the latest so far.

        Raises:
            ValueError: not one vector ``[d]`` a client.
        """
        self._add(clients, torch.full_like(clients, round), tokens)

    def _add(self, clients: Tensor, rounds: Tensor, tokens: Tensor) -> None:
        if tokens.shape != (len(clients), self.dim):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {(len(clients), self.dim)}")
        held = len(self)
        clients, rounds = torch.cat([self._clients, clients]), torch.cat([self._rounds, rounds])
        kept = self._kept(clients, rounds)
        old, new = kept[kept < held], kept[kept >= held] - held
        self._make_room(old, len(new))
        end = self._end + len(new)
        self._tokens[self._end : end] = tokens.detach().index_select(0, new).to(self._tokens)
        self._places, self._end = torch.cat([self._places, torch.arange(self._end, end)]), end
        self._clients, self._rounds = clients[kept], rounds[kept]
        self._unsaved = int((kept >= held - self._unsaved).sum())

    def _make_room(self, old: Tensor, more: int) -> None:
        """Drops all tokens but ``old``, indices in time order, and has ``more`` free rows behind them."""
        self._places = self._places[old]
        if self._end + more > len(self._tokens):
            self._end = 0
            for some in self._places.split(max(1, PART_BYTES // self._token_bytes)):  # a part covers what has moved
                self._tokens[self._end : self._end + len(some)] = self._tokens.index_select(0, some)
                self._end += len(some)
            self._places = torch.arange(self._end)

    def _kept(self, clients: Tensor, rounds: Tensor) -> Tensor:
        """Which of these tokens, in time order, the window and the capacity leave: their indices, ascending."""
        kept = torch.ones(len(clients), dtype=torch.bool)
        if self._window_rounds is not None and len(rounds):
            kept &= rounds > rounds.max() - self._window_rounds
        if self._per_client is not None:
            kept &= _newer(clients) < self._per_client
        return kept.nonzero()[-self.capacity :, 0]

    def tokens(self, newest: int | None = None) -> Tensor:
        """All L tokens, or so many of the newest, ``[L, d] float32``, in time order.

        They may be no copy: to be read only, and only until the next ``append``.
        """
        places = self._places if newest is None else self._places[max(0, len(self) - newest) :]
        start, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if end - start == len(places):
            return self._tokens[start:end].float()
        # Whole rows, which lie as those of the array do: so what is computed from them has the same bits.
        return self._padded[places][:, : self.dim].float()

    def clients(self) -> Tensor:
        """``[L] int64``, whose token each is; a copy."""
        return self._clients.clone()

    def rounds(self) -> Tensor:
        """``[L] int64``, of which round each is; a copy."""
        return self._rounds.clone()

    def sequences(self, ids: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Each client's tokens in time order, the newest last: ``([S, K, d] float32, [S, K] bool)``.

        K is ``length``, or the longest one's length, which may be 0. Longer ones lose their oldest tokens; shorter ones
        have zeros in front, where the mask is False. The clients ``ids [S] int64`` may have no tokens at all.
        """
        unique, row = ids.unique(return_inverse=True)
        theirs = torch.isin(self._clients, unique)
        clients, places = self._clients[theirs], self._places[theirs]
        newer = _newer(clients)
        if length is None:
            length = int(newer.max()) + 1 if len(newer) else 0
        fits = newer < length
        at = torch.full((len(unique), length), -1)
        at[torch.searchsorted(unique, clients[fits]), length - 1 - newer[fits]] = places[fits]
        at = at[row]
        mask = at >= 0
        tokens = torch.zeros(*mask.shape, self.dim)
        tokens[mask] = self._tokens[at[mask]].float()
        return tokens, mask

    # In a checkpoint -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return len(self) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        return 16 + self.dim * self._tokens.element_size()  # with client and round

    def changes(self, everything: bool = False) -> Iterator[dict[str, Tensor]]:
        """Tokens since the last call, or all, in time order: ``tokens [L, d]`` as stored, ``clients``, ``rounds``."""
        new = torch.arange(0 if everything else len(self) - self._unsaved, len(self))
        self._unsaved = 0
        for some in new.split(max(1, PART_BYTES // self._token_bytes)) if len(new) else ():
            yield {
                "tokens": self._tokens[self._places[some]],
                "clients": self._clients[some],
                "rounds": self._rounds[some],
            }

    def apply(self, change: Mapping[str, Tensor]) -> None:
        """Appends them; of another window's tokens it keeps what its own does."""
        self._add(change["clients"], change["rounds"], change["tokens"])


def _rows(capacity: int) -> int:
    """Of the array: so many more than tokens that moving them all is rare."""
    return capacity + max(1, capacity // 2)


def _row_bytes(dim: int, dtype: str) -> int:
    """Of a token in the array: every one begins as the first does, wherever the oldest is (``ALIGNMENT``)."""
    return -(-dim * _DTYPES[dtype].itemsize // ALIGNMENT) * ALIGNMENT


def _newer(clients: Tensor) -> Tensor:
    """How many newer tokens of its client there are of each, ``[L] int64``, in time order like ``clients [L]``."""
    backwards, order = clients.flip(0).sort(stable=True)
    count = backwards.unique_consecutive(return_counts=True)[1]
    first = (count.cumsum(0) - count).repeat_interleave(count)
    newer = torch.empty_like(clients)
    newer[order] = torch.arange(len(clients)) - first
    return newer.flip(0)
