"""Atomic save, verified load. Tensors are safetensors, everything else is JSON: nothing in a checkpoint can run code.

A checkpoint is a folder ``round-00007`` with ``state.safetensors`` and ``state.json``, written anew each time,
``changes.journal``, which the next one appends to (``fedsim/journal.py``), and, written last, ``manifest.json`` with
their lengths and checksums. It is written under a temporary name, flushed to disk, and renamed; an older one of that
name is ``round-00007.old`` meanwhile. Of a run at a URI it is uploaded then (``fedsim/remote.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedsim import journal, remote
from fedsim.errors import CheckpointError
from fedsim.files import flush as _flush
from fedsim.journal import Journal, Journaled

FORMAT = 2
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What JSON that ``save`` has not written makes its readers raise."""
_PLAIN = (bool, int, float, str, type(None))
_TENSORS, _TREE, _JOURNAL, _MANIFEST = "state.safetensors", "state.json", "changes.journal", "manifest.json"


def folder_of(checkpoints: Path, round: int) -> Path:
    """Where the checkpoint after so many rounds lies."""
    return checkpoints / f"round-{round:05d}"


def save(
    folder: Path, tree: dict[str, Any], states: Mapping[str, Journaled] | None = None, before: Journal | None = None
) -> Journal:
    """Writes a tree of dicts, lists, numbers, texts and tensors: whole, or the folder stays what it was.

    Args:
        folder: the checkpoint.
        tree: what is written anew each time.
        states: what is written where it has changed, by name.
        before: what the last save of these states returned; after one that failed there is none.

    Raises:
        TypeError: the tree holds something else.
        CheckpointError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _pack(tree, "", tensors)
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _TREE).write_text(json.dumps(plain), encoding="utf-8")
        written = journal.write(temporary / _JOURNAL, states or {}, before)
        files = {name: _facts(temporary / name) for name in (_TENSORS, _TREE)}
        files[_JOURNAL] = {"bytes": written.bytes, "sha256": written.sha256.hexdigest()}
        (temporary / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
    remote.push_checkpoint(folder)
    return replace(written, path=folder / _JOURNAL)


def load(folder: Path) -> dict[str, Any]:
    """The tree that ``save`` wrote, here or at the run's URI.

    Raises:
        CheckpointError: a file is missing, or is not what the manifest says.
        OutputError: the URI cannot be read.
    """
    remote.pull_checkpoint(folder)
    verify(folder)
    try:
        tensors = load_file(folder / _TENSORS)
        return dict(_unpack(json.loads((folder / _TREE).read_text(encoding="utf-8")), tensors))
    except (SafetensorError, OSError, *_NOT_OURS) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


def facts_of(folder: Path) -> dict[str, Any]:
    """The driver's facts in a checkpoint that is here and was verified; none of its tensors is read.

    Raises:
        CheckpointError: it has none that can be read.
    """
    try:
        packed = json.loads((folder / _TREE).read_text(encoding="utf-8"))
        return dict(_unpack(dict(packed["dict"])["facts"], {}))
    except (OSError, *_NOT_OURS) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


def is_here(folder: Path) -> bool:
    """Whether this machine sees all of a checkpoint, by what is written last."""
    return (folder / _MANIFEST).is_file()


def replay(folder: Path, states: Mapping[str, Journaled]) -> None:
    """Gives the states what they held when they were saved; ``load`` comes before, and verifies.

    Raises:
        Exception: of whatever kind, where the checkpoint is of other states.
    """
    journal.read(folder / _JOURNAL, _manifest(folder)["files"][_JOURNAL]["bytes"], states)


def verify(folder: Path) -> None:
    """Checks the files against the manifest.

    Raises:
        CheckpointError: which file differs.
    """
    try:
        manifest = _manifest(folder)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
        for name in (_TENSORS, _TREE, _JOURNAL):
            expected = manifest["files"][name]
            # Of the journal, what was there then: later checkpoints have appended to it.
            if _facts(folder / name, expected["bytes"] if name == _JOURNAL else None) != expected:
                raise CheckpointError(f"{folder / name}: damaged (its checksum is not the manifest's)")
    except (OSError, *_NOT_OURS) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {error}") from None


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and what was wrong with those that were passed over.

    Of a run at a URI: of those that are here or there; of one round the URI's.

    Raises:
        OutputError: the URI cannot be read.
    """
    damaged = []
    for folder in reversed(_by_round({*checkpoints.glob("round-*"), *remote.checkpoints(checkpoints.parent)})):
        try:
            remote.pull_checkpoint(folder)
            verify(folder)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def prune(checkpoints: Path, keep: int, until: float = math.inf) -> None:
    """Deletes all but the newest ``keep`` of those ``until`` this round: later ones are of an attempt at these rounds
    that was given up, damaged or outdated."""
    found = _by_round(checkpoints.glob("round-*"))
    kept = [folder for folder in found if round_of(folder) <= until][-keep:]
    for folder in found:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _by_round(folders: Iterable[Path]) -> list[Path]:
    """Oldest first; of one round, what is being replaced comes before its successor."""
    found = [folder for folder in folders if re.fullmatch(r"round-\d+(\.old)?", folder.name)]
    return sorted(found, key=lambda folder: (round_of(folder), not folder.suffix))


def round_of(folder: Path) -> int:
    """After which round it was written."""
    return int(folder.stem.removeprefix("round-"))


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON, its tensors moved to ``tensors`` under their numbers; ``path`` is for messages."""
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share their memory.
        number, order = str(len(tensors)), _order(value)
        tensors[number] = value.detach().cpu().permute(order).clone(memory_format=torch.contiguous_format)
        return {"tensor": number} if order == sorted(order) else {"tensor": number, "order": order}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, _PLAIN) for item in value):
            return {"value": list(value)}  # not one more dict for each number
        return {"list": [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold {path!r}, a {type(value).__name__}")


def _order(value: torch.Tensor) -> list[int]:
    """A tensor's axes, those with the longest strides first."""
    strides = value.stride()
    axes = list(range(value.dim()))
    return axes if value.is_contiguous() else sorted(axes, key=lambda axis: -strides[axis])


def _unpack(packed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in packed:
        # Where a tensor begins in memory, and its strides, show in the last bits of products: in the file it begins
        # where the one before has ended, a copy where torch lets all begin.
        tensor = tensors[packed["tensor"]].clone()
        order = packed.get("order", range(tensor.dim()))
        return tensor.permute([order.index(axis) for axis in range(tensor.dim())])
    if "dict" in packed:
        return {key: _unpack(item, tensors) for key, item in packed["dict"]}
    if "list" in packed:
        return [_unpack(item, tensors) for item in packed["list"]]
    return packed["value"]


def _facts(path: Path, length: int | None = None) -> dict[str, Any]:
    """Bytes and checksum of the file, or of its beginning of this length; fewer bytes where it is shorter."""
    digest, left = hashlib.sha256(), path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while chunk := file.read(max(0, min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
