"""A disk that is full: the run fails with one line, its last checkpoint is whole, and with room it goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from conftest import TINY
from run_folders import results

from fedsim import checkpoint, loop
from fedsim.__main__ import main
from fedsim.files import unfinished
from fedsim.tracking import JsonLines

SETTINGS = ("run", *TINY, "algorithm=pfedseq", "rounds=3")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], AbstractContextManager[None]]:
    """``with full(os, "fsync"):`` this function finds no room, from the first checkpoint on."""

    @contextmanager
    def within(owner: Any, name: str) -> Iterator[None]:
        save, write, saved = loop._save, getattr(owner, name), []

        def noted(*values: Any) -> None:
            save(*values)
            saved.append(values)

        def limited(*values: Any) -> Any:
            if saved:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*values)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "_save", noted)
            patched.setattr(owner, name, limited)
            yield
        assert saved

    return within


@pytest.mark.parametrize(
    ("owner", "name"), [(JsonLines, "on_round"), (os, "fsync"), (os, "replace"), (checkpoint, "_flush")]
)
def test_a_full_disk_costs_one_line_and_no_round(owner, name, full, capsys, tmp_path):
    folder = tmp_path / "run"
    with full(owner, name):
        assert main([*SETTINGS, f"output={folder}"]) == 1
    told = capsys.readouterr()
    again = f"python -m fedsim resume {folder}"
    assert told.err.startswith(f"fedsim: {folder}") and told.err.count("\n") == 1
    assert "cannot be written" in told.err and "No space left on device" in told.err
    assert again in told.err + told.out
    assert not [path.name for path in folder.rglob("*") if unfinished(path.name)]
    assert main(["resume", str(folder)]) == 0
    assert main([*SETTINGS, f"output={tmp_path / 'undisturbed'}"]) == 0
    assert results(folder) == results(tmp_path / "undisturbed")


def test_one_that_was_full_before_the_run_began_is_a_mistake_of_the_caller(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "run"

    def limited(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedsim.simulation.save_partition", limited)
        assert main([*SETTINGS, f"output={folder}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"fedsim: output: {folder} cannot be written ([Errno 28]") and told.count("\n") == 1
