"""What can be seen of a run over HTTP: in Ray's dashboard, and where Prometheus reads the metrics."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.job_config import JobConfig

from fedsim import __version__, loop
from fedsim.ray_backend import dashboard_url
from fedsim.simulation import run
from fedsim.tracking.ray_metrics import METRICS, PoolMetrics, job_metadata

PATIENCE_S = 60.0  # Ray exports every second here, elsewhere every ten


@pytest.fixture(scope="module")
def watched(tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run of two rounds on a Ray with a dashboard; a simulator is killed between them. Its last record."""
    folder = tmp_path_factory.mktemp("runs") / "watched"
    settings = ["backend=ray", "backend.simulators=2", "backend.block_size=2", f"output={folder}"]
    config = tiny_config(*settings)
    save = loop._save

    def save_and_kill(backend: Any, folder: Path, progress: loop.Progress, keep: int) -> None:
        save(backend, folder, progress, keep)
        if progress.round == 1:
            actors = {actor["name"]: actor for actor in ray.util.list_named_actors(all_namespaces=True)}
            ray.kill(ray.get_actor(**actors["simulator-0"]))

    ray.init(
        address="local", num_cpus=2, include_dashboard=True, logging_level="warning",
        job_config=JobConfig(metadata=job_metadata(config, "watched")),
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop, "_save", save_and_kill)
            run(config)
        yield json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    finally:
        ray.shutdown()


def get(path: str) -> Any:
    """What the dashboard answers to who has the token."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(dashboard_url() + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def state(what: str) -> list[dict[str, Any]]:
    return list(get(f"/api/v0/{what}?detail=true&limit=1000")["data"]["result"]["result"])


def eventually(read: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    """What is read as soon as it is as wanted, or else at last: Ray tells some things a second late."""
    end = time.monotonic() + PATIENCE_S
    while not wanted(found := read()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def metrics() -> dict[str, dict[tuple[str, ...], float]]:
    """Ours, as Prometheus reads them: by name and the values of our own tags."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_fedsim"):
                tags = [
                    sample.labels[tag] for tag in ("run", "statistic", "stage", "kind", "le") if tag in sample.labels
                ]
                found.setdefault(sample.name, {})[tuple(tags)] = sample.value
    return found


def test_the_dashboard_asks_for_the_token(watched):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{dashboard_url()}/api/v0/actors", timeout=60)
    assert refused.value.code == 401


def test_the_job_says_which_run_it_is(watched):
    (job,) = [job for job in get("/api/jobs/") if job["type"] == "DRIVER"]
    assert job["metadata"] == {
        "fedsim": __version__, "run": "watched", "algorithm": "fedavg", "env": "shapes", "model": "test_vit",
        "seed": "0", "rounds": "2",
    }  # fmt: skip


def test_actors_are_there_by_name_the_replaced_one_too(watched):
    actors = eventually(
        lambda: {actor["name"]: actor for actor in state("actors")},
        lambda actors: actors["central"]["state"] == "DEAD",  # the run is over
    )
    assert set(actors) == {"central", "simulator-0", "simulator-1", "simulator-0-r1"}
    assert [actors[name]["class_name"] for name in ("central", "simulator-1")] == ["CentralActor", "SimulatorActor"]
    assert len({actor["ray_namespace"] for actor in actors.values()}) == 1
    assert actors["central"]["ray_namespace"].startswith("watched-")


def test_what_each_actor_does(watched):
    names = {actor["actor_id"]: actor["name"] for actor in state("actors")}

    def done() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {name: set() for name in names.values()}
        for task in state("tasks"):
            found[names[task["actor_id"]]].add(task["name"].rpartition(".")[2])
        return found

    server, simulator = {"broadcast", "aggregate", "average", "save"}, {"train", "evaluate"}
    found = eventually(done, lambda found: found["central"] >= server and found["simulator-1"] >= simulator)
    assert found["central"] >= server and found["simulator-1"] >= simulator
    assert not found["central"] & simulator


def test_metrics_are_exported_by_run(watched):
    pool = PoolMetrics("watched")
    pool.pool(waiting=3, living=2)
    for seconds in (0.07, 0.3, 0.4):
        pool.block("check", seconds)
    run = ("watched",)

    def both_told(found: dict[str, dict[tuple[str, ...], float]]) -> bool:  # Ray exports each metric in its own time
        blocks = found.get("ray_fedsim_block_seconds_bucket", {}).get(("watched", "check", "+Inf"))
        return (found.get("ray_fedsim_queue_length"), blocks) == ({run: 3.0}, 3.0)

    found = eventually(metrics, both_told)
    assert {found[name][run] for name in ("ray_fedsim_round", "ray_fedsim_rounds")} == {2.0}
    assert found["ray_fedsim_loss"] == {run: watched["loss"]}
    assert found["ray_fedsim_updates_per_second"] == {run: watched["updates_per_second"]}
    assert found["ray_fedsim_accuracy"] == {("watched", name): value for name, value in watched["accuracy"].items()}
    assert found["ray_fedsim_seconds"] == {("watched", name): value for name, value in watched["seconds"].items()}
    failures = {kind: value for (_, kind), value in found["ray_fedsim_failures"].items()}
    assert failures["actors_replaced"] == 1
    assert set(failures) == {
        "actors_replaced", "hangs", "blocks_requeued", "blocks_halved", "central_restarted", "updates_skipped",
        "clients_quarantined",
    }  # fmt: skip
    assert (found["ray_fedsim_queue_length"], found["ray_fedsim_simulators"]) == ({run: 3.0}, {run: 2.0})
    seconds = found["ray_fedsim_block_seconds_bucket"]
    blocks = {stage: value for (_, stage, le), value in seconds.items() if le == "+Inf"}
    assert blocks == {"train": 2 * 2, "evaluate": 2 * 4, "check": 3}  # two rounds, of 4 and of 8 clients in twos
    counts = {
        le: value for (_, stage, le), value in found["ray_fedsim_block_seconds_bucket"].items() if stage == "check"
    }
    assert [counts[le] for le in ("0.05", "0.1", "0.2", "0.5", "+Inf")] == [0, 1, 1, 3, 3]


def test_the_grafana_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads((resources.files("fedsim") / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert {name.removesuffix("_bucket") for name in shown} == {f"ray_{name}" for name in METRICS}
    assert all('run=~"$run"' in query for query in queries)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
