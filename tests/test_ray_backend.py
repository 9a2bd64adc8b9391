"""The Ray back end on a cluster of its own: a whole run, and what the dashboard shows of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import TINY

from fedsim.__main__ import main
from fedsim.config import BackendConfig
from fedsim.errors import ConfigError
from fedsim.plan import prepare
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
        run(tiny_config(*settings, *on_ray, f"output={tmp_path / 'ray'}"))
    summary = resume(tmp_path / "ray").summary
    for key in ("accuracy", "unseen", "bytes", "failures", "status"):
        assert summary[key] == expected[key]


def test_the_dashboard_shows_the_actors_by_name_and_asks_for_the_token(tiny_config):
    from fedsim.ray_backend import RayBackend, dashboard_url

    plan = prepare(tiny_config("backend=ray", "backend.simulators=2"))
    backend = RayBackend(plan.workload, plan.params, "a-run")
    try:
        backend.train(0, [tuple(np.arange(4).tolist())])
        url = f"{dashboard_url()}/api/v0/actors?detail=true"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=60)
        assert refused.value.code == 401
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            actors = json.load(answer)["data"]["result"]["result"]
        alive = {actor["name"]: actor for actor in actors if actor["state"] == "ALIVE"}
        assert set(alive) == {"central", "simulator-0", "simulator-1"}
        assert all(actor["ray_namespace"].startswith("a-run-") for actor in alive.values())
        assert "dashboard http://127.0.0.1:" in backend.describe()
        assert token not in backend.describe()
    finally:
        backend.close()


def test_more_simulators_than_the_cluster_holds_is_refused(tiny_config):
    from fedsim.ray_backend import RayBackend

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="warning")
    try:
        plan = prepare(tiny_config("backend=ray", "backend.simulators=4"))
        with pytest.raises(ConfigError, match="4 simulators of 1 CPU each, the cluster has room for 1"):
            RayBackend(plan.workload, plan.params, "too-many")
    finally:
        ray.shutdown()


def test_defaults_are_those_of_the_design():
    config = BackendConfig()
    assert (config.name, config.simulators, config.max_attempts) == ("ray", 0, 3)
    assert (config.on_client_error, config.give_up_after_s) == ("raise", 600)
