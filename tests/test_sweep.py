"""Sweeps: what is to be run, the folder of a sweep, going on with one, its tables."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from ray.exceptions import RayError
from rich.console import Console
from run_folders import results

from fedsim import errors
from fedsim import sweep as sweeping
from fedsim.__main__ import main
from fedsim.config import load
from fedsim.errors import ConfigError
from fedsim.grid import SWEEPS, Uniform, plan, split

GRID = ("algorithm=fedavg,local", "seed=0,1")
NAMES = [f"algorithm={algorithm}-seed={seed}" for algorithm in ("fedavg", "local") for seed in (0, 1)]


def names(*texts: str, path: str | None = None) -> list[str]:
    return [run.name for run in plan(path, texts)[0].runs()]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["sweep", *arguments]) == 2
    return [line.removeprefix("fedsim: ") for line in capsys.readouterr().err.splitlines()]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# What is to be run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1, 2", ["0", "1", "2"]),
        ("", [""]),
        ("1e-3", ["1e-3"]),
        ("[qkv, mlp],[qkv]", ["[qkv, mlp]", "[qkv]"]),
        ("{a: 1, b: [2, 3]},{}", ["{a: 1, b: [2, 3]}", "{}"]),
        ("'a,b',\"c\"", ["a,b", "c"]),
        ("it's,theirs", ["it's", "theirs"]),
        ("['a]', b],c", ["['a]', b]", "c"]),
    ],
)
def test_values_stand_between_commas_outside_of_brackets_and_quotes(text, values):
    assert split(text) == values


@pytest.mark.parametrize("text", ["1,", ",", "1,,2", "[1,2", "1],2", "'a,b"])
def test_empty_and_unclosed_values_are_refused(text):
    with pytest.raises(ValueError, match=r"empty value|not closed"):
        split(text)


def test_runs_are_the_product_of_variants_and_both_grids(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "config: quickstart\n"
        "settings: [rounds=3, local.lr=0.1, backend=local]\n"
        "variants:\n  plain: [algorithm=fedavg]\n  slow: [algorithm=fedavg_ft, local.lr=0.2]\n"
        "grid: {adapter.targets: [[qkv], [qkv, mlp]], cohort: [4, 8]}\n"
    )
    # The file's cohorts are replaced, its learning rates too; the seeds are the command line's own.
    sweep, configs = plan(str(file), ["cohort=5", "seed=0,1", "local.lr=0.3"])
    runs = sweep.runs()
    assert [run.name for run in runs] == [
        f"{variant}-targets={targets}-seed={seed}"
        for variant in ("plain", "slow") for targets in ("qkv", "qkv_mlp") for seed in (0, 1)
    ]  # fmt: skip
    assert runs[3].label == "plain targets=[qkv, mlp]"
    assert runs[3].swept == {"variant": "plain", "adapter.targets": "[qkv, mlp]", "seed": "1"}
    found = configs["slow-targets=qkv_mlp-seed=1"]
    assert (found.algorithm.name, found.adapter.targets, found.seed) == ("fedavg_ft", ("qkv", "mlp"), 1)
    assert {(config.cohort, config.local.lr, config.rounds) for config in configs.values()} == {(5, 0.3, 3)}


def test_samples_are_the_same_for_all_variants_and_more_of_them_are_the_old_ones_and_new_ones():
    texts = ["algorithm=fedavg,local", "local.lr=loguniform(1e-3, 1e-1)", "cohort=randint(2, 5)", "local.momentum=0"]
    few, many = (plan(None, [*texts], samples)[1] for samples in (3, 6))
    drawn = {
        name: [(config.local.lr, config.cohort) for config in few.values() if config.algorithm.name == name]
        for name in ("fedavg", "local")
    }
    assert drawn["fedavg"] == drawn["local"] and len(set(drawn["local"])) == 3
    assert set(few) < set(many) and len(many) == 12
    assert all(1e-3 <= config.local.lr <= 1e-1 and config.cohort in (2, 3, 4) for config in many.values())
    rates = np.log10([config.local.lr for config in plan(None, texts, 200)[1].values()])
    assert (rates < -2.5).any() and (rates > -1.5).any()  # a uniform draw would leave one in sixty below -2.5


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("loguniform(0, 1)", "local.lr: 'loguniform(0, 1)' needs 0 < low < high"),
        ("uniform(2, 1)", "local.lr: 'uniform(2, 1)' needs low < high"),
        ("uniform(1)", "local.lr: 'uniform(1)' needs two numbers, as in uniform(1, 8)"),
        ("uniform(1, inf)", "local.lr: 'uniform(1, inf)' needs finite bounds"),
        ("uniform(nan, 1)", "local.lr: 'uniform(nan, 1)' needs finite bounds"),
        ("loguniform(1, 1e999)", "local.lr: 'loguniform(1, 1e999)' needs finite bounds"),
        ("uniform(-1e308, 1e308)", "local.lr: 'uniform(-1e308, 1e308)' is too wide: high - low is infinite"),
        ("randint(0.2, 0.8)", "local.lr: 'randint(0.2, 0.8)' needs whole numbers from -2^63 to 2^63"),
        ("randint(1, 1.5)", "local.lr: 'randint(1, 1.5)' needs whole numbers from -2^63 to 2^63"),
        ("randint(0, 1e30)", "local.lr: 'randint(0, 1e30)' needs whole numbers from -2^63 to 2^63"),
    ],
)
def test_distributions_that_are_none(text, mistake):
    with pytest.raises(ConfigError) as caught:
        plan(None, [f"local.lr={text}"], 2)
    assert mistake in caught.value.mistakes


def test_the_widest_distributions_are_drawn_from():
    for text in (f"randint({-(2**63)}, {2**63})", "uniform(-8e307, 8e307)", "loguniform(1e-300, 1e300)"):
        distribution = Uniform.read(text)
        drawn = [float(distribution.sample("key", number)) for number in range(20)]
        assert all(distribution.low <= value <= distribution.high for value in drawn) and len(set(drawn)) == 20


def test_a_search_needs_samples_and_samples_a_search():
    with pytest.raises(ConfigError, match="--samples: how many, of what is searched"):
        plan(None, ["local.lr=uniform(0.1, 1)"])
    with pytest.raises(ConfigError, match="--samples: how many, of what is searched"):
        plan(None, ["local.lr=uniform(0.1, 1)"], -1)
    with pytest.raises(ConfigError, match="--samples: nothing is searched"):
        plan(None, ["local.lr=0.1,0.2"], 3)


def test_a_variants_setting_wins_over_those_of_all(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("config: quickstart\nsettings: [local.lr=0.1]\nvariants: {a: [local.lr=0.2], b: }\n")
    assert [config.local.lr for config in plan(str(file), [])[1].values()] == [0.2, 0.1]


def test_a_written_sweep_reads_as_the_same_sweep(tmp_path):
    sweep, _ = plan("pfedseq_parts", ["seed=0,1", "rounds=2"])
    (tmp_path / "sweep.yaml").write_text(sweep.to_yaml())
    assert plan(str(tmp_path / "sweep.yaml"), [])[0] == sweep


def test_a_plain_configuration_and_none_are_swept_too():
    assert names(path="cifar100_vit_tiny") == ["run"]
    assert names("seed=3,4") == ["seed=3", "seed=4"]
    assert plan(None, ["seed=3"])[0].config == "quickstart"


def test_folder_names_are_short_safe_and_apart():
    # Keys whose last parts are the same are written whole.
    assert names("local.lr=0.1,1e-2", "algorithm=pfedseq", "algorithm.lr=0.1,0.2")[0] == "local.lr=0.1-algorithm.lr=0.1"
    assert names("env=images", "env.path=/data/a b.zip,../ä.zip") == ["path=data_a_b.zip", "path=.._.zip"]
    same = names("env=images", "env.path=a/b,a_b,A_B")
    assert len({name.lower() for name in same}) == 3 and all(name.lower().startswith("path=a_b-") for name in same)
    long = names("env=images", f"env.path={'x' * 300},{'x' * 301}")
    assert [len(name) for name in long] == [100, 100] and long[0] != long[1]
    assert long == names("env=images", f"env.path={'x' * 300},{'x' * 301}")


def test_all_mistakes_are_reported_at_once_and_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "config: quickstart\nvaraints: {}\nsettings: [rounds, output=here]\n"
        "variants: {a.b: [], c: [local.lrr=1]}\ngrid: {seed: 3, local.epochs: [1, x]}\n"
    )
    lines = refused(["mine.yaml", "algorithm=fedavg,fedvag", "cohort=4,4", "local.lr=0.1,", "lr"], capsys)
    assert sorted(lines) == sorted(
        [
            "varaints: unknown key, did you mean 'variants'?",
            "settings: 'rounds' is not key=value",
            "'lr' is not key=value",
            "output: every run of a sweep has a folder of its own; --out says where",
            "variants: 'a.b' is not a name of letters, digits, _, + and -",
            "grid.seed: not a list of values",
            "cohort: '4' stands there twice",
            "local.lr: an empty value in '0.1,'",
            "local.lrr: unknown key, did you mean 'lr'?",
            "local.epochs: 'x' is not a whole number",
            "algorithm: unknown algorithm 'fedvag', did you mean 'fedavg'?",
        ]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["pfedseq_lerner"], "config: no file 'pfedseq_lerner', did you mean 'pfedseq_learner'?"),
        (["seed=0,1", "--jobs", "0"], "--jobs: 0 is below 1"),
        (["local.lr=uniform(0.1, 1)", "--samples", "-1"], "--samples: -1 is below 1"),
        (["local.lr=uniform(0.1, 1)", "--samples", "0"], "--samples: 0 is below 1"),
        (["--resume", ".", "--samples", "0"], "--samples: 0 is below 1"),
        (["seed=0,1", "--out", "."], "--out: . exists and is not the folder of a sweep"),
        (["seed=0,1", "--out", "file/sweep"], "--out: file/sweep cannot be written to"),
        (["seed=0,1", "--out", "s3://bucket/sweep"], "--out: a URI; the runs of a sweep need a folder"),
    ],
)
def test_other_mistakes_cost_one_line(capsys, tmp_path, monkeypatch, arguments, start):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    (line,) = refused(arguments, capsys)
    assert line.startswith(start)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_resolve_and_begin_with_their_command(file, monkeypatch):
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert f"python -m fedsim sweep {file.stem}" in first.replace("  ", "\n").splitlines()[0]
    _, configs = plan(file.stem, [])
    assert len(configs) > 1
    assert {config.backend.name for config in configs.values()} == {"local"}
    assert all(config.checkpoint.every < config.rounds for config in configs.values())  # one that is killed goes on


def test_list_names_the_shipped_sweeps(capsys):
    assert main(["list", "configs"]) == 0
    printed = capsys.readouterr().out
    assert all(file.stem in printed for file in SWEEPS.glob("*.yaml"))


# The folder of a sweep -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder in which ``--out out`` was run, two runs at a time."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(["sweep", *TINY, *GRID, "--out", "out", "--jobs", "2"]) == 0
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sweep's folder, ``out`` in the working directory."""
    shutil.copytree(swept / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "out"


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_every_run_has_a_folder_and_a_log(swept):
    found = sorted(path.name for path in (swept / "out").iterdir())
    logs = [f"{name}.log" for name in NAMES]
    assert found == sorted([*NAMES, *logs, "report", "results.csv", "sweep.yaml", "table.csv"])
    assert "fedavg" in (swept / "out" / "report" / "table.csv").read_text()
    assert all("round 2/2" in (swept / "out" / log).read_text() for log in logs)


def test_results_are_those_of_the_summaries(swept):
    found = rows(swept / "out" / "results.csv")
    assert [row["run"] for row in found] == NAMES
    for row in found:
        summary = summary_of(swept / "out" / row["run"])
        assert (row["algorithm"], int(row["seed"])) == (summary["algorithm"], summary["seed"])
        assert row["status"] == "finished"
        assert float(row["accuracy.mean"]) == summary["accuracy"]["mean"]
        assert int(row["bytes.up"]) == summary["bytes"]["up"]
        assert float(row["seconds.total"]) == summary["seconds"]["total"]
        assert int(row["failures.clients_quarantined"]) == 0


def test_the_table_has_means_and_deviations_over_seeds(swept):
    found = rows(swept / "out" / "table.csv")
    assert [(row["runs"], row["algorithm"], row["n"]) for row in found] == [
        ("algorithm=fedavg", "fedavg", "2"),
        ("algorithm=local", "local", "2"),
    ]
    assert "seed" not in found[0]
    for row, pair in zip(found, (NAMES[:2], NAMES[2:]), strict=True):
        first, second = (summary_of(swept / "out" / name) for name in pair)
        for section, key in (("accuracy", "mean"), ("accuracy", "p10"), ("bytes", "down"), ("seconds", "total")):
            values = (first[section][key], second[section][key])
            assert float(row[f"{section}.{key}"]) == pytest.approx(sum(values) / 2)
            # Of two values: their distance over the square root of two.
            assert float(row[f"{section}.{key}.std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert found[1]["accuracy.global"] == ""  # of local, nothing is averaged


def test_a_finished_sweep_is_only_tabled_again_and_the_best_is_marked(copied, capsys, monkeypatch):
    monkeypatch.setattr(sweeping, "_on_tune", lambda *_: pytest.fail("a finished run was started again"))
    assert main(["sweep", *TINY, *GRID, "--out", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "4 runs, 4 of them finished before; as many at a time as fit, in out"
    means = {row["runs"]: float(row["accuracy.mean"]) for row in rows(copied / "table.csv")}
    (marked,) = [line for line in printed if " * " in line and "algorithm=" in line]
    best = max(means, key=lambda label: means[label])
    pair = [summary_of(copied / name)["accuracy"]["mean"] for name in NAMES if name.startswith(best)]
    assert marked.split()[:6] == [best, "2", f"{means[best]:.3f}", "±", f"{statistics.stdev(pair):.3f}", "*"]


def test_going_on_runs_what_is_missing_resumes_what_is_unfinished_and_names_what_failed(copied, capsys):
    missing, unfinished, done, broken = NAMES
    before = {name: summary_of(copied / name) for name in NAMES}
    shutil.rmtree(copied / missing)
    (copied / unfinished / "summary.json").unlink()
    shutil.rmtree(copied / unfinished / "checkpoints" / "round-00002")
    (copied / broken / "summary.json").unlink()
    for manifest in (copied / broken / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("damaged")

    assert main(["sweep", "--resume", "out", "--jobs", "2"]) == 1

    log = (copied / f"{missing}.log").read_text()
    assert log.count("round 2/2") == 2 and "resuming" not in log
    assert "algorithm=fedavg-seed=1 after round 1 of 2" in (copied / f"{unfinished}.log").read_text()
    for name in (missing, unfinished, done):
        assert summary_of(copied / name)["accuracy"] == before[name]["accuracy"]
    assert summary_of(copied / done) == before[done]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "4 runs, 1 of them finished before; 2 at a time, in out"
    assert sorted(line.partition("  ")[0] for line in printed if "/4  " in line) == ["2/4", "3/4", "4/4"]
    accuracy = before[missing]["accuracy"]["mean"]
    assert any(f"/4  {missing}  accuracy {accuracy:.3f}  " in line for line in printed)
    assert any(line.endswith(f"/4  {broken}  failed") for line in printed)
    where = copied.absolute() / broken
    assert f"failed: {broken} ({where}: no valid checkpoint is left)" in printed
    files = "results.csv, table.csv and the page report/index.html in out"
    assert printed[-1] == f"{files}; try again with: python -m fedsim sweep --resume out --jobs 2"
    assert [row["status"] for row in rows(copied / "results.csv")] == ["finished"] * 3 + ["failed"]
    assert [row["n"] for row in rows(copied / "table.csv")] == ["2", "1"]


def test_another_sweep_in_the_same_folder_is_refused(copied, capsys):
    (line,) = refused([*TINY, "algorithm=fedavg,local", "seed=0,2", "--out", "out"], capsys)
    assert line.startswith("--out: out holds another sweep (python -m fedsim sweep ")
    (line,) = refused([*TINY, *GRID, "rounds=3", "--out", "out"], capsys)
    assert "another sweep" in line


def test_runs_of_a_configuration_that_has_changed_are_refused(copied, capsys):
    file = copied / NAMES[0] / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 0.2"))
    (line,) = refused([*TINY, *GRID, "--out", "out"], capsys)
    assert line == f"--out: out/{NAMES[0]} was begun with local.lr=0.2, and now it is 0.1; choose another folder"


def test_a_runs_own_configuration_runs_again_although_its_path_has_an_equals_sign(copied, capsys):
    assert main(["run", f"out/{NAMES[2]}/config.yaml", "--dry-run"]) == 0
    assert "name: local" in capsys.readouterr().out


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """For sweeps whose runs are none."""
    monkeypatch.setattr(sweeping, "_cluster", lambda *_: nullcontext())


def test_an_interrupt_ends_the_runs_and_says_how_to_go_on(tmp_path, capsys, monkeypatch, no_cluster):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "_on_tune", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *TINY, "seed=0,1,2", "--out", "out", "--jobs", "3"]) == 130
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "interrupted; go on with: python -m fedsim sweep --resume out --jobs 3"


def test_a_folder_is_in_use_by_one_sweep_at_a_time(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sweeping._alone(Path("out")):
        assert refused([*TINY, "--out", "out"], capsys) == ["--out: out is in use by another sweep"]
    with sweeping._alone(Path("out")):
        pass


def test_stopping_early_by_the_test_split_is_refused(tmp_path, capsys):
    (line,) = refused([*TINY, *GRID, "--early-stop", "--out", str(tmp_path / "out")], capsys)
    assert line == "--early-stop: would choose by the test split; set eval.validation=0.2"
    assert not (tmp_path / "out").exists()


def test_resume_takes_the_folder_and_nothing_else(tmp_path, capsys):
    (line,) = refused(["--resume", str(tmp_path)], capsys)
    assert line == f"--resume: {tmp_path} is not the folder of a sweep (no sweep.yaml)"
    (line,) = refused(["seed=0,1", "--resume", str(tmp_path)], capsys)
    assert line == "--resume: the folder says what to run; leave settings, --out and --samples out"


class Trial:
    def __init__(self, name: str) -> None:
        self.config, self.status, self.error_file = {"run": name}, "RUNNING", None


def test_a_run_that_was_stopped_early_is_told_of_and_not_begun_again(tmp_path, capsys, monkeypatch, no_cluster):
    monkeypatch.chdir(tmp_path)

    def stops_the_first(configs: Any, out: Path, board: sweeping.Board, *_: Any) -> None:
        assert list(configs) == ["seed=0", "seed=1"]
        (out / "seed=0").mkdir()
        board.on_trial_result(1, [], Trial("seed=0"), {"round": 1, "accuracy": 0.25})
        board.on_trial_complete(1, [], Trial("seed=0"))
        board.on_trial_error(1, [], Trial("seed=1"))

    monkeypatch.setattr(sweeping, "_on_tune", stops_the_first)
    command = ["sweep", *TINY, "seed=0,1", "eval.validation=0.2", "--early-stop", "--out", "out"]
    assert main(command) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:3] == ["1/2  seed=0  accuracy 0.250  stopped after round 1", "2/2  seed=1  failed"]
    assert "failed: seed=1 (its process died; see its log)" in printed

    monkeypatch.setattr(sweeping, "_on_tune", lambda configs, *_: seen.extend(configs))
    seen: list[str] = []
    main(command)
    assert seen == ["seed=1"]


def test_a_person_at_a_terminal_sees_the_runs_that_go_on(tmp_path):
    screen, trial = io.StringIO(), Trial("seed=1")
    board = sweeping.Board(plan(None, ["seed=0,1"])[0].runs(), tmp_path, Console(file=screen, force_terminal=True))
    board.on_trial_result(1, [Trial("seed=0"), trial], trial, {"round": 3, "accuracy": 0.25})
    board.close()
    assert re.search(r"seed=1 +3 +0\.250", screen.getvalue())
    assert "seed=0" not in screen.getvalue()  # it has told nothing yet


def test_a_run_reserves_a_place_for_each_of_its_simulators(monkeypatch):
    def bundles(*settings: str) -> list[dict[str, float]]:
        return sweeping._resources(load(None, [*TINY, "backend.threads=3", *settings])).bundles

    on_ray = ("backend=ray", "backend.simulators=2")
    monkeypatch.setattr(sweeping, "gpu_fraction", lambda backend: 0.0)
    assert bundles(*on_ray) == [{"CPU": 3}, {"CPU": 3}]
    assert bundles() == [{"CPU": 3}]
    monkeypatch.setattr(sweeping, "gpu_fraction", lambda backend: 0.25)
    assert bundles(*on_ray) == [{"GPU": 0.25}, {"GPU": 0.25}]


def test_a_run_that_would_wait_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(sweeping, "gpu_fraction", lambda backend: 0.5 * (backend.per_gpu == 2))
    configs = {
        name: load(None, [*TINY, "backend=ray", "backend.threads=2", f"backend.simulators={n}", f"backend.per_gpu={g}"])
        for name, n, g in (("fits", 2, 1), ("cpu", 3, 1), ("again", 3, 1), ("gpu", 4, 2))
    }
    sweeping._refuse_too_large({"fits": configs["fits"]}, {"CPU": 4.0})
    with pytest.raises(ConfigError) as caught:
        sweeping._refuse_too_large(configs, {"CPU": 4.0, "GPU": 1.0})
    advice = "; choose fewer backend.simulators or backend.threads"
    assert caught.value.mistakes == [
        f"backend: a run of the sweep takes 6 CPU, and the cluster has 4{advice}",
        f"backend: a run of the sweep takes 2 GPU, and the cluster has 1{advice}",
    ]


def test_a_sweep_that_is_refused_leaves_its_folder_to_the_corrected_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sweeping, "connect", lambda *_: False)
        patched.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
        (line,) = refused([*TINY, "seed=0,1", "backend.threads=3", "--out", "out"], capsys)
    assert line.startswith("backend: a run of the sweep takes 3 CPU, and the cluster has 2; ")
    assert not any(Path("out").iterdir())

    monkeypatch.setattr(sweeping, "_cluster", lambda *_: nullcontext())
    monkeypatch.setattr(sweeping, "_on_tune", lambda configs, *_: begun.extend(configs))
    begun: list[str] = []
    assert main(["sweep", *TINY, "seed=0,1", "backend.threads=2", "--out", "out"]) == 0
    assert begun == ["seed=0", "seed=1"] and "backend.threads=2" in Path("out/sweep.yaml").read_text()


def test_what_a_person_reads_of_runs_that_are_tried_again(tmp_path, capsys):
    board = sweeping.Board(plan(None, ["seed=0,1,2"])[0].runs(), tmp_path, Console(width=160))
    lost, died, both = map(Trial, ("seed=0", "seed=1", "seed=2"))
    told = {"error": "round 3: no simulators", "round": 0, "accuracy": 0.0}
    for trial in (lost, both):
        board.on_trial_result(1, [], trial, told)
        board.on_trial_recover(1, [], trial)
    board.on_trial_recover(1, [], died)
    board.on_trial_result(1, [], lost, told)
    for trial in (lost, died, both):  # the last one's process dies before it has told anything
        board.on_trial_error(1, [], trial)
    assert capsys.readouterr().out.splitlines() == [
        "seed=0: failed, and is tried again (round 3: no simulators)",
        "seed=2: failed, and is tried again (round 3: no simulators)",
        "seed=1: its process died, see its log; another one goes on in its place",
        *(f"{at}/3  seed={at - 1}  failed" for at in (1, 2, 3)),
    ]
    assert list(board.failed.values()) == [
        "failed: seed=0 (round 3: no simulators)",
        "failed: seed=1 (its process died; see its log)",
        "failed: seed=2 (its process died; see its log)",
    ]
    death = "fedsim: the process of this run died\n"
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs == {"seed=1": 2 * death, "seed=2": death}


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (errors.BlockFailedError(1, [3], 3, "killed"), True),
        (errors.CentralLostError(1, "killed"), True),
        (errors.DeviceMemoryError("1 clients in a block: out of memory"), True),
        (errors.NotStartedError(1, "simulator", 600.0, "run"), True),
        (errors.FedsimError("central died while it started"), True),
        (errors.OutputError("run: cannot be written"), True),
        (errors.RunError("run: cannot be written"), True),
        (OSError(28, "No space left on device"), True),
        (RayError("the cluster is gone"), True),
        (errors.CheckpointError("run: no valid checkpoint is left"), False),
        (errors.ClientError("train", 1, [3], "ValueError"), False),
        (errors.OwnCodeError("env=mine: build", "ValueError"), False),
        (ConfigError(["local.lr: 'x' is not a number"]), False),
        (errors.DataError("no images"), False),
        (errors.WeightsError("other shapes"), False),
        (ValueError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_retry_may_cure_is_left_to_tune(tmp_path, monkeypatch, error, again):
    def fails(*_: Any) -> None:
        raise error

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(sweeping, "run", fails)
    monkeypatch.setattr("ray.tune.report", told.append)
    with pytest.raises(type(error)) if again else nullcontext():
        sweeping._trial({"run": "seed=0"}, {"seed=0": load(None, TINY)}, tmp_path)
    line = str(error).partition("\n")[0] or "ValueError"
    assert told == [{"error": line, "round": 0, "accuracy": 0.0}]
    assert line in (tmp_path / "seed=0.log").read_text()


@pytest.mark.parametrize(
    ("settings", "curves"),
    [
        (["algorithm=fedavg,local", "cohort=2,4,8", "backend.block_size=4,8", "seed=0,1,2"], {"cohort": "cohort"}),
        (["local.lr=0.1,0.2,0.3", "cohort=2,4,0.5"], {"local.lr": "lr", "cohort": "cohort"}),
        (
            ["algorithm=pfedseq", "local.lr=0.1,0.2,0.3", "algorithm.lr=0.1,0.2,0.3"],
            {"local.lr": "local.lr", "algorithm.lr": "algorithm.lr"},
        ),
    ],
)
def test_a_picture_for_each_key_of_three_numbers(settings, curves):
    sweep, _ = plan(None, settings)
    assert sweeping._curves(sweep, [run.swept for run in sweep.runs()]) == curves


# Runs in processes of their own --------------------------------------------------------------------------------------

KILLED = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

from fedsim.algorithms.fedavg import FedAvg


class Killed(FedAvg):
    '''FedAvg whose process is killed in round 2, the first so many times; a file remembers each.'''

    @dataclass(frozen=True)
    class Config:
        folder: str = ""
        deaths: int = 0

    def aggregate(self, server, cohort, update, rows):
        died = len(list(Path(self.config.folder).glob(f"of-{self.config.deaths}-*")))
        if cohort.round == 1 and died < self.config.deaths:
            Path(self.config.folder, f"of-{self.config.deaths}-{died + 1}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().aggregate(server, cohort, update, rows)
"""


def test_a_run_that_is_killed_goes_on_from_its_checkpoint_and_one_that_always_is_does_not_stop_the_others(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "killed.py").write_text(KILLED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["algorithm=killed:Killed", f"algorithm.folder={tmp_path}", "algorithm.deaths=0,1,9"]
    settings = [*TINY, "rounds=3", "backend.dashboard=false", *own]
    assert main(["sweep", *settings, "--out", "out", "--jobs", "2"]) == 1

    assert sorted(path.name for path in tmp_path.glob("of-*")) == ["of-1-1", *(f"of-9-{death}" for death in (1, 2, 3))]
    assert results(tmp_path / "out" / "deaths=1") == results(tmp_path / "out" / "deaths=0")
    for name, died, resumed in (("deaths=0", 0, 0), ("deaths=1", 1, 1), ("deaths=9", 3, 2)):
        log = (tmp_path / "out" / f"{name}.log").read_text()
        assert log.count("fedsim: the process of this run died\nThe actor died unexpectedly") == died
        assert log.count(f"{name} after round 1 of 3") == log.count("resuming") == resumed

    assert [row["status"] for row in rows(tmp_path / "out" / "results.csv")] == ["finished"] * 2 + ["failed"]
    assert [row["runs"] for row in rows(tmp_path / "out" / "table.csv")] == ["deaths=0", "deaths=1"]
    printed = capsys.readouterr().out.splitlines()
    died = "its process died, see its log; another one goes on in its place"
    assert [printed.count(f"deaths={deaths}: {died}") for deaths in (0, 1, 9)] == [0, 1, 2]
    assert sum(line.endswith("/3  deaths=9  failed") for line in printed) == 1
    assert "failed: deaths=9 (its process died; see its log)" in printed
    assert printed[-1].endswith("; try again with: python -m fedsim sweep --resume out --jobs 2")


LOST = """
from dataclasses import dataclass
from pathlib import Path

from fedsim.algorithms.fedavg import FedAvg
from fedsim.errors import NotStartedError


class Lost(FedAvg):
    '''FedAvg that loses its simulators in round 2, the first so many times; below 0: it fails. Files remember it.'''

    @dataclass(frozen=True)
    class Config:
        folder: str = ""
        losses: int = 0

    def aggregate(self, server, cohort, update, rows):
        losses = self.config.losses
        lost = len(list(Path(self.config.folder).glob(f"of{losses}-*")))
        if cohort.round == 1 and lost < abs(losses):
            Path(self.config.folder, f"of{losses}-{lost + 1}").touch()
            raise NotStartedError(1, "simulator", 600.0, "here") if losses > 0 else ValueError("mine")
        return super().aggregate(server, cohort, update, rows)
"""


def test_a_run_that_loses_its_simulators_is_tried_again_from_its_checkpoint_and_one_with_an_error_of_its_own_is_not(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "lost.py").write_text(LOST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["algorithm=lost:Lost", f"algorithm.folder={tmp_path}", "algorithm.losses=0,1,9,-9"]
    settings = [*TINY, "rounds=3", "backend.dashboard=false", *own]
    assert main(["sweep", *settings, "--out", "out", "--jobs", "2"]) == 1

    assert sorted(path.name for path in tmp_path.glob("of*")) == ["of-9-1", "of1-1", "of9-1", "of9-2", "of9-3"]
    assert results(tmp_path / "out" / "losses=1") == results(tmp_path / "out" / "losses=0")
    for name, resumed in (("losses=0", 0), ("losses=1", 1), ("losses=9", 2), ("losses=-9", 0)):
        log = (tmp_path / "out" / f"{name}.log").read_text()
        assert log.count(f"{name} after round 1 of 3") == log.count("resuming") == resumed
        assert "process of this run died" not in log
    printed = capsys.readouterr().out.splitlines()
    lost = (
        "round 2: no simulator could be started for 600 s; the last checkpoint is whole; once the cluster has room: "
        "python -m fedsim resume here"
    )
    tried = [printed.count(f"losses={losses}: failed, and is tried again ({lost})") for losses in (0, 1, 9, -9)]
    assert tried == [0, 1, 2, 0]
    assert f"failed: losses=9 ({lost})" in printed
    assert any(line.startswith("failed: losses=-9 (aggregate failed in round 2, clients [") for line in printed)
    status = [row["status"] for row in rows(tmp_path / "out" / "results.csv")]
    assert status == ["finished", "finished", "failed", "failed"]


def test_a_sweep_of_fewer_rounds_than_an_evaluation_takes_runs_to_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, configs = plan(None, [*TINY, "eval.every=5", "rounds=2", "eval.validation=0.2", "seed=0,1"])
    assert sweeping.run_sweep(sweep, configs, tmp_path / "out", Console(quiet=True), "again", early_stop=True)
    assert [row["status"] for row in rows(tmp_path / "out" / "results.csv")] == ["finished"] * 2


RIGHT = """
import os
from dataclasses import dataclass
from pathlib import Path

import ray
from torch.nn.functional import one_hot

from fedsim.algorithms.fedavg import FedAvg


class Right(FedAvg):
    '''FedAvg that predicts what is right, or what is not; files say which process of which group trained clients.'''

    @dataclass(frozen=True)
    class Config:
        folder: str = ""
        right: bool = True

    def local_update(self, payload, rows, ctx):
        group = ray.util.get_current_placement_group().id.hex()
        Path(self.config.folder, f"{self.config.right}-{group}-{os.getpid()}").touch()
        return super().local_update(payload, rows, ctx)

    def personalise(self, payload, rows, ctx):
        return lambda batch: one_hot((batch.labels + (not self.config.right)) % 6, 6).float()
"""


def test_each_run_has_simulators_of_its_own_and_one_that_falls_behind_is_stopped(tmp_path, capsys, monkeypatch):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "trained").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["algorithm=right:Right", f"algorithm.folder={tmp_path / 'trained'}", "algorithm.right=true,false"]
    on_ray = ["backend=ray", "backend.simulators=1", "backend.dashboard=false", "backend.block_size=2"]
    settings = [*TINY, *on_ray, "eval.validation=0.2", "rounds=9", *own]
    assert main(["sweep", *settings, "--early-stop", "--jobs", "1", "--out", "out"]) == 0

    finished, stopped = tmp_path / "out" / "right=true", tmp_path / "out" / "right=false"
    assert summary_of(finished)["accuracy"]["mean"] == 1.0
    assert (stopped / sweeping.STOPPED).read_text() == "1\n"
    assert not (stopped / "summary.json").exists()
    trained = [file.name.split("-") for file in (tmp_path / "trained").iterdir()]
    assert sorted(right for right, _, _ in trained) == ["False", "True"]  # one simulator each
    assert len({group for _, group, _ in trained}) == len({process for _, _, process in trained}) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("1/2  right=true  accuracy 1.000  ")
    assert printed[2] == "2/2  right=false  accuracy 0.000  stopped after round 1"
    assert printed[-1] == "results.csv, table.csv and the page report/index.html in out"
