"""The command line: what it prints, what it leaves behind, its exit codes."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import TINY
from run_folders import results
from safetensors.torch import save_file

from fedsim import simulation
from fedsim.__main__ import main
from fedsim.config import ModelConfig
from fedsim.models.vit import create_backbone
from fedsim.simulator import Simulator


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    return ["run", *TINY, f"output={tmp_path / 'run'}"]


@pytest.fixture
def own_images(tmp_path: Path) -> list[str]:
    """The tiny run on images of one's own: without the settings that only drawn shapes have."""
    kept = [text for text in TINY if text.split("=")[0] not in ("env", "env.classes", "env.px")]
    return ["run", *kept, "env=images", "env.partition=iid", f"output={tmp_path / 'run'}"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[str]:
    """The lines with which a command is refused; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before
    lines = captured.err.splitlines()
    assert all(line.startswith("fedsim: ") for line in lines)
    return [line.removeprefix("fedsim: ") for line in lines]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["algoritm=fedavg"], "algoritm: unknown key, did you mean 'algorithm'?"),
        (["algorithm=fedvag"], "algorithm: unknown algorithm 'fedvag', did you mean 'fedavg'?"),
        (["env=shaps"], "env: unknown env 'shaps', did you mean 'shapes'?"),
        (["local.lrr=1"], "local.lrr: unknown key, did you mean 'lr'?"),
        (["algorithm=pfedseq", "algorithm.gian=1"], "algorithm.gian: unknown key, did you mean 'gain'?"),
        (["rounds=many"], "rounds: 'many' is not a whole number"),
        (["rounds=0"], "rounds: 0 is below 1"),
        (["local.lr=fast"], "local.lr: 'fast' is not a number"),
        (["backend=rey"], "backend.name: unknown choice 'rey', did you mean 'ray'?"),
        (["cohort=9"], "cohort: 9 clients a round, but there are only 8 (env.num_clients, eval.unseen)"),
        (["cohort=2.5"], "cohort: 2.5 is neither a count of clients (1, 2, …) nor a share between 0 and 1"),
        (["adapter.blocks=first:2"], "adapter: blocks 'first:2' is not 'all' or 'last:N'"),
        (["model=test_vitt"], "model.name: timm has no vision transformer 'test_vitt', did you mean 'test_vit'?"),
        (["model.weights=nowhere.safetensors"], "model.weights: no file 'nowhere.safetensors'"),
        (["adapter.blocks=last:7"], "adapter.blocks: 'last:7', but the model has 6 blocks"),
        (["seed"], "config: no file"),
    ],
)
def test_a_mistake_costs_one_line(tiny, capsys, tmp_path, settings, expected):
    arguments = [tiny[0], *settings, *tiny[1:]] if "=" not in settings[0] else [*tiny, *settings]
    (line,) = refused(arguments, capsys, tmp_path)
    assert line.startswith(expected)


def test_more_classes_per_client_than_there_are_costs_one_line(tiny, capsys, tmp_path):
    (line,) = refused([*tiny, "env.classes_per_client=7"], capsys, tmp_path)
    assert "classes_per_client" in line and "7" in line and "6" in line


@pytest.mark.parametrize(("settings", "word"), [(["env.path=missing.zip"], "missing.zip"), ([], "env.path")])
def test_a_missing_archive_costs_one_line(own_images, capsys, tmp_path, settings, word):
    (line,) = refused([*own_images, *settings], capsys, tmp_path)
    assert word in line


def test_all_mistakes_of_a_file_are_reported_together(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm: fedvag\nenv: shapes\nlocal: {lr: fast, epoch: 2}\nrounds: 0\n")
    lines = refused(["run", str(file), "backend=rey"], capsys, tmp_path)
    assert len(lines) == 5
    assert {line.partition(":")[0] for line in lines} == {
        "algorithm", "local.lr", "local.epoch", "rounds", "backend.name",
    }  # fmt: skip


def test_a_file_that_is_no_yaml_costs_one_line(capsys, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("algorithm: [fedavg\n")
    (line,) = refused(["run", str(file)], capsys, tmp_path)
    assert str(file) in line


def test_a_truncated_archive_costs_one_line(own_images, capsys, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            file.writestr(name, b"x" * 1000)
    archive.write_bytes(archive.read_bytes()[:1500])
    (line,) = refused([*own_images, f"env.path={archive}"], capsys, tmp_path)
    assert "images.zip" in line


def test_a_class_folder_without_images_costs_one_line(own_images, capsys, tmp_path):
    (tmp_path / "tree" / "empty").mkdir(parents=True)
    (tmp_path / "tree" / "full").mkdir()
    (tmp_path / "tree" / "full" / "1.png").write_bytes(b"not looked at")
    (line,) = refused([*own_images, f"env.path={tmp_path / 'tree'}"], capsys, tmp_path)
    assert "empty" in line


def test_weights_that_do_not_fit_name_the_tensor_and_both_shapes(tiny, capsys, tmp_path):
    backbone = create_backbone(ModelConfig(name="test_vit", img_size=16, options={"patch_size": 8}))
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    state["norm.weight"] = torch.ones(7)
    save_file(state, tmp_path / "odd.safetensors")
    (line,) = refused([*tiny, f"model.weights={tmp_path / 'odd.safetensors'}"], capsys, tmp_path)
    assert "'norm.weight'" in line and "(7,)" in line and "(64,)" in line


def test_an_output_folder_that_exists_is_left_alone(tiny, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    (line,) = refused(tiny, capsys, tmp_path)
    assert "exists" in line and "resume" not in line
    (tmp_path / "run" / "config.yaml").write_text("of a run")
    (line,) = refused(tiny, capsys, tmp_path)
    assert f"python -m fedsim resume {tmp_path / 'run'}" in line


def test_a_plan_without_room_is_refused_before_anything_starts(tiny, capsys, tmp_path, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=100 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (line,) = refused(tiny, capsys, tmp_path)
    assert line.startswith("memory: the plan needs")


def test_dry_run_prints_configuration_and_plan_and_writes_nothing(tiny, capsys, tmp_path):
    assert main([*tiny, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "name: fedavg" in printed
    assert "clients       8, 4 a round, 6 classes" in printed
    assert "blocks        1 a round, of 4 clients" in printed
    assert not (tmp_path / "run").exists()


def test_settings_may_stand_on_both_sides_of_an_option(tiny, capsys):
    assert main([*tiny, "--dry-run", "seed=7", "backend.block_size=auto"]) == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["run", "--dryrun"], ["list", "seed=1"], ["no-such-command"]])
def test_an_unknown_option_or_command_exits_with_2(arguments):
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2


def test_resume_over_another_backbone_is_refused(tiny, capsys, tmp_path):
    backbone = create_backbone(ModelConfig(name="test_vit", img_size=16, options={"patch_size": 8}))
    weights = tmp_path / "weights.safetensors"
    save_file({name: value.clone() for name, value in backbone.state_dict().items()}, weights)
    assert main([*tiny, f"model.weights={weights}"]) == 0
    save_file({name: value + 1 for name, value in backbone.state_dict().items()}, weights)
    (line,) = refused(["resume", str(tmp_path / "run")], capsys, tmp_path)
    assert "the backbone is not what the run began with (config.yaml, about.backbone.sha256: " in line


def edited(folder: Path, key: str, value: object) -> None:
    """A run's ``config.yaml``, by hand."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    *sections, name = key.split(".")
    (tree[sections[0]] if sections else tree)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds") / "run"
    assert main(["run", *TINY, "algorithm=pfedseq", "local.schedule=cosine", f"output={folder}"]) == 0
    return folder


@pytest.fixture
def done(two_rounds: Path, tmp_path: Path) -> Path:
    """A finished run of two rounds, to be edited."""
    return Path(shutil.copytree(two_rounds, tmp_path / "run"))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("local.lr", 0.2, "local.lr: 0.1 then, 0.2 now"),
        ("local.batch_size", 8, "local.batch_size: 4 then, 8 now"),
        ("cohort", 3, "cohort: 4.0 then, 3.0 now"),
        ("algorithm.learner", "lstm", "algorithm.learner: ssm then, lstm now"),
        ("algorithm", "fedavg", "algorithm.name: pfedseq then, fedavg now"),
        ("backend.threads", 2, "backend.threads: 1 then, 2 now"),
        ("backend.block_size", 0, "backend.block_size: 8 then, 0 now"),
        ("model.options", {"patch_size": 8, "qk_norm": True}, "model.options.qk_norm: None then, True now"),
        ("rounds", 1, "rounds: 1, where 2 are done"),
        ("rounds", 3, "rounds: 2 then, 3 now, on which local.schedule=cosine depends"),
    ],
)
def test_resume_with_other_settings_names_the_first(done, capsys, tmp_path, key, value, told):
    edited(done, key, value)
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    line = f"{done}: the settings are not what the run began with (config.yaml, {told})"
    assert refused(["resume", str(done)], capsys, tmp_path) == [line]
    assert refused(["export", str(done), "--client", "0"], capsys, tmp_path) == [line]
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval.every", 2), ("nonfinite", "skip"), ("backend.on_client_error", "quarantine"), ("checkpoint.keep", 1),
        ("tracking.project", "other"),
    ],
)  # fmt: skip
def test_resume_with_settings_on_which_no_result_depends(done, key, value):
    edited(done, key, value)
    assert main(["resume", str(done)]) == 0


