"""The files of a folder, a ``.zip`` or a ``.tar``: streamed one after another, never extracted to disk.

Members that could name a file outside (absolute paths, ``..``, links) are refused, although nothing is written: an
archive that has them is not what its user takes it for.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from fedsim.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_BYTES = 64 * 2**20  # of one file that is read, or of any in an archive, decompressed
MAX_TOTAL_BYTES = 2**30  # of all files in an archive that are more than MAX_RATIO times its own size
MAX_RATIO = 100  # images are compressed already: of those in use, archives are hardly smaller than their files
MAX_DEPTH = 8  # of folders: a link back to a folder above would otherwise never end


@dataclass(frozen=True)
class Member:
    """A file or folder inside a source; ``name`` has forward slashes, is relative, and ends in no slash."""

    name: str
    is_folder: bool
    size: int
    changed_ns: int = 0


Entries = Iterator[tuple[Member, Callable[[], bytes]]]


def members(path: Path) -> list[Member]:
    """All files and folders of a source, but hidden ones.

    Raises:
        DataError: damaged, unsafe, or neither a folder nor an archive; or an archive has a file of more than
            ``MAX_BYTES``, or unfolds into too many.
    """
    return [member for member, _ in _entries(path)]


def contents(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted members, in the order in which the source stores them.

    Raises:
        DataError: as ``members``, or a member is larger than ``MAX_BYTES``.
    """
    wanted = frozenset(wanted)
    for member, read in _entries(path):
        if member.name in wanted:
            _refuse_large(path, member)
            with _readable(path):
                content = read()
            yield member.name, content


def fingerprint(path: Path, files: list[Member]) -> str:
    """A hash of an archive's size and time of change, or of those of a folder's ``files``."""
    if path.is_file():
        facts = [("", path.stat().st_size, path.stat().st_mtime_ns)]
    else:
        facts = [(file.name, file.size, file.changed_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _entries(path: Path) -> Entries:
    if path.is_dir():
        kind = _in_folder
    elif path.name.lower().endswith(SUFFIXES):
        kind = _in_zip if path.name.lower().endswith(".zip") else _in_tar
    else:
        raise DataError(f"{str(path)!r} is neither a folder nor an archive ({' '.join(SUFFIXES)})")
    with _readable(path):
        for member, read in kind(path) if kind is _in_folder else _bounded(path, kind(path)):
            if not any(part.startswith(".") or part == "__MACOSX" for part in member.name.split("/")):
                yield member, read


def _bounded(path: Path, entries: Entries) -> Entries:
    """An archive's entries, hidden ones and what is no image too: a ``.tar.gz`` is read through to get past them."""
    most, total = max(MAX_TOTAL_BYTES, MAX_RATIO * path.stat().st_size), 0
    for member, read in entries:
        _refuse_large(path, member)
        total += member.size
        if total > most:
            raise DataError(f"{str(path)!r}: its files have more than {most} bytes, as those of a decompression bomb")
        yield member, read


def _refuse_large(path: Path, member: Member) -> None:
    if member.size > MAX_BYTES:
        raise DataError(f"{str(path)!r}: {member.name!r} has {member.size} bytes, more than {MAX_BYTES}")


def _in_folder(path: Path) -> Entries:
    for folder, folders, files in os.walk(path, followlinks=True):
        relative = PurePosixPath(Path(folder).relative_to(path).as_posix())
        if len(relative.parts) >= MAX_DEPTH:
            folders.clear()
        for name in folders:
            yield Member(str(relative / name), True, 0), bytes
        for name in files:
            file = Path(folder, name)
            facts = file.stat()
            yield Member(str(relative / name), False, facts.st_size, facts.st_mtime_ns), file.read_bytes


def _in_zip(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{str(path)!r}: {info.filename!r} is a link, which is refused")
            name = _safe(path, info.filename)
            if name:
                yield Member(name, info.is_dir(), info.file_size), partial(_zip_content, archive, info)


def _in_tar(path: Path) -> Entries:
    with tarfile.open(path, "r:*") as archive:
        for info in archive:
            if not (info.isfile() or info.isdir()):
                raise DataError(f"{str(path)!r}: {info.name!r} is a link or a device, which is refused")
            if info.size < 0:  # tarfile would come back to this member for ever
                raise DataError(f"{str(path)!r} is damaged: {info.name!r} has {info.size} bytes")
            name = _safe(path, info.name)
            if name:
                yield Member(name, info.isdir(), info.size), partial(_tar_content, archive, info)
        # tarfile takes an archive that was cut between two members for a whole one; a whole one ends in zeros.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{str(path)!r} is damaged: its end is missing")


def _zip_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        return file.read(info.file_size)  # without a number, all that there is would be unpacked, whatever was declared


def _tar_content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    return file.read() if file else b""


def _safe(path: Path, name: str) -> str:
    """The normalised name; empty for the archive's own root."""
    slashed = name.replace("\\", "/")
    if slashed.startswith("/") or slashed[1:2] == ":" or ".." in slashed.split("/"):
        raise DataError(f"{str(path)!r}: {name!r} points outside of the archive, which is refused")
    return "/".join(part for part in slashed.split("/") if part not in ("", "."))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # what readers of a damaged archive raise is not documented
        raise DataError(f"{str(path)!r} cannot be read, it may be damaged: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
