"""A server that is lost between two checkpoints: the rounds since the newest are repeated, and no line with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from fedsim.__main__ import main
from fedsim.backend import LocalBackend
from fedsim.errors import CentralLostError
from fedsim.simulation import run


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[int]]:
    """``losing([2, 1])``: the server is gone when round 2 (from 0) is to be aggregated, and then in round 1.

    Returns:
        A list of all rounds in which it was asked to.
    """

    def patched(due: list[int]) -> list[int]:
        aggregate, rounds = LocalBackend.aggregate, []

        def lost(self: LocalBackend, round: int) -> Any:
            rounds.append(round)
            if due[:1] == [round]:
                due.pop(0)
                del self.server
                raise CentralLostError(round, "gone")
            return aggregate(self, round)

        monkeypatch.setattr(LocalBackend, "aggregate", lost)
        return rounds

    return patched


def told(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [(record["round"], record["loss"], record["bytes"]) for record in records]
    return summary["accuracy"], summary["bytes"], rounds, (folder / "clients.csv").read_text()


@pytest.mark.parametrize(
    ("every", "due", "aggregated"),
    [
        (1, [0, 2], [0, 0, 1, 2, 2, 3]),  # without a checkpoint it starts over
        (2, [3, 2, 3], [0, 1, 2, 3, 2, 2, 3, 2, 3]),  # three losses before another round is done
    ],
)
def test_rounds_since_the_newest_checkpoint_are_repeated(tiny_config, tmp_path, losing, every, due, aggregated):
    settings = ["algorithm=pfedseq", "rounds=4", "eval.every=2", f"checkpoint.every={every}"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    losses, rounds = len(due), losing(due)
    run(tiny_config(*settings, f"output={tmp_path / 'disturbed'}"))
    assert rounds == aggregated
    assert told(tmp_path / "disturbed") == told(tmp_path / "undisturbed")
    summary = json.loads((tmp_path / "disturbed" / "summary.json").read_text())
    assert (summary["failures"]["central_restarted"], summary["status"]) == (losses, "finished")


def test_a_server_that_is_lost_four_times_in_one_round_stops_the_run(capsys, tmp_path, losing):
    rounds = losing([1] * 9)
    assert main(["run", *TINY, "rounds=3", f"output={tmp_path / 'run'}"]) == 1
    assert rounds == [0, 1, 1, 1, 1]
    told = capsys.readouterr()
    assert told.err == "fedsim: round 2: the central actor is lost (gone)\n"
    assert told.out.endswith(f"failed; go on with: python -m fedsim resume {tmp_path / 'run'}\n")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["failures"]["central_restarted"], summary["status"], summary["rounds"]) == (3, "failed", 1)


def test_every_round_may_lose_it_three_times(tiny_config, tmp_path, losing):
    rounds = losing([0, 0, 0, 1, 1, 1])
    run(tiny_config(f"output={tmp_path / 'run'}"))
    assert rounds == [0] * 4 + [1] * 4