def test_a_run_may_have_more_rounds_but_no_fewer_than_are_done(tiny, capsys, tmp_path):
    folder = tmp_path / "run"
    assert main(tiny) == 0
    edited(folder, "rounds", 4)
    assert main(["resume", str(folder)]) == 0
    assert main([*tiny, "rounds=4", f"output={tmp_path / 'undisturbed'}"]) == 0
    assert results(folder) == results(tmp_path / "undisturbed")
    for rounds in (2, 3):  # of which checkpoints know that there were four
        edited(folder, "rounds", rounds)
        (line,) = refused(["resume", str(folder)], capsys, tmp_path)
        assert line.endswith(f"(config.yaml, rounds: {rounds}, where 4 are done)")


def test_a_checkpoint_of_a_version_that_kept_no_settings_is_accepted(tiny, capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(simulation, "settings_of", lambda config: {})
        assert main(tiny) == 0
    edited(tmp_path / "run", "local.lr", 0.2)
    assert main(["resume", str(tmp_path / "run")]) == 0
    edited(tmp_path / "run", "rounds", 1)
    (line,) = refused(["resume", str(tmp_path / "run")], capsys, tmp_path)
    assert line.endswith("(config.yaml, rounds: 1, where 2 are done)")


@pytest.mark.parametrize(("left", "lines"), [(None, 0), (b"", 0), (b'{"round": 1}\n', 1), (b"{}\n{", 1)])
def test_resume_over_a_gap_in_the_metrics_is_refused(done, capsys, tmp_path, left, lines):
    file = done / "metrics.jsonl"
    whole = file.read_bytes()
    if left is None:
        file.unlink()
    else:
        file.write_bytes(left)
    (line,) = refused(["resume", str(done)], capsys, tmp_path)
    assert line == (
        f"{done}: metrics.jsonl has {lines} whole lines of 2 rounds; to go on from an older checkpoint, delete "
        "checkpoints/round-00002"
    )
    file.write_bytes(whole.splitlines(keepends=True)[0])
    shutil.rmtree(done / "checkpoints" / "round-00002")
    assert main(["resume", str(done)]) == 0


def test_a_run_that_lives_is_of_nobody_else(tiny, capsys, tmp_path, monkeypatch):
    folder, train, answers = tmp_path / "run", Simulator.train, []

    def tried(self, round, *values):
        if round == 1:
            answers.append(refused(["resume", str(folder)], capsys, tmp_path))
            answers.append(refused([*tiny, f"output={folder}"], capsys, tmp_path))
        return train(self, round, *values)

    with monkeypatch.context() as patched:
        patched.setattr(Simulator, "train", tried)
        assert main(tiny) == 0
    assert main([*tiny, f"output={tmp_path / 'undisturbed'}"]) == 0
    (resuming,), (running,) = answers
    assert resuming == f"{folder}: in use by another process"
    assert running.startswith(f"output: {folder} exists; ")
    assert results(folder) == results(tmp_path / "undisturbed")


def test_of_two_runs_that_begin_in_one_folder_one_goes_on(tiny, capsys, tmp_path, monkeypatch):
    create, answers = simulation._create, []

    def tried(folder, plan):
        if not answers:
            answers.append(refused([*tiny, f"output={folder}"], capsys, tmp_path))
        create(folder, plan)

    monkeypatch.setattr(simulation, "_create", tried)
    assert main(tiny) == 0
    assert answers == [[f"{tmp_path / 'run'}: in use by another process"]]


def test_what_a_run_that_was_killed_before_it_began_leaves_is_no_hindrance(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert main(tiny) == 0


def test_resume_with_other_versions_goes_on_and_tells(tiny, capsys, tmp_path):
    assert main(tiny) == 0
    file, torch = tmp_path / "run" / "config.yaml", f"torch: {version('torch')}"
    text = file.read_text()
    assert torch in text
    file.write_text(text.replace(torch, "torch: 0.0.1"))
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert f"(about.versions.torch: 0.0.1 then, {version('torch')} now)" in capsys.readouterr().out


def test_a_run_leaves_the_folder_of_the_design(tiny, capsys, tmp_path):
    assert main(tiny) == 0
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "clients.csv", "summary.json", "tensorboard", "checkpoints", "partition.npz",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert {"mean", "weighted", "std", "p10", "min", "sent", "global"} <= summary["accuracy"].keys()
    assert summary["status"] == "finished"
    # FedAvg sends one row of 712 float32 to each of 4 clients in each of 2 rounds, and gets as much back.
    assert summary["bytes"] == {"up": 712 * 4 * 4 * 2, "down": 712 * 4 * 4 * 2}
    assert {"actors_replaced", "blocks_requeued", "clients_quarantined"} <= summary["failures"].keys()
    assert not any(summary["failures"].values())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert records[-1]["accuracy"] == summary["accuracy"]
    assert len((folder / "clients.csv").read_text().splitlines()) == 9
    assert any((folder / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert "round 2/2" in printed and "worst client" in printed


def test_a_run_folders_config_runs_again_to_the_same_numbers(tiny, tmp_path, monkeypatch):
    assert main(tiny) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(tmp_path / "run" / "config.yaml")]) == 0  # into runs/, under a name of its own
    (again,) = (tmp_path / "runs").iterdir()
    again.rename(tmp_path / "again")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "again"))
    assert one["accuracy"] == two["accuracy"]


