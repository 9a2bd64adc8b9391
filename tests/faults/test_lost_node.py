"""A node of the cluster is lost, and a simulator on another one is killed; the results are those of one process."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import TINY
from run_folders import results

from fedsim.simulation import run


def test_a_killed_simulator_and_a_lost_node_cost_time_and_nothing_else(tiny_config, tmp_path):
    settings = ["algorithm=pfedseq", "rounds=4", "eval.every=2", "backend.block_size=1"]
    on_ray = ["backend=ray", "backend.simulators=2", f"output={tmp_path / 'disturbed'}"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    # A process, a folder and a token of its own: nobody else's Ray meets this one.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's have names too long for Ray's sockets
        own = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("two_nodes.py")), *TINY, *settings, *on_ray],
            env={**os.environ, **own}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary, *found = results(tmp_path / "disturbed")
    expected, *others = results(tmp_path / "undisturbed")
    failures, none = summary.pop("failures"), expected.pop("failures")
    assert (summary, found) == (expected, others)
    requeued = failures.pop("blocks_requeued")
    assert failures == {key: value for key, value in none.items() if key != "blocks_requeued"} | {"actors_replaced": 2}
    assert requeued >= 2  # of each of the two what it was given at the round's start
