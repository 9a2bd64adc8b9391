"""Simulators and the central actor are killed and stopped; the results are those of an undisturbed run."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import run_folders

from fedsim import simulation as runs
from fedsim.backend import Backend, LocalBackend
from fedsim.errors import BlockFailedError, ClientError, NotStartedError
from fedsim.plan import Plan, prepare
from fedsim.simulation import run
from fedsim.supervisor import Failures

FAULTY = '''"""FedAvg with clients that do harm: a file by their id says what, and in which round."""
import os, signal
from pathlib import Path
import torch
from fedsim.algorithms.fedavg import FedAvg

class Faulty(FedAvg):
    def init_server(self, params, generator):
        if (Path(__file__).parent / "faults" / "server").exists():
            {}["no such key"]
        return super().init_server(params, generator)

    def local_update(self, payload, rows, ctx):
        for client in ctx.ids:
            fault = Path(__file__).parent / "faults" / str(client)
            if fault.exists():
                kind, round = fault.read_text().split()
                if ctx.round >= int(round):
                    self.do(kind, fault, len(ctx.ids))
        return super().local_update(payload, rows, ctx)

    def do(self, kind, fault, clients):
        if kind == "exit":
            os._exit(1)
        if kind == "memory":
            if clients > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return
        if kind == "bug":
            {}["no such key"]
        fault.unlink()
        while kind == "loop":
            pass
        os.kill(os.getpid(), getattr(signal, kind))
'''
SERVER_BUG_LINE, BUG_LINE = (n for n, line in enumerate(FAULTY.splitlines(), 1) if line.endswith('{}["no such key"]'))
RAY = ("backend=ray", "backend.simulators=2", "backend.min_deadline_s=2")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of faults; a Ray whose workers know the algorithm that commits them."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faults").mkdir()
    (folder / "faulty.py").write_text(FAULTY)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="warning", namespace="faults",
        runtime_env={"env_vars": {"PYTHONPATH": str(folder)}},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield folder / "faults"
    ray.shutdown()


@pytest.fixture(autouse=True)
def harmless(faults: Path) -> Iterator[None]:
    """No fault outlives its test."""
    yield
    for file in faults.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def pool(faults: Path, tiny_config) -> Iterator[tuple[Plan, Any]]:
    """A pool with blocks of one client, which all take part in every round."""
    from fedsim.ray_backend import RayBackend

    plan = prepare(tiny_config(*RAY, "algorithm=faulty:Faulty", "cohort=8", "backend.block_size=1"))
    backend = RayBackend(plan.workload, plan.params, "faults")
    yield plan, backend
    backend.close()


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str, dict[str, Any]]:
    """All that a run wrote, apart from times and memory, and its failures."""
    summary, records, clients = run_folders.results(folder)
    failures = summary.pop("failures")
    return summary, records, clients, failures


def test_killed_stopped_and_looping_simulators_cost_time_and_nothing_else(faults, tiny_config, tmp_path):
    settings = ["algorithm=faulty:Faulty", "cohort=8", "backend.block_size=1", "rounds=3"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    (faults / "3").write_text("SIGKILL 0")
    (faults / "6").write_text("SIGSTOP 1")  # by then blocks were timed
    (faults / "1").write_text("loop 2")
    run(tiny_config(*settings, *RAY, f"output={tmp_path / 'disturbed'}"))
    *found, failures = results(tmp_path / "disturbed")
    *expected, none = results(tmp_path / "undisturbed")
    assert found == expected
    assert (failures["actors_replaced"], failures["hangs"], failures["blocks_halved"]) == (3, 2, 0)
    assert not any(none.values())


def test_a_client_that_kills_its_simulators_is_found_and_left_out(faults, tiny_config, tmp_path, monkeypatch):
    settings = ["algorithm=faulty:Faulty", "cohort=8", "backend.block_size=2"]
    settings += ["backend.on_client_error=quarantine", "backend.max_attempts=1"]
    (faults / "5").write_text("exit 0")
    run(tiny_config(*settings, *RAY, f"output={tmp_path / 'deadly'}"))
    (faults / "5").unlink()
    # Found out in round 1 or known from the start: for the others it is the same.
    monkeypatch.setattr(runs, "make_backend", without_client_5)
    run(tiny_config(*settings, f"output={tmp_path / 'without'}"))
    *found, failures = results(tmp_path / "deadly")
    *expected, _ = results(tmp_path / "without")
    assert found == expected
    # The block of two died twice, then the client alone.
    assert {name: failures[name] for name in ("actors_replaced", "blocks_halved", "clients_quarantined")} == {
        "actors_replaced": 3, "blocks_halved": 1, "clients_quarantined": 1,
    }  # fmt: skip
    assert failures["quarantined"] == [5]
    clients = list(csv.DictReader((tmp_path / "deadly" / "clients.csv").open()))
    assert [row["quarantined"] for row in clients] == ["0"] * 5 + ["1"] + ["0"] * 2
    assert [row["rounds"] for row in clients] == ["2"] * 5 + ["0"] + ["2"] * 2
    assert (clients[5]["test_samples"], clients[5]["accuracy"]) == ("0", "nan")


def without_client_5(workload: Any, params: Any, folder: str) -> Backend:
    backend = LocalBackend(workload, params)
    backend.failures = Failures(clients_quarantined=1, quarantined=[5])
    return backend


@pytest.mark.parametrize(
    ("kind", "due"),
    [
        (signal.SIGKILL, ["aggregate 0", "evaluate 2"]),  # before there is a checkpoint, and when there are two
        (signal.SIGSTOP, ["train 1", "aggregate 2"]),  # no payload comes, or no answer; such a stage was timed before
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_server_is_rebuilt_from_the_newest_checkpoint_or_from_the_start(
    faults, tiny_config, tmp_path, monkeypatch, kind, due
):
    from fedsim.ray_backend import RayBackend

    settings = ["algorithm=pfedseq", "rounds=3", "eval.every=3"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    left = [*due]
    for stage in ("train", "aggregate", "evaluate"):
        monkeypatch.setattr(RayBackend, stage, disturbing_the_server(getattr(RayBackend, stage), stage, left, kind))
    run(tiny_config(*settings, *RAY, f"output={tmp_path / 'disturbed'}"))
    assert left == []
    *found, failures = results(tmp_path / "disturbed")
    *expected, none = results(tmp_path / "undisturbed")
    assert found == expected
    assert failures == none | {"central_restarted": 2}  # the simulators are to blame for nothing


def disturbing_the_server(method: Any, stage: str, due: list[str], kind: signal.Signals) -> Any:
    def disturbed(self: Any, round: int, *values: Any) -> Any:
        if f"{stage} {round}" in due:
            due.remove(f"{stage} {round}")
            os.kill(ray.get(self._central.ready.remote()), kind)
        return method(self, round, *values)

    return disturbed


def test_an_error_before_round_1_is_told_as_without_ray(faults, tiny_config):
    from fedsim.ray_backend import RayBackend

    plan = prepare(tiny_config(*RAY, "backend.simulators=1", "algorithm=faulty:Faulty"))
    (faults / "server").touch()
    told = []
    for backend in (RayBackend, LocalBackend):
        with pytest.raises(ClientError) as failure:
            backend(plan.workload, plan.params, *(["faults"] if backend is RayBackend else []))
        told.append(str(failure.value))
    assert told[0] == told[1]
    assert told[0].startswith("init_server failed in round 1, clients []\nTraceback (most recent call last):\n")
    assert f'faulty.py", line {SERVER_BUG_LINE}' in told[0] and told[0].endswith("KeyError: 'no such key'")


def test_dead_simulators_and_lost_results_are_replaced_and_every_block_is_applied_once(pool):
    plan, backend = pool
    backend.failures = Failures()
    undisturbed = LocalBackend(plan.workload, plan.params)
    try:
        for round in range(2):
            blocks = plan.blocks(plan.sample_cohort(round))
            for pid in backend.pids()[: round + 1]:
                os.kill(pid, signal.SIGKILL)
            facts, expected = backend.train(round, blocks), undisturbed.train(round, blocks)
            for fact, other in zip(facts, expected, strict=True):
                np.testing.assert_array_equal(fact["ids"], other["ids"])
                np.testing.assert_array_equal(fact["loss"], other["loss"])
            requeued = backend.failures.blocks_requeued
            backend._trained[3].result = of_a_lost_node(plan.workload)
            assert backend.aggregate(round) == undisturbed.aggregate(round)
            assert backend.failures.blocks_requeued == requeued + 1
        found, expected = (b.evaluate(1, plan.evaluation_blocks()) for b in (backend, undisturbed))
        for fact, other in zip(found, expected, strict=True):
            assert {key: value.tolist() for key, value in fact.items()} == {k: v.tolist() for k, v in other.items()}
        assert backend.failures.actors_replaced == 3  # one, and two
        assert backend.failures.blocks_requeued >= 3 + 2
    finally:
        undisturbed.close()


def of_a_lost_node(workload: Any) -> Any:
    """A reference to something that is gone with what should have made it."""
    from fedsim.actors import SimulatorActor

    actor = SimulatorActor.options(num_cpus=0).remote(workload, workload.frozen, 9, 0.0)
    ray.kill(actor)
    return actor.ready.remote()


def test_an_error_of_the_users_code_is_no_fault_it_stops_the_run_with_its_own_traceback(pool, faults):
    plan, backend = pool
    backend.failures = Failures()
    (faults / "5").write_text("bug 0")
    with pytest.raises(ClientError) as failure:
        backend.train(0, plan.blocks(plan.sample_cohort(0)))
    assert (failure.value.stage, failure.value.round, failure.value.clients) == ("train", 0, [5])
    assert "KeyError: 'no such key'" in failure.value.original
    assert f'faulty.py", line {BUG_LINE}' in failure.value.original
    assert backend.failures == Failures()


def test_a_client_that_kills_every_simulator_stops_the_run_and_is_named(pool, faults):
    plan, backend = pool
    backend.failures = Failures()
    (faults / "5").write_text("exit 0")
    assert (5,) in plan.blocks(plan.sample_cohort(0))
    with pytest.raises(BlockFailedError) as failure:
        # Alone: the answer of a block before it may be lost with the process, which then died under that one.
        backend.train(0, [(5,)])
    assert (failure.value.clients, failure.value.attempts) == ([5], 3)
    assert backend.failures.actors_replaced == 3


def test_blocks_too_large_for_the_gpu_are_halved_by_both_back_ends(pool, faults):
    plan, backend = pool
    backend.failures = Failures()
    local = LocalBackend(plan.workload, plan.params)
    (faults / "4").write_text("memory 0")
    try:
        for each in (backend, local):
            facts = each.train(0, [(0, 1, 2), (3, 4, 5, 6, 7)])
            assert [fact["ids"].tolist() for fact in facts] == [[0, 1, 2], [3, 4], [5], [6, 7]]
            assert each.failures == Failures(blocks_halved=2)
    finally:
        local.close()


def test_without_room_for_simulators_the_run_waits_then_gives_up_and_says_how_to_go_on(pool, monkeypatch):
    plan, backend = pool
    backend.failures = Failures()
    block = plan.blocks(plan.sample_cohort(0))[:1]

    @ray.remote(num_cpus=1)
    class Neighbour:
        def pid(self) -> int:
            return os.getpid()

    pids = backend.pids()
    neighbours = [Neighbour.remote() for _ in pids]
    with monkeypatch.context() as patched:
        hasty = replace(backend.config, start_timeout_s=1, give_up_after_s=4)
        patched.setattr(backend, "config", hasty)
        patched.setattr(backend._pool, "_config", hasty)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        ray.get([neighbour.pid.remote() for neighbour in neighbours])  # they have the room now
        with pytest.raises(NotStartedError, match=r"round 1: no simulator .* python -m fedsim resume faults$"):
            backend.train(0, block)
    assert backend._pool.slots[0].failed_starts >= 2
    for neighbour in neighbours:
        ray.kill(neighbour)
    (facts,) = backend.train(0, block)
    assert facts["ids"].tolist() == list(block[0])
