"""What there is to tell of a round, to whom, and the file that holds it all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsim import results
from fedsim.config import Config, to_tree

Record = dict[str, Any]


class Tracker(Protocol):
    """One place where metrics go."""

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        """A round is done; ``accuracies [N]``: of all clients, if it was evaluated."""

    def close(self) -> None:
        """No more records."""


class JsonLines:
    """``metrics.jsonl``: one line a round."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Appends after the first ``keep_bytes``: what a killed run wrote past its checkpoint is cut off."""
        self._file = path.open("ab")
        self._file.truncate(min(keep_bytes, self.bytes_written))

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        self._file.write(json.dumps(finite(record), allow_nan=False).encode() + b"\n")
        self._file.flush()

    @property
    def bytes_written(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def rounds_after(folder: Path, round: int) -> Iterator[Record]:
    """Of a run's ``metrics.jsonl``, the records of the rounds after this one."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["round"] > round:
                yield record


def finite(value: Any) -> Any:
    """The value with ``None`` for every number that is not finite: JSON has none of those."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """``{"seconds": {"train": 1.0}}`` as ``("seconds/train", 1.0)``; what is no number is left out."""
    for key, value in results.flat(record).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key.rpartition(".")[2] != "round":
            yield key.replace(".", "/"), float(value)


def settings(config: Config) -> dict[str, bool | float | str]:
    """The configuration as ``{"local.lr": 0.05}``, lists as texts, without where it is written and who is told."""
    tree = results.flat(to_tree(config))
    return {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in tree.items()
        if value is not None and key.partition(".")[0] not in ("output", "tracking")
    }
