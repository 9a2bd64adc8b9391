"""Numbers of a round and of a run: weighted sums, distributions over clients.

A metric over blocks is kept as numerators and denominators and divided once, in the order of the clients' ids, so that
sums do not depend on who was done first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.simulator import Facts


def by_client(facts: list[Facts], key: str) -> tuple[np.ndarray, np.ndarray]:
    """``(ids, values)`` of all blocks, ordered by id."""
    ids = np.concatenate([fact["ids"] for fact in facts])
    order = np.argsort(ids, kind="stable")
    return ids[order], np.concatenate([fact[key] for fact in facts])[order]


def train_loss(facts: list[Facts], skipped: Sequence[int] = ()) -> float:
    """Mean training loss of the cohort but for those who were skipped, weighted by samples; NaN if nobody is left."""
    ids, losses = by_client(facts, "loss")
    _, samples = by_client(facts, "samples")
    taken = ~np.isin(ids, skipped)
    losses, samples = losses[taken].astype(np.float64), samples[taken]
    return float((losses * samples).sum() / samples.sum()) if taken.any() else math.nan


def distribution(correct: np.ndarray, total: np.ndarray) -> dict[str, float]:
    """The distribution of clients' accuracies, and ``weighted``, the accuracy over all samples."""
    accuracy = correct.astype(np.float64) / total
    p10, p50, p90 = np.percentile(accuracy, [10, 50, 90])
    return {
        "mean": float(accuracy.mean()),
        "weighted": float(correct.sum(dtype=np.float64) / total.sum(dtype=np.float64)),
        "std": float(accuracy.std()),
        "p10": float(p10),
        "p50": float(p50),
        "p90": float(p90),
        "min": float(accuracy.min()),
        "max": float(accuracy.max()),
    }


class Evaluation:
    """One evaluation of the population.

    Attributes:
        ids: ``[N]`` clients, in order.
        accuracy, sent: ``[N] float64``, of the personalised model and of what was sent.
        adapted: ``[N] float64``, of what was sent after one local epoch; NaN but for clients that never train.
    """

    def __init__(self, facts: list[Facts]) -> None:
        self.ids, self.total = by_client(facts, "total")
        kinds = [key for key in ("personal", "sent", "global") if key in facts[0]]
        self._correct = {key: by_client(facts, key)[1].astype(np.float64) for key in kinds}
        self.accuracy = self._correct["personal"] / self.total
        self.sent = self._correct["sent"] / self.total
        known = "adapted" in facts[0]
        self.adapted = by_client(facts, "adapted")[1] / self.total if known else np.full(len(self.ids), math.nan)

    def summary(self) -> dict[str, float | None]:
        """``distribution`` of the personalised models; ``sent`` and ``global``: the mean over clients of the others."""
        mean_of = {key: float((value / self.total).mean()) for key, value in self._correct.items()}
        own = distribution(self._correct["personal"], self.total)
        return {**own, "sent": mean_of["sent"], "global": mean_of.get("global")}

    def among(self, chosen: np.ndarray) -> dict[str, Any]:
        """Number and mean accuracies of the clients that ``chosen [N] bool`` picks."""
        of = {"mean": self.accuracy[chosen], "sent": self.sent[chosen], "adapted": self.adapted[chosen]}
        known = {name: len(values) > 0 and not np.isnan(values).any() for name, values in of.items()}
        means = {name: float(values.mean()) if known[name] else None for name, values in of.items()}
        return {"clients": int(chosen.sum()), **means}


def client_rows(
    sizes: np.ndarray, rounds_taken: np.ndarray, evaluation: Evaluation | None, quarantined: Sequence[int] = ()
) -> list[dict[str, int | float | str]]:
    """The lines of ``clients.csv``; who was quarantined before the last evaluation has no part in it."""
    before, after, total = np.full((3, len(sizes)), math.nan)
    if evaluation:
        before[evaluation.ids], after[evaluation.ids] = evaluation.sent, evaluation.accuracy
        total[evaluation.ids] = evaluation.total
    return [
        {
            "client": client,
            "samples": int(sizes[client]),
            "test_samples": int(np.nan_to_num(total[client])),
            "rounds": int(rounds_taken[client]),
            "accuracy_sent": round(float(before[client]), 6),
            "accuracy": round(float(after[client]), 6),
            "quarantined": int(client in quarantined),
        }
        for client in range(len(sizes))
    ]
