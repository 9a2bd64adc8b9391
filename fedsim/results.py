"""Finished runs as they lie in their folders: found, read whole, or refused with the reason in one line."""

from __future__ import annotations

import csv
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedsim import config as configuration
from fedsim.errors import ConfigError, OutputError
from fedsim.schema import plain

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, yaml.YAMLError,
               zipfile.BadZipFile, zlib.error)  # fmt: skip
_COLUMNS = ("client", "samples", "test_samples", "rounds", "accuracy_sent", "accuracy")  # of clients.csv
_TOLD = ("accuracy.mean", "accuracy.p10", "accuracy.min", "bytes.up", "bytes.down", "seconds.total", "seed", "rounds")


@dataclass(frozen=True)
class Point:
    """A round that was evaluated.

    Attributes:
        round: from 1.
        accuracy: the mean over clients.
        bytes: sent until then, up and down.
        seconds: until then, of training and of the server's work.
    """

    round: int
    accuracy: float
    bytes: int
    seconds: float


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder tells.

    Attributes:
        folder: where it lies.
        settings: the resolved configuration, flat, with the run's seed but without its output.
        about: what ``config.yaml`` says of data, backbone, versions and commit.
        summary: ``summary.json``, flat.
        points: the rounds that were evaluated.
        measured: by round, what the algorithm itself measured.
        clients: the columns of ``clients.csv``, each ``[N] float64``.
    """

    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    summary: dict[str, Any]
    points: list[Point]
    measured: dict[int, dict[str, float]]
    clients: dict[str, np.ndarray]

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders among ``paths`` and directly below them (a sweep's), each once; what is neither stays.

    Plain files are passed over: ``runs/*`` names logs and tables, too.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            continue
        below = [] if (path / "config.yaml").is_file() else sorted(file.parent for file in path.glob("*/config.yaml"))
        for folder in below or [path]:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read(folder: Path) -> FinishedRun:
    """A finished run.

    Raises:
        OutputError: the folder is none of a run that has finished, or a file of it is damaged.
    """
    summary = flat(finished(folder))
    with _reading(folder / "summary.json"):
        for key in _TOLD:
            if not isinstance(summary.get(key), (int, float)):
                raise ValueError(f"{key} is {summary.get(key)!r}")
    with _reading(folder / "config.yaml") as file:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        about = dict(tree.pop("about", {}))
        settings = _settings(tree)
    with _reading(folder / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        points = list(_points(records))
        measured = {record["round"]: _numbers(record["algorithm"]) for record in records if "algorithm" in record}
        if not points:
            raise ValueError("no round was evaluated")
    with _reading(folder / "clients.csv") as file, file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
        clients = {column: np.array([float(row[column]) for row in rows]) for column in _COLUMNS}
        if not rows:
            raise ValueError("no client")
    return FinishedRun(folder, settings, about, summary, points, measured, clients)


def finished(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        OutputError: the folder is none of a run that has finished.
    """
    try:
        summary = dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise OutputError(f"{folder}: not a finished run (no summary.json that can be read)") from None
    status = summary.get("status")
    if not summary.get("accuracy"):
        raise OutputError(f"{folder}: the run ended before its first evaluation ({status})")
    if status != "finished":
        raise OutputError(f"{folder}: not a finished run ({status}); python -m fedsim resume {folder}")
    return summary


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"accuracy": {"mean": 0.5}}`` as ``{"accuracy.mean": 0.5}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def flat_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run, flat; nothing of any other."""
    try:
        return flat(finished(folder))
    except OutputError:
        return {}


def class_counts(folder: Path) -> np.ndarray | None:
    """Training images of every client in every class, ``[N, classes] int64``, by the run's ``partition.npz``.

    ``None`` where the file does not tell: it is missing or damaged, or was written without the images' labels.
    """
    try:
        with np.load(folder / "partition.npz", allow_pickle=False) as file:
            images, offsets, labels = file["train_values"], file["train_offsets"], file["labels"]
            classes = max(int(json.loads(str(file["about"]))["classes"]), int(labels.max()) + 1)
        clients = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        counts = np.bincount(clients * classes + labels[images], minlength=(len(offsets) - 1) * classes)
        return counts.reshape(-1, classes)
    except _UNREADABLE:
        return None


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """What goes wrong with a damaged file is told of this file."""
    try:
        yield file
    except _UNREADABLE as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise OutputError(f"{file}: damaged ({told})") from None


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat; settings that are newer than the run stand at their defaults, as they do when it is resumed."""
    tree.pop("output", None)
    for section, schema in [*configuration.SECTIONS.items(), *_own_schemas(tree)]:
        tree[section] = {**plain(dataclasses.asdict(schema())), **tree.get(section, {})}
    return flat(tree)


def _own_schemas(tree: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """Those of the shipped algorithm and env; a user's code is not run for a report."""
    for section, find_class in (("algorithm", configuration.algorithm_class), ("env", configuration.env_class)):
        name = str(tree[section]["name"])
        if ":" not in name:
            with suppress(ConfigError):  # of another version, that shipped it
                yield section, find_class(name).Config


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flat(measured).items() if isinstance(value, (int, float))}


def _points(records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    sent, seconds = 0, 0.0
    for record in records:
        sent += record["bytes"]["up"] + record["bytes"]["down"]
        seconds += record["seconds"]["train"] + record["seconds"]["server"]
        if "accuracy" in record:
            yield Point(record["round"], float(record["accuracy"]["mean"]), sent, seconds)
