"""The cached prefix: the same numbers as without, made once, read by every simulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.config import Config
from fedsim.env import FederatedData
from fedsim.errors import ConfigError
from fedsim.models import prefix
from fedsim.models.vit import VitModel
from fedsim.plan import Plan, prepare
from fedsim.simulation import run

Tiny = Callable[..., Config]
TWO_OF_THREE = ("model.options={patch_size: 8, depth: 3}", "adapter.blocks=last:2")


def made(config: Config) -> FederatedData:
    """The data of a run with the file of tokens that this process makes."""
    return prefix.made_here(prepare(config).workload).data


@pytest.mark.parametrize("kind", ["sequential", "lora"])
def test_what_is_in_the_file_is_what_no_adapter_has_changed(tiny_config: Tiny, kind: str) -> None:
    plan = prepare(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32", f"adapter={kind}"))
    data, config = prefix.made_here(plan.workload).data, plan.workload.config
    model = VitModel(config.model, config.adapter, len(data.classes), plan.workload.frozen)
    backbone = model.module.backbone
    pixels = model.pixels(torch.from_numpy(data.images[5:9].copy()))
    first, second, _ = backbone.blocks
    tokens = first(backbone._pos_embed(backbone.patch_embed(pixels)))
    if kind == "lora":  # it has a part in the second block's attention
        by_hand = tokens[:, None]
    else:
        attended = tokens + second.ls1(second.attn(second.norm1(tokens)))
        by_hand = torch.stack([attended, second.mlp.mlp(second.norm2(attended))], 1)
    assert data.inputs.shape == (len(data.images), 1 if kind == "lora" else 2, 5, 64)
    assert data.inputs.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(data.inputs[5:9].copy()), by_hand, rtol=1e-5, atol=1e-6)


def test_logits_are_those_of_the_whole_model(tiny_config: Tiny) -> None:
    plan = prepare(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32"))
    data, config = prefix.made_here(plan.workload).data, plan.workload.config
    model = VitModel(config.model, config.adapter, len(data.classes), plan.workload.frozen)
    rows = plan.params[None] + 0.1 * torch.randn(2, len(plan.params), generator=torch.Generator().manual_seed(1))
    images, tokens = (torch.from_numpy(array[:6].copy()).unflatten(0, (2, 3)) for array in (data.images, data.inputs))
    torch.testing.assert_close(model.logits(rows, tokens), model.logits(rows, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [("fp32", "fp32", 1e-6), ("fp16", "fp32", 5e-3), ("off", "bf16", 1e-2), ("fp16", "bf16", 1e-2)],
)
def test_a_cached_run_and_one_in_bf16_agree_with_an_uncached_one_in_fp32(
    kind: str, precision: str, tolerance: float, tiny_config: Tiny, tmp_path: Path
) -> None:
    losses, accuracies = [], []
    for cache, used in (("off", "fp32"), (kind, precision)):
        settings = [f"model.cached_prefix={cache}", f"precision={used}", f"output={tmp_path / cache / used}"]
        result = run(tiny_config(*TWO_OF_THREE, *settings, "rounds=4", "env.test_samples_per_client=50"))
        records = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
        losses.append([record["loss"] for record in records])
        accuracies.append(result.summary["accuracy"]["mean"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)
    assert abs(accuracies[0] - accuracies[1]) <= 0.02
    assert len(set(losses[0])) == 4


def test_it_is_made_once_for_any_number_of_threads(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32"))
    tokens = first.inputs.copy()
    monkeypatch.setattr(VitModel, "embed", None)  # not needed again
    again = made(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32"))
    assert again.token_file == first.token_file
    monkeypatch.undo()
    assert first.token_file is not None
    first.token_file.unlink()
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    remade = made(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32"))
    np.testing.assert_array_equal(remade.inputs, tokens)


def test_simulators_share_the_images_in_whole_chunks() -> None:
    assert prefix.parts(100, 1) == [slice(0, 100)]
    assert prefix.parts(100, 2) == [slice(0, 64), slice(64, 100)]
    assert prefix.parts(70, 5) == [slice(0, 32), slice(32, 64), slice(64, 70)]  # three chunks, for three of the five
    assert prefix.parts(1000, 3) == [slice(0, 352), slice(352, 672), slice(672, 1000)]


def test_in_stretches_it_is_the_same_file(tiny_config: Tiny, tmp_path: Path) -> None:
    workload = prepare(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp32")).workload
    whole = prefix.made_here(workload).data.inputs
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros_like(whole))
    for images in reversed(prefix.parts(len(whole), 3)):
        prefix.fill(workload, "cpu", path, images, cores=1)
    np.testing.assert_array_equal(np.load(path), whole)
    with pytest.raises(FileNotFoundError):
        prefix.fill(workload, "cpu", tmp_path / "none.npy", slice(0, 32))


def test_other_weights_or_types_have_another_file(tiny_config: Tiny) -> None:
    files = {
        made(tiny_config(*TWO_OF_THREE, *more)).token_file
        for more in (
            ("model.cached_prefix=fp32",),
            ("model.cached_prefix=fp16",),
            ("model.cached_prefix=fp16", "adapter.blocks=last:1"),
            ("model.cached_prefix=fp16", "adapter=lora"),
            ("model.cached_prefix=fp16", "seed=5"),  # random weights are a function of the seed; so are the images
        )
    }
    assert len(files) == 5


def test_the_file_is_that_of_the_images_themselves(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    config, data = tiny_plan.workload.config, tiny_plan.workload.data
    config = replace(config, model=replace(config.model, cached_prefix="fp32"))

    def tokens_of(folder: str, images: np.ndarray) -> Path:
        """Of an env that keeps its images in a file of its own."""
        (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / folder / "images.npy", images)
        own = FederatedData(tmp_path / folder / "images.npy", data.labels, data.classes, data.train, data.test)
        file = prefix.made_here(replace(tiny_plan.workload, config=config, data=own)).data.token_file
        assert file is not None
        return file

    black, white = np.zeros((3, 3, 16, 16), np.uint8), np.full((3, 3, 16, 16), 255, np.uint8)
    first = tokens_of("one", black)
    assert tokens_of("two", black) == first
    assert not np.array_equal(np.load(tokens_of("two", white)), np.load(first))
    assert tokens_of("one", white) == tokens_of("two", white)  # overwritten in place


def test_without_a_frozen_prefix_it_is_refused(tiny_config: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"every block has an adapter; set adapter\.blocks=last:N"):
        prepare(tiny_config("adapter.blocks=all", "model.cached_prefix=fp16"))


def test_tokens_too_large_for_fp16_are_refused(tiny_config: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = VitModel.embed
    monkeypatch.setattr(VitModel, "embed", lambda self, images: 1e6 * embed(self, images))
    with pytest.raises(ConfigError, match="tokens do not fit fp16; use fp32"):
        made(tiny_config(*TWO_OF_THREE, "model.cached_prefix=fp16", "seed=9"))
