"""The round loop. It reads like the algorithm box of a paper; everything else is behind ``Backend`` and ``Tracker``."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import checkpoint, remote
from fedsim.backend import Backend
from fedsim.errors import OutputError
from fedsim.files import flush, write_atomically
from fedsim.metrics import Evaluation, by_client, client_rows, train_loss
from fedsim.plan import Plan
from fedsim.simulator import Facts
from fedsim.tracking import Record, Tracker, finite

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What the driver remembers between rounds; it is part of every checkpoint.

    Attributes:
        round: rounds done.
        rounds_taken: ``[N]`` rounds that each client has taken part in; the server counts them too, for checkpoints.
        bytes, seconds: totals so far.
        updates: client updates so far.
        failures: counts by kind, and who is quarantined.
        evaluated: the last evaluation's facts, arrays ``[C]`` in the order of the clients' ids.
        metrics_bytes: length of ``metrics.jsonl`` at this point.
        evaluation_saved: whether the last checkpoint has ``evaluated``.
        settings: those that results depend on; none in a checkpoint of a fedsim that did not keep them.
    """

    round: int
    rounds_taken: list[int]
    bytes: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    seconds: dict[str, float] = field(
        default_factory=lambda: {"total": 0.0, "train": 0.0, "server": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
    )
    updates: int = 0
    failures: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, np.ndarray] = field(default_factory=dict)
    metrics_bytes: int = 0
    evaluation_saved: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def evaluation(self) -> Evaluation | None:
        return Evaluation([self.evaluated]) if self.evaluated else None

    def facts(self) -> dict[str, Any]:
        """What the next checkpoint is given of it; a copy."""
        apart = ("rounds_taken", "evaluation_saved", *(["evaluated"] if self.evaluation_saved else []))
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name not in apart}


def run_rounds(plan: Plan, backend: Backend, folder: Path, trackers: list[Tracker], progress: Progress) -> Progress:
    """Runs the rounds that are left, each: sample, broadcast, train locally, aggregate, evaluate, remember."""
    config, everyone = plan.workload.config, plan.evaluation_blocks()
    for round in range(progress.round, config.rounds):
        clock = _Clock()
        cohort = plan.sample_cohort(round)
        blocks = plan.blocks(cohort)

        trained = backend.train(round, blocks)
        clock.lap("train")
        aggregated = backend.aggregate(round)
        clock.lap("server")
        evaluated = None
        if (round + 1) % config.eval.every == 0 or round + 1 == config.rounds:
            evaluated = backend.evaluate(round, everyone)
        clock.lap("evaluate")

        evaluation = Evaluation(evaluated) if evaluated else None
        record = _record(round, trained, aggregated, evaluation, clock)
        if skipped := aggregated["skipped"]:
            _log.warning("round %d: the updates of clients %s are not finite; nothing is taken of them",
                         round + 1, skipped)  # fmt: skip
        # Counted from what the checkpoint says: rounds that are repeated after a lost server count once.
        backend.failures.updates_skipped = progress.failures.get("updates_skipped", 0) + len(skipped)
        taken = np.setdiff1d(by_client(trained, "ids")[0], skipped)
        _advance(progress, record, taken, evaluated, asdict(backend.failures))
        with _writing(folder):
            for tracker in trackers:
                tracker.on_round(record, evaluation.accuracy if evaluation else None)
        if (round + 1) % config.checkpoint.every == 0 or round + 1 == config.rounds:
            _save(backend, folder, progress, config.checkpoint.keep)
    return progress


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def _record(
    round: int, trained: list[Facts], aggregated: Facts, evaluation: Evaluation | None, clock: _Clock
) -> Record:
    seconds = {stage: round_to(value, 4) for stage, value in clock.seconds.items()}
    seconds["total"] = round_to(sum(seconds.values()), 4)
    seconds |= {part: round_to(value, 4) for part, value in aggregated["seconds"].items()}  # within "server"
    updates = sum(len(fact["ids"]) for fact in trained)
    record = {
        "round": round + 1,
        "loss": train_loss(trained, aggregated["skipped"]),
        "bytes": {"up": aggregated["bytes_up"], "down": sum(fact["bytes_down"] for fact in trained)},
        "seconds": seconds,
        "updates": updates,
        "updates_per_second": round_to(updates / (clock.seconds["train"] + clock.seconds["server"]), 3),
    }
    if aggregated["skipped"]:
        record["skipped"] = aggregated["skipped"]
    if aggregated["metrics"]:
        record["algorithm"] = aggregated["metrics"]
    if evaluation:
        record["accuracy"] = evaluation.summary()
    return record


