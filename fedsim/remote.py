"""A run folder at a URI (``output=s3://bucket/run``).

The run is written into a working folder on this machine, in the cache, and mirrored: a checkpoint by the process that
wrote it (the central actor, on whatever machine that is), all else by the driver, after each checkpoint and at the end.
The path of a working folder has the URI in it: who has the path needs to be told nothing more, on any machine.

    config.yaml, metrics.jsonl, …         the run folder's files
    checkpoints/round-00007/              a checkpoint's files but its journal, and pieces.json, which names
    checkpoints/journal/START-SHA256      the pieces of that: from which byte on, and the checksum of all to its end

Any upload may be torn off. A file of the run gets its name when it is whole, and so does a checkpoint's manifest, when
all else is there: without one it is none. Nor is it one while ``metrics.jsonl`` does not reach so far.

An object cannot be appended to. So each checkpoint adds what is new in its journal as a piece: bytes go up once, and a
run that is resumed fetches as many objects as there were checkpoints since the journal began. What is small and grows,
``metrics.jsonl`` and TensorBoard's file, is sent whole each time: with 2 kB a round, after 1000 of them 1 GB in all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fedsim import uri as at
from fedsim.cache import cache_folder
from fedsim.errors import OutputError
from fedsim.files import LOCK, unfinished
from fedsim.uri import is_uri

if TYPE_CHECKING:
    from pyarrow.fs import SubTreeFileSystem

_LONGEST_NAME = 255  # bytes of a file's name, nearly everywhere
_REWRITTEN = ("metrics.jsonl", "summary.json", "clients.csv")  # whose length may stay; all others only grow, if at all
_STATE = ("state.safetensors", "state.json")
_JOURNAL, _PIECES, _MANIFEST = "changes.journal", "pieces.json", "manifest.json"

_log = logging.getLogger(__name__)


def working_folder(uri: str, below: Path | None = None) -> Path:
    """The folder on this machine for the run at a URI; ``below``: this folder, by default the cache.

    Raises:
        OutputError: the URI is too long.
    """
    quoted = quote(uri, safe="")
    if len(quoted) > _LONGEST_NAME:
        raise OutputError(f"{uri}: too long a URI ({len(quoted)} characters when quoted, at most {_LONGEST_NAME})")
    return (below or cache_folder() / "remote") / quoted / PurePosixPath(uri.partition("?")[0]).name


def uri_of(folder: Path) -> str | None:
    """Where a run folder is mirrored; ``None``: nowhere, it is an ordinary one."""
    uri = unquote(folder.parent.name)
    return uri if is_uri(uri) else None


def shown(folder: Path) -> str:
    """A run folder as a person calls it: by its URI, or by its path."""
    return uri_of(folder) or str(folder)


# A run begins, or goes on --------------------------------------------------------------------------------------------


def usable(uri: str) -> Path:
    """The working folder for a URI; nothing is made.

    Raises:
        OutputError: the URI cannot be used.
    """
    at.files_at(uri)
    return working_folder(uri)


def lock_of(folder: Path) -> Path:
    """The file by which a run folder is locked; of a working folder, which may be made anew, beside it."""
    return (folder.parent if uri_of(folder) else folder) / LOCK


def new(uri: str) -> Path:
    """The working folder for a run that is to begin at a URI.

    Raises:
        OutputError: there is something already, or that cannot be seen.
    """
    found = at.read(uri, at.sizes, back_off_s=())
    if found:
        on = f", or go on with it: python -m fedsim resume {uri}" if "config.yaml" in found else ""
        raise OutputError(f"output: {uri} exists; choose another{on}")
    return working_folder(uri)


def begin(folder: Path) -> None:
    """Makes sure that the URI can be written to, and clears the working folder; nothing for an ordinary folder.

    Raises:
        OutputError: it cannot.
    """
    if uri := uri_of(folder):
        files = at.files_at(uri)
        try:
            files.base_fs.create_dir(files.base_path, recursive=True)
            files.open_output_stream(".fedsim").close()
            files.delete_file(".fedsim")
        except Exception as error:
            raise OutputError(f"output: {uri} cannot be written to ({at.reason(error)})") from None
        shutil.rmtree(folder, ignore_errors=True)


def fetch(uri: str) -> Path:
    """The working folder of a run that goes on: the one that is here, if its newest checkpoint is as new as the URI's.

    Otherwise it is made anew from the URI; the checkpoint comes with ``checkpoint.newest``.

    Raises:
        OutputError: the URI is not a run's, or cannot be read.
    """
    folder = working_folder(uri)

    def is_as_new(files: SubTreeFileSystem) -> bool:
        begun = at.content(files, "config.yaml")
        same = begun is not None and begun == _content(folder / "config.yaml")
        return same and _last(_names(folder)) >= _last(at.sizes(files))

    if not at.read(uri, is_as_new):
        copy(uri)
    return folder


def copy(uri: str, below: Path | None = None) -> Path:
    """A working folder with what the URI has but its checkpoints, and nothing else; those come when they are asked for.

    Raises:
        OutputError: the URI is no run's, nor that of a folder of runs, or cannot be read.
    """
    folder = working_folder(uri, below)

    def attempt(files: SubTreeFileSystem) -> None:
        names = _of_the_driver(at.sizes(files))
        if not any(PurePosixPath(name).name == "config.yaml" for name in names):
            raise OutputError(f"{uri}: not a run folder (no config.yaml)")
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                at.receive(files, name, file)

    at.read(uri, attempt)
    return folder


@contextmanager
def copies(places: Sequence[str]) -> Iterator[list[Path]]:
    """Run folders; of those at URIs, copies that are gone afterwards.

    Raises:
        OutputError: as of ``copy``.
    """
    with tempfile.TemporaryDirectory(prefix="fedsim-") as below:
        yield [copy(place, Path(below)) if is_uri(place) else Path(place) for place in places]


# The driver's part ---------------------------------------------------------------------------------------------------


def push(folder: Path, round: int = 0, keep: int = 0) -> None:
    """Uploads what has changed in a run folder but checkpoints; says so where that fails.

    After the checkpoint of a ``round``, all but the last ``keep`` until then are deleted.
    """

    def attempt(files: SubTreeFileSystem) -> None:
        there = at.sizes(files)
        for name in there:
            if name.endswith(".tmp"):
                files.delete_file(name)
        for name in _of_the_driver(_names(folder)):
            if name in _REWRITTEN or there.get(name) != (folder / name).stat().st_size:
                at.replace(files, name, folder / name)
        if round:
            _prune(files, there, round, keep)

    _or_say_so(folder, "what has changed", attempt)


def _prune(files: SubTreeFileSystem, there: Iterable[str], round: int, keep: int) -> None:
    # Later ones are of an attempt at these rounds that was given up.
    kept = [name for name in _whole(there) if _round(name) <= round][-keep:]
    used = {piece for name in kept for piece in json.loads(at.content(files, f"checkpoints/{name}/{_PIECES}") or "")}
    found = {match[1] for name in there if (match := re.match(r"checkpoints/(round-\d+)/", name))}
    for name in sorted(found - {*kept}):
        at.delete_folder(files, f"checkpoints/{name}", first=_MANIFEST)
    for name in there:
        if name.startswith("checkpoints/journal/") and PurePosixPath(name).name not in used:
            files.delete_file(name)


def finish(folder: Path) -> None:
    """The last ``push``, of a run that ends: with its newest checkpoint, if that is here and not there yet."""
    for name in _whole(_names(folder))[-1:]:
        if not (folder / "checkpoints" / name / _PIECES).is_file():
            push_checkpoint(folder / "checkpoints" / name)
    push(folder)


# The central actor's part --------------------------------------------------------------------------------------------


def push_checkpoint(folder: Path) -> None:
    """Uploads a checkpoint, then deletes those beside it here; says so where that fails."""

    def attempt(files: SubTreeFileSystem) -> None:
        there, pending = f"checkpoints/{folder.name}", folder / f"{_PIECES}.tmp"
        at.delete_folder(files, there, first=_MANIFEST)
        pending.write_text(json.dumps(_push_journal(files, folder)), encoding="utf-8")
        for name in _STATE:
            at.send(files, f"{there}/{name}", folder / name)
        at.send(files, f"{there}/{_PIECES}", pending)
        at.replace(files, f"{there}/{_MANIFEST}", folder / _MANIFEST)
        pending.rename(folder / _PIECES)  # all of it is there
        for other in folder.parent.glob("round-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    _or_say_so(folder.parent.parent, folder.name, attempt)


def _push_journal(files: SubTreeFileSystem, folder: Path) -> list[str]:
    """Uploads what the journal has beyond what is there of it; the names of all its pieces, in their order."""
    journal, uploaded = _journal_of(folder), []
    for other in folder.parent.glob("round-*"):
        # Checkpoints that have a journal in common only ever append to it.
        if (other / _PIECES).is_file() and os.path.samefile(other / _JOURNAL, folder / _JOURNAL):
            uploaded.append((_journal_of(other)["bytes"], json.loads((other / _PIECES).read_text(encoding="utf-8"))))
    start, pieces = max(uploaded, default=(0, []))
    if start == journal["bytes"]:
        return pieces
    piece = f"{start:015d}-{journal['sha256'][:16]}"
    at.send(files, f"checkpoints/journal/{piece}", folder / _JOURNAL, start, journal["bytes"])
    return [*pieces, piece]


def _journal_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"][_JOURNAL]


def pull_checkpoint(folder: Path) -> None:
    """Makes a checkpoint here that of the URI, if that has it; one that lacks a file there gets no manifest here.

    Raises:
        OutputError: the URI cannot be read.
    """
    there, uri = f"checkpoints/{folder.name}", uri_of(folder.parent.parent)

    def attempt(files: SubTreeFileSystem) -> None:
        manifest = at.content(files, f"{there}/{_MANIFEST}")
        if manifest is None or manifest == _content(folder / _MANIFEST):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            for name in (*_STATE, _PIECES):
                with (folder / name).open("wb") as file:
                    at.receive(files, f"{there}/{name}", file)
            with (folder / _JOURNAL).open("wb") as file:
                for piece in json.loads((folder / _PIECES).read_text(encoding="utf-8")):
                    at.receive(files, f"checkpoints/journal/{piece}", file)
        except (FileNotFoundError, ValueError, TypeError):
            return
        (folder / _MANIFEST).write_bytes(manifest)

    if uri:
        at.read(uri, attempt)


def checkpoints(folder: Path) -> list[Path]:
    """Where the checkpoints at the URI lie in this run folder, or will: those that its ``metrics.jsonl`` reaches.

    Raises:
        OutputError: the URI cannot be read.
    """
    uri = uri_of(folder)
    if uri is None:
        return []
    rounds = (_content(folder / "metrics.jsonl") or b"").count(b"\n")
    return [folder / "checkpoints" / name for name in _whole(at.read(uri, at.sizes)) if _round(name) <= rounds]


def _or_say_so(folder: Path, what: str, attempt: Callable[[SubTreeFileSystem], None]) -> None:
    """Does it where the folder is mirrored; a network that fails does not stop the run."""
    if uri := uri_of(folder):
        try:
            at.patiently(uri, attempt)
        except Exception as error:
            _log.warning("%s lacks %s (%s); the next upload catches up", uri, what, at.reason(error))


# Names of files, relative to the run folder --------------------------------------------------------------------------


def _names(folder: Path) -> Iterator[str]:
    """Of the files that are here."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return (path.relative_to(folder).as_posix() for path in files)


def _of_the_driver(names: Iterable[str]) -> list[str]:
    """Those of no checkpoint, not half written, not outside; config.yaml is last: a folder that has it has all."""
    own = [name for name in names if not {"checkpoints", ".."} & {*PurePosixPath(name).parts}]
    return sorted((name for name in own if not unfinished(name)), key=lambda name: (name == "config.yaml", name))


def _whole(names: Iterable[str]) -> list[str]:
    """The checkpoints whose manifest is among the files, oldest first."""
    found = [re.fullmatch(rf"checkpoints/(round-\d+)/{re.escape(_MANIFEST)}", name) for name in names]
    return sorted((match[1] for match in found if match), key=_round)


def _round(name: str) -> int:
    return int(name.removeprefix("round-"))


def _last(names: Iterable[str]) -> int:
    return max(map(_round, _whole(names)), default=-1)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
