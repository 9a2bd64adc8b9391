"""Drawn shapes: what is drawn, for whom, and the same each time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import schema
from fedsim.env import FederatedData
from fedsim.envs import shapes
from fedsim.envs.shapes import COMBINATIONS, SHAPES, TEXTURES, Shapes
from fedsim.errors import DataError


def build(folder: Path, seed: int = 0, model_px: int = 64, **settings: Any) -> FederatedData:
    return Shapes(Shapes.Config(**settings)).build(seed, model_px, folder)


def drawn(label: int, style: int, n: int = 1, px: int = 64) -> np.ndarray:
    return np.concatenate(list(shapes._draw(np.full(n, label), np.full(n, style), px, 0, "test")))


def test_defaults(tmp_path: Path) -> None:
    data = build(tmp_path)
    assert data.images.shape == (24 * 80, 3, 32, 32) and data.images.dtype == np.uint8
    assert (data.num_clients, len(data.classes), len(set(data.classes))) == (24, 12, 12)
    assert set(data.train.sizes) == {60} and set(data.test.sizes) == {20}
    for train, test in zip(data.train, data.test, strict=True):
        assert np.unique(data.labels[train], return_counts=True)[1].tolist() == [15] * 4
        assert np.unique(data.labels[test], return_counts=True)[1].tolist() == [5] * 4
        assert set(data.labels[train]) == set(data.labels[test])
    assert sorted([*data.train.values, *data.test.values]) == list(range(1920))
    json.dumps(data.about)


@pytest.mark.parametrize(
    "rule",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 0.1, "num_clients": 40},
        {"partition": "dirichlet", "alpha": 1e-3, "num_clients": 7},
        {"partition": "pathological", "classes_per_client": 12, "num_clients": 3},
        {"partition": "iid", "samples_per_client": 1, "test_samples_per_client": 1, "num_clients": 30},
    ],
    ids=str,
)
def test_every_rule_gives_every_client_images_of_its_own(tmp_path: Path, rule: dict[str, Any]) -> None:
    data = build(tmp_path, model_px=16, **rule)
    assert data.train.sizes.min() >= 1 and data.test.sizes.min() >= 1
    both = np.concatenate([data.train.values, data.test.values])
    assert sorted(both) == list(range(len(data.labels))) == list(range(len(data.images)))
    for train, test in zip(data.train, data.test, strict=True):
        assert set(data.labels[test]) <= set(data.labels[train])


def test_the_same_seed_draws_the_same_images(tmp_path: Path) -> None:
    first, again, other = (build(tmp_path / str(at), seed) for at, seed in enumerate([1, 1, 2]))
    assert (first.images == again.images).all() and (first.labels == again.labels).all()
    # Colours, not only the grain: a style changes more than a tenth of the range for half of the images.
    change = abs(first.images.mean(axis=(2, 3)) - other.images.mean(axis=(2, 3))).max(axis=1)
    assert np.median(change) > 25


def test_the_cache_is_used_again_and_keyed_by_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    others = [
        build(tmp_path, seed=1),
        build(tmp_path, px=16),
        build(tmp_path, num_clients=23),
        build(tmp_path, classes=13),
    ]
    monkeypatch.setattr(shapes, "DRAWING", -1)
    others.append(build(tmp_path))
    monkeypatch.undo()
    assert len({first.image_file, *(other.image_file for other in others)}) == 6
    monkeypatch.setattr(shapes, "_draw", None)
    assert build(tmp_path).image_file == first.image_file


def test_the_model_s_input_bounds_the_images(tmp_path: Path) -> None:
    assert build(tmp_path, model_px=24).images.shape[-1] == 24
    assert build(tmp_path, model_px=224, px=48, num_clients=4).images.shape[-1] == 48


def test_a_client_s_images_do_not_depend_on_the_other_clients() -> None:
    labels = np.zeros(8, dtype=int)
    alone = np.concatenate(list(shapes._draw(labels[:4], labels[:4] + 1, 32, 0, "x"))).astype(int)
    among = np.concatenate(list(shapes._draw(labels, labels + [0, 1] * 4, 32, 0, "x"))).astype(int)
    # The grain differs with the place in the file; shape, pose and colours do not.
    assert abs(alone - among[1::2]).mean() < 15 < abs(alone - among[::2]).mean()


def test_clients_have_styles_of_their_own(tmp_path: Path) -> None:
    data = build(tmp_path, partition="iid")
    colours = data.images.mean(axis=(2, 3))
    between = np.stack([colours[mine].mean(0) for mine in data.train]).std(0)
    within = np.stack([colours[mine].std(0) for mine in data.train]).mean(0)
    assert (between > 1.5 * within).all()


def test_all_pairs_have_names_of_their_own() -> None:
    names = {shapes.name(label) for label in range(COMBINATIONS)}
    assert names == {f"{texture} {shape}" for shape, texture in itertools.product(SHAPES, TEXTURES)}


def test_all_shapes_and_textures_are_among_the_clients_and_the_public_classes() -> None:
    for labels in (np.arange(12), np.arange(12, COMBINATIONS)):
        shape, texture = shapes.pair(labels)
        assert set(shape) == set(range(len(SHAPES))) and set(texture) == set(range(len(TEXTURES)))


def test_public_images_are_of_other_classes() -> None:
    images, labels = Shapes(Shapes.Config(public_per_class=5)).public(64)
    assert images.shape == (140, 3, 32, 32) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [5] * 28
    assert Shapes(Shapes.Config(classes=36, public_per_class=3)).public(16)[0].shape == (12, 3, 16, 16)


def test_public_images_are_the_same_each_time() -> None:
    env = Shapes(Shapes.Config(public_per_class=2))
    assert (env.public(32)[0] == env.public(32)[0]).all()


STEPS = (np.arange(96, dtype=np.float32) + 0.5) / 40 - 1.2
GRID = np.meshgrid(STEPS, STEPS)  # u, v; cells of 1/40


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_one_in_radius_and_no_two_are_alike(shape: str) -> None:
    inside = SHAPES[shape](*GRID) < 0
    assert np.hypot(*GRID)[inside].max() <= 1.2 and 0.08 < inside.mean() < 0.6
    others = [np.mean(inside ^ (SHAPES[other](*GRID) < 0)) for other in SHAPES if other != shape]
    assert min(others) > 0.05


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi * 0.92**2), ("square", 1.6**2), ("ring", 4 * np.pi * 0.7 * 0.27)]
)
def test_areas_by_hand(shape: str, area: float) -> None:
    assert (SHAPES[shape](*GRID) < 0).sum() / 1600 == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("shape", ["triangle", "star", "heart"])
def test_upright_shapes_are_symmetric_and_the_right_way_up(shape: str) -> None:
    inside = SHAPES[shape](*GRID) < 0
    assert (inside == inside[:, ::-1]).mean() > 0.99
    rows = inside.sum(1)[inside.any(1)]
    assert (rows[0] > rows[-1]) == (shape == "heart")  # two lobes above, or one tip


def test_textures_share_their_inks() -> None:
    for texture, function in TEXTURES.items():
        second = np.mean(function(*GRID)[np.hypot(*GRID) < 0.92] > 0)
        assert second == 0 if texture == "solid" else 0.15 < second < 0.7, texture


@pytest.mark.parametrize("style", range(12))
def test_a_shape_stands_out_from_its_ground(style: int) -> None:
    images = drawn(label=0, style=style, n=8).astype(int)  # solid circles, near the middle
    middle, corners = (
        images[:, :, 28:36, 28:36].mean((0, 2, 3)),
        images[:, :, [0, 0, 63, 63], [0, 63, 0, 63]].mean((0, 2)),
    )
    assert abs(middle - corners).max() > 40


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"classes": 1}, "env.classes: 1 is below 2"),
        ({"classes": 37}, "env.classes: 37 is above 36"),
        ({"px": 8}, "env.px: 8 is below 16"),
        ({"px": 513}, "env.px: 513 is above 512"),
        ({"public_per_class": 0}, "env.public_per_class: 0 is below 1"),
        ({"samples_per_client": 0}, "env.samples_per_client: 0 is below 1"),
        ({"test_samples_per_client": 100_001}, "env.test_samples_per_client: 100001 is above 100000"),
        ({"num_clients": 0}, "env.num_clients: 0 is below 1"),
        ({"classes_per_client": 0}, "env.classes_per_client: 0 is below 1"),
        ({"partition": "domain"}, "env.partition: unknown choice 'domain'; choose from dirichlet, iid, pathological"),
        ({"partition": "file"}, "env.partition: unknown choice 'file'; choose from dirichlet, iid, pathological"),
        ({"partition": "pathologic"}, "env.partition: unknown choice 'pathologic', did you mean 'pathological'?"),
        (
            {"samples_per_client": 3},
            "env: samples_per_client=3: a client could not hold all of its classes_per_client=4 classes",
        ),
    ],
)
def test_mistakes(wrong: dict[str, Any], line: str) -> None:
    mistakes: list[str] = []
    assert schema.build(Shapes.Config, wrong, "env", mistakes) is None
    assert mistakes == [line]


def test_a_cache_where_nothing_can_be_written_is_no_full_disk() -> None:
    with pytest.raises(DataError, match=r"^cache '/proc/x' cannot be written: "):
        build(Path("/proc/x"))


def test_more_images_than_the_disk_has_room_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^env\.num_clients=100000000: 8000000000 images take 22888 GiB, "):
        build(tmp_path / "cold", num_clients=100_000_000)
    assert not (tmp_path / "cold").exists()


def test_more_classes_a_client_than_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^env\.classes_per_client=13: the source has training images of 12 classes$"):
        build(tmp_path, classes_per_client=13)
