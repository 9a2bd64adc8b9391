"""Finished runs side by side: which of them answer the same question, and by how much they differ.

Runs on the same data, evaluated alike, are one *task*; within it, runs that differ in nothing but the seed are one
*row*. With the same seed, all rows of a task have the same clients with the same images: differences are paired.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedsim.results import FinishedRun, Point
from fedsim.tracking import size

MEASURES = {
    **{"accuracy.mean": "mean", "accuracy.sent": "sent", "accuracy.global": "global", "accuracy.p10": "p10"},
    **{"bytes.up": "bytes up", "bytes.down": "bytes down", "seconds.total": "seconds"},
}
"""What a row of a table tells, with the heading of the column."""

_NO_PART = ("seed", "eval.every")
_SHORTEST_DISTRIBUTION = 512  # points of it that are kept


@dataclass(frozen=True)
class Difference:
    """A row against the best one, over the seeds that both have.

    Attributes:
        by_seed: of the accuracy, the mean over clients.
        better, worse: how many clients, of all these seeds, have a more or a less accurate model.
        clients: how many there are.
    """

    by_seed: dict[int, float]
    better: int
    worse: int
    clients: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; of one seed there is none."""
        n = len(self.by_seed)
        return statistics.stdev(self.by_seed.values()) / n**0.5 if n > 1 else None


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed, in the order of the seeds."""

    label: str
    runs: tuple[FinishedRun, ...]

    @cached_property
    def by_seed(self) -> dict[int, FinishedRun]:
        return {run.seed: run for run in self.runs}

    @property
    def settings(self) -> dict[str, Any]:
        """Without the seed."""
        return _seedless(self.runs[0])

    def mean(self, measure: str) -> float | None:
        """Over seeds; ``None`` where a run has none: the mean over some of the seeds would be of something else."""
        return over_seeds([run.summary.get(measure) for run in self.runs])[0]

    def points(self) -> list[list[Point]]:
        """The rounds that all runs evaluated, each with a point a run."""
        evaluated = [{point.round: point for point in run.points} for run in self.runs]
        shared = set.intersection(*(set(points) for points in evaluated))
        return [[points[round] for points in evaluated] for round in sorted(shared)]

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Accuracies in order, and the share of all runs' clients that have at most that: ``[P]``, ``[P]``."""
        accuracies = np.concatenate([run.clients["accuracy"] for run in self.runs])
        values, counts = np.unique(accuracies, return_counts=True)
        shares = counts.cumsum() / len(accuracies)
        kept = np.unique(np.linspace(0, len(values) - 1, _SHORTEST_DISTRIBUTION).round().astype(int))
        return values[kept], shares[kept]

    def measured(self, prefix: str) -> tuple[list[int], dict[str, list[float]]]:
        """What the algorithm measured under names that begin so: the rounds, and by name the means over the runs."""
        names = [name for name in _last_measured(self.runs[0]) if name.startswith(prefix)]
        rounds = sorted(
            set.intersection(*({r for r, own in run.measured.items() if own.keys() >= set(names)} for run in self.runs))
        )
        return rounds if names else [], {
            name: [statistics.fmean(run.measured[round][name] for run in self.runs) for round in rounds]
            for name in names
        }


@dataclass(frozen=True)
class Task:
    """One question: rows on the same data, evaluated alike.

    Attributes:
        label: the env, and what tells the task from others on the same env.
        rows: the best mean accuracy first.
    """

    label: str
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row:
        return self.rows[0]

    def difference(self, row: Row) -> Difference | None:
        """The row against the best one; ``None``: no seed in common."""
        pairs = {seed: (run, self.best.by_seed[seed]) for seed, run in row.by_seed.items() if seed in self.best.by_seed}
        if not pairs:
            return None
        mean = {seed: a.summary["accuracy.mean"] - b.summary["accuracy.mean"] for seed, (a, b) in pairs.items()}
        alike = [pair for pair in pairs.values() if len(pair[0].clients["client"]) == len(pair[1].clients["client"])]
        change = [a.clients["accuracy"] - b.clients["accuracy"] for a, b in alike]
        clients = np.concatenate(change) if change else np.zeros(0)
        return Difference(mean, int((clients > 0).sum()), int((clients < 0).sum()), len(clients))

    @property
    def shared_seed(self) -> int:
        """The lowest of the best row's seeds that most rows have."""
        held = Counter(seed for row in self.rows for seed in row.by_seed if seed in self.best.by_seed)
        return min(held, key=lambda seed: (-held[seed], seed))

    def worst_clients(self, number: int) -> list[int]:
        """Those with the least accuracy under the best row, of its run with ``shared_seed``."""
        clients = self.best.by_seed[self.shared_seed].clients
        order = np.lexsort((clients["client"], clients["accuracy"]))
        return [int(client) for client in clients["client"][order[:number]]]

    def differing(self) -> dict[str, list[Any]]:
        """Settings that are not the same in all rows, with each row's value; ``None`` where a row has none."""
        keys = dict.fromkeys(key for row in self.rows for key in row.settings)
        values = {key: [row.settings.get(key) for row in self.rows] for key in keys}
        return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def tasks(runs: Sequence[FinishedRun]) -> list[Task]:
    """All runs, by task and row; the first run's task first. A second run of one seed begins a row of its own."""
    questions: dict[str, list[FinishedRun]] = {}
    for run in runs:
        questions.setdefault(json.dumps(_question(run), sort_keys=True, default=str), []).append(run)
    asked = [(str(same[0].summary["env"]), _question(same[0])) for same in questions.values()]
    return [Task(label, _rows(same)) for label, same in zip(told_apart(asked), questions.values(), strict=True)]


