"""What the driver remembers between rounds, what of it a checkpoint is given, and where that must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import loop
from fedsim.errors import OutputError
from fedsim.loop import Progress
from fedsim.remote import working_folder


class Saves:
    """Of a back end, what it is given to save; ``elsewhere``: on a machine with a disk of its own."""

    def __init__(self, elsewhere: bool = False) -> None:
        self.facts: list[dict[str, Any]] = []
        self._elsewhere = elsewhere

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts.append(facts)
        if not self._elsewhere:
            folder.mkdir(parents=True)
            (folder / "manifest.json").touch()


def record(round: int) -> dict[str, Any]:
    return {"round": round, "updates": 2, "bytes": {"up": 3, "down": 4}, "seconds": {"train": 0.5}}


def test_a_checkpoint_is_given_an_evaluation_once_and_not_who_took_part(tmp_path: Path) -> None:
    progress, backend = Progress(0, [0, 0, 0], settings={"seed": 7}), Saves()
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
    common = {"failures": {"hangs": 1}, "metrics_bytes": 5, "settings": {"seed": 7}}
    assert first == {"round": 1, "updates": 2, "bytes": {"up": 3, "down": 4}, **common}
    assert second == {"round": 2, "updates": 4, "bytes": {"up": 6, "down": 8}, **common}
    assert [one["train"] for one in seconds] == [0.5, 1.0]

    resumed = Progress(**second, rounds_taken=[1, 1, 2], evaluated=progress.evaluated)
    one, other = resumed.evaluation(), progress.evaluation()
    assert one is not None and other is not None and one.summary() == other.summary()
    assert resumed.rounds_taken == progress.rounds_taken


def test_a_checkpoint_that_the_driver_does_not_see_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(OutputError) as caught:
        loop._save(Saves(elsewhere=True), tmp_path, Progress(1, [1]), keep=2)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint that the server wrote is not here; on a cluster output must be a folder that all "
        "nodes share, or a URI"
    )


def test_of_a_run_at_a_uri_the_server_sends_it_from_wherever_it_is(tmp_path: Path) -> None:
    folder = working_folder(f"file://{tmp_path}/there", tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    backend = Saves(elsewhere=True)
    loop._save(backend, folder, Progress(1, [1]), keep=2)  # type: ignore[arg-type]
    assert len(backend.facts) == 1
