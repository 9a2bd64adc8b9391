"""The journal: what several checkpoints have in common, and what one of them adds; worked by hand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import checkpoint, journal
from fedsim.checkpoint import folder_of, newest, prune
from fedsim.errors import CheckpointError
from fedsim.journal import Journal, Journaled, Latest


class Notes(Journaled):
    """Numbers, of which a checkpoint has those that were added; it says itself how large it is."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        self.numbers: list[float] = []
        self.saved, self._nbytes = 0, nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def changes(self, everything: bool = False) -> Iterator[dict[str, Tensor]]:
        new = self.numbers if everything else self.numbers[self.saved :]
        self.saved = len(self.numbers)
        for number in new:
            yield {"number": torch.tensor(number)}

    def apply(self, change: Mapping[str, Tensor]) -> None:
        self.numbers.append(float(change["number"]))

    def clear(self) -> None:
        self.numbers, self.saved = [], 0


class Run:
    """Checkpoints of some notes, a number a round."""

    def __init__(self, checkpoints: Path, nbytes: int = 1 << 20) -> None:
        self.checkpoints, self.notes = checkpoints, Notes(nbytes)
        self.journal: Journal | None = None

    def round(self, number: int) -> Path:
        self.notes.numbers.append(float(number))
        folder = folder_of(self.checkpoints, number)
        self.journal = checkpoint.save(folder, {"round": number}, {"notes": self.notes}, self.journal)
        return folder


def notes_in(folder: Path) -> list[float]:
    checkpoint.load(folder)
    notes = Notes()
    notes.numbers = [-1.0]  # forgotten
    checkpoint.replay(folder, {"notes": notes})
    return notes.numbers


def file_of(folder: Path) -> Path:
    return folder / "changes.journal"


def test_every_checkpoint_has_what_there_was_then(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folders = [run.round(number) for number in (1, 2, 3)]
    assert [notes_in(folder) for folder in folders] == [[1], [1, 2], [1, 2, 3]]


def test_they_share_one_file_to_which_each_adds_its_change(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (size, *others), files = zip(*[(file_of(run.round(n)).stat().st_size, n) for n in (1, 2, 3)], strict=True)
    assert others == [2 * size, 3 * size] and files == (1, 2, 3)
    stats = [file_of(folder_of(tmp_path, n)).stat() for n in (1, 2, 3)]
    assert len({stat.st_ino for stat in stats}) == 1 and stats[0].st_nlink == 3
    prune(tmp_path, 1)
    assert file_of(folder_of(tmp_path, 3)).stat().st_nlink == 1
    assert notes_in(folder_of(tmp_path, 3)) == [1, 2, 3]


def test_a_new_one_begins_where_most_is_outdated(tmp_path: Path) -> None:
    size = file_of(Run(tmp_path / "measure").round(1)).stat().st_size
    run = Run(tmp_path / "run", nbytes=size)  # twice that is 2: the third checkpoint finds 2 and goes on, the fourth 3
    folders = [run.round(number) for number in (1, 2, 3, 4, 5)]
    files = [file_of(folder).stat().st_ino for folder in folders]
    assert files[0] == files[1] == files[2] != files[3] != files[4] != files[2]
    assert [notes_in(folder) for folder in folders[2:]] == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_a_new_one_begins_for_another_state(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.round(1)
    run.notes = Notes()
    run.notes.numbers, run.notes.saved = [7.0, 8.0], 2
    assert notes_in(run.round(9)) == [7, 8, 9]


@pytest.mark.parametrize("harm", ["deleted", "torn", "appended to"])
def test_a_new_one_begins_where_the_last_is_not_what_it_was(tmp_path: Path, harm: str) -> None:
    run = Run(tmp_path)
    folder = run.round(1)
    if harm == "deleted":
        shutil.rmtree(folder)
    else:
        content = file_of(folder).read_bytes()
        file_of(folder).write_bytes(content[:-1] if harm == "torn" else content + b"1")
    assert notes_in(run.round(2)) == [1, 2]


def test_the_same_round_again_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    inode = file_of(run.round(1)).stat().st_ino
    run.round(2)
    folder = run.round(2)
    assert notes_in(folder) == [1, 2, 2] and file_of(folder).stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00001", "round-00002"]


@pytest.mark.parametrize("at", [-1, 0])
def test_damage_is_named_and_harms_only_those_that_have_it(tmp_path: Path, at: int) -> None:
    """A bit of the last checkpoint's own part, or of the part that all have."""
    run = Run(tmp_path)
    folders = [run.round(number) for number in (1, 2)]
    content = bytearray(file_of(folders[1]).read_bytes())
    content[at] ^= 1
    with file_of(folders[1]).open("r+b") as file:  # in place: it is the one file
        file.write(content)
    told = [f"{file_of(folder)}: damaged (its checksum is not the manifest's)" for folder in (folders[1], folders[0])]
    assert newest(tmp_path) == ((folders[0], told[:1]) if at else (None, told))


def test_what_is_torn_off_harms_only_those_that_need_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folders = [run.round(number) for number in (1, 2)]
    os.truncate(file_of(folders[1]), file_of(folders[1]).stat().st_size - 1)
    assert newest(tmp_path)[0] == folders[0] and notes_in(folders[0]) == [1]
    with pytest.raises(CheckpointError, match=r"changes\.journal: damaged"):
        checkpoint.load(folders[1])


def test_what_a_killed_save_appended_is_nobodys(tmp_path: Path) -> None:
    folder = Run(tmp_path).round(1)
    with file_of(folder).open("ab") as file:
        file.write(b"half of a part")
    assert newest(tmp_path) == (folder, []) and notes_in(folder) == [1]


def test_without_links_each_has_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    run = Run(tmp_path)
    folders = [run.round(number) for number in (1, 2, 3)]
    assert [file_of(folder).stat().st_nlink for folder in folders] == [1, 1, 1]
    assert [notes_in(folder) for folder in folders] == [[1], [1, 2], [1, 2, 3]]


def test_states_are_told_apart_whatever_their_names(tmp_path: Path) -> None:
    states = {name: Notes() for name in ("a", "a/number", '["a"]')}
    for k, notes in enumerate(states.values()):
        notes.numbers = [float(k)]
    written = journal.write(tmp_path / "j", states, None)
    back = {name: Notes() for name in states}
    journal.read(written.path, written.bytes, back)
    assert [notes.numbers for notes in back.values()] == [[0], [1], [2]]
    with pytest.raises(KeyError):
        journal.read(written.path, written.bytes, {"a": Notes()})


def test_the_latest_replaces_all_before(tmp_path: Path) -> None:
    latest, back = Latest(), Latest()
    values = [{}, {"a": torch.zeros(500), "b": torch.zeros(1)}, {}, {"a": torch.ones(1000)}, {}]
    written: list[Journal] = []
    for number, value in enumerate(values):
        if value:
            latest.set(value)
        written.append(journal.write(tmp_path / str(number), {"x": latest}, written[-1] if written else None))
    sizes = [one.bytes for one in written]
    assert 0 == sizes[0] < sizes[1] == sizes[2] < sizes[3] == sizes[4] and latest.nbytes == 4000
    found = []
    for one in written:
        journal.read(one.path, one.bytes, {"x": back})
        found.append({name: len(value) for name, value in back.value.items()})
    assert found == [{}, {"a": 500, "b": 1}, {"a": 500, "b": 1}, {"a": 1000}, {"a": 1000}]
