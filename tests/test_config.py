"""Configurations: picks, overrides, and every mistake in one report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedsim.config import CONFIGS, AdapterConfig, Config, LocalConfig, find, load, resolve, to_tree
from fedsim.errors import ConfigError, OwnCodeError

FILE = """
algorithm:
  name: fedavg_ft
  finetune_epochs: 3
env:
  name: images
  path: photos.zip
  num_clients: 30
  classes_per_client: 5
model: test_vit
adapter: lora
rounds: 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def mistakes(path: Path | str | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.mistakes


# What a file and overrides mean ----------------------------------------------------------------------------------


def test_a_file_and_the_shorthand_of_its_sections(file: Path) -> None:
    config = load(file)
    assert (config.algorithm.name, config.algorithm.settings.finetune_epochs) == ("fedavg_ft", 3)
    assert (config.env.name, config.env.settings.path, config.env.settings.num_clients) == ("images", "photos.zip", 30)
    assert (config.model.name, config.adapter.kind, config.rounds) == ("test_vit", "lora", 7)
    assert (config.seed, config.local.lr, config.backend.name) == (0, 0.05, "ray")  # defaults


def test_overrides_win_over_the_file(file: Path) -> None:
    config = load(file, ["rounds=9", "algorithm.finetune_epochs=4", "local.lr=0.2", "env.path=other"])
    assert (config.rounds, config.algorithm.settings.finetune_epochs) == (9, 4)
    assert (config.local.lr, config.env.settings.path) == (0.2, "other")


def test_without_a_file_it_is_the_quickstart() -> None:
    assert load(None) == load("quickstart") == load(CONFIGS / "quickstart.yaml")


@pytest.mark.parametrize("pick", ["algorithm=fedavg_ft", "algorithm.name=fedavg_ft"])
def test_picking_the_files_own_algorithm_keeps_its_settings(file: Path, pick: str) -> None:
    assert load(file, [pick]).algorithm.settings.finetune_epochs == 3


def test_picking_another_algorithm_drops_the_settings_of_the_files(file: Path) -> None:
    # pfedseq has a finetune_epochs too; what was chosen for fedavg_ft does not pass over to it.
    assert load(file, ["algorithm=pfedseq"]).algorithm.settings.finetune_epochs == 1
    assert load(file, ["algorithm=fedavg"]).algorithm.name == "fedavg"


def test_a_pick_may_come_after_the_settings_it_decides_on(file: Path) -> None:
    config = load(file, ["algorithm.gain=0.5", "algorithm=pfedseq"])
    assert (config.algorithm.name, config.algorithm.settings.gain) == ("pfedseq", 0.5)


def test_picking_another_env_keeps_how_clients_are_split_but_no_path(file: Path) -> None:
    settings = load(file, ["env=cifar10"]).env.settings
    assert (settings.num_clients, settings.classes_per_client, settings.path) == (30, 5, "")


def test_picking_model_adapter_and_backend_keeps_their_other_settings() -> None:
    config = load(None, ["adapter=parallel", "backend=local", "model=vit_tiny_patch16_224"])
    assert (config.adapter.kind, config.adapter.width) == ("parallel", 8)
    assert (config.backend.name, config.backend.simulators) == ("local", 2)
    assert (config.model.name, config.model.img_size) == ("vit_tiny_patch16_224", 32)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-03"])
def test_small_numbers_in_any_spelling(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lr.yaml"
    path.write_text(FILE + f"local:\n  lr: {text}\n")
    assert load(path).local.lr == load(None, [f"local.lr={text}"]).local.lr == 0.001


def test_a_section_left_empty_has_no_settings_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("algorithm: fedavg\nenv: shapes\nmodel:\n  options:\nlocal:\n  # lr: 0.1\neval:\n")
    config = load(path, ["local.lr=0.2"])
    assert (config.local.lr, config.eval.every, config.model.options) == (0.2, 10, {})


@pytest.mark.parametrize("text", ["1:2", "yes", "007", "1e3", "null", "2020-01-01", "[a", "{b}", "a: b", "#c", ""])
def test_texts_are_taken_as_they_stand(text: str) -> None:
    config = load(None, [f"backend.address={text}", f"output={text}"])
    assert config.backend.address == config.output == text and type(config.output) is str


def test_settings_within_settings(file: Path) -> None:
    config = load(file, ["model.options.patch_size=4", "model.options.a.b=[1, x]", "model.options.flag=yes"])
    assert config.model.options == {"patch_size": 4, "a": {"b": [1, "x"]}, "flag": True}
    config = load(file, ["model.options={patch_size: 8, depth: 2}", "model.options.patch_size=4"])
    assert config.model.options == {"patch_size": 4, "depth": 2}
    assert load(file, ["local={lr: 0.1, epochs: 2}", "local.epochs=3"]).local == LocalConfig(lr=0.1, epochs=3)


def test_about_is_ignored(file: Path) -> None:
    expected = load(file)
    file.write_text(FILE + "about:\n  commit: abc\n  memory_mib: {server: 1}\n")
    assert load(file) == expected


def test_environment_variables_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", "/somewhere")
    assert load("cifar100_vit_tiny").model.weights == "/somewhere/vit_tiny_patch16_224.safetensors"


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_shipped_configuration_resolves_and_says_how_to_run_it(name: str) -> None:
    load(name)
    first = find(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#") and "python -m fedsim" in first


def test_to_tree_is_read_back_to_the_same(file: Path, tiny_config: Callable[..., Config]) -> None:
    for config in (load(file), load(None), tiny_config("adapter.targets=[mlp]", "cohort=0.5", "model.mean=0.5")):
        tree = yaml.safe_load(yaml.safe_dump(to_tree(config)))
        assert resolve(tree) == config


# Mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_file_and_of_the_overrides_at_once(file: Path) -> None:
    file.write_text(FILE + "cohrt: 5\nlocal:\n  epochs: 0\n  optimizer: sdg\n")
    assert sorted(mistakes(file, "seed=-1", "noise", "adapter.widht=4", "algorithm.mu=1", "env.num_client=3")) == [
        "'noise' is not key=value",
        "adapter.widht: unknown key, did you mean 'width'?",
        "algorithm.mu: unknown key; choose from finetune_epochs",
        "cohrt: unknown key, did you mean 'cohort'?",
        "env.num_client: unknown key, did you mean 'num_clients'?",
        "local.epochs: 0 is below 1",
        "local.optimizer: unknown choice 'sdg', did you mean 'sgd'?",
        "seed: -1 is below 0",
    ]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("algorithm=fedavgg", "algorithm: unknown algorithm 'fedavgg', did you mean 'fedavg'?"),
        ("env=shape", "env: unknown env 'shape', did you mean 'shapes'?"),
        ("adapter=lore", "adapter.kind: unknown choice 'lore', did you mean 'lora'?"),
        ("backend=loca", "backend.name: unknown choice 'loca', did you mean 'local'?"),
        ("algorithm=3", "algorithm: unknown algorithm '3'; choose from"),
        ("algorithm=:Foo", "algorithm: ':Foo' is not module:Class"),
        ("rounds=true", "rounds: True is not a whole number"),
        ("rounds=2.5", "rounds: 2.5 is not a whole number"),
        ("rounds=", "rounds: '' is not a whole number"),
        ("rounds=[1", "rounds: '[1' is not a value"),
        ("=3", "'=3' is not key=value"),
        ("rounds=2024-13-01", "rounds: '2024-13-01' is not a value"),
        ("rounds.x=3", "rounds.x: 'rounds' is not a section"),
        ("model.name.x=3", "model.name.x: 'name' is not a section"),
        ("local=0", "local: 0 is not a section with keys"),
        ("local=false", "local: False is not a section with keys"),
        ("local=[]", "local: [] is not a section with keys"),
        ("local=", "local: '' is not a section with keys"),
        ("local={lr: x}", "local.lr: 'x' is not a number"),
        ("local.lr=" + "9" * 400, "local.lr: 999"),
        ("seed=" + "9" * 20, "seed: 99999999999999999999 is above 9223372036854775807"),
        ("local.momentum=1.5", "local.momentum: 1.5 is above 1"),
        ("cohort=0", "cohort: 0.0 is neither a count of clients (1, 2, …) nor a share between 0 and 1"),
        ("cohort=2.5", "cohort: 2.5 is neither a count of clients (1, 2, …) nor a share between 0 and 1"),
        ("about=x", "about: unknown key; choose from"),
        ("nonfinite=ignore", "nonfinite: unknown choice 'ignore'; choose from raise, skip"),
        ("model.options={checkpoint_path: x.pth}", "model: options.checkpoint_path: weights are set by model.weights"),
        ("rounds=" + "9" * 20, "rounds: 99999999999999999999 is beyond 2^63"),
    ],
)
def test_one_mistake(override: str, mistake: str) -> None:
    (told,) = mistakes(None, override)
    assert told.startswith(mistake)


@pytest.mark.parametrize("bool_for", ["seed", "env.num_clients", "local.lr", "cohort"])
def test_a_switch_is_no_number(bool_for: str) -> None:
    (told,) = mistakes(None, f"{bool_for}=true")
    assert told.startswith(f"{bool_for}: True is not a ")


def test_no_such_file() -> None:
    assert mistakes("quikstart") == ["config: no file 'quikstart', did you mean 'quickstart'?"]
    (told,) = mistakes("some/where/quickstar.yaml")
    assert told == "config: no file 'some/where/quickstar.yaml', did you mean 'quickstart'?"


@pytest.mark.parametrize(
    "text", ["a: [1", "- 1\n- 2\n", "a: ${oc.env:FEDSIM_NO_SUCH_VARIABLE}\n", "1: 2\n", f"a: {'9' * 5000}"]
)
def test_a_file_that_is_no_configuration_costs_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (told,) = mistakes(path)
    assert told.startswith(f"{path}: ") and "\n" not in told


def test_a_file_without_algorithm_and_env(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert mistakes(path) == ["algorithm: needs a name (algorithm=NAME)", "env: needs a name (env=NAME)"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("def __post_init__(self): {}['nothing']", "env=own_env:Mine: Config failed\nTraceback"),
        ("odd: object = object()", "env: the Config of own_env:Mine holds what no configuration file can (Object of"),
    ],
)
def test_a_users_own_config_that_fails(config: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_env.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.envs.shapes import Shapes\n"
        "class Mine(Shapes):\n"
        "    @dataclass(frozen=True)\n"
        "    class Config(Shapes.Config):\n"
        f"        {config}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_env", raising=False)
    with pytest.raises((ConfigError, OwnCodeError)) as caught:
        load(None, ["env=own_env:Mine"])
    assert str(caught.value).startswith(told)


# Adapter blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "expected"), [("all", 6), ("last:1", 1), ("last:6", 6)])
def test_adapter_blocks(blocks: str, expected: int) -> None:
    assert AdapterConfig(blocks=blocks).count(6) == expected
    assert AdapterConfig(kind="none", blocks=blocks).count(6) == 0


def test_an_adapter_in_more_blocks_than_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(blocks="last:7").count(6)
    assert caught.value.mistakes == ["adapter.blocks: 'last:7', but the model has 6 blocks"]


@pytest.mark.parametrize("blocks", ["first:2", "last:0", "last:", "last:-1", "3", "last:x"])
def test_adapter_blocks_of_another_form(blocks: str) -> None:
    with pytest.raises(ValueError, match="is not 'all' or 'last:N'"):
        AdapterConfig(blocks=blocks)
