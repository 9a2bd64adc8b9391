"""The cache of decoded images and of cached prefixes: each one ``.npy`` that processes map into memory, and beside it a
manifest, written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import DataError
from fedsim.files import replacing, write_atomically


def cache_folder() -> Path:
    """Where decoded images and pre-trained backbones are kept: ``$FEDSIM_CACHE`` or ``~/.cache/fedsim``."""
    return Path(os.environ.get("FEDSIM_CACHE") or "~/.cache/fedsim").expanduser().absolute()


def cached(folder: Path, name: str, about: dict[str, Any], write: Callable[[Path], None], verify: bool = False) -> Path:
    """The ``.npy`` file that ``about`` describes: the one in the cache, or else the one that ``write`` makes now.

    Several processes may build one entry at once: each writes a file of its own, and the last one to finish replaces
    the others' equal files.

    Args:
        folder: the cache; made where it does not exist.
        name: what the file's name begins with.
        about: JSON-serialisable facts that decide the content; they are the entry's key and part of its manifest.
        write: writes the ``.npy`` to the path it is given.
        verify: reads an existing entry whole and compares its sha256, not only its size.

    Raises:
        DataError: the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    array_file = folder / f"{name}-{key}.npy"
    facts = _facts(array_file)
    with suppress(OSError):  # one that cannot be read is made anew
        if facts.get("about") == about and (not verify or _sha256(array_file) == facts.get("sha256")):
            return array_file
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(array_file) as temporary:
            write(temporary)
            shape = np.load(temporary, mmap_mode="r").shape
            facts = {"about": about, "shape": shape, "bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
        write_atomically(_manifest(array_file), json.dumps(facts, indent=1))
    return array_file


def content(array_file: Path) -> str:
    """The sha256 of an array's file: by its manifest for an entry of the cache, else the file is read.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return str(_facts(array_file).get("sha256") or _sha256(array_file))
    except OSError as error:
        raise DataError(f"{array_file}: cannot be read ({error})") from None


def room(folder: Path) -> int:
    """Bytes that are free for a cache, whose folder need not be there yet.

    Raises:
        DataError: there are none as nothing can be written there at all.
    """
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if not free:  # as in /proc, or of a disk that is full
        with _told(folder):
            tempfile.TemporaryFile(dir=disk).close()
    return free


def create(path: Path, shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    """A new ``.npy``, mapped into memory for writing, its disk space taken.

    Raises:
        OSError: the disk is full (a map of a file with holes would die of a signal later instead).
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cache {str(folder)!r} cannot be written: {error}") from None


def _manifest(array_file: Path) -> Path:
    return array_file.with_suffix(".json")


def _facts(array_file: Path) -> dict[str, Any]:
    """What the manifest of an entry says; nothing where there is none, or where it is not of a file of this length."""
    try:
        facts: dict[str, Any] = json.loads(_manifest(array_file).read_text(encoding="utf-8"))
        return facts if facts["bytes"] == array_file.stat().st_size else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
