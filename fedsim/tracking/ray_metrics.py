"""What Ray shows of a run: its metrics, exported as ``ray_<name>`` by every node's agent, and its job's metadata.

All are tagged by run, none by client. ``fedsim/grafana.json`` is the dashboard for them.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from ray.util.metrics import Gauge, Histogram

from fedsim import __version__
from fedsim.backend import Backend
from fedsim.config import Config
from fedsim.tracking.record import Record

METRICS = {
    "fedsim_round": "rounds done",
    "fedsim_rounds": "rounds that the run will have",
    "fedsim_loss": "mean training loss of the last round's cohort",
    "fedsim_accuracy": "over clients, of the last evaluation",
    "fedsim_updates_per_second": "client updates in a second of training and of the server's work, last round",
    "fedsim_seconds": "of the last round, by stage",
    "fedsim_failures": "what went wrong and was mended so far, by kind",
    "fedsim_queue_length": "blocks of this stage that no simulator has",
    "fedsim_simulators": "simulators that live",
    "fedsim_block_seconds": "that a simulator took for a block, by stage",
}
"""By name, what it tells."""

BLOCK_SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]


class RayMetrics:
    """The tracker: what a round's record tells, and the failures so far."""

    def __init__(self, run: str, rounds: int, backend: Backend) -> None:
        self._backend = backend
        self._round, self._loss = _gauge("fedsim_round", run), _gauge("fedsim_loss", run)
        self._updates = _gauge("fedsim_updates_per_second", run)
        self._accuracy = _gauge("fedsim_accuracy", run, "statistic")
        self._seconds = _gauge("fedsim_seconds", run, "stage")
        self._failures = _gauge("fedsim_failures", run, "kind")
        _gauge("fedsim_rounds", run).set(rounds)

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        self._round.set(record["round"])
        self._loss.set(record["loss"])
        self._updates.set(record["updates_per_second"])
        for stage, seconds in record["seconds"].items():
            self._seconds.set(seconds, {"stage": stage})
        for statistic, accuracy in record.get("accuracy", {}).items():
            self._accuracy.set(accuracy, {"statistic": statistic})
        for kind, number in asdict(self._backend.failures).items():
            if isinstance(number, int):  # not who is quarantined
                self._failures.set(number, {"kind": kind})

    def close(self) -> None:
        """Ray shows the last values for as long as the process lives."""


class PoolMetrics:
    """What the pool does, told as it happens: a round may last for hours."""

    def __init__(self, run: str) -> None:
        self._queue, self._simulators = _gauge("fedsim_queue_length", run), _gauge("fedsim_simulators", run)
        name = "fedsim_block_seconds"
        self._block = Histogram(name, METRICS[name], BLOCK_SECONDS, ("run", "stage")).set_default_tags({"run": run})

    def pool(self, waiting: int, living: int) -> None:
        """So many blocks wait for a simulator, and so many simulators live."""
        self._queue.set(waiting)
        self._simulators.set(living)

    def block(self, stage: str, seconds: float) -> None:
        """A simulator has done a block."""
        self._block.observe(seconds, {"stage": stage})


def _gauge(name: str, run: str, *tags: str) -> Gauge:
    return Gauge(name, METRICS[name], ("run", *tags)).set_default_tags({"run": run})


def job_metadata(config: Config, run: str) -> dict[str, str]:
    """What the dashboard's list of jobs shows of a run."""
    return {
        "fedsim": __version__,
        "run": run,
        "algorithm": config.algorithm.name,
        "env": config.env.name,
        "model": config.model.name,
        "seed": str(config.seed),
        "rounds": str(config.rounds),
    }
