"""The Ray back end on a cluster of its own: a whole run, and what the dashboard shows of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from conftest import TINY

from fedsim.__main__ import main
from fedsim.actors import Weights, put_frozen
from fedsim.config import BackendConfig
from fedsim.errors import ConfigError
from fedsim.plan import prepare
from fedsim.ray_backend import RayBackend
from fedsim.simulation import resume, run


def test_a_whole_run_on_ray_leaves_nothing_running(tmp_path, capsys):
    ray_settings = ["backend=ray", "backend.simulators=2", "backend.dashboard=false", "algorithm=pfedseq"]
    assert main(["run", *TINY, *ray_settings, f"output={tmp_path / 'ray'}"]) == 0
    assert not ray.is_initialized()
    assert main(["run", *TINY, "algorithm=pfedseq", f"output={tmp_path / 'local'}"]) == 0
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("ray", "local"))
    assert one["accuracy"] == other["accuracy"]
    assert set(one["peak_memory_mib"]) == {"driver", "central", "simulator-0", "simulator-1"}


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


def test_defaults_are_those_of_the_design():
    config = BackendConfig()
    assert (config.name, config.simulators, config.max_attempts) == ("ray", 0, 3)
    assert (config.on_client_error, config.give_up_after_s) == ("raise", 600)


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
