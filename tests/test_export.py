"""What a run trained, rebuilt from timm and the exported file alone."""

from __future__ import annotations

import csv
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim.__main__ import main
from fedsim.config import load
from fedsim.export import state_dict
from fedsim.layout import Layout
from fedsim.simulation import Result, restored, run

DOCS = Path(__file__).parent.parent / "docs" / "export.md"
CLIENT = 3
# On top of the tiny run. feddpa has two adapters, fedrod two heads; fedavg_ft trains at evaluation.
RUNS = {
    "sequential": ("algorithm=fedavg_ft", "adapter.blocks=last:2", "adapter.scale=0.5"),
    "parallel": ("algorithm=feddpa", "adapter=parallel", "adapter.blocks=all", "adapter.scale=2"),
    "lora": ("algorithm=feddpa", "adapter=lora", "adapter.blocks=last:2", "adapter.scale=0.5"),
    "none": ("algorithm=fedrod", "adapter=none"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            run(load(None, [*TINY, "rounds=1", *RUNS[name], f"output={made[name]}"]))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def load_client(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], nn.Module]:
    """The loader as it stands in the documentation."""
    (code,) = re.findall(r"```python\n# load_client\.py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path_factory.mktemp("docs") / "load_client.py"
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file))["load_client"]


def exported(folder: Path, *more: str) -> Path:
    assert main(["export", str(folder), "--client", str(CLIENT), *more]) == 0
    return folder / "export" / f"client-{CLIENT}.safetensors"


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def own_images(folder: Path, about: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The client's test images as the file says that they must be normalised, and their labels."""
    with restored(folder, Console(quiet=True)) as (plan, _, _):
        data = plan.workload.data
        images, labels = data.images[data.test[CLIENT]], data.labels[data.test[CLIENT]]
    mean, std = (torch.tensor(json.loads(about[key])).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images.copy()).float() / 255 - mean) / std, torch.from_numpy(labels)


def logits_of_fedsim(folder: Path) -> Tensor:
    """By the simulator's own evaluation: those that its accuracy is counted from."""
    found: list[Tensor] = []
    with restored(folder, Console(quiet=True)) as (_, backend, rounds):
        score = backend.simulator._score

        def scored(ctx: Any, models: Any) -> Any:
            found.extend(ctx.logits(models["personal"], batch)[0] for batch in ctx.batches(split="test", batch_size=64))
            return score(ctx, models)

        backend.simulator._score = scored  # type: ignore[method-assign]
        backend.evaluate(rounds - 1, [(CLIENT,)])
    return torch.cat(found)


@pytest.mark.parametrize("name", list(RUNS))
def test_timm_and_the_file_give_the_logits_and_the_accuracy_of_the_run(name, folders, load_client):
    folder = folders(name)
    file = exported(folder, "--backbone")
    about = metadata(file)
    images, labels = own_images(folder, about)
    with torch.no_grad():
        logits = load_client(file)(images)
    torch.testing.assert_close(logits, logits_of_fedsim(folder), atol=1e-5, rtol=0)
    with (folder / "clients.csv").open(encoding="utf-8") as lines:
        accuracy = float(list(csv.DictReader(lines))[CLIENT]["accuracy"])
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(accuracy, abs=1e-6)
    assert (about["adapter"], about["client"], about["round"]) == (name, str(CLIENT), "1")
    assert json.loads(about["model"]) == {"model_name": "test_vit", "img_size": 16, "num_classes": 6, "patch_size": 8}
    assert about["weights"] == "random" and len(json.loads(about["classes"])) == 6


