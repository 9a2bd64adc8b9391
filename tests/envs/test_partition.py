"""Splits: exact numbers on small cases, and what must hold for every rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config import load
from fedsim.env import Ragged, save_partition
from fedsim.envs import counts as arithmetic
from fedsim.envs.partition import PartitionConfig, facts, load_partition, partition
from fedsim.errors import ConfigError, DataError
from fedsim.schema import build

LABELS = np.tile(np.arange(10), 60)  # 600 images of 10 classes
DOMAINS = np.repeat(["ink", "photo", "sketch"], [300, 180, 120])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def table(labels: np.ndarray, lists: Ragged, classes: int) -> list[list[int]]:
    """Images of each class of each client."""
    return [np.bincount(labels[indices], minlength=classes).tolist() for indices in lists]


def split(config: PartitionConfig, seed: int = 0, official: bool = False) -> tuple[Ragged, Ragged]:
    return partition(LABELS, config, seed, DOMAINS, _mixed_test() if official else None)


def _mixed_test() -> np.ndarray:
    is_test = np.zeros(600, dtype=bool)
    is_test[rng().permutation(600)[:150]] = True
    return is_test


RULES: list[dict[str, Any]] = [
    {"partition": "iid", "num_clients": 1},
    {"partition": "iid", "num_clients": 70},
    {"partition": "dirichlet", "num_clients": 20, "alpha": 1e-3},
    {"partition": "dirichlet", "num_clients": 20, "alpha": 0.1},
    {"partition": "dirichlet", "num_clients": 90, "alpha": 0.5, "min_samples": 4},
    {"partition": "dirichlet", "num_clients": 20, "alpha": 1e3},
    {"partition": "pathological", "num_clients": 20, "classes_per_client": 3},
    {"partition": "pathological", "num_clients": 3, "classes_per_client": 10},
    {"partition": "domain", "num_clients": 12},
]
CAPS: list[dict[str, Any]] = [
    {},
    {"samples_per_client": 10},
    {"samples_per_client": 12, "test_samples_per_client": 3},
    {"test_samples_per_client": 1},
]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_laws(rule: dict[str, Any], cap: dict[str, Any], official: bool) -> None:
    config = PartitionConfig(**rule, **cap)
    train, test = split(config, official=official)
    assert len(train) == len(test) == config.num_clients
    assert train.sizes.min() >= 1 and test.sizes.min() >= 1
    assert len(np.unique(train.values)) == len(train.values)
    assert not np.intersect1d(train.values, test.values).size
    for mine, tested in zip(train, test, strict=True):
        assert set(LABELS[tested]) <= set(LABELS[mine])
        assert len(np.unique(tested)) == len(tested)
    if config.samples_per_client:
        assert train.sizes.max() <= config.samples_per_client
    if config.test_samples_per_client:
        assert test.sizes.max() <= config.test_samples_per_client
    if official:
        assert not _mixed_test()[train.values].any() and _mixed_test()[test.values].all()
    else:
        assert len(np.unique(test.values)) == len(test.values)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_held_out_split_without_a_cap_uses_every_image(rule: dict[str, Any]) -> None:
    train, test = split(PartitionConfig(**rule))
    assert sorted([*train.values, *test.values]) == list(range(600))


@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_the_seed_decides(rule: dict[str, Any]) -> None:
    first, again, other = (split(PartitionConfig(**rule), seed)[0] for seed in (3, 3, 4))
    assert first.values.tolist() == again.values.tolist() and first.offsets.tolist() == again.offsets.tolist()
    assert first.values.tolist() != other.values.tolist()


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("cap", [0, 3, 4, 20])
def test_pathological_clients_have_exactly_k_classes(cap: int, official: bool) -> None:
    config = PartitionConfig(20, "pathological", classes_per_client=3, samples_per_client=cap)
    train, _ = split(config, official=official)
    assert [len(np.unique(LABELS[indices])) for indices in train] == [3] * 20


@pytest.mark.parametrize("official", [False, True])
def test_a_cap_keeps_rare_classes_of_pathological_clients(official: bool) -> None:
    labels = np.repeat([0, 1, 0, 1], [90, 5, 10, 5])
    config = PartitionConfig(1, "pathological", classes_per_client=2, samples_per_client=2)
    train, _ = partition(labels, config, 0, is_test=np.arange(110) >= 95 if official else None)
    assert table(labels, train, 2) == [[1, 1]]


def test_pathological_by_hand() -> None:
    # 4 clients of 2 of 4 classes: two clients hold each class, half of its 6 images and of its 2 test images each.
    labels = np.tile(np.arange(4), 8)
    config = PartitionConfig(4, "pathological", classes_per_client=2)
    train, test = partition(labels, config, 0, is_test=np.arange(32) >= 24)
    held, tested = np.array(table(labels, train, 4)), np.array(table(labels, test, 4))
    assert (np.sort(held, axis=1) == [0, 0, 3, 3]).all() and (held.sum(0) == 6).all()
    assert (tested == held // 3).all()


@pytest.mark.parametrize(("clients", "k", "numbers"), [(3, 2, [1, 1, 2, 2]), (1, 4, [1] * 4), (5, 3, [3, 4, 4, 4])])
def test_pathological_classes_have_almost_equal_numbers_of_clients(clients: int, k: int, numbers: list[int]) -> None:
    counts = arithmetic.pathological(np.tile(np.arange(4), 10), clients, k, rng())
    assert sorted((counts > 0).sum(0)) == numbers
    assert (counts.sum(0) == 10).all()


def test_iid_sizes_differ_by_one() -> None:
    train, test = partition(np.zeros(13, int), PartitionConfig(3, "iid"), 0, is_test=np.arange(13) >= 10)
    assert sorted(train.sizes) == [3, 3, 4] and sorted(test.sizes) == [1, 1, 1]


def test_domains_get_clients_in_proportion() -> None:
    train, test = split(PartitionConfig(10, "domain"))
    # 300 : 180 : 120 images, so 5, 3 and 2 of 10 clients with 60 images each, a fifth of them for the test.
    assert [set(DOMAINS[mine]) for mine in train] == [{"ink"}] * 5 + [{"photo"}] * 3 + [{"sketch"}] * 2
    assert [set(DOMAINS[mine]) for mine in test] == [{"ink"}] * 5 + [{"photo"}] * 3 + [{"sketch"}] * 2
    assert set(train.sizes) == {48} and set(test.sizes) == {12}


def test_a_small_domain_still_has_a_client() -> None:
    domains = np.repeat([0, 1], [98, 2])
    train, _ = partition(np.zeros(100, int), PartitionConfig(3, "domain"), 0, domains)
    assert [domains[mine][0] for mine in train] == [0, 0, 1]


def test_domain_clients_test_in_their_domain_when_the_test_split_is_official() -> None:
    _, test = split(PartitionConfig(10, "domain"), official=True)
    assert [set(DOMAINS[tested]) for tested in test] == [{"ink"}] * 5 + [{"photo"}] * 3 + [{"sketch"}] * 2


def test_hold_out_is_stratified() -> None:
    labels = np.repeat([0, 1], [10, 5])
    train, test = partition(labels, PartitionConfig(1, "iid"), 0)
    assert (table(labels, train, 2), table(labels, test, 2)) == ([[8, 4]], [[2, 1]])


def test_an_only_image_of_a_class_is_trained_on() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    train, test = partition(labels, PartitionConfig(1, "iid"), 0)
    assert (table(labels, train, 3), table(labels, test, 3)) == ([[6, 1, 1]], [[2, 0, 0]])


def test_dirichlet_proportions_have_the_distribution_s_second_moment() -> None:
    # E[sum p^2] = (alpha + 1) / (C alpha + 1): 0.25 for alpha = 0.5, C = 10.
    counts = arithmetic.dirichlet(np.tile(np.arange(10), 100_000), 2000, 0.5, 1, rng())
    shares = counts / counts.sum(1, keepdims=True)
    assert (shares**2).sum(1).mean() == pytest.approx(0.25, abs=0.01)
    assert counts.sum() == 1_000_000


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("clients", [500, 5000])
def test_dirichlet_reaches_min_samples_whatever_alpha(alpha: float, clients: int) -> None:
    labels = np.tile(np.arange(100), 200)
    train, test = partition(labels, PartitionConfig(clients, alpha=alpha, min_samples=2), 0)
    assert train.sizes.min() >= 2 and test.sizes.min() >= 1 and len(train) == clients


def test_dirichlet_extremes() -> None:
    few, many = (arithmetic.dirichlet(LABELS, 10, alpha, 1, rng()) for alpha in (1e-3, 1e6))
    assert (few > 0).sum() <= 20
    assert (many == 6).all()


def test_the_richest_gives_to_those_below_the_least() -> None:
    counts = arithmetic._at_least(np.array([[5, 2, 0], [0, 0, 1], [0, 0, 0]]), 2)
    # Client 0 gives class 0 three times: 4 and 2, then 3 and 2, then 2 and 2 remain.
    assert counts.tolist() == [[2, 2, 0], [1, 0, 1], [2, 0, 0]]


def test_rounding_by_largest_remainders() -> None:
    quota = np.array([[2.6, 0.2, 1.2], [1.0, 2.0, 0.0]])
    assert arithmetic.rounded(quota, np.array([4, 3]), rng()).tolist() == [[3, 0, 1], [1, 2, 0]]


def test_ties_do_not_favour_the_first_class() -> None:
    tied = arithmetic.rounded(np.full((200, 4), 0.25), np.ones(200), rng())
    assert (tied.sum(1) == 1).all() and tied.sum(0).min() > 30


def test_a_cap_keeps_proportions_and_on_request_all_classes() -> None:
    counts = np.array([[6, 4, 0], [97, 2, 1], [97, 2, 1], [1, 1, 0]])
    keep = np.array([False, False, True, False])
    capped = arithmetic.capped(counts, np.array([5, 3, 3, 9]), rng(), keep)
    assert capped.tolist() == [[3, 2, 0], [3, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_official_test_images_follow_the_training_images() -> None:
    counts = np.array([[3, 0], [1, 4]])
    assert arithmetic.official_test(counts, counts, np.array([4, 2]), rng()).tolist() == [[3, 0], [1, 2]]


def test_a_class_capped_away_is_not_tested() -> None:
    test = arithmetic.official_test(np.array([[4, 4]]), np.array([[0, 2]]), np.array([2, 2]), rng())
    assert test.tolist() == [[0, 2]]


def test_a_client_without_test_images_gets_one_of_the_richest_of_its_class() -> None:
    counts = np.array([[8, 1], [1, 0], [0, 7]])
    assert arithmetic.official_test(counts, counts, np.array([3, 2]), rng()).tolist() == [[2, 0], [1, 0], [0, 2]]


def test_a_test_image_is_lent_only_where_there_are_too_few() -> None:
    labels = np.array([0] * 4 + [1] * 4 + [0, 1])
    config = PartitionConfig(4, "pathological", classes_per_client=1)
    train, test = partition(labels, config, 0, is_test=np.arange(10) > 7)
    assert test.sizes.tolist() == [1] * 4
    assert [labels[tested][0] for tested in test] == [labels[mine][0] for mine in train]
    assert sorted(test.values) == [8, 8, 9, 9]


def test_swaps_until_each_client_has_a_pair() -> None:
    counts = np.array([[1, 1], [3, 1]])
    assert arithmetic.paired(counts).tolist() == [[2, 0], [2, 2]]
    assert counts.tolist() == [[1, 1], [3, 1]]


def test_swaps_serve_two_needy_clients_at_once() -> None:
    assert sorted(arithmetic.paired(np.array([[1, 1], [1, 1]])).tolist()) == [[0, 2], [2, 0]]


def test_many_clients_of_few_images_each_have_a_class_twice() -> None:
    labels = np.tile(np.arange(100), 30)
    train, test = partition(labels, PartitionConfig(1000, "iid"), 0)
    assert set(train.sizes) == {2} and set(test.sizes) == {1}
    assert all(labels[tested][0] in labels[mine] for mine, tested in zip(train, test, strict=True))


def test_facts() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    train, test = Ragged.of([np.array([0, 2]), np.array([4])]), Ragged.of([np.array([1]), np.array([5])])
    told = facts(labels, PartitionConfig(partition="iid"), train, test)
    assert told.pop("labels_crc32") != facts(labels[::-1], PartitionConfig(), train, test)["labels_crc32"]
    assert told == {
        "partition": "iid",
        "clients": 2,
        "images": 6,
        "train_samples": {"total": 3, "min": 1, "median": 1.5, "max": 2},
        "test_samples": {"total": 2, "min": 1, "median": 1.0, "max": 1},
        "classes_per_client_mean": 1.5,
    }
    json.dumps(told)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"num_clients": 0}, "env.num_clients: 0 is below 1"),
        ({"partition": "dirchlet"}, "env.partition: unknown choice 'dirchlet', did you mean 'dirichlet'?"),
        ({"alpha": 0.0}, "env.alpha: 0.0 is below 1e-06"),
        ({"alpha": float("nan")}, "env.alpha: nan is not a number"),
        ({"test_share": 1.0}, "env.test_share: 1.0 is above 0.999999"),
        ({"test_share": 0.0}, "env.test_share: 0.0 is below 1e-06"),
        ({"min_samples": 0}, "env.min_samples: 0 is below 1"),
        ({"classes_per_client": 0}, "env.classes_per_client: 0 is below 1"),
        ({"samples_per_client": -1}, "env.samples_per_client: -1 is below 0"),
        ({"test_samples_per_client": -2}, "env.test_samples_per_client: -2 is below 0"),
        ({"partition": "file"}, "env: partition_file is not set: partition=file reads a saved partition from it"),
        (
            {"partition": "pathological", "samples_per_client": 9},
            "env: samples_per_client=9: a client could not hold all of its classes_per_client=10 classes",
        ),
    ],
)
def test_settings_that_no_source_can_satisfy(wrong: dict[str, Any], line: str) -> None:
    mistakes: list[str] = []
    assert build(PartitionConfig, wrong, "env", mistakes) is None
    assert mistakes == [line]


@pytest.mark.parametrize("name", ["shapes", "images", "cifar10", "cifar100"])
def test_all_mistakes_of_an_env_are_reported_together(name: str) -> None:
    wrong = ["env.alpha=-1", "env.partition=dirichelt", "env.test_share=7"]
    with pytest.raises(ConfigError) as caught:
        load(None, [f"env={name}", *wrong])
    assert caught.value.mistakes == [
        "env.alpha: -1.0 is below 1e-06",
        "env.partition: unknown choice 'dirichelt', did you mean 'dirichlet'?",
        "env.test_share: 7.0 is above 0.999999",
    ]


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
def test_extreme_alphas_split(alpha: float) -> None:
    train, test = split(PartitionConfig(20, alpha=alpha))
    assert sorted([*train.values, *test.values]) == list(range(600)) and train.sizes.min() >= 2


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            {"partition": "pathological", "classes_per_client": 11},
            "env.classes_per_client=11: the source has training images of 10 classes",
        ),
        (
            {"partition": "iid", "num_clients": 301},
            "env.num_clients=301: each needs at least 2 images, the source has 600 to give (most clients: 300)",
        ),
        (
            {"num_clients": 201},
            "env.num_clients=201: each needs at least 3 images, the source has 600 to give (most clients: 200)",
        ),
        (
            {"min_samples": 10**12},
            "env.num_clients=100: each needs at least 1000000000001 images, the source has 600 to give "
            "(most clients: 0)",
        ),
        (
            {"partition": "pathological", "num_clients": 150, "classes_per_client": 5},
            "class 0 has 60 training images for 75 clients that hold it",
        ),
        (
            {"partition": "pathological", "num_clients": 60, "classes_per_client": 10},
            "client 0 has one image of each of its classes, none to hold out; use fewer clients",
        ),
        (
            {"partition": "domain", "num_clients": 2},
            "env.num_clients=2: below the number of domains, 3; each needs a client",
        ),
    ],
)
def test_settings_that_this_source_cannot_satisfy(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError) as caught:
        split(PartitionConfig(**wrong))
    assert str(caught.value) == line


def test_domain_partition_without_domains() -> None:
    with pytest.raises(DataError, match="the source has no domains; choose from iid, dirichlet, pathological"):
        partition(LABELS, PartitionConfig(partition="domain"), 0)


def test_a_domain_with_too_few_images() -> None:
    with pytest.raises(DataError, match="domain 'b' has 1 images, too few for 1 clients of at least 2"):
        partition(np.zeros(50, int), PartitionConfig(2, "domain"), 0, np.array(["a"] * 49 + ["b"]))


def test_all_images_of_different_classes_leave_none_to_hold_out() -> None:
    with pytest.raises(DataError, match="client 0 has one image of each of its classes"):
        partition(np.arange(8), PartitionConfig(2, "iid"), 0)


def test_a_class_without_test_images() -> None:
    config = PartitionConfig(2, "pathological", classes_per_client=1)
    with pytest.raises(DataError, match="the source has no test image of any class that it trains on"):
        partition(np.array([0, 0, 1, 1, 0]), config, 0, is_test=np.arange(5) == 4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    train, test = split(PartitionConfig(5, "iid"))
    path = tmp_path / "split.npz"
    save_partition(path, train, test, facts(LABELS, PartitionConfig(), train, test))
    return path


def test_a_saved_partition_is_used_again(saved: Path) -> None:
    train, test = split(PartitionConfig(5, "iid"))
    config = PartitionConfig(100, "file", partition_file=str(saved))
    for wanted, got in zip((train, test), partition(LABELS, config, seed=9), strict=True):
        assert wanted.values.tolist() == got.values.tolist() and wanted.offsets.tolist() == got.offsets.tolist()
    assert [file.name for file in saved.parent.iterdir()] == ["split.npz"]


def _changed(path: Path, **arrays: Any) -> None:
    with np.load(path) as file:
        whole = {**file, **arrays}
    np.savez(path, **{name: array for name, array in whole.items() if array is not None})


BAD = np.arange(480)
BAD[7] = 600


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"test_offsets": None}, "array 'test_offsets' is missing"),
        ({"train_values": BAD}, "train index 600 is out of range"),
        ({"train_values": np.zeros(480, np.int64)}, "a training image is held twice"),
        ({"train_values": np.arange(480.0)}, "the train lists are damaged"),
        ({"train_values": np.arange(100)}, "the train lists are damaged"),
        ({"train_offsets": np.array([0, 200, 100, 300, 400, 480])}, "the train lists are damaged"),
        ({"train_offsets": np.array([0, 0, 100, 300, 400, 480])}, "client 0 has no train images"),
        ({"test_offsets": np.array([0, 20, 40, 120])}, "train lists of 5 clients, test lists of 3"),
        ({"train_values": np.arange(480)}, "an image is in both a train and a test list"),
        ({"about": np.array('{"images": 599}')}, "made for 599 images, the source has 600"),
        ({"about": np.array('{"images": 600}')}, "made for other labels, or the same images in another order"),
        ({"about": np.array("[")}, "not a saved partition (Expecting value: line 1 column 2 (char 1))"),
    ],
)
def test_a_damaged_partition_is_refused(saved: Path, arrays: dict[str, Any], line: str) -> None:
    _changed(saved, **arrays)
    with pytest.raises(DataError) as caught:
        load_partition(saved, LABELS)
    assert str(caught.value) == f"partition {str(saved)!r}: {line}"


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_partition(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "split.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a saved partition"):
        load_partition(path, LABELS)


def test_a_missing_partition_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"env\.partition_file: no file"):
        load_partition(tmp_path / "none.npz", LABELS)


def test_pickled_arrays_are_never_loaded(saved: Path) -> None:
    _changed(saved, train_values=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="allow_pickle=False"):
        load_partition(saved, LABELS)