def test_resume_of_no_run_folder_costs_one_line(capsys, tmp_path):
    (line,) = refused(["resume", str(tmp_path)], capsys, tmp_path)
    assert "not a run folder" in line


def test_an_error_of_the_users_algorithm_exits_with_1_and_shows_where(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text(
        "from fedsim.algorithms.fedavg import FedAvg\n"
        "class Mistaken(FedAvg):\n"
        "    def aggregate(self, server, cohort, update, rows):\n"
        "        return {'w': server['w'] / 0 * update['nothing']}, rows\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*tiny, "algorithm=mistaken:Mistaken"]) == 1
    printed = capsys.readouterr()
    assert "aggregate failed in round 1" in printed.err
    assert "KeyError: 'nothing'" in printed.err
    assert "resume" in printed.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_an_error_of_the_users_env_exits_with_1_and_shows_where(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "mistaken_env.py").write_text(
        "from fedsim.envs.shapes import Shapes\n"
        "class Mistaken(Shapes):\n"
        "    def build(self, seed, px, cache):\n"
        "        return {}['nothing']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*tiny, "env=mistaken_env:Mistaken"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("fedsim: env=mistaken_env:Mistaken: build failed\nTraceback (most recent call last):\n")
    assert 'mistaken_env.py", line 4, in build' in told and told.endswith("KeyError: 'nothing'\n")
    assert not (tmp_path / "run").exists()


def test_what_names_a_file_need_not_be_text(tiny, tmp_path, monkeypatch):
    name = "run[/b]\udcff"
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main([*tiny, f"output={tmp_path / name}"]) == 0
    assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "report")]) == 0
    screen.flush()
    assert "run[/b]\\udcff" in screen.buffer.getvalue().decode()
    assert "\nb]\\udcff,fedavg," in (tmp_path / "report" / "comparison.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["algorithms", "envs", "configs"])
def test_list_names_all_there_is(capsys, what):
    assert main(["list", what]) == 0
    printed = capsys.readouterr().out
    names = {
        "algorithms": ["pfedseq", "fedavg", "fedavg_ft", "local"],
        "envs": ["shapes", "images", "cifar100", "cifar10"],
        "configs": ["quickstart", "cifar100_vit_tiny", "images"],
    }
    assert all(name in printed for name in names[what])
