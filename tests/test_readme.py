"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import TINY

from fedsim.__main__ import main
from fedsim.config import load
from fedsim.plan import prepare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_an_algorithm_runs_and_does_what_it_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n# my_algorithms\.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_algorithms.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from fedsim.backend import LocalBackend

    def loss(*settings: str) -> float:
        plan = prepare(load(None, [*TINY, *settings]))
        backend = LocalBackend(plan.workload, plan.params)
        facts = backend.train(0, plan.blocks(plan.sample_cohort(0)))
        backend.close()
        return float(sum(fact["loss"].sum() for fact in facts))

    proximal = "algorithm=my_algorithms:FedProx"
    assert loss(proximal, "algorithm.mu=0") == loss("algorithm=fedavg")
    assert loss(proximal, "algorithm.mu=5") > loss("algorithm=fedavg")
    assert main(["run", *TINY, proximal, "algorithm.mu=0.1", f"output={tmp_path / 'run'}"]) == 0


def test_the_notebook_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(import fedsim\n.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny = [setting for setting in TINY if not setting.startswith("algorithm")]
    names: dict[str, Any] = {}
    exec(code.replace('"backend=local"]', f'"backend=local", *{tiny!r}]'), names)  # the same, smaller
    result = names["result"]
    assert result.summary["algorithm"] == "ditto" and result.summary["seed"] == 1
    assert (tmp_path / result.folder / "summary.json").is_file()
    assert set(result.adapters(7)) >= {"head.weight", "head.bias"}


def test_the_mistakes_shown_are_those_that_are_printed(capsys):
    command, *expected = re.search(r"\$ python -m fedsim (run algorithm=fedvag.*?)```", README, re.DOTALL)[
        1
    ].splitlines()
    assert main(command.split()) == 2
    assert capsys.readouterr().err.splitlines() == expected


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_runs_on_ray_in_a_sweep_from_a_file_of_its_own(tmp_path):
    """In a process of its own, with nothing but the working folder to find it by; its workers find it, too."""
    (code,) = re.findall(r"```python\n# my_algorithms\.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "mine.py").write_text(code)
    (tmp_path / "config.yaml").write_text(
        "algorithm: {name: 'my_pkg.mine:FedProx', mu: 0.1}\nbackend: {name: ray, simulators: 1, dashboard: false}\n"
    )
    tiny = [setting for setting in TINY if not setting.startswith(("algorithm", "backend=", "rounds"))]
    command = ["sweep", "config.yaml", *tiny, "rounds=1", "algorithm.mu=0,0.5", "--out", "swept", "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {}
    for mu in ("0", "0.5"):
        folder = tmp_path / "swept" / f"mu={mu}"
        assert json.loads((folder / "summary.json").read_text())["algorithm"] == "my_pkg.mine:FedProx"
        losses[mu] = json.loads((folder / "metrics.jsonl").read_text())["loss"]
    assert losses["0"] < losses["0.5"]
