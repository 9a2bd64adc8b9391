"""Finished runs as they lie in their folders: found, read whole, or refused with the reason in one line."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import config as configuration
from fedsim import remote
from fedsim.errors import ConfigError, OutputError
from fedsim.schema import from_yaml, plain

_COLUMNS = ("client", "samples", "test_samples", "rounds", "accuracy_sent", "accuracy")  # of clients.csv
_TOLD = ("accuracy.mean", "accuracy.p10", "accuracy.min", "bytes.up", "bytes.down", "seconds.total", "seed", "rounds")
_MAY_BE_TOLD = ("accuracy.sent", "accuracy.global")
_LARGEST = 2.0**64  # of what a run counts


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
        if os.path.isfile(path):  # pathlib's raises where a name is too long
            continue
        whole = os.path.isfile(path / "config.yaml") or not os.path.isdir(path)
        below = [] if whole else sorted(file.parent for file in path.glob("*/config.yaml"))
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
        for key in (*_TOLD, *(key for key in _MAY_BE_TOLD if summary.get(key) is not None)):
            _number(key, summary.get(key))
        for key in ("algorithm", "env"):
            if not isinstance(summary.get(key), str):
                raise ValueError(f"{key} is {summary.get(key)!r}")
    with _reading(folder / "config.yaml") as file:
        # As JSON has it: all keys are texts.
        tree = json.loads(json.dumps(from_yaml(file.read_text(encoding="utf-8")), default=str))
        about = _about(tree.pop("about", {}))
        settings = _settings(tree)
    with _reading(folder / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        points = list(_points(records))
        measured = {int(record["round"]): _numbers(record["algorithm"]) for record in records if "algorithm" in record}
        if not points:
            raise ValueError("no round was evaluated")
    with _reading(folder / "clients.csv") as file, file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
        clients = {column: np.array([float(row[column]) for row in rows]) for column in _COLUMNS}
        if not rows:
            raise ValueError("no client")
        if clients["client"].tolist() != list(range(summary["num_clients"])):
            raise ValueError(f"its lines are not those of {summary['num_clients']} clients")
        if not all(np.isfinite(clients[column]).all() for column in ("samples", "test_samples", "rounds")):
            raise ValueError("a number of samples or rounds is none")
    return FinishedRun(folder, settings, about, summary, points, measured, clients)


def finished(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        OutputError: the folder is none of a run that has finished.
    """
    try:
        summary = dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise OutputError(f"{remote.shown(folder)}: not a finished run (no summary.json that can be read)") from None
    status = summary.get("status")
    if not summary.get("accuracy"):
        raise OutputError(f"{folder}: the run ended before its first evaluation ({status})")
    if status != "finished":
        raise OutputError(
            f"{remote.shown(folder)}: not a finished run ({status}); python -m fedsim resume {remote.shown(folder)}"
        )
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
    except Exception:  # what readers of a damaged archive raise is not documented
        return None


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """What goes wrong with a damaged file is told of this file."""
    try:
        yield file
    except Exception as error:  # of whatever kind: readers of YAML, JSON and CSV raise what the damage makes them
        told = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise OutputError(f"{file}: damaged ({told})") from None


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat; settings that are newer than the run stand at their defaults, as they do when it is resumed."""
    for key, default in dataclasses.asdict(configuration._Top()).items():
        tree.setdefault(key, default)
    tree.pop("output")
    for section, schema in [*configuration.SECTIONS.items(), *_own_schemas(tree)]:
        tree[section] = {**plain(dataclasses.asdict(schema())), **tree.get(section, {})}
    settings = flat(tree)
    for key in ("eval.validation", "eval.unseen"):
        _number(key, settings[key])
    return settings


def _about(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run: what the page shows, of the kinds that it takes.

    Raises:
        ValueError: it is of another kind.
    """
    for key, kind in (("data", Mapping), ("versions", Mapping), ("commit", str)):
        if tree.get(key) is not None and not isinstance(tree[key], kind):
            raise ValueError(f"about.{key} is {tree[key]!r}")
    return {key: value for key, value in tree.items() if value is not None}


def _own_schemas(tree: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """Those of the shipped algorithm and env; a user's code is not run for a report."""
    for section, find_class in (("algorithm", configuration.algorithm_class), ("env", configuration.env_class)):
        name = str(tree[section]["name"])
        if ":" not in name:
            with suppress(ConfigError):  # of another version, that shipped it
                yield section, find_class(name).Config


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in flat(measured).items() if isinstance(value, (int, float)) and abs(value) < np.inf
    }


def _number(what: str, value: Any) -> float:
    """The value, if it is something that can be counted.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} is {value!r}")
    return value


def _points(records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    sent, seconds = 0, 0.0
    for record in records:
        sent += int(_number("bytes.up", record["bytes"]["up"]) + _number("bytes.down", record["bytes"]["down"]))
        seconds += _number("seconds.train", record["seconds"]["train"])
        seconds += _number("seconds.server", record["seconds"]["server"])
        if "accuracy" in record:
            yield Point(int(record["round"]), _number("accuracy.mean", record["accuracy"]["mean"]), sent, seconds)