def test_without_the_backbone_the_file_holds_what_the_client_trained_and_the_library_gives_the_same(folders):
    folder = folders("sequential")
    state = load_file(exported(folder))
    adapter = {f"{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}
    assert state.keys() == {"head.weight", "head.bias"} | {
        f"blocks.{block}.mlp.adapter.{name}" for block in (4, 5) for name in adapter
    }
    assert state["head.weight"].shape == (6, 64) and state["blocks.5.mlp.adapter.down.weight"].shape == (2, 64)
    again = Result(folder, {}).adapters(CLIENT)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_two_adapters_are_one_of_twice_the_width_scaled_at_its_end():
    layout = Layout.of(
        [
            ("backbone.blocks.0.mlp.adapter.down", (3, 1), "adapter"),
            ("backbone.blocks.0.mlp.adapter.up", (1, 3), "adapter"),
            ("backbone.blocks.0.mlp.adapter.up_bias", (3,), "adapter"),
            ("head.bias", (2,), "head"),
            ("backbone.blocks.0.mlp.adapter.personal.down", (3, 1), "adapter.personal"),
            ("backbone.blocks.0.mlp.adapter.personal.up", (1, 3), "adapter.personal"),
            ("backbone.blocks.0.mlp.adapter.personal.up_bias", (3,), "adapter.personal"),
            ("head.personal.bias", (2,), "head.personal"),
        ]
    )
    found = state_dict(layout, torch.arange(22.0), scale=10.0)
    assert {name: value.tolist() for name, value in found.items()} == {
        "blocks.0.mlp.adapter.down.weight": [[0.0, 1.0, 2.0], [11.0, 12.0, 13.0]],
        "blocks.0.mlp.adapter.up.weight": [[30.0, 140.0], [40.0, 150.0], [50.0, 160.0]],
        "blocks.0.mlp.adapter.up.bias": [230.0, 250.0, 270.0],
        "head.bias": [29.0, 31.0],
    }


def test_the_folder_for_peft_adds_the_same_products(folders):
    """As peft applies them: ``W x + lora_alpha / r * B A x`` at the named modules, and the saved head in place."""
    file = exported(folders("lora"))
    folder = file.with_name(f"client-{CLIENT}-peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["modules_to_save"]) == (
        "LORA",
        4,
        4,
        ["head"],
    )
    state, own = load_file(folder / "adapter_model.safetensors"), load_file(file)
    assert state.keys() == {f"base_model.model.{name}" for name in own}
    assert all(torch.equal(state[f"base_model.model.{name}"], value) for name, value in own.items())
    modules = dict(timm.create_model(**json.loads(metadata(file)["model"])).named_modules())
    expected = [f"blocks.{block}.{name}" for block in (4, 5) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert sorted(config["target_modules"]) == sorted(expected)
    for name in expected:
        product = own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
        assert product.shape == modules[name].weight.shape


def test_peft_itself_reads_it(folders, load_client):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    file = exported(folders("lora"), "--backbone")
    about = metadata(file)
    bare = timm.create_model(**json.loads(about["model"]))
    frozen = {name: value for name, value in load_file(file).items() if "lora_" not in name and "head" not in name}
    bare.load_state_dict(frozen, strict=False)
    model = peft.PeftModel.from_pretrained(bare, str(file.with_name(f"client-{CLIENT}-peft"))).eval()
    images, _ = own_images(folders("lora"), about)
    with torch.no_grad():
        torch.testing.assert_close(model(images), load_client(file)(images), atol=1e-5, rtol=0)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("fedsim: ")


def test_what_cannot_be_exported_costs_one_line(folders, capsys, tmp_path):
    folder = str(folders("none"))
    assert refused([folder, "--client", "8"], capsys) == "--client: 8, but the run has clients 0 to 7"
    assert refused([folder, "--client", "0", "--out", str(tmp_path)], capsys).endswith("is a folder; name a file")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused([folder, "--client", "0", "--out", str(tmp_path / "file" / "x")], capsys)
    assert "not a run folder" in refused([str(tmp_path), "--client", "0"], capsys)
    (tmp_path / "config.yaml").write_text(Path(folder, "config.yaml").read_text())
    assert refused([str(tmp_path), "--client", "0"], capsys).endswith("the run has no checkpoint yet")


def test_an_algorithm_that_predicts_with_more_is_refused(capsys, tmp_path):
    run(load(None, [*TINY, "rounds=1", "algorithm=knnper", f"output={tmp_path / 'run'}"]))
    line = refused([str(tmp_path / "run"), "--client", "0"], capsys)
    assert line == "algorithm: knnper predicts with more than adapters and a head, which is all that can be exported"
    assert not (tmp_path / "run" / "export").exists()
