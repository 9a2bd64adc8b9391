"""Where metrics go: ``metrics.jsonl``, TensorBoard, Ray, W&B, MLflow, the console (``docs/watching.md``).

A tracker sees every round's record, once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from fedsim.errors import ConfigError
from fedsim.tracking.console import ConsoleProgress, closing_table, duration, size
from fedsim.tracking.record import JsonLines, Record, Tracker, finite, flat
from fedsim.tracking.services import MLflow, WeightsAndBiases
from fedsim.tracking.tensorboard import TensorBoard

if TYPE_CHECKING:
    from fedsim.backend import Backend
    from fedsim.config import TrackingConfig
    from fedsim.simulator import Workload

__all__ = [
    "ConsoleProgress", "Guarded", "JsonLines", "MLflow", "Record", "TensorBoard", "Tracker", "WeightsAndBiases",
    "closing_table", "duration", "finite", "flat", "refuse_missing", "size", "start",
]  # fmt: skip

_log = logging.getLogger(__name__)


class Guarded:
    """A tracker without which the run can go on: when it fails, one line says so, and it is left out."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = start()
        except Exception as error:
            self._leave_out(error)

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        if self._tracker is not None:
            try:
                self._tracker.on_round(record, accuracies)
            except Exception as error:
                self._leave_out(error)

    def close(self) -> None:
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        self._tracker = None
        told = (str(error).strip().splitlines() or [""])[0]
        _log.warning("%s fails, and is left out: %s%s", self._name, type(error).__name__, told and f": {told}")


def start(
    workload: Workload, backend: Backend, folder: Path, rounds_done: int, metrics_bytes: int, console: Console
) -> list[Tracker]:
    """All trackers of a run that goes on after ``rounds_done``; only ``metrics.jsonl`` stops it by a failure.

    Args:
        workload: what is run.
        backend: what runs it.
        folder: the run's; it exists.
        rounds_done: so many rounds were tracked before.
        metrics_bytes: so long was ``metrics.jsonl`` then.
        console: for a person.
    """
    config, data = workload.config, workload.data
    lines = JsonLines(folder / "metrics.jsonl", metrics_bytes)  # first: others read there what they have missed
    starts: dict[str, Callable[[], Tracker]] = {
        "TensorBoard": lambda: TensorBoard(folder / "tensorboard", config, data, rounds_done)
    }
    if config.backend.name == "ray":
        from fedsim.tracking.ray_metrics import RayMetrics  # elsewhere Ray is not imported

        starts["the export to Ray"] = lambda: RayMetrics(folder.name, config.rounds, backend)
    if config.tracking.wandb:
        starts["W&B"] = lambda: WeightsAndBiases(config, folder)
    if config.tracking.mlflow:
        starts["MLflow"] = lambda: MLflow(config, folder)
    starts["the console"] = lambda: ConsoleProgress(console, config.rounds, rounds_done)
    return [lines, *(Guarded(name, begin) for name, begin in starts.items())]


def refuse_missing(config: TrackingConfig) -> None:
    """Imports what was asked for, and nothing else.

    Raises:
        ConfigError: it is not installed; with the extra that brings it.
    """
    mistakes = []
    for name, asked in (("wandb", config.wandb), ("mlflow", bool(config.mlflow))):
        try:
            if asked:
                importlib.import_module(name)
        except ImportError as error:
            mistakes.append(f'tracking.{name}: {error}; pip install "fedsim-ray[{name}]"')
    if mistakes:
        raise ConfigError(mistakes)
