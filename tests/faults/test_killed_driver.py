"""The driver is killed at random moments, and resumed each time: the results are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from run_folders import results

ROUNDS = 4
SETTINGS = (*TINY, "algorithm=pfedseq", f"rounds={ROUNDS}", "eval.every=2", "backend.block_size=4")
Drive = Callable[[list[str], int], tuple[int, int]]


@pytest.fixture(scope="module")
def drive(cache: Path) -> Iterator[Drive]:
    """``drive(arguments, moment)``: the exit code and the changes of a driver; see ``drivers.py``."""
    command = [sys.executable, str(Path(__file__).with_name("drivers.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def ask(arguments: list[str], moment: int) -> tuple[int, int]:
            print(json.dumps({"arguments": arguments, "moment": moment}), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            return answer["code"], answer["changes"]

        yield ask
        process.kill()


def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_been(drive: Drive, tmp_path: Path) -> None:
    undisturbed, folder, rng = tmp_path / "undisturbed", tmp_path / "killed", random.Random(0)
    code, changes = drive(["run", *SETTINGS, f"output={undisturbed}"], 0)
    assert code == 0
    kills = 0
    while code or not kills:
        command = ["resume", str(folder)]
        if not (folder / "config.yaml").is_file():  # it had not begun yet
            shutil.rmtree(folder, ignore_errors=True)
            command = ["run", *SETTINGS, f"output={folder}"]
        code, _ = drive(command, rng.randint(1, changes // ROUNDS))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        assert kills < 50, "it makes no progress"
    assert kills >= ROUNDS  # none of these drivers lives for more than about a round
    assert results(folder) == results(undisturbed)
