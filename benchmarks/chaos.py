"""What faults cost: one small run with simulators and the server killed and stopped, a node removed, the driver killed.

    python benchmarks/chaos.py [--rounds 40 --every 5 --driver-kills 20 --seed 0 --only FAULT … --out FILE]

Each row is one run, compared with the same run undisturbed: ``equal`` says whether summary, metrics and clients are the
same bit for bit, apart from times, memory and the counts of failures. ``injected``: faults; ``recovered``: actors that
were replaced (one that is hit while it starts, or after its last block, is in no count), or drivers; a driver's run is
resumed. ``seconds_lost``: per fault, of wall clock. Blocks are of one client: nothing is halved. The simulators stand
on two Ray nodes of one CPU each; a removed node does not come back, so half of the room goes with it. Where memory is
short, it is taken until Ray's memory monitor kills, as a rule all actors at once. What may end the server waits for a
new round: a run that is set back four times without one stops. A row that fails says so in ``error``, and the others
go on; with one that fails or is not ``equal`` the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# A cluster of `cluster_utils` would go without, where there is no token yet; the undisturbed run leaves one.
os.environ.setdefault("RAY_AUTH_MODE", "token")

import psutil

SETTINGS = (
    "algorithm=pfedseq", "env=shapes", "env.num_clients=32", "env.classes=6", "env.classes_per_client=2", "env.px=16",
    "env.samples_per_client=32", "model=test_vit", "model.weights=random", "model.img_size=16",
    "model.options={patch_size: 8}", "adapter.width=4", "local.epochs=4", "local.batch_size=4", "cohort=16",
    "eval.every=10", "backend=ray", "backend.simulators=2", "backend.block_size=1", "backend.dashboard=false",
    "backend.min_deadline_s=3", "backend.start_timeout_s=60",
    "backend.max_attempts=100",  # chance, and no client, is to blame where one is hit again and again
)  # fmt: skip
SIMULATORS, SERVER = ("simulator",), ("central",)
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


def actors(*names: str) -> list[psutil.Process]:
    """Processes of these actors among this one's descendants, but for those that were stopped already."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()).lower()
            named = title.startswith("ray::") and any(name in title for name in names)
            if named and process.status() != psutil.STATUS_STOPPED:
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def rounds_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def take_memory(victims: list[psutil.Process]) -> None:
    """Until Ray's memory monitor has killed one of these, or nearly all is taken."""
    piece = b"1" * (64 << 20)  # small: as long as memory is short, whatever starts anew is killed as well
    with ExitStack() as taken:  # mapped, and given back at once: malloc might keep it
        while not psutil.wait_procs(victims, timeout=0.02)[0] and psutil.virtual_memory().available > 2 << 30:
            taken.enter_context(mmap.mmap(-1, len(piece))).write(piece)


def on_two_nodes(
    kind: str, whom: tuple[str, ...], remove: bool, rounds: int, every_s: float, seed: int, folder: Path
) -> tuple[dict[str, int], float]:
    """A run some of whose actors get a signal now and then, or have no memory.

    Returns:
        Faults that were injected, and the seconds that it took.
    """
    import ray
    from ray.cluster_utils import Cluster

    from fedsim.config import load
    from fedsim.simulation import run

    system = dict(HEALTH)
    if kind == "memory":
        memory = psutil.virtual_memory()
        most = 1 - (memory.available - (4 << 30)) / memory.total  # the run itself takes about 2 GiB
        system |= {"memory_usage_threshold": most, "memory_monitor_refresh_ms": 100}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": system}
    )
    node, over, rng = cluster.add_node(num_cpus=1), threading.Event(), random.Random(seed)
    injected = {"signals": 0, "nodes": 0, "shortages": 0}

    def disturb() -> None:
        while not over.wait(0.2) and not rounds_done(folder):
            pass  # the pool starts undisturbed
        hit = 0
        while not over.wait(rng.uniform(0.5, 1.5) * every_s):
            done = rounds_done(folder)
            targets = actors(*whom) if whom == SIMULATORS or done > hit else []
            if remove and not injected["nodes"] and done >= rounds // 2:
                cluster.remove_node(node, allow_graceful=False)
                injected["nodes"] = 1
            elif targets:
                hit = done
                if kind == "memory":
                    take_memory(targets)
                    injected["shortages"] += 1
                else:
                    rng.choice(targets).send_signal(signal.Signals[kind])
                    injected["signals"] += 1

    ray.init(address=cluster.address, logging_level="warning")
    thread, start = threading.Thread(target=disturb), time.perf_counter()
    thread.start()
    try:
        run(load(None, [*SETTINGS, f"rounds={rounds}", f"output={folder}"]))
        return injected, time.perf_counter() - start
    finally:
        over.set()
        thread.join()
        ray.shutdown()
        cluster.shutdown()


