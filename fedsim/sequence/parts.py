"""A row's parts: what has a memory of its own.

A part is the adapter of one layer, or the weights of one class in a head. Parts of equal form lie in one bank
``[G, k]`` and share a learner, which sees them as sequences: ``G`` parts, or ``G`` parts of each of ``N`` clients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsim.layout import Layout, Piece


class Parts:
    """Rows ``[N, d]`` as banks of parts ``[G, N, k]``, and back; ``arranged`` rows have part lie after part.

    Attributes:
        banks: the parts' elements as places in the row, ``[G, k] int64`` each; together they cover it.
    """

    def __init__(self, banks: Iterable[Tensor]) -> None:
        self.banks = list(banks)
        self._places = torch.cat([bank.flatten() for bank in self.banks])
        self._order = self._places.argsort()

    @classmethod
    def of(cls, layout: Layout, whole: bool = False) -> Parts:
        """The parts of a layout; ``whole``: the row is one part."""
        if whole:
            return cls([torch.arange(layout.size)[None]])
        modules: dict[str, list[Piece]] = {}
        for piece in layout.pieces:
            modules.setdefault(piece.name.rpartition(".")[0] or piece.name, []).append(piece)
        by_form: dict[tuple[str, int], list[Tensor]] = {}
        for pieces in modules.values():
            for part in _of_head(pieces) if pieces[0].group == "head" else [torch.cat([_places(p) for p in pieces])]:
                by_form.setdefault((pieces[0].group, len(part)), []).append(part)
        return cls([torch.stack(parts) for parts in by_form.values()])

    def arranged(self, rows: Tensor) -> Tensor:
        """``[N, d]`` with the elements of a part beside each other."""
        return rows.index_select(1, self._places)  # half the time of rows[:, places]

    def cut(self, arranged: Tensor) -> list[Tensor]:
        """Arranged rows ``[N, d]`` as one ``[G, N, k]`` a bank, without a copy."""
        pieces = arranged.split([bank.numel() for bank in self.banks], 1)
        return [piece.unflatten(1, bank.shape).transpose(0, 1) for piece, bank in zip(pieces, self.banks, strict=True)]

    def split(self, rows: Tensor) -> list[Tensor]:
        """``[N, d]`` to one ``[G, N, k]`` a bank."""
        return self.cut(self.arranged(rows))

    def spread(self, values: Tensor) -> Tensor:
        """One value a bank ``[B]`` to one an element ``[d]``."""
        return torch.cat([v.expand(bank.numel()) for v, bank in zip(values, self.banks, strict=True)])[self._order]

    def join(self, parts: list[Tensor]) -> Tensor:
        """One ``[G, N, k]`` a bank to ``[N, d]``."""
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).index_select(1, self._order)


def _places(piece: Piece) -> Tensor:
    return piece.offset + torch.arange(piece.size)


def _of_head(pieces: list[Piece]) -> Tensor:
    """One part a class, ``[classes, k]``: a class's weights and bias; classes are the last axis of a head's tensors."""
    return torch.cat([_places(piece).view(-1, piece.shape[-1]) for piece in pieces]).t()
