"""The validation split: what is held out, that the test split is left alone, and that run folders tell."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY
from trees import png, write

from fedsim.config import Config, load
from fedsim.env import FederatedData, Ragged, held_out, save_partition, saved_about
from fedsim.errors import CheckpointError, ConfigError
from fedsim.plan import prepare
from fedsim.simulation import resume, run

Make = Callable[..., Config]


def clients(*sizes: int) -> FederatedData:
    """Clients with so many training samples, in falling order of their indices, and one test sample each."""
    indices = np.arange(sum(sizes))[::-1]
    train = Ragged.of(np.split(indices, np.cumsum(sizes)[:-1]))
    test = Ragged.of(list(np.arange(sum(sizes), sum(sizes) + len(sizes))[:, None]))
    labels = np.zeros(sum(sizes) + len(sizes), dtype=np.int64)
    return FederatedData(Path("none.npy"), labels, ("only",), train, test, {"images": len(labels)})


def held(data: FederatedData, share: float = 0.3, seed: int = 0) -> list[list[int]]:
    return [list(map(int, held_out(data, share, seed).test[client])) for client in range(data.num_clients)]


# What is held out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "stay", "go"),
    [
        (0.3, [70, 7, 4, 2, 1], [30, 3, 2, 1, 1]),  # 1.8 of 6 and 0.9 of 3 are rounded
        (0.01, [99, 9, 5, 2, 1], [1, 1, 1, 1, 1]),  # at least one goes
        (0.9, [10, 1, 1, 1, 1], [90, 9, 5, 2, 1]),  # at least one stays
    ],
)
def test_sizes_by_hand(share: float, stay: list[int], go: list[int]) -> None:
    found = held_out(clients(100, 10, 6, 3, 2), share, 0)
    assert (found.train.sizes.tolist(), found.test.sizes.tolist()) == (stay, go)


def test_both_parts_together_are_the_training_samples_in_their_order() -> None:
    data = clients(10, 2, 25)
    found = held_out(data, 0.3, 0)
    for before, train, validation in zip(data.train, found.train, found.test, strict=True):
        assert not set(train.tolist()) & set(validation.tolist())
        assert sorted([*train, *validation], reverse=True) == before.tolist()
        assert train.tolist() == sorted(train, reverse=True) and validation.tolist() == sorted(validation, reverse=True)


def test_the_test_split_is_in_neither_part() -> None:
    data = clients(10, 2, 25)
    found = held_out(data, 0.3, 0)
    assert not np.isin(data.test.values, [*found.train.values, *found.test.values]).any()
    assert data.test.values.tolist() == [37, 38, 39] and data.train.sizes.tolist() == [10, 2, 25]  # nor changed
    assert (found.labels is data.labels, found.image_file, found.classes) == (True, data.image_file, data.classes)


def test_the_split_is_a_function_of_the_seed_and_the_client() -> None:
    data = clients(20, 20)
    assert held(data) == held(data) and held(data) != held(data, seed=1)
    first, second = held(data)
    assert [40 - 1 - index for index in first] != [20 - 1 - index for index in second]  # other positions of the list
    assert held(clients(20, 30))[0] == [index + 10 for index in first]  # whatever the others have


def test_about_says_what_is_evaluated() -> None:
    data = clients(4)
    assert held_out(data, 0.25, 0).about == {"images": 5, "evaluated": "validation, 0.25 of the training samples"}
    assert data.about == {"images": 5}


@pytest.mark.parametrize(("sizes", "more"), [((3, 1, 2), ""), ((3, 1, 2, 1, 1), " (as have 2 more)")])
def test_a_client_with_a_single_sample_is_named(sizes: tuple[int, ...], more: str) -> None:
    with pytest.raises(ConfigError) as caught:
        held_out(clients(*sizes), 0.3, 0)
    assert caught.value.mistakes == [
        f"eval.validation: client 1 has a single training sample{more}: none can be held out; give clients at least 2 "
        "(env), or set eval.validation=0"
    ]
    assert pickle.loads(pickle.dumps(caught.value)).mistakes == caught.value.mistakes


# Run folders -----------------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_rest_and_evaluates_what_was_held_out(tiny_config: Make, tmp_path: Path) -> None:
    folder = run(tiny_config("eval.validation=0.3", f"output={tmp_path / 'run'}")).folder
    with (folder / "clients.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    totals = [int(row["test_samples"]) for row in rows]
    assert totals == [3, 4, 2, 4, 3, 3, 3, 3]  # of 11, 12, 8, 12, 9, 10, 9, 9
    assert [int(row["samples"]) for row in rows] == [8, 8, 6, 8, 6, 7, 6, 6]
    correct = [float(row["accuracy"]) * total for row, total in zip(rows, totals, strict=True)]
    assert correct == pytest.approx(np.round(correct), abs=1e-5)
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert saved["eval"]["validation"] == 0.3
    assert saved["about"]["data"]["evaluated"] == "validation, 0.3 of the training samples"


@pytest.mark.parametrize("share", [0, 0.2])
def test_a_run_does_not_go_on_with_another_share(tiny_config: Make, tmp_path: Path, share: float) -> None:
    file = run(tiny_config("eval.validation=0.3", "rounds=1", f"output={tmp_path / 'run'}")).folder / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("validation: 0.3", f"validation: {share}"))
    with pytest.raises(CheckpointError, match=rf"\(config\.yaml, eval\.validation: 0\.3 then, {float(share)} now\)$"):
        resume(file.parent)


# A saved split ---------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Make:
    """The tiny run on twenty images of each of two classes, split among two clients."""
    files = {f"{name}/{at:02}.png": png((9 * at, at, 0)) for name in ("ant", "cat") for at in range(20)}
    write(tmp_path / "source", files, "folder")
    general = [text for text in TINY if not text.startswith(("env", "cohort"))]
    own = ("env=images", f"env.path={tmp_path / 'source'}", "env.num_clients=2", "env.partition=iid", "cohort=2")
    return lambda *settings: load(None, [*general, *own, *settings])


@pytest.fixture
def saved(images: Make, tmp_path: Path) -> Path:
    data = prepare(images("eval.validation=0.5")).workload.data
    save_partition(tmp_path / "partition.npz", data.train, data.test, data.about)
    return tmp_path / "partition.npz"


def test_a_saved_split_with_validation_is_used_as_it_is_and_says_so(images: Make, saved: Path) -> None:
    data = prepare(images("eval.validation=0.5")).workload.data
    assert (data.train.sizes.tolist(), data.test.sizes.tolist()) == ([8, 8], [8, 8])  # of 16; 4 more are the env's test
    again = prepare(images("env.partition=file", f"env.partition_file={saved}", "seed=7")).workload.data
    assert again.train.values.tolist() == data.train.values.tolist()
    assert again.test.values.tolist() == data.test.values.tolist()
    evaluated = "validation, 0.5 of the training samples"
    assert again.about["evaluated"] == saved_about(saved)["evaluated"] == evaluated
    json.dumps(again.about)


def test_nothing_is_held_out_of_it_a_second_time(images: Make, saved: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(images("env.partition=file", f"env.partition_file={saved}", "eval.validation=0.5"))
    assert caught.value.mistakes == [
        f"eval.validation: env.partition_file {str(saved)!r} already evaluates held-out samples (validation, 0.5 of "
        "the training samples); set eval.validation=0 to use it as it is"
    ]


def test_a_saved_split_without_validation_is_held_out_of_like_any_other(images: Make, tmp_path: Path) -> None:
    plain, file = prepare(images()).workload.data, tmp_path / "plain.npz"
    save_partition(file, plain.train, plain.test, plain.about)
    read = prepare(images("env.partition=file", f"env.partition_file={file}", "eval.validation=0.5")).workload.data
    direct = prepare(images("eval.validation=0.5")).workload.data
    assert read.train.values.tolist() == direct.train.values.tolist()
    assert read.test.values.tolist() == direct.test.values.tolist()