def killed_driver(rounds: int, kills: int, longest_s: float, seed: int, folder: Path) -> tuple[dict[str, int], float]:
    """A run whose driver is killed again and again, up to ``longest_s`` after it was started, and resumed."""
    rng, injected, start = random.Random(seed), {"drivers": 0}, time.perf_counter()
    while True:
        if (folder / "config.yaml").is_file():
            command = ["resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            command = ["run", *SETTINGS, f"rounds={rounds}", f"output={folder}"]
        process = subprocess.Popen([sys.executable, "-m", "fedsim", *command], stdout=subprocess.DEVNULL)
        try:
            code = process.wait(rng.uniform(0, longest_s) if injected["drivers"] < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            injected["drivers"] += 1
            continue
        if code:
            raise RuntimeError(f"python -m fedsim {command[0]} exited with {code}")
        return injected, time.perf_counter() - start


def results(folder: Path) -> tuple[Any, dict[str, Any]]:
    """All that a run wrote, apart from times and memory; and its failures."""
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for measured in ("seconds", "updates_per_second", "peak_memory_mib"):
        for told in (summary, *records):
            told.pop(measured, None)
    failures = summary.pop("failures")
    return (summary, records, (folder / "clients.csv").read_text()), failures


def in_a_process(work: Callable[..., Any], *values: Any) -> Any:
    """Each run has a Ray of its own, and a process of its own with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work, *values).result()


def row_of(
    fault: str, injected: dict[str, int], failures: dict[str, Any], seconds: float, undisturbed_s: float | None
) -> dict[str, Any]:
    """A row, but for what it is compared with; without the undisturbed run's seconds there are none that were lost."""
    total = sum(injected.values())
    return {
        "fault": fault,
        "injected": total,
        "recovered": injected.get("drivers", failures["actors_replaced"] + failures["central_restarted"]),
        "seconds_lost": None if undisturbed_s is None else round((seconds - undisturbed_s) / max(1, total), 2),
        "seconds": round(seconds, 1),
        "failures": failures,
    }


def main() -> int:
    """Returns the exit code: 1 if a row failed or is not equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=float, default=5, help="mean seconds between two signals")
    parser.add_argument("--driver-kills", type=int, default=20)
    parser.add_argument("--driver-s", type=float, default=30, help="a driver is killed within so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="these rows, and what they are compared with")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        base, given = Path(name), (options.rounds, options.every, options.seed)
        drivers = (options.driver_s, options.seed)
        runs: dict[str, tuple[Any, ...]] = {
            "none, driver apart": (killed_driver, options.rounds, 0, *drivers),
            "driver killed": (killed_driver, options.rounds, options.driver_kills, *drivers),
            "none, two nodes": (on_two_nodes, "", (), False, *given),
            "simulator killed": (on_two_nodes, "SIGKILL", SIMULATORS, False, *given),
            "simulator stopped": (on_two_nodes, "SIGSTOP", SIMULATORS, False, *given),
            "server killed": (on_two_nodes, "SIGKILL", SERVER, False, *given),
            "server stopped": (on_two_nodes, "SIGSTOP", SERVER, False, *given),
            "memory short": (on_two_nodes, "memory", (*SIMULATORS, *SERVER), False, *given),
            "node removed": (on_two_nodes, "", (), True, *given),
            "simulators killed, node removed": (on_two_nodes, "SIGKILL", SIMULATORS, True, *given),
        }
        if options.only:
            wanted = {*options.only}
            wanted |= {"none, driver apart" if fault == "driver killed" else "none, two nodes" for fault in wanted}
            runs = {fault: run for fault, run in runs.items() if fault in wanted}
        undisturbed_s, expected, code = None, None, 0
        for fault, (work, *values) in runs.items():
            folder, undisturbed = base / fault.replace(" ", "-").replace(",", ""), fault.startswith("none")
            if undisturbed:  # what the rows after it are compared with
                undisturbed_s = None
            try:
                injected, seconds = in_a_process(work, *values, folder)
                found, failures = results(folder)
                if undisturbed:
                    undisturbed_s, expected = seconds, expected or found
                row = row_of(fault, injected, failures, seconds, undisturbed_s) | {"equal": found == expected}
            except Exception as error:
                row = {"fault": fault, "equal": False, "error": f"{type(error).__name__}: {error}"}
            code |= not row["equal"]
            row["rounds"] = options.rounds
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        return code


if __name__ == "__main__":
    sys.exit(main())