def _rows(runs: Sequence[FinishedRun]) -> tuple[Row, ...]:
    groups: list[list[FinishedRun]] = []
    for run in runs:
        for group in groups:
            if _seedless(group[0]) == _seedless(run) and run.seed not in {other.seed for other in group}:
                group.append(run)
                break
        else:
            groups.append([run])
    labels = told_apart([(str(group[0].summary["algorithm"]), _seedless(group[0])) for group in groups])
    alike = Counter(labels)
    rows = [
        Row(
            label if alike[label] == 1 else f"{label} ({group[0].folder.name})",
            tuple(sorted(group, key=lambda run: run.seed)),
        )
        for label, group in zip(labels, groups, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: -(row.mean("accuracy.mean") or 0.0)))


def over_seeds(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean, and sample standard deviation of two values or more; nothing where a value is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _seedless(run: FinishedRun) -> dict[str, Any]:
    """What decides the run's results but for the seed: neither how often it is evaluated nor its checkpoints do."""
    return {
        key: value for key, value in run.settings.items() if not key.startswith(("checkpoint.", "tracking.", *_NO_PART))
    }


def _question(run: FinishedRun) -> dict[str, Any]:
    """What must be equal for a comparison: the data, the split, and which samples and clients are evaluated."""
    data = {key: value for key, value in run.settings.items() if key.startswith("env.")}
    return data | {key: run.settings.get(key) for key in ("eval.validation", "eval.unseen")}


def told_apart(named: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Each name, with those of its settings that not all of this name share, nor more than half of them.

    ``["fedprox", "fedprox mu=0.1", "fedprox mu=1.0"]``: names with other settings have other labels.
    """
    labels = []
    for name, own in named:
        alike = [settings for other, settings in named if other == name]
        keys = dict.fromkeys(key for settings in alike for key in settings)
        same = {key: sum(settings.get(key) == own.get(key) for settings in alike) for key in keys}
        differing = [key for key in keys if same[key] < len(alike)]
        tails = Counter(_tail(key) for key in differing)
        told = [key for key in differing if same[key] <= len(alike) / 2]
        parts = [f"{_tail(key) if tails[_tail(key)] == 1 else key}={as_text(own.get(key))}" for key in told]
        labels.append(" ".join([_tail(name, ":"), *parts]))
    return labels


def shown(measure: str, value: Any) -> str:
    """A number of ``summary.json`` for a person."""
    if value is None:
        return "–"
    if measure.startswith("bytes"):
        return size(value)
    if measure.startswith(("seconds", "updates")):
        return f"{value:.1f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def signed(mean: float, error: float | None) -> str:
    """``−0.012 ± 0.003``: with a sign, and with the standard error where there is one."""
    text = f"{mean:+.3f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:.3f}"


def by_client(run: FinishedRun) -> dict[int, dict[str, float]]:
    """The lines of ``clients.csv`` by the client's id."""
    lines = zip(*(values.tolist() for values in run.clients.values()), strict=True)
    named = (dict(zip(run.clients, line, strict=True)) for line in lines)
    return {int(line["client"]): line for line in named}


def _tail(text: str, separator: str = ".") -> str:
    return text.rpartition(separator)[2]


def as_text(value: Any) -> str:
    """A setting's value for a person."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    return "–" if value is None else str(value)


def _last_measured(run: FinishedRun) -> dict[str, float]:
    return run.measured[max(run.measured)] if run.measured else {}
