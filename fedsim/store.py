"""The store: what every client keeps between its rounds (its personal rows), for the whole population.

Memory is taken when a client is first seen: it gets the next row of an array whose pages are not backed before they are
written, and past the budget the array lies in a sparse file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithm import State
from fedsim.journal import PART_BYTES, Journaled

ALIGNMENT = 64  # bytes, as torch's own
BUDGET_BYTES = 4 << 30


def allocate(shape: tuple[int, ...], dtype: np.dtype, on_disk: bool, folder: Path | None = None) -> np.ndarray:
    """Zeros of this shape, in memory or in a file under ``folder`` that is gone with the array.

    They begin at a multiple of ``ALIGNMENT``: where numbers begin shows in the last bits of products of matrices.
    """
    if not on_disk:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)  # calloc: no page is taken before it is written
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes].view(dtype).reshape(shape)
    # Unlinked when closed: the file is memory, the checkpoint is what lasts.
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 – it lives as long as the map
    file.truncate(int(np.prod(shape)) * dtype.itemsize)
    return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


class Store(Journaled):
    """Rows of all clients by name: ``[N, *shape]``, those never written being the template's.

    Args:
        template: what a client keeps before it is first seen (``Algorithm.init_client``), without the client axis.
        num_clients: N.
        budget_bytes: larger than this, the rows lie in a memory-mapped file under ``folder``.
        folder: for such files; default: the system's temporary folder.

    Attributes:
        seen: ``[N] bool``, the clients that were written.
    """

    def __init__(
        self, template: State, num_clients: int, budget_bytes: int = BUDGET_BYTES, folder: Path | None = None
    ) -> None:
        self.template = template
        self.seen, self._unsaved = np.zeros((2, num_clients), dtype=bool)
        # Where each client's row is. In the order of their coming, since memory is given in pages of up to 2 MiB.
        self._places, self._used = np.zeros(num_clients, dtype=np.int64), 0
        on_disk = self.bytes_for(template, num_clients) > budget_bytes
        self._rows = {
            name: allocate((num_clients, *value.shape), value.numpy().dtype, on_disk, folder)
            for name, value in template.items()
        }

    @staticmethod
    def bytes_for(template: State, num_clients: int) -> int:
        """Bytes of the rows of so many clients."""
        return num_clients * sum(value.numel() * value.element_size() for value in template.values())

    def read(self, ids: np.ndarray) -> State:
        """A copy of the rows of clients ``ids [C]``: ``[C, *shape]``."""
        rows = {}
        for name, stored in self._rows.items():
            value = stored[self._places[ids]]
            value[~self.seen[ids]] = self.template[name].numpy()
            rows[name] = torch.from_numpy(value)
        return rows

    def write(self, ids: np.ndarray, rows: State) -> None:
        """Replaces the rows of clients ``ids [C]``.

        Raises:
            ValueError: names or shapes that the template does not have.
        """
        if rows.keys() != self._rows.keys():
            raise ValueError(f"a client keeps {sorted(self._rows)}, the algorithm returned rows {sorted(rows)}")
        for name, value in rows.items():
            expected = (len(ids), *self.template[name].shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"rows {name!r} have shape {tuple(value.shape)}, expected {expected}")
        new = np.unique(ids[~self.seen[ids]])
        self._places[new] = self._used + np.arange(len(new))
        self._used += len(new)
        for name, value in rows.items():
            self._rows[name][self._places[ids]] = value.numpy()
        self.seen[ids] = self._unsaved[ids] = True

    # In a checkpoint -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the clients that were seen."""
        return self._used * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 8 + self.bytes_for(self.template, 1)  # with the id

    def changes(self, everything: bool = False) -> Iterator[State]:
        """``ids [C]`` and ``rows.<name> [C, *shape]`` of the clients written since the last call, or of all seen."""
        ids = np.flatnonzero(self.seen if everything else self._unsaved)
        self._unsaved[ids] = False
        most = max(1, PART_BYTES // self._row_bytes)
        for at in range(0, len(ids), most):
            some = ids[at : at + most]
            yield {"ids": torch.from_numpy(some), **{f"rows.{name}": rows for name, rows in self.read(some).items()}}

    def apply(self, change: Mapping[str, Tensor]) -> None:
        rows = {name.removeprefix("rows."): value for name, value in change.items() if name != "ids"}
        self.write(change["ids"].numpy(), rows)

    def clear(self) -> None:
        self.seen[:] = self._unsaved[:] = False
        self._used = 0
