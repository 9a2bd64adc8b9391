"""The journal: state that grows with the run, saved as what has changed.

It is a file of parts, each a safetensors blob behind its length. Checkpoints that follow each other have one such file
in common, each as a link in its own folder: the next one appends to it, and of its bytes a checkpoint counts as its own
those that were there then. So every checkpoint is whole by itself and costs what has changed, what one appends harms no
other, and the file is gone with the last of them. When it holds more than twice what there is to say, a new one begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

PART_BYTES = 64 << 20
"""About how much of a state is in memory once more while it is saved or read."""


class Journaled(ABC):
    """State of which a checkpoint writes only what has changed since the one before."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all that it holds."""

    @abstractmethod
    def changes(self, everything: bool = False) -> Iterator[dict[str, Tensor]]:
        """What was written since the last call, or all that it holds, in parts of about ``PART_BYTES``."""

    @abstractmethod
    def apply(self, change: Mapping[str, Tensor]) -> None:
        """Takes one part; they come in the order in which ``changes`` gave them."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets all that it holds."""


class Latest(Journaled):
    """Tensors that are replaced all at once, and not at every checkpoint.

    Attributes:
        value: the newest, by name.
    """

    def __init__(self) -> None:
        self.value: dict[str, Tensor] = {}
        self._unsaved = False

    def set(self, value: Mapping[str, Tensor]) -> None:
        """Replaces them."""
        self.value, self._unsaved = dict(value), True

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.value.values())

    def changes(self, everything: bool = False) -> Iterator[dict[str, Tensor]]:
        if self.value and (everything or self._unsaved):
            self._unsaved = False
            yield self.value

    def apply(self, change: Mapping[str, Tensor]) -> None:
        self.value = dict(change)

    def clear(self) -> None:
        self.value = {}


@dataclass(frozen=True)
class Journal:
    """A journal as a checkpoint left it, for the next checkpoint to go on with.

    Attributes:
        path: the file.
        states: whose changes it holds, by name.
        bytes: its length.
        sha256: the checksum of so many bytes.
    """

    path: Path
    states: Mapping[str, Journaled]
    bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def goes_on(self, states: Mapping[str, Journaled]) -> bool:
        """Whether changes of these states can be appended, and there is not more that is outdated than what is not."""
        untouched = self.path.is_file() and self.path.stat().st_size == self.bytes
        return untouched and states == self.states and self.bytes <= 2 * sum(state.nbytes for state in states.values())


def write(path: Path, states: Mapping[str, Journaled], before: Journal | None) -> Journal:
    """The journal before and what has changed since, or a new one with everything, at ``path``; not flushed to disk.

    After a failure nothing goes on with ``before``: the states have given their changes away.
    """
    journal = Journal(path, states)
    if before is not None and before.goes_on(states):
        _link(before.path, path)
        journal = replace(before, path=path, sha256=before.sha256.copy())
    length, sha256 = journal.bytes, journal.sha256
    with path.open("ab") as file:
        for name, state in states.items():
            for change in state.changes(everything=not journal.bytes):
                content = save({json.dumps([name, key]): value for key, value in change.items()})
                for piece in (len(content).to_bytes(8, "little"), content):
                    file.write(piece)
                    sha256.update(piece)
                    length += len(piece)
    return replace(journal, bytes=length)


def read(path: Path, length: int, states: Mapping[str, Journaled]) -> None:
    """Gives the states what they held when the journal was so many bytes long.

    Raises:
        Exception: of whatever kind, where these bytes are no journal, or one of other states.
    """
    for state in states.values():
        state.clear()
    with path.open("rb") as file:
        while file.tell() < length:
            size = int.from_bytes(file.read(8), "little")
            change = {tuple(json.loads(key)): value for key, value in load(file.read(min(size, length))).items()}
            (name,) = {name for name, _ in change}
            states[name].apply({key: value for (_, key), value in change.items()})


def _link(source: Path, target: Path) -> None:
    """Both are one file; on a file system without such links, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