def round_to(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}")


def _advance(
    progress: Progress, record: Record, cohort: np.ndarray, evaluated: list[Facts] | None, failures: dict[str, Any]
) -> None:
    progress.round = record["round"]
    progress.updates += record["updates"]
    for client in cohort.tolist():
        progress.rounds_taken[client] += 1
    for kind, amount in record["bytes"].items():
        progress.bytes[kind] += amount
    for stage, amount in record["seconds"].items():
        progress.seconds[stage] = progress.seconds.get(stage, 0.0) + amount
    progress.failures = failures
    if evaluated:
        progress.evaluated = {key: by_client(evaluated, key)[1] for key in evaluated[0]}
        progress.evaluation_saved = False


def _save(backend: Backend, folder: Path, progress: Progress, keep: int) -> None:
    """A checkpoint.

    Raises:
        OutputError: it cannot be written, or was written where the driver does not see it.
    """
    start = time.perf_counter()
    with _writing(folder):
        flush(folder / "metrics.jsonl")  # a checkpoint that outlives a loss of power without it would leave a gap
        progress.metrics_bytes = (folder / "metrics.jsonl").stat().st_size
    checkpoints = folder / "checkpoints"
    written = checkpoint.folder_of(checkpoints, progress.round)
    backend.save(written, progress.facts())
    if not remote.uri_of(folder) and not checkpoint.is_here(written):
        raise OutputError(
            f"{folder}: the checkpoint that the server wrote is not here; on a cluster output must be a folder that "
            "all nodes share, or a URI"
        )
    progress.evaluation_saved = True
    checkpoint.prune(checkpoints, keep, progress.round)
    remote.push(folder, progress.round, keep)
    progress.seconds["checkpoint"] += time.perf_counter() - start


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tells what cannot be written to the run folder from a mistake in the code.

    Raises:
        OutputError: with the command that goes on from the last checkpoint.
    """
    try:
        yield
    except OSError as error:
        again = f"when it can: python -m fedsim resume {remote.shown(folder)}"
        raise OutputError(f"{remote.shown(folder)}: cannot be written ({error}); {again}") from None


def summarise(plan: Plan, progress: Progress, peak_memory_mib: dict[str, float], status: str) -> dict[str, Any]:
    """``summary.json``."""
    config, evaluation = plan.workload.config, progress.evaluation()
    busy = progress.seconds["train"] + progress.seconds["server"]
    ids = evaluation.ids if evaluation else np.arange(0)
    kept_away, rounds_taken = np.isin(ids, list(plan.workload.unseen)), np.array(progress.rounds_taken)[ids]
    return {
        "algorithm": config.algorithm.name,
        "env": config.env.name,
        "model": config.model.name,
        "seed": config.seed,
        "rounds": progress.round,
        "num_clients": plan.workload.data.num_clients,
        "accuracy": evaluation.summary() if evaluation else {},
        "unseen": evaluation.among(kept_away if kept_away.any() else rounds_taken == 0) if evaluation else {},
        "bytes": progress.bytes,
        "seconds": {stage: round_to(value, 3) for stage, value in progress.seconds.items()},
        "updates_per_second": round_to(progress.updates / busy, 3) if busy else 0.0,
        "peak_memory_mib": peak_memory_mib,
        "failures": progress.failures,
        "status": status,
    }


def write_results(folder: Path, plan: Plan, progress: Progress, summary: dict[str, Any]) -> None:
    """``summary.json`` and ``clients.csv``.

    Raises:
        OutputError: they cannot be written.
    """
    quarantined = progress.failures.get("quarantined", [])
    sizes, rounds_taken = plan.workload.data.train.sizes, np.array(progress.rounds_taken)
    rows = client_rows(sizes, rounds_taken, progress.evaluation(), quarantined)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with _writing(folder):
        write_atomically(folder / "clients.csv", text.getvalue())
        write_atomically(folder / "summary.json", json.dumps(finite(summary), indent=2) + "\n")
