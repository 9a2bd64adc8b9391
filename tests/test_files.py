"""Files are whole or what they were, nothing else is left beside them, and a lock is of one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import files
from fedsim.files import locked, replacing, unfinished, write_atomically


def there(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("ne")
        assert there(tmp_path) == {"a": "old", temporary.name: "ne"}
        # What a mirror of the folder, or a person, knows a half-written file by.
        assert temporary.name.startswith(".a.") and unfinished(temporary.name)
        temporary.write_text("new")
    assert there(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), KeyError()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "a") as temporary:
        temporary.write_text("ne")
        raise error
    assert there(tmp_path) == {"a": "old"}


def test_a_disk_that_is_full_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_atomically(tmp_path / "a", "new")
    assert there(tmp_path) == {"a": "old"}


def test_nothing_that_was_written_is_nothing_that_can_replace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert there(tmp_path) == {"a": "old"}


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert there(tmp_path) == {"a": "one"}  # which was the last to end


def test_content_is_on_disk_before_it_has_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, dict[str, str]]] = []
    flush = files.flush

    def noted(path: Path) -> None:
        flushed.append((path.name, there(tmp_path)))
        flush(path)

    monkeypatch.setattr(files, "flush", noted)
    write_atomically(tmp_path / "a", "new")
    (first, before), last = flushed
    assert before == {first: "new"} and first != "a"
    assert last == (tmp_path.name, {"a": "new"})


def test_a_text_that_is_none(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "ä\udcff\n")
    assert there(tmp_path) == {"a": "ä\\udcff\n"}


@pytest.mark.parametrize("place", ["no such folder/a", "x" * 300])
def test_a_place_that_cannot_be(tmp_path: Path, place: str) -> None:
    with pytest.raises(OSError):
        write_atomically(tmp_path / place, "new")
    assert there(tmp_path) == {}


# Locks ---------------------------------------------------------------------------------------------------------------


def refused(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except BlockingIOError:
        return True


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / ".lock"):
            assert refused(tmp_path / ".lock") and there(tmp_path) == {".lock": ""}
        assert there(tmp_path) == {}


def test_a_lock_dies_with_its_process_and_not_with_its_file(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fedsim.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        assert refused(tmp_path / ".lock")
        process.kill()
    assert there(tmp_path) == {".lock": ""} and not refused(tmp_path / ".lock")


def test_who_opened_a_lock_whose_holder_then_deleted_it_opens_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, flock = [], fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / ".lock"):
        assert len(opened) == 2 and there(tmp_path) == {".lock": ""} and refused(tmp_path / ".lock")


def test_a_file_system_without_locks_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / ".lock"):
        assert not refused(tmp_path / ".lock")
    assert there(tmp_path) == {}
