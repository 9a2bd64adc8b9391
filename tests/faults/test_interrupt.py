"""Ctrl-C: one ends the run after the blocks in flight, a second one ends it now; nothing is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY

from fedsim.__main__ import main
from fedsim.simulator import Simulator


@pytest.mark.parametrize(
    ("kinds", "blocks_done"),
    [([signal.SIGINT], 3), ([signal.SIGINT, signal.SIGINT], 2), ([signal.SIGTERM], 2)],
    ids=["once", "twice", "terminated"],
)
def test_an_interrupted_run_ends_with_the_block_or_now_and_goes_on_to_the_same_end(
    tmp_path, capsys, monkeypatch, kinds, blocks_done
):
    train, begun, done = Simulator.train, [], []

    def interrupted(self: Simulator, *values: Any) -> Any:
        begun.append(values)
        if len(begun) == 3:  # the first of round 2
            for kind in kinds:
                os.kill(os.getpid(), kind)
        result = train(self, *values)
        done.append(values)
        return result

    settings = [*TINY, "algorithm=pfedseq", "backend.block_size=2"]
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patched:
        patched.setattr(Simulator, "train", interrupted)
        assert main(["run", *settings, f"output={folder}"]) == 130
    assert (len(begun), len(done)) == (3, blocks_done)
    assert f"interrupted; go on with: python -m fedsim resume {folder}" in capsys.readouterr().out
    assert told(folder)[:2] == ("interrupted", 1)
    assert main(["resume", str(folder)]) == 0
    assert main(["run", *settings, f"output={tmp_path / 'undisturbed'}"]) == 0
    assert told(folder) == told(tmp_path / "undisturbed")


def told(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    return summary["status"], summary["rounds"], summary["accuracy"], (folder / "clients.csv").read_text()


@dataclass(frozen=True)
class Stopped:
    """A run on a Ray of its own that was interrupted in round 3.

    Attributes:
        folder: the run's.
        code: its exit code.
        printed: all that it printed, before and after.
        started: the processes that it had started.
    """

    folder: Path
    code: int
    printed: str
    started: list[psutil.Process]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    command = [
        sys.executable, "-m", "fedsim", "run", *TINY, f"output={folder}", "rounds=1000000", "eval.every=1000000",
        "backend=ray", "backend.simulators=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    try:
        assert process.stdout
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("round 2/"):
                break
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        rest, _ = process.communicate(timeout=120)
        return Stopped(folder, process.returncode, "".join(printed) + rest, started)
    finally:
        process.kill()


def test_an_interrupted_run_on_ray_leaves_no_process(stopped):
    assert stopped.code == 130
    assert "stopping after the blocks in flight" in stopped.printed
    assert f"interrupted; go on with: python -m fedsim resume {stopped.folder}" in stopped.printed
    assert "Traceback" not in stopped.printed
    assert stopped.started
    assert psutil.wait_procs(stopped.started, timeout=60)[1] == []


def test_its_dashboard_was_on_loopback_and_the_token_is_told_nowhere(stopped):
    assert re.search(r"dashboard http://127\.0\.0\.1:\d+ \(token: `ray get-auth-token`\)", stopped.printed)
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    left = [path for path in stopped.folder.rglob("*") if path.is_file()]
    assert token and left
    assert token not in stopped.printed
    assert [path for path in left if token.encode() in path.read_bytes()] == []
