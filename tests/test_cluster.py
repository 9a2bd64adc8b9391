"""A Ray cluster of two nodes on this machine, started as docs/cluster.md says, and runs that are its jobs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import yaml
from conftest import TINY
from run_folders import results

from fedsim import config
from fedsim.__main__ import main
from fedsim.errors import OutputError
from fedsim.simulation import output_folder

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "cluster.md").read_text(encoding="utf-8")
PATIENCE_S = 120.0

HELD = """
import os
from dataclasses import dataclass

from fedsim.algorithms.fedavg import FedAvg


class Held(FedAvg):
    '''FedAvg whose server stops in round 3 for as long as there is a pipe into which nobody writes.'''

    @dataclass(frozen=True)
    class Config:
        pipe: str = ""

    def aggregate(self, server, cohort, update, rows):
        if cohort.round == 2 and os.path.exists(self.config.pipe):
            open(self.config.pipe).read()
        return super().aggregate(server, cohort, update, rows)
"""


def block(title: str) -> str:
    """The first fenced block of a section of the page."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[0]


def commands(title: str) -> list[list[str]]:
    """Those that the page gives first in a section."""
    return [shlex.split(line, comments=True) for line in block(title).replace("\\\n", "").splitlines()]


@dataclass(frozen=True)
class Cluster:
    """A cluster, and what is done with it from outside.

    Attributes:
        shared: the folder that all nodes see.
        work: the folder in which the commands are given.
        env: the environment of whoever has the token.
    """

    shared: Path
    work: Path
    env: dict[str, str]

    def job(self, command: Sequence[str], run: str) -> str:
        """What a command of the page prints, given for another run than ``two``."""
        words = [re.sub(r"\btwo\b", run, word.replace("/shared", str(self.shared))) for word in command]
        done = subprocess.run(words, cwd=self.work, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        token = (Path(self.env["HOME"]) / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(
            self.env["RAY_API_SERVER_ADDRESS"] + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def state(self, what: str) -> list[dict[str, Any]]:
        return list(self.get(f"/api/v0/{what}?detail=true&limit=1000")["data"]["result"]["result"])


def eventually(read: Callable[[], Any]) -> Any:
    """What is read as soon as it is something, or else at last."""
    end = time.monotonic() + PATIENCE_S
    while not (found := read()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextmanager
def running(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command, ended with all that it has started."""
    with log.open("w") as words:
        process = subprocess.Popen(command, env=env, stdout=words, stderr=words, start_new_session=True)
    try:
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(PATIENCE_S)
        for left in psutil.wait_procs(started, timeout=10)[1]:
            left.kill()


def join(started: ExitStack, command: Sequence[str], env: dict[str, str], log: Path, there: Callable[[], bool]) -> None:
    """A node, started again where Ray's own patience, 30 s, was too short for a machine that is busy."""
    for _ in range(3):
        process = started.enter_context(running(command, env, log))
        eventually(lambda process=process: there() or process.poll() is not None)
        if there():
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shared, work = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("work")
    own = [*TINY, "algorithm=held:Held", f"algorithm.pipe={shared / 'pipe'}", "rounds=4", "backend.block_size=2"]
    (work / "held.py").write_text(HELD)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(work)
        tree = config.to_tree(config.load(None, own))
    tree["backend"]["name"] = "ray"
    (work / "my.yaml").write_text(yaml.safe_dump(tree))

    home = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's own folders have names too long for Ray's sockets
    token, mode, head, node = commands("A cluster by hand")
    assert mode == ["export", "RAY_AUTH_MODE=token"]
    dashboard = free_port()
    env = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "FEDSIM_"))} | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    # So that both nodes, and other clusters, find room and ports on one machine.
    apart = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--dashboard-agent-listen-port=0",
             "--min-worker-port=0", "--max-worker-port=0"]  # fmt: skip
    head += ["--port=0", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    head += ["--temp-dir", str(home / "ray"), *apart]
    address = home / "ray" / "ray_current_cluster"
    try:
        with ExitStack() as started:
            subprocess.run(token, env=env, check=True, capture_output=True)
            join(started, head, env, home / "head.log", address.is_file)
            node = [word.replace("HEAD:6379", address.read_text().strip()) for word in node] + apart
            node += ["--temp-dir", str(home / "node")]  # in one that both have, each unpacks jobs' folders anew
            found = Cluster(shared, work, env)
            join(
                started,
                node,
                env,
                home / "node.log",
                lambda: [node["state"] for node in found.state("nodes")].count("ALIVE") == 2,
            )
            yield found
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Any:
    """The results of the same run in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(cluster.work)
        folder = cluster.shared / "local"
        assert main(["run", str(cluster.work / "my.yaml"), "backend=local", f"output={folder}"]) == 0
    return results(folder)


def test_a_submitted_run_is_carried_by_both_nodes_and_is_that_of_one_process(cluster, undisturbed):
    address, submit, *_ = commands("As a job")
    assert address == ["export", "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"]
    printed = cluster.job(submit, "whole")
    folder = cluster.shared / "runs" / "whole"
    assert "round 4/4" in printed and f"results in {folder}" in printed
    assert results(folder) == undisturbed
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "clients.csv", "summary.json", "tensorboard", "checkpoints", "partition.npz",
    }  # fmt: skip
    assert list((cluster.shared / "cache").glob("*.npy"))  # the images, where --runtime-env-json says

    job = cluster.get("/api/jobs/whole")
    assert (job["status"], job["driver_exit_code"], job["metadata"]) == ("SUCCEEDED", 0, {"run": "whole"})
    actors = {actor["name"]: actor for actor in cluster.state("actors") if actor["ray_namespace"].startswith("whole-")}
    assert set(actors) == {"central", "simulator-0", "simulator-1"}
    nodes = {node["node_id"] for node in cluster.state("nodes")}
    assert {actors[f"simulator-{number}"]["node_id"] for number in (0, 1)} == nodes
    assert len(nodes) == 2


def test_a_stopped_job_is_told_how_to_go_on_and_does(cluster, undisturbed):
    _, submit, stop, resume, _ = commands("As a job")
    folder, pipe = cluster.shared / "runs" / "stopped", cluster.shared / "pipe"
    os.mkfifo(pipe)
    cluster.job([*submit[:3], "--no-wait", *submit[3:]], "stopped")
    assert eventually((folder / "checkpoints" / "round-00002" / "manifest.json").is_file)
    cluster.job(stop, "stopped")
    pipe.unlink()

    assert cluster.get("/api/jobs/stopped")["status"] == "STOPPED"
    log = cluster.get("/api/jobs/stopped/logs")["logs"]
    assert f"interrupted; go on with: python -m fedsim resume {folder}" in log
    assert "Traceback" not in log
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 2)

    assert f"resuming {folder} after round 2 of 4" in cluster.job(resume, "stopped")
    assert results(folder) == undisturbed


def test_the_runs_of_a_submitted_sweep_are_on_both_nodes_and_are_those_of_one_process(cluster, monkeypatch):
    *_, submit = commands("As a job")
    small = ["rounds=2", "backend=local"]
    cluster.job([*("seed=0,1" if word == "seed=0,1,2" else word for word in submit), *small], "both")
    sweep = cluster.shared / "sweeps" / "both"
    monkeypatch.syspath_prepend(cluster.work)
    for seed in (0, 1):
        alone = cluster.shared / f"alone-{seed}"
        settings = [f"seed={seed}", *small, f"output={alone}"]
        assert main(["run", str(cluster.work / "my.yaml"), *settings]) == 0
        assert results(sweep / f"seed={seed}") == results(alone)
    with (sweep / "results.csv").open(newline="", encoding="utf-8") as lines:
        found = [(row["run"], row["seed"], row["status"], row["accuracy.mean"]) for row in csv.DictReader(lines)]
    assert found == [
        (f"seed={seed}", str(seed), "finished", str(results(cluster.shared / f"alone-{seed}")[0]["accuracy"]["mean"]))
        for seed in (0, 1)
    ]
    assert (sweep / "report" / "index.html").is_file()

    nodes = [actor["node_id"] for actor in cluster.state("actors") if actor["class_name"] == "ImplicitFunc"]  # Tune's
    assert len(nodes) == 2
    assert {*nodes} == {node["node_id"] for node in cluster.state("nodes")}


def test_nobody_without_the_token_submits_anything(cluster):
    url = f"{cluster.env['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=60)
    assert refused.value.code == 401


# What needs no cluster -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["run", "output=runs/one"], "output: runs/one"),
        (["run"], "output: runs/…"),
        (["sweep", "seed=0,1", "--out", "sweeps/one"], "--out: sweeps/one"),
    ],
)
@pytest.mark.parametrize("by_setting", [True, False])
def test_a_relative_path_is_refused_on_a_cluster(command, told, by_setting, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "backend=ray"]
    if by_setting:
        settings.append("backend.address=head:6379")
    else:
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert main([command[0], *settings, *command[1:]]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fedsim: {told} is relative, which on the nodes of the cluster head:6379 are as many folders; give the "
        "absolute path of one that all nodes see"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nodes", [1, 2])
def test_so_it_is_where_the_calling_program_has_joined_one(nodes, tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False}, *[{"Alive": True}] * nodes])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))
    config = tiny_config("backend=ray")
    if nodes == 1:
        assert not output_folder(config).is_absolute()
    else:
        with pytest.raises(OutputError, match=r"runs/… is relative, which on the nodes of the cluster head:6379 are"):
            output_folder(config)


def test_commands_of_ray_in_the_docs_have_no_options_that_ray_has_not():
    from ray.scripts.scripts import cli

    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")).replace("\\\n", "")
    known = {name: own.params for name, own in cli.commands.items()}
    known |= {f"job {name}": own.params for name, own in cli.commands["job"].commands.items()}
    known["symmetric-run"] = known["symmetric-run"] + known["start"]  # which it hands on
    checked = set()
    for name, rest in re.findall(r"\bray ((?:job )?[a-z-]+)((?: [^ \n`#]+)*)", pages):
        if name in known:
            options = {option for parameter in known[name] for option in parameter.opts}
            assert {*re.findall(r"--[a-z-]+", rest.partition(" -- ")[0])} <= options, f"ray {name}"
            checked.add(name)
    assert checked == {"start", "stop", "get-auth-token", "symmetric-run", "job submit", "job stop"}


def test_the_slurm_script_is_one():
    subprocess.run(["bash", "-n"], input=block("SLURM"), text=True, check=True)


def test_the_pods_of_the_kuberay_recipe_see_the_same_folder():
    job = yaml.safe_load(block("KubeRay"))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
        assert mount["name"] == volume["name"]
        for path in (container["env"][0]["value"], *re.findall(r"/\S+", job["spec"]["entrypoint"])):
            assert path.startswith(f"{mount['mountPath']}/")
