"""What the driver remembers between rounds, and what of it a checkpoint is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedsim import loop
from fedsim.loop import Progress


class Saves:
    """Of a back end, what it is given to save."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts.append(facts)


def record(round: int) -> dict[str, Any]:
    return {"round": round, "updates": 2, "bytes": {"up": 3, "down": 4}, "seconds": {"train": 0.5}}


def test_a_checkpoint_is_given_an_evaluation_once_and_not_who_took_part(tmp_path: Path) -> None:
    progress, backend = Progress(0, [0, 0, 0]), Saves()
    (tmp_path / "metrics.jsonl").write_text("12345")
    blocks = [
        {"ids": np.array([2, 0]), "total": np.array([6.0, 4.0]), "personal": np.array([3.0, 1.0]), "sent": np.zeros(2)},
        {"ids": np.array([1]), "total": np.array([5.0]), "personal": np.array([5.0]), "sent": np.zeros(1)},
    ]
    loop._advance(progress, record(1), np.array([2, 0]), blocks, {"hangs": 1})
    loop._save(backend, tmp_path, progress, keep=2)  # type: ignore[arg-type]
    loop._advance(progress, record(2), np.array([2, 1]), None, {"hangs": 1})
    loop._save(backend, tmp_path, progress, keep=2)  # type: ignore[arg-type]

    first, second = backend.facts
    evaluated = {name: value.tolist() for name, value in first.pop("evaluated").items()}
    assert evaluated == {"ids": [0, 1, 2], "total": [4, 5, 6], "personal": [1, 5, 3], "sent": [0, 0, 0]}
    seconds = [facts.pop("seconds") for facts in (first, second)]
    common = {"failures": {"hangs": 1}, "metrics_bytes": 5}
    assert first == {"round": 1, "updates": 2, "bytes": {"up": 3, "down": 4}, **common}
    assert second == {"round": 2, "updates": 4, "bytes": {"up": 6, "down": 8}, **common}
    assert [one["train"] for one in seconds] == [0.5, 1.0]

    resumed = Progress(**second, rounds_taken=[1, 1, 2], evaluated=progress.evaluated)
    one, other = resumed.evaluation(), progress.evaluation()
    assert one is not None and other is not None and one.summary() == other.summary()
    assert resumed.rounds_taken == progress.rounds_taken
