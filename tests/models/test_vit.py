"""The adapted vision transformer: its rows, its blocks of clients, its weights.

test_vit at 16 pixels in patches of 8: 4 patches, 6 blocks of width 64, an MLP of 192 hidden units.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.config import AdapterConfig, ModelConfig
from fedsim.errors import ConfigError, WeightsError
from fedsim.local import LocalContext
from fedsim.models.adapters import OUTPUTS
from fedsim.models.class_token import is_pooled_alone
from fedsim.models.frozen import freeze, halved
from fedsim.models.vit import (
    AdaptedVit,
    VitModel,
    as_tensors,
    checksum,
    create_backbone,
    frozen_arrays,
    load_backbone,
    load_weights,
    skeleton,
)

MODEL = ModelConfig(name="test_vit", weights="random", img_size=16, options={"patch_size": 8})
KINDS = ("sequential", "parallel", "lora")
CLASSES = 5


def adapters(kind: str = "sequential", blocks: str = "last:2", **more: Any) -> AdapterConfig:
    return AdapterConfig(kind=kind, width=2, blocks=blocks, **more)


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return frozen_arrays(load_backbone(MODEL))


def made(frozen: dict[str, np.ndarray], kind: str = "sequential", blocks: str = "last:2") -> VitModel:
    return VitModel(MODEL, adapters(kind, blocks), CLASSES, frozen)


def random_rows(model: VitModel, clients: int) -> Tensor:
    return 0.1 * torch.randn(clients, model.layout.size, generator=torch.Generator().manual_seed(1))


def random_images(clients: int, samples: int, px: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (clients, samples, 3, px, px), generator=generator).to(torch.uint8)


# The row ---------------------------------------------------------------------------------------------------------

BOTTLENECK = 64 * 2 + 2 + 2 * 64 + 64
LORA_A, LORA_B = {"qkv": 64 * 2, "mlp": 64 * 2 + 192 * 2}, {"qkv": 2 * 192, "mlp": 2 * 192 + 2 * 64}
HEAD = 64 * CLASSES + CLASSES


@pytest.mark.parametrize(("blocks", "count"), [("last:1", 1), ("last:3", 3), ("all", 6)])
@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_groups_of_bottlenecks(kind: str, blocks: str, count: int) -> None:
    layout = VitModel(MODEL, adapters(kind, blocks), CLASSES).layout
    assert layout.groups == {"adapter": count * BOTTLENECK, "head": HEAD}
    assert layout.size == count * 322 + 325


@pytest.mark.parametrize(
    ("targets", "a", "b"), [(("qkv", "mlp"), 640, 896), (("qkv",), 128, 384), (("mlp",), 512, 512)]
)
def test_groups_of_lora(targets: tuple[str, ...], a: int, b: int) -> None:
    assert (a, b) == (sum(LORA_A[target] for target in targets), sum(LORA_B[target] for target in targets))
    layout = VitModel(MODEL, adapters("lora", "last:2", targets=targets), CLASSES).layout
    assert layout.groups == {"adapter.A": 2 * a, "adapter.B": 2 * b, "head": HEAD}


def test_without_adapters_a_row_is_a_head() -> None:
    assert VitModel(MODEL, adapters("none"), CLASSES).layout.groups == {"head": HEAD}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_lie_in_the_last_blocks(kind: str) -> None:
    pieces = VitModel(MODEL, adapters(kind, "last:2"), CLASSES).layout.pieces
    found = {piece.name.split(".")[2] for piece in pieces if piece.group.startswith("adapter")}
    assert found == {"4", "5"}


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ConfigError, match="'last:7', but the model has 6 blocks"):
        VitModel(MODEL, adapters(blocks="last:7"), CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_row(frozen: dict[str, np.ndarray], kind: str) -> None:
    model = made(frozen, kind)
    row, again, other = (model.initial(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(row, again) and not torch.equal(row, other)
    views = model.layout.views(row[None])
    random = {name.rpartition(".")[2] for name, value in views.items() if value.any()}
    assert random == ({"A", "weight"} if kind == "lora" else {"down", "weight"})
    assert all(value.all() for name, value in views.items() if name.rpartition(".")[2] in random)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_adapters_leave_the_backbone_as_it_is(frozen: dict[str, np.ndarray], kind: str) -> None:
    model, bare = made(frozen, kind, "all"), made(frozen, "none")
    row, images = model.initial(torch.Generator().manual_seed(0))[None], random_images(1, 3)
    expected = bare.features(torch.zeros(1, HEAD), images)
    torch.testing.assert_close(model.features(row, images), expected, atol=1e-6, rtol=0)
    changed = row + random_rows(model, 1) * model.layout.mask("adapter")
    assert (model.features(changed, images) - expected).abs().max() > 1e-3


# A block of clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_block_of_three_is_three_blocks_of_one(frozen: dict[str, np.ndarray], kind: str) -> None:
    model = made(frozen, kind)
    rows, images = random_rows(model, 3), random_images(3, 2)

    def run(clients: slice) -> tuple[Tensor, Tensor, Tensor]:
        own = rows[clients].clone().requires_grad_()
        logits = model.logits(own, images[clients])
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), own)
        return model.features(own, images[clients]).detach(), logits.detach(), gradient

    block, alone = run(slice(3)), [run(slice(i, i + 1)) for i in range(3)]
    assert [tuple(value.shape) for value in block] == [(3, 2, 64), (3, 2, CLASSES), (3, model.layout.size)]
    for together, apart in zip(block, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)
    assert (block[1][0] - block[1][1]).abs().max() > 1e-3  # the clients do differ


POOLED = [({}, True), ({"init_values": 0.5, "qkv_bias": False}, True), ({"reg_tokens": 2}, True),
          ({"global_pool": "avg"}, False), ({"global_pool": "map"}, False)]  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize(("options", "class_token"), POOLED)
def test_the_last_mlp_sees_only_what_is_pooled(
    monkeypatch, kind: str, options: dict[str, Any], class_token: bool
) -> None:
    """And features and gradients are those of all tokens through all blocks."""
    config = replace(MODEL, options=MODEL.options | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VitModel(config, adapters(kind, "last:1" if kind == "none" else "last:2"), CLASSES)
    rows, images, seen, found = random_rows(model, 2), random_images(2, 3), [], []
    model.module.backbone.blocks[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    for pools in (is_pooled_alone, lambda backbone, last: False):
        monkeypatch.setattr("fedsim.models.class_token.is_pooled_alone", pools)
        own = rows.clone().requires_grad_()
        features = model.features(own, images)
        gradient = torch.autograd.grad(model.logits(own, images).logsumexp(-1).sum(), own)[0]
        found.append((features.detach(), gradient))
    for some, all_tokens in zip(*found, strict=True):
        torch.testing.assert_close(some, all_tokens, atol=1e-5, rtol=1e-5)
    tokens = max(seen)
    assert tokens > 1
    if kind != "none":  # without adapters no block has any: all are in the prefix
        assert seen == [1 if class_token else tokens] * 2 + [tokens] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("blocks", ["last:1", "last:2", "all"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize(("options", "class_token"), POOLED)
def test_the_first_block_is_opened_at_its_mlp(
    monkeypatch, kind: str, blocks: str, options: dict[str, Any], class_token: bool, precision: str
) -> None:
    """Its attention and its MLP have no part in what a client trains; features and gradients are those of the block."""
    config = replace(MODEL, options=MODEL.options | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VitModel(config, adapters(kind, blocks), CLASSES, precision=precision)
    rows, images, found = random_rows(model, 2), random_images(2, 3), []
    tokens = 4 + model.module.backbone.num_prefix_tokens
    bottleneck = kind in ("sequential", "parallel")
    for opened in (bottleneck, False):
        if not opened:
            monkeypatch.setattr(AdaptedVit, "opens_at_mlp", False)
        own = rows.clone().requires_grad_()
        embedded = model.embed(images)
        parts = 2 if opened else 1
        assert embedded.shape == (2, 3, parts, 1 if opened and class_token and blocks == "last:1" else tokens, 64)
        logits = model.logits(own, embedded)
        assert torch.equal(logits, model.logits(own, images))
        found.append((logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), own)[0]))
    tolerance = {"fp32": 1e-5, "bf16": 5e-2}[precision]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_logits_are_the_head_on_the_features(frozen: dict[str, np.ndarray]) -> None:
    model = made(frozen)
    rows, images = random_rows(model, 2), random_images(2, 3)
    views = model.layout.views(rows)
    expected = model.features(rows, images) @ views["head.weight"] + views["head.bias"][:, None]
    torch.testing.assert_close(model.logits(rows, images), expected)


def test_features_do_not_depend_on_the_head(frozen: dict[str, np.ndarray]) -> None:
    model = made(frozen)
    rows, images = random_rows(model, 1), random_images(1, 2)
    assert torch.equal(model.features(rows * ~model.layout.mask("head"), images), model.features(rows, images))


def test_bf16_gives_float32_logits_close_to_fp32(frozen: dict[str, np.ndarray]) -> None:
    full, half = made(frozen), VitModel(MODEL, adapters(), CLASSES, frozen, precision="bf16")
    rows, images = random_rows(full, 2), random_images(2, 3)
    logits, expected = half.logits(rows, images), full.logits(rows, images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


# The frozen backbone ---------------------------------------------------------------------------------------------


def test_frozen_weights_get_no_gradient_and_stay(frozen: dict[str, np.ndarray]) -> None:
    model, before = made(frozen), checksum(frozen)
    rows = random_rows(model, 2).requires_grad_()
    model.logits(rows, random_images(2, 2)).square().sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum(1).gt(0).all()
    assert all(parameter.grad is None for parameter in model.module.parameters())
    backbone = {name: value for name, value in model.module.named_parameters() if value.requires_grad}
    assert set(backbone) == {piece.name for piece in model.layout.pieces}
    assert checksum(frozen) == before


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_arrays_are_shared_not_copied(frozen: dict[str, np.ndarray], kind: str) -> None:
    models = [made(frozen, kind), made(frozen, kind)]
    for model in models:
        own = {piece.name for piece in model.layout.pieces}
        held = [value.detach().numpy() for name, value in model.module.state_dict().items() if name not in own]
        assert len(held) == len(frozen)
        assert all(any(np.shares_memory(value, array) for array in frozen.values()) for value in held)


def test_dropout_is_off() -> None:
    model = VitModel(replace(MODEL, options=MODEL.options | {"pos_drop_rate": 0.5}), adapters(), CLASSES)
    rows, images = random_rows(model, 1), random_images(1, 2)
    assert torch.equal(model.logits(rows, images), model.logits(rows, images))


def test_over_frozen_arrays_nothing_random_is_drawn(frozen: dict[str, np.ndarray]) -> None:
    before = torch.random.get_rng_state()
    made(frozen)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("test_vit2", {}),
        ("test_vit3", {}),
        ("test_vit4", {}),
        ("vit_tiny_patch16_224", {"depth": 1}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1}),
        ("vit_base_patch16_siglip_gap_224", {"depth": 1, "embed_dim": 48, "num_heads": 4}),
    ],
)
def test_over_frozen_arrays_it_is_the_same_model(name: str, options: dict[str, int]) -> None:
    model = ModelConfig(name=name, weights="random", img_size=64 if "14" not in name else 56, options=options)
    backbone = load_backbone(model).eval()
    shared = VitModel(model, adapters("none"), CLASSES, frozen_arrays(backbone))
    images = random_images(1, 2, model.img_size)
    freeze(backbone)  # the same products
    with torch.no_grad():
        expected = backbone(shared.pixels(images)[0])
    assert torch.equal(shared.features(torch.zeros(1, shared.layout.size), images)[0], expected)


def test_in_bf16_halved_matrices_are_what_autocast_makes_of_them(frozen: dict[str, np.ndarray]) -> None:
    models = [VitModel(MODEL, adapters("lora"), CLASSES, own, precision="bf16") for own in (frozen, halved(frozen))]
    rows, images = random_rows(models[0], 2).requires_grad_(), random_images(2, 3)
    logits = [model.logits(rows, images) for model in models]
    assert torch.equal(*logits)
    assert torch.equal(*(torch.autograd.grad(own.square().sum(), rows)[0] for own in logits))


def test_read_only_arrays_are_taken_without_a_warning(
    frozen: dict[str, np.ndarray], recwarn: pytest.WarningsRecorder
) -> None:
    locked = {name: value.copy() for name, value in frozen.items()}
    for value in locked.values():
        value.flags.writeable = False  # as out of Ray's object store
    model = VitModel(MODEL, adapters(), CLASSES, locked)
    rows = random_rows(model, 1)
    assert torch.equal(model.logits(rows, random_images(1, 2)), made(frozen).logits(rows, random_images(1, 2)))
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_checksum_is_of_names_and_values() -> None:
    one = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
    assert checksum(one) == checksum(dict(reversed(one.items())))
    assert checksum(one) != checksum({**one, "b": np.array([4.0])})
    assert checksum(one) != checksum({"a": one["a"], "c": one["b"]})


# Pixels ----------------------------------------------------------------------------------------------------------


def pixels(model: VitModel, images: Tensor) -> Tensor:
    """What the backbone is given."""
    seen: list[Tensor] = []
    patches = model.module.backbone.patch_embed
    handle = patches.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.features(torch.zeros(1, model.layout.size), images)
    handle.remove()
    return seen[0]


def test_pixels_are_normalised_as_the_weights_want_it() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3, 1, 1).expand(1, 1, 3, 16, 16)
    model = VitModel(MODEL, adapters(), CLASSES)
    assert model.module.backbone.pretrained_cfg["mean"] == model.module.backbone.pretrained_cfg["std"] == (0.5,) * 3
    torch.testing.assert_close(pixels(model, images)[0, :, 3, 4], torch.tensor([-1.0, -0.6, 1.0]))


def test_mean_and_std_may_be_set() -> None:
    images = torch.full((1, 1, 3, 16, 16), 51, dtype=torch.uint8)  # 0.2
    model = VitModel(replace(MODEL, mean=0.1, std=0.25), adapters(), CLASSES)
    torch.testing.assert_close(pixels(model, images), torch.full((1, 3, 16, 16), 0.4))
    model = VitModel(replace(MODEL, std=0.25), adapters(), CLASSES)
    torch.testing.assert_close(pixels(model, images), torch.full((1, 3, 16, 16), -1.2))


def test_small_images_are_scaled_up() -> None:
    # Columns 0 0 0 0 255 255 255 255; twice as wide, the step between them is 1/4, 3/4 (bilinear, between centres).
    small = torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)
    small[..., 4:] = 255
    model = VitModel(replace(MODEL, mean=0.0, std=1.0), adapters(), CLASSES)
    found = pixels(model, small)
    assert found.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found[0, 2, 5], torch.tensor([0.0] * 7 + [0.25, 0.75] + [1.0] * 7))


# Making and loading ----------------------------------------------------------------------------------------------


def test_an_unknown_model_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        create_backbone(replace(MODEL, name="vit_tiny_patch16_24"))
    assert caught.value.mistakes == [
        "model.name: timm has no vision transformer 'vit_tiny_patch16_24', did you mean 'vit_tiny_patch16_224'?"
    ]


def test_an_unknown_model_is_not_answered_with_all_names() -> None:
    with pytest.raises(ConfigError) as caught:
        create_backbone(replace(MODEL, name="resnet50"))
    assert len(caught.value.mistakes[0]) < 400


@pytest.mark.parametrize(
    "options",
    [
        {"no_such_option": 1}, {"embed_dim": 63}, {"patch_size": 32}, {"patch_size": 5}, {"patch_size": 0},
        {"patch_size": "8"}, {"depth": -1}, {"num_heads": 0}, {"in_chans": 1}, {"global_pool": ""},
        {"features_only": True}, {"num_classes": 3}, {"pretrained": True},
    ],
)  # fmt: skip
def test_a_model_that_does_not_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model: timm cannot make 'test_vit' with these options: ") as caught:
        create_backbone(replace(MODEL, options=options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_pwee_patch16_reg1_gap_256"])
def test_blocks_without_a_place_for_an_adapter(name: str, kind: str) -> None:
    backbone, lacking = skeleton(ModelConfig(name=name, img_size=64)), "attn" if kind == "lora" else "mlp"
    with pytest.raises(ConfigError) as caught:
        AdaptedVit(backbone, adapters(kind), CLASSES)
    assert caught.value.mistakes == [f"adapter: the blocks of {name!r} have no {lacking!r} to adapt"]


def test_mlps_of_another_make_have_no_place_for_an_adapter() -> None:
    backbone = skeleton(ModelConfig(name="aimv2_large_patch14_224", img_size=56))
    with pytest.raises(ConfigError, match="the blocks of 'aimv2_large_patch14_224' have no 'fc1' to adapt"):
        AdaptedVit(backbone, adapters(), CLASSES)


def state_of(img_size: int = 16) -> dict[str, Tensor]:
    """Values of a whole backbone, another number for each tensor."""
    own = create_backbone(replace(MODEL, img_size=img_size)).state_dict()
    return {name: torch.full_like(value, float(i)) for i, (name, value) in enumerate(own.items())}


def loaded(tmp_path: Path, state: dict[str, Tensor]) -> Any:
    save_file(state, tmp_path / "weights.safetensors")
    return load_backbone(replace(MODEL, weights=str(tmp_path / "weights.safetensors")))


def refused(tmp_path: Path, state: dict[str, Tensor]) -> str:
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path, state)
    message = str(caught.value)
    assert message.startswith("model.weights: ") and "weights.safetensors" in message and "\n" not in message
    return message


def test_weights_from_a_file(tmp_path: Path) -> None:
    state = state_of()
    back = loaded(tmp_path, state).state_dict()
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_the_files_classifier_is_left_out(tmp_path: Path) -> None:
    state = state_of()
    back = loaded(tmp_path, {**state, "head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)})
    assert list(back.state_dict()) == list(state)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights(create_backbone(MODEL), tmp_path / "none.safetensors")
    assert str(caught.value) == f"model.weights: no file '{tmp_path}/none.safetensors'"


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state_of(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError) as caught:
        load_backbone(replace(MODEL, weights=str(path)))
    message = str(caught.value)
    assert message.startswith(f"model.weights: '{path}' is not a readable safetensors file: ") and "\n" not in message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = state_of()
    del state["blocks.3.attn.qkv.bias"]
    assert refused(tmp_path, state).endswith("does not fit the model: it lacks 'blocks.3.attn.qkv.bias'")
    del state["norm.bias"]
    assert refused(tmp_path, state).endswith("it lacks 'blocks.3.attn.qkv.bias' and 1 more")


def test_a_foreign_tensor_is_named(tmp_path: Path) -> None:
    state = {**state_of(), "decoder.weight": torch.ones(2)}
    assert refused(tmp_path, state).endswith("does not fit the model: the model has no 'decoder.weight'")
    del state["norm.bias"]
    assert refused(tmp_path, state).endswith("it lacks 'norm.bias'; the model has no 'decoder.weight'")


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    state = {**state_of(), "blocks.2.mlp.fc1.weight": torch.ones(128, 64)}
    assert refused(tmp_path, state).endswith(
        "tensor 'blocks.2.mlp.fc1.weight' has shape (128, 64), the model's has (192, 64)"
    )


def test_position_embeddings_are_resampled(tmp_path: Path) -> None:
    # From 4 x 4 patches to 2 x 2. Rows of patches with 0, 0, 1, 1 become rows with about 0 and 1.
    state, expected = state_of(img_size=32), state_of()
    extra = expected["pos_embed"].shape[1] - 4  # the class token's and, in some models, registers'
    assert state["pos_embed"].shape == (1, extra + 16, 64)
    grid = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1).expand(4, 4, 64).reshape(1, 16, 64)
    state["pos_embed"] = torch.cat([torch.full((1, extra, 64), 7.0), grid], 1)
    back = loaded(tmp_path, state).state_dict()
    found = back.pop("pos_embed")
    assert found.shape == (1, extra + 4, 64) and (found[:, :extra] == 7.0).all()
    rows = found[0, extra:].view(2, 2, 64)
    torch.testing.assert_close(rows[:, 0], rows[:, 1])
    assert rows[0].abs().max() < 0.15 and (rows[1] - 1).abs().max() < 0.15
    assert all(torch.equal(value, state[name]) for name, value in back.items())


def test_random_weights_are_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return checksum(frozen_arrays(load_backbone(MODEL)))

    assert drawn(0) == drawn(0) != drawn(1)


def test_real_weights_at_another_size() -> None:
    folder = os.environ.get("FEDSIM_DATA")
    if not folder:
        pytest.skip("FEDSIM_DATA is unset: it names the folder with vit_tiny_patch16_224.safetensors")
    path = Path(folder) / "vit_tiny_patch16_224.safetensors"
    model = ModelConfig(name="vit_tiny_patch16_224", weights=str(path), img_size=64)
    frozen, published = as_tensors(frozen_arrays(load_backbone(model))), load_file(path)
    assert published["pos_embed"].shape == (1, 1 + 14 * 14, 192) and frozen["pos_embed"].shape == (1, 1 + 4 * 4, 192)
    assert all(torch.equal(value, published[name]) for name, value in frozen.items() if name != "pos_embed")


# Extra pieces of the row -----------------------------------------------------------------------------------------

BOTH = ("adapter.personal", "head.personal")


def twice(frozen: dict[str, np.ndarray], kind: str = "sequential", extra: tuple[str, ...] = BOTH) -> VitModel:
    return VitModel(MODEL, adapters(kind), CLASSES, frozen, extra=extra)


def without(model: VitModel, rows: Tensor, *groups: str) -> Tensor:
    for group in groups:
        rows = rows * ~model.layout.mask(group)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_extra_pieces_come_after_all_others(frozen: dict[str, np.ndarray], kind: str) -> None:
    single, double = made(frozen, kind), twice(frozen, kind)
    d = single.layout.size
    assert double.layout.pieces[: len(single.layout.pieces)] == single.layout.pieces and double.layout.size == 2 * d
    groups = [group.replace("adapter", "adapter.personal").replace("head", "head.personal") for group in (
        piece.group for piece in single.layout.pieces
    )]  # fmt: skip
    assert [piece.group for piece in double.layout.pieces[len(single.layout.pieces) :]] == groups
    assert double.layout.mask("adapter").sum() == 2 * single.layout.mask("adapter").sum()
    # What is there without them starts alike.
    row = double.initial(torch.Generator().manual_seed(0))
    assert torch.equal(row[:d], single.initial(torch.Generator().manual_seed(0)))
    assert without(double, row, "adapter", "head").any().item() is False and row[d:].any()


@pytest.mark.parametrize("extra", [(), ("adapter.personal",), ("head.personal",)])
def test_only_what_is_declared(frozen: dict[str, np.ndarray], extra: tuple[str, ...]) -> None:
    assert list(twice(frozen, extra=extra).layout.groups) == ["adapter", "head", *extra]


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_personal_piece_of_zero_changes_nothing(frozen: dict[str, np.ndarray], kind: str) -> None:
    single, double = made(frozen, kind), twice(frozen, kind)
    rows, images = random_rows(double, 2), random_images(2, 3)
    plain = without(double, rows, "adapter.personal", "head.personal")
    expected = single.logits(rows[:, : single.layout.size], images)
    torch.testing.assert_close(double.logits(plain, images), expected)
    for group in BOTH if kind != "none" else BOTH[1:]:
        assert (double.logits(without(double, rows, group), images) - double.logits(rows, images)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_both_adapters_have_the_same_part(frozen: dict[str, np.ndarray], kind: str) -> None:
    """The two may change places; and half of each of two equal ones is one: outputs are mixed through ``OUTPUTS``."""
    model = twice(frozen, kind, BOTH[:1])
    rows, images = random_rows(model, 2), random_images(2, 3)
    first = model.layout.mask("adapter") & ~model.layout.mask("adapter.personal")
    second = model.layout.mask("adapter.personal")
    swapped = rows.clone()
    swapped[:, first], swapped[:, second] = rows[:, second], rows[:, first]
    torch.testing.assert_close(model.features(swapped, images), model.features(rows, images))
    equal = rows.clone()
    equal[:, second] = rows[:, first]
    halved = torch.cat([
        torch.full((piece.size,), 0.5 if piece.name.rpartition(".")[2] in OUTPUTS and "adapter" in piece.group else 1.0)
        for piece in model.layout.pieces
    ])  # fmt: skip
    alone = without(model, rows, "adapter.personal")
    torch.testing.assert_close(model.features(equal * halved, images), model.features(alone, images))


def test_logits_of_two_heads_are_summed_and_each_can_be_had_alone(frozen: dict[str, np.ndarray]) -> None:
    model = twice(frozen, extra=("head.personal",))
    rows, images = random_rows(model, 2), random_images(2, 3)
    features, views = model.features(rows, images), model.layout.views(rows)
    for group in ("head", "head.personal"):
        expected = features @ views[f"{group}.weight"] + views[f"{group}.bias"][:, None]
        torch.testing.assert_close(model.head(rows, features, group), expected)
    both = model.head(rows, features) + model.head(rows, features, "head.personal")
    torch.testing.assert_close(model.logits(rows, images), both)
    ctx = LocalContext.__new__(LocalContext)
    ctx.model = model
    assert torch.equal(ctx.head(rows, features[:1]), model.head(rows, features)[:1])
    torch.testing.assert_close(ctx.head(rows[:1], features)[1], model.head(rows[:1], features[1:])[0])


def test_an_unknown_extra_piece(frozen: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigError) as caught:
        twice(frozen, extra=("head.personl",))
    assert caught.value.mistakes == ["algorithm: unknown extra piece 'head.personl', did you mean 'head.personal'?"]
