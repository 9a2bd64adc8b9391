"""Updates that are not finite: the run stops, or goes on without them, which changes nothing for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from run_folders import results

from fedsim.backend import LocalBackend
from fedsim.errors import CentralLostError, ClientError
from fedsim.simulation import resume, run
from fedsim.simulator import Simulator

SETTINGS = ("cohort=8", "rounds=3", "backend.block_size=4")
EVERYONE = range(8)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, Sequence[int]]], None]:
    """``spoiled({1: [3, 5]})``: in round 2 these clients' losses and updates are NaN."""

    def patched(due: Mapping[int, Sequence[int]]) -> None:
        train = Simulator.train

        def spoiling(self: Simulator, round: int, ids: tuple[int, ...], *values: Any) -> Any:
            facts, update, rows = train(self, round, ids, *values)
            for place, client in enumerate(ids):
                if client in due.get(round, ()):
                    facts["loss"][place] = update["delta"][place, 0] = math.nan
            return facts, update, rows

        monkeypatch.setattr(Simulator, "train", spoiling)

    return patched


def rounds_taken(clients: str) -> list[str]:
    return [line.split(",")[3] for line in clients.splitlines()[1:]]


def test_without_any_such_update_the_setting_changes_nothing(tiny_config, tmp_path):
    for choice in ("raise", "skip"):
        run(tiny_config(*SETTINGS, f"nonfinite={choice}", f"output={tmp_path / choice}"))
    assert results(tmp_path / "raise") == results(tmp_path / "skip")


def test_clients_are_left_out_of_the_round_named_and_counted(tiny_config, tmp_path, spoiled, caplog):
    run(tiny_config(*SETTINGS, f"output={tmp_path / 'plain'}"))
    spoiled({1: [3, 5], 2: EVERYONE})
    run(tiny_config(*SETTINGS, "nonfinite=skip", f"output={tmp_path / 'run'}"))
    summary, (first, second, third), clients = results(tmp_path / "run")
    assert first == results(tmp_path / "plain")[1][0] and "skipped" not in first
    assert (second["skipped"], third["skipped"]) == ([3, 5], [*EVERYONE])
    assert isinstance(second["loss"], float) and third["loss"] is None
    assert third["accuracy"] == second["accuracy"] != results(tmp_path / "plain")[1][1]["accuracy"]
    assert (summary["status"], summary["rounds"], summary["failures"]["updates_skipped"]) == ("finished", 3, 10)
    assert rounds_taken(clients) == ["2", "2", "2", "1", "2", "1", "2", "2"]
    assert [record.getMessage() for record in caplog.records if "finite" in record.getMessage()] == [
        f"round {round}: the updates of clients {ids} are not finite; nothing is taken of them"
        for round, ids in ((2, [3, 5]), (3, [*EVERYONE]))
    ]


def test_they_are_counted_once_whatever_is_repeated(tiny_config, tmp_path, spoiled, stopped_after, monkeypatch):
    spoiled({0: [2], 1: [3, 5]})
    settings = [*SETTINGS, "nonfinite=skip", "checkpoint.every=2"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    with stopped_after(2):
        run(tiny_config(*settings, f"output={tmp_path / 'stopped'}"))
    resume(tmp_path / "stopped")
    assert results(tmp_path / "stopped") == results(tmp_path / "undisturbed")

    aggregate, due = LocalBackend.aggregate, [1]

    def lost(self: LocalBackend, round: int) -> Any:
        if due == [round]:
            due.pop()
            raise CentralLostError(round, "gone")
        return aggregate(self, round)

    monkeypatch.setattr(LocalBackend, "aggregate", lost)
    run(tiny_config(*settings, f"output={tmp_path / 'lost'}"))
    summary, *rest = results(tmp_path / "lost")
    assert summary["failures"].pop("central_restarted") == 1
    expected, *others = results(tmp_path / "undisturbed")
    assert expected["failures"].pop("central_restarted") == 0
    assert (summary, rest) == (expected, others) and summary["failures"]["updates_skipped"] == 3


def test_by_default_they_stop_the_run(tiny_config, tmp_path, spoiled):
    spoiled({1: [3, 5]})
    with pytest.raises(ClientError, match=r"train failed in round 2, clients \[3, 5\]\n.*nonfinite=skip$"):
        run(tiny_config(*SETTINGS, f"output={tmp_path / 'run'}"))
    summary, records, _ = results(tmp_path / "run")
    assert (summary["status"], summary["rounds"], len(records)) == ("failed", 1, 1)
