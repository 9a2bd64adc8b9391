"""Files below a URI: in an object store, or wherever else pyarrow or fsspec can read and write.

Names are relative to the URI, which is what they are confined to. What these functions raise is whatever the file
system raises, until ``patiently`` or ``read`` is around it.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from fedsim.errors import FedsimError, OutputError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem, SubTreeFileSystem

BACK_OFF_S = (1.0, 3.0, 9.0)  # between attempts
_CHUNK_BYTES = 1 << 20

_T = TypeVar("_T")


def is_uri(place: str) -> bool:
    """Whether a place is named by a URI, such as ``s3://bucket/run``, not by a path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place))


@cache
def files_at(uri: str) -> SubTreeFileSystem:
    """What is below the URI.

    Raises:
        OutputError: nothing that is installed understands it, or it holds a secret.
    """
    if re.match(r"[^/]+://[^/@]*:[^/@]*@", uri):
        raise OutputError("output: a URI with a password would be printed and logged; give secrets by the environment")
    if ".." in PurePosixPath(uri).parts:
        raise OutputError(f"output: {uri} has '..' in it")
    from pyarrow.fs import FileSystem, SubTreeFileSystem  # half a second, which only a run at a URI needs

    try:
        files, path = FileSystem.from_uri(uri)
    except Exception as error:
        try:
            files, path = _by_fsspec(uri)
        except Exception as other:
            raise OutputError(f"output: {uri} cannot be used ({reason(error)}; {reason(other)})") from None
    return SubTreeFileSystem(path, files)


def _by_fsspec(uri: str) -> tuple[FileSystem, str]:
    from fsspec.core import url_to_fs
    from pyarrow import PythonFile
    from pyarrow.fs import FileInfo, FileSelector, FileType, FSSpecHandler, PyFileSystem

    class Handler(FSSpecHandler):
        """Without its look before it leaps, which takes any failure for a sign that there is no such file."""

        def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
            """All that is below, as nobody here asks for less."""
            try:
                listed = self.fs.ls(selector.base_dir, detail=True)
            except FileNotFoundError:
                return []
            below = [info for info in listed if info["name"].strip("/") != selector.base_dir.strip("/")]
            found = [self._create_file_info(info["name"], info) for info in below]
            folders = [info.path for info in found if info.type == FileType.Directory]
            return found + [info for path in folders for info in self.get_file_info_selector(FileSelector(path))]

        def open_input_stream(self, path: str) -> PythonFile:
            return PythonFile(self.fs.open(path, mode="rb"), mode="r")

        def delete_file(self, path: str) -> None:
            self.fs.rm(path)

    # A listing that is kept would hide what another process writes.
    files, path = url_to_fs(uri, use_listings_cache=False)
    return PyFileSystem(Handler(files)), path


# Files ---------------------------------------------------------------------------------------------------------------


def sizes(files: SubTreeFileSystem) -> dict[str, int]:
    """Bytes of all files, by name."""
    from pyarrow.fs import FileSelector, FileType

    found = files.get_file_info(FileSelector("", recursive=True, allow_not_found=True))
    return {info.path: info.size for info in found if info.type == FileType.File}


def send(files: SubTreeFileSystem, name: str, path: Path, start: int = 0, end: int | None = None) -> None:
    """Uploads a file, or these bytes of it; where it fails, a part may have the name."""
    with path.open("rb") as source, _opened(files, name) as target:
        source.seek(start)
        left = (path.stat().st_size if end is None else end) - start
        while chunk := source.read(min(left, _CHUNK_BYTES)):
            target.write(chunk)
            left -= len(chunk)


def _opened(files: SubTreeFileSystem, name: str) -> Any:
    try:
        return files.open_output_stream(name)
    except FileNotFoundError:  # it is no object store: it has folders
        files.create_dir(name.rpartition("/")[0], recursive=True)
        return files.open_output_stream(name)


def replace(files: SubTreeFileSystem, name: str, path: Path) -> None:
    """Uploads a file that has its name only when it is whole; where it fails, a part may be ``name.tmp``."""
    send(files, f"{name}.tmp", path)
    files.move(f"{name}.tmp", name)


def receive(files: SubTreeFileSystem, name: str, target: BinaryIO) -> None:
    """Downloads a file."""
    with files.open_input_stream(name) as source:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def content(files: SubTreeFileSystem, name: str) -> bytes | None:
    """Of a small file; ``None``: there is none."""
    try:
        with files.open_input_stream(name) as source:
            return source.read()
    except FileNotFoundError:
        return None


def delete_folder(files: SubTreeFileSystem, name: str, first: str) -> None:
    """Deletes a folder, this file of it before all others; nothing where there is none."""
    from pyarrow.fs import FileType

    file, folder = files.get_file_info([f"{name}/{first}", name])
    if file.type != FileType.NotFound:
        files.delete_file(file.path)
    if folder.type != FileType.NotFound:
        files.delete_dir(folder.path)


# Failures ------------------------------------------------------------------------------------------------------------


def patiently(uri: str, attempt: Callable[[SubTreeFileSystem], _T], back_off_s: Sequence[float] | None = None) -> _T:
    """What the attempt gives, which is made once more after each of these waits; default: ``BACK_OFF_S``."""
    for wait_s in BACK_OFF_S if back_off_s is None else back_off_s:
        try:
            return attempt(files_at(uri))
        except (FedsimError, FileNotFoundError):
            raise
        except Exception:
            time.sleep(wait_s)
    return attempt(files_at(uri))


def read(uri: str, attempt: Callable[[SubTreeFileSystem], _T], back_off_s: Sequence[float] | None = None) -> _T:
    """As ``patiently``; for what a run cannot do without.

    Raises:
        OutputError: it fails, in whatever way.
    """
    try:
        return patiently(uri, attempt, back_off_s)
    except FedsimError:
        raise
    except Exception as error:
        raise OutputError(f"{uri}: cannot be read ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """The first line of what it says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
