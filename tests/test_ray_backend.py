"""The Ray back end on a cluster of its own: a whole run, and what the dashboard shows of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
from conftest import TINY
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayTaskError

from fedsim import ray_backend
from fedsim.__main__ import main
from fedsim.actors import Weights, fill_prefix, put_frozen
from fedsim.backend import Backend
from fedsim.config import BackendConfig
from fedsim.errors import CentralLostError, ConfigError, DataError, FedsimError, NotStartedError
from fedsim.plan import Plan, prepare
from fedsim.ray_backend import RayBackend
from fedsim.simulation import resume, run
from fedsim.supervisor import Deadlines, Failures, Pool, Stage


def test_a_whole_run_on_ray_leaves_nothing_running(tmp_path, capsys, monkeypatch):
    settings = [*TINY, "algorithm=pfedseq", "model.options={patch_size: 8, depth: 3}", "adapter.blocks=last:2"]
    ray_settings = ["backend=ray", "backend.simulators=2", "backend.dashboard=false"]
    tokens = []
    for name, more in (("ray", ray_settings), ("local", [])):
        monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache" / name))  # each computes the cached prefix anew
        output = f"output={tmp_path / name}"
        assert main(["run", *settings, "model.cached_prefix=fp16", *more, output]) == 0
        assert not ray.is_initialized()
        tokens.append(np.load(*(tmp_path / "cache" / name).glob("prefix-*.npy")))
    assert tokens[0].any()
    np.testing.assert_array_equal(*tokens)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ray", "local"))
    assert one["accuracy"] == other["accuracy"]
    assert set(one["peak_memory_mib"]) == {"driver", "central", "simulator-0", "simulator-1"}


def test_a_cache_that_a_node_does_not_see_is_told(tiny_plan, tmp_path):
    work = tiny_plan.workload
    gone = fill_prefix._function(work, work.frozen, 0.0, tmp_path / "gone.npy", slice(0, 32))
    assert isinstance(gone, DataError)
    assert str(gone).endswith("gone.npy'; $FEDSIM_CACHE is to be a folder that all nodes see")


def test_a_dashboard_without_a_token_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["run", *TINY, "backend=ray", "backend.simulators=1", f"output={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        "fedsim: backend.dashboard: RAY_AUTH_MODE=disabled lets everybody on this machine run code through it; unset "
        "that, or set backend.dashboard=false\n"
    )
    assert not ray.is_initialized() and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("nonsense", "'nonsense' is no HOST:PORT, which a head has 6379 for unless it was told"),
        (
            "http://127.0.0.1:8265",
            "'http://127.0.0.1:8265' is no HOST:PORT, which a head has 6379 for unless it was told",
        ),
        ("127.0.0.1:1", "no cluster answers at 127.0.0.1:1 ([Errno 111] Connection refused)"),
    ],
)
@pytest.mark.parametrize("named", ["backend.address", "RAY_ADDRESS"])
def test_an_address_without_a_cluster(tmp_path, capsys, monkeypatch, address, told, named):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = [f"backend.address={address}"] if named == "backend.address" else []
    if not given:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(["run", *TINY, "backend=ray", *given, f"output={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == f"fedsim: {named}: {told}\n"
    assert not ray.is_initialized() and not any(tmp_path.iterdir())


def test_auto_without_a_cluster(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("Could not find any\nmore")))
    assert main(["run", *TINY, "backend=ray", "backend.address=auto", f"output={tmp_path / 'run'}"]) == 2
    told = "backend.address: the cluster at auto cannot be joined: Could not find any"
    assert capsys.readouterr().err == f"fedsim: {told}\n"


def test_a_run_that_stopped_on_ray_resumes_on_ray_to_the_same_numbers(tmp_path, tiny_config, stopped_after):
    settings = ["algorithm=pfedseq", "rounds=3", "eval.every=3"]
    on_ray = ["backend=ray", "backend.simulators=2", "backend.dashboard=false", "backend.block_size=2"]
    expected = run(tiny_config(*settings, "backend.block_size=2", f"output={tmp_path / 'local'}")).summary
    with stopped_after(1):
        run(tiny_config(*settings, *on_ray, f"output=file://{tmp_path / 'ray'}"))
    summary = resume(f"file://{tmp_path / 'ray'}").summary
    for key in ("accuracy", "unseen", "bytes", "failures", "status"):
        assert summary[key] == expected[key]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


def test_more_simulators_than_the_cluster_holds_is_refused(cluster, tiny_config):
    plan = prepare(tiny_config("backend=ray", "backend.simulators=4"))
    with pytest.raises(ConfigError, match="4 simulators of 1 CPU each, the cluster has room for 1"):
        RayBackend(plan.workload, plan.params, "too-many")


def test_actors_have_one_heap_for_all_threads(cluster, tiny_config):
    plan = prepare(tiny_config("backend=ray", "backend.simulators=1"))
    backend = RayBackend(plan.workload, plan.params, "one-heap")
    try:
        pids = [ray.get(backend._central.ready.remote()), *backend.pids()]
        assert [psutil.Process(pid).environ().get("MALLOC_ARENA_MAX") for pid in pids] == ["1", "1"]
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("settings", "share", "simulators"),
    [
        ({}, 0.5, 4),
        ({"per_gpu": 4}, 0.25, 8),
        ({"gpu_fraction": 0.3}, 0.3, 6),
        ({"per_gpu": 0}, 1.0, 2),
        ({"per_gpu": 0, "simulators": 2}, 1.0, 2),
        ({"per_gpu": 0, "simulators": 5}, 1 / 3, 5),  # three on one, two on the other
    ],
)
def test_simulators_on_two_gpus(monkeypatch, settings, share, simulators):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)
    assert ray_backend._size_pool(BackendConfig(**settings)) == (pytest.approx(share), simulators)
    bare = object.__new__(RayBackend)
    bare.config, bare.gpu_fraction = BackendConfig(**settings), share
    assert bare.per_gpu == math.floor(1 / share + 1e-6)
    with pytest.raises(ConfigError, match=r"5 simulators of 0\.5 GPU each, the cluster has room for 4"):
        ray_backend._size_pool(BackendConfig(simulators=5))


def test_another_number_of_simulators_on_a_gpu_takes_the_place_of_those_there_are(bare, monkeypatch):
    started = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(bare, "_start_pool", lambda *told: started.append(told))
    bare._pool.slots[0].starts = 1
    bare.share_gpus(4)
    assert (bare.gpu_fraction, bare.per_gpu) == (0.25, 4)
    assert started == [(8, 1)]  # eight, whose names tell that there was one before


def test_defaults_are_those_of_the_design():
    config = BackendConfig()
    assert (config.name, config.simulators, config.max_attempts) == ("ray", 0, 3)
    assert (config.on_client_error, config.give_up_after_s) == ("raise", 600)


@pytest.fixture
def bare(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> RayBackend:
    """A back end whose actors are nobody: what it makes of what happens to them is its own."""
    backend = object.__new__(RayBackend)
    Backend.__init__(backend)
    backend.config, backend._work, backend._folder = BackendConfig(), tiny_plan.workload, "runs/one"
    backend._deadlines, backend._pool = Deadlines(backend.config), Pool(backend.config, 1)
    backend._central = Nobody()
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(backend, "_start_due", lambda now: None)
    return backend


class Nobody:
    """Any method of it is one that is never done."""

    def __getattr__(self, name: str) -> Nobody:
        return self

    def remote(self, *values: object) -> Nobody:
        return self


def test_a_server_that_does_not_answer_is_lost_after_its_deadline(bare, monkeypatch, tmp_path):
    def get(reference: Nobody, timeout: float) -> None:
        raise GetTimeoutError("some object(s) not ready")

    monkeypatch.setattr(ray, "get", get)
    bare._trained = []
    for seconds in (300, 600):  # it hung, so it has more time then
        told = rf"round 3: the central actor is lost \(no answer to aggregate within {seconds} s; see backend.min_dea"
        with pytest.raises(CentralLostError, match=told):
            bare.aggregate(2)
    bare._deadlines.kept("save", 7)
    with pytest.raises(CentralLostError, match=r"no answer to save within 70 s"):
        bare.save(tmp_path, {"round": 3})


def test_what_a_resumed_run_reads_and_what_goes_over_a_network_takes_as_long_as_it_takes(bare, monkeypatch, tmp_path):
    waited: list[float | None] = []
    monkeypatch.setattr(ray, "get", lambda reference, timeout: waited.append(timeout))
    bare.load(tmp_path / "round-00003")
    bare.failures.central_restarted = 1
    bare.load(tmp_path / "round-00003")
    bare._folder = "s3://bucket/run"
    bare.load(tmp_path / "round-00003")
    bare.save(tmp_path, {"round": 3})
    assert waited == [None, 60, None, None]  # the second load is one that was timed


def test_a_simulator_that_was_killed_for_memory_is_a_fault_and_no_error_of_the_users(bare, monkeypatch):
    stage = Stage("train", 0, [(4, 5, 6, 7), (1,)], bare.config, bare.failures)
    monkeypatch.setattr(ray, "get", lambda reference, timeout: 4711)  # the server lives
    (slot,) = bare._pool.slots
    for _ in range(2):
        bare._pool.starting(slot, 0.0)
        bare._pool.ready(slot)
        piece = stage.waiting.popleft()
        slot.pieces.append(piece)
        # As Ray 2.60 raises it: of a task or of an actor, and several lines long.
        bare._see_fault(stage, slot, piece, OutOfMemoryError("3 worker(s) were killed due to …\nOOM kill reason: …"))
    assert [piece.clients for piece in stage.waiting] == [(4, 5), (6, 7), (1,)]
    assert bare.failures == Failures(actors_replaced=2, blocks_requeued=1, blocks_halved=1)


def killed() -> ActorDiedError:
    """What Ray 2.60 raises of an actor whose process was killed: several lines."""
    told = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR …"
    context = ActorDiedErrorContext(class_name="SimulatorActor", actor_id=bytes(16), pid=9, error_message=told)
    assert str(ActorDiedError(context)).count("\n") > 3
    return ActorDiedError(context)


def test_who_is_killed_while_it_starts_costs_one_line(bare, monkeypatch):
    (slot,) = bare._pool.slots
    slot.answer = "never comes"

    def get(reference: object, timeout: float | None = None) -> None:
        if reference is not bare._central:
            raise killed()

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))
    with pytest.raises(FedsimError) as failure:
        bare._wait_until_ready()
    assert str(failure.value) == (
        "simulator-0 died while it started (The actor died unexpectedly before finishing this task); no round was "
        "begun: start the run again, with fewer backend.simulators where memory is short"
    )


@pytest.mark.parametrize(("killed_starts", "paused"), [(0, []), (3, [1, 2, 4]), (99, [1, 2, 4, 8, 16, 32])])
def test_a_server_whose_successor_does_not_start_is_waited_for(bare, monkeypatch, caplog, killed_starts, paused):
    pauses: list[float] = []

    def get(reference: object, timeout: float) -> int:
        if len(pauses) < killed_starts:
            raise killed()
        return 4711

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(bare, "_start_central", lambda: bare._central)
    monkeypatch.setattr(ray_backend.time, "sleep", pauses.append)
    monkeypatch.setattr(ray_backend.time, "monotonic", lambda: float(sum(pauses)))
    bare.config = replace(bare.config, give_up_after_s=60)
    gives_up = pytest.raises(NotStartedError, match=r"round 3: no central actor could be started for 63 s; .* runs/one")
    with gives_up if killed_starts == 99 else contextlib.nullcontext():
        bare.rebuild(2)
    assert pauses == paused
    assert len(caplog.records) == bool(paused)  # one line, however often


def test_a_replacement_that_does_not_start_is_told_of_in_one_line_with_what_went_wrong(bare, monkeypatch, caplog):
    trace = "Traceback (most recent call last):\n  File 'actors.py', line 9, in __init__\nImportError: no module 'x'\n"
    failed = ActorDiedError(RayTaskError("SimulatorActor.__init__", trace, ImportError("no module 'x'")))
    stage, (slot,) = Stage("train", 2, [(1,)], bare.config, bare.failures), bare._pool.slots
    for error in (failed, killed()):
        bare._pool.starting(slot, 0.0)
        slot.failed_starts = 0

        def get(reference: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)
        bare._see(stage, slot)
    assert [record.getMessage() for record in caplog.records] == [
        f"round 3: simulator-0: {told}; 0 of 1 live, another start is tried"
        for told in ("ImportError: no module 'x'", "The actor died unexpectedly before finishing this task")
    ]
    assert bare.failures == Failures()


def test_the_runs_of_a_sweep_share_frozen_weights(cluster):
    frozen, same, other = ({"w": np.full(9, value, dtype=np.float32)} for value in (1.0, 1.0, 2.0))
    assert put_frozen(frozen) != put_frozen(same)  # no sweep, nothing shared
    weights = Weights.options(name="weights").remote()
    try:
        first, second, third = put_frozen(frozen), put_frozen(same), put_frozen(other)
        assert first == second != third
        assert ray.get(second)["w"].tolist() == [1.0] * 9 and ray.get(third)["w"].tolist() == [2.0] * 9
    finally:
        ray.kill(weights)
