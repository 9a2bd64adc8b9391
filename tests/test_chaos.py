"""``benchmarks/chaos.py``: what it makes of rows that fail or differ; the runs themselves are stood in for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FAILURES = {"actors_replaced": 2, "central_restarted": 1}
Chaos = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chaos:
    """The exit code and the rows by name, where these runs (folders' names) fail, or end with another result."""
    spec = spec_from_file_location("chaos", Path(__file__).parents[1] / "benchmarks" / "chaos.py")
    assert spec and spec.loader
    module: ModuleType = module_from_spec(spec)
    spec.loader.exec_module(module)

    def measured(*failing: str, other: str = "") -> tuple[int, dict[str, dict[str, Any]]]:
        def run(work: Any, *values: Any) -> tuple[dict[str, int], float]:
            if values[-1].name in failing:
                raise RuntimeError("lost")
            return {"signals": 2}, 4.0 if values[-1].name.startswith("none") else 7.0

        monkeypatch.setattr(module, "in_a_process", run)
        monkeypatch.setattr(module, "results", lambda folder: (folder.name == other, FAILURES))
        monkeypatch.setattr(sys, "argv", ["chaos.py", "--rounds", "3"])
        code = module.main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return code, {row["fault"]: row for row in rows}

    return measured


def test_rows_that_are_all_equal(chaos):
    code, rows = chaos()
    assert code == 0 and len(rows) == 10 and all(row["equal"] for row in rows.values())
    assert rows["server killed"] == {
        "fault": "server killed", "injected": 2, "recovered": 3, "seconds_lost": 1.5, "seconds": 7.0,
        "failures": FAILURES, "equal": True, "rounds": 3,
    }  # fmt: skip


def test_a_row_that_differs(chaos):
    code, rows = chaos(other="node-removed")
    assert code == 1 and [fault for fault, row in rows.items() if not row["equal"]] == ["node removed"]


def test_a_row_that_fails_does_not_cost_the_others(chaos):
    code, rows = chaos("server-killed")
    assert code == 1 and len(rows) == 10
    assert rows.pop("server killed") == {
        "fault": "server killed", "equal": False, "error": "RuntimeError: lost", "rounds": 3,
    }  # fmt: skip
    assert all(row["equal"] for row in rows.values())


def test_what_is_disturbed_is_compared_with_what_is_not(chaos):
    code, rows = chaos("none-driver-apart", other="driver-killed")
    assert code == 1
    unequal = {fault: row.get("seconds_lost") for fault, row in rows.items() if not row["equal"]}
    assert unequal == {"none, driver apart": None, "driver killed": None}
    assert rows["server killed"]["seconds_lost"] == 1.5
