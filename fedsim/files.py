"""Files that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system, a cluster's for instance


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside ``path`` to write to, which takes its place, flushed to disk, if the block ends well.

    Otherwise ``path`` stays what it was, and the new file is deleted; only what a killed process was writing stays
    behind, as ``.STEM.….tmp.SUFFIX``. Several processes may replace one file at once: the last one's counts.

    Raises:
        OSError: it cannot be written.
    """
    # The suffix last: some writers put their own behind any other.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # it may not have been begun
            temporary.unlink()
        raise
    flush(path.parent)


def unfinished(name: str) -> bool:
    """Whether a file of this name is what a killed process left of a write."""
    return ".tmp" in Path(name).suffixes


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        # A folder's name need not be text: what of it is none is written as \udcff.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def flush(path: Path) -> None:
    """To disk: a file's content, or the names in a folder.

    Raises:
        OSError: there is no room, or nothing of that name.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends; nothing where the file system has none.

    Args:
        path: the file that is locked; it is made, and gone when the block has ended.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    descriptor = _take(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)  # after the deletion: who has opened it meanwhile finds that it is gone


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder before has deleted it
