"""Blocks, cohorts, and what is refused before a run starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedsim.config import Config
from fedsim.env import FederatedData
from fedsim.envs.shapes import Shapes
from fedsim.errors import ConfigError, DataError
from fedsim.plan import Plan, cut_blocks, emulates_bf16, prepare

Make = Callable[..., Config]

# Clients 0 … 4; four samples a step: 3, 1, 2, 2 and 1 steps. Most steps first, then by id: 0, 2, 3, 1, 4.
SIZES = np.array([10, 3, 7, 8, 1])


def blocks(block_size: int, clients: tuple[int, ...] = (0, 1, 2, 3, 4)) -> list[tuple[int, ...]]:
    ids = np.array(clients)
    return cut_blocks(ids, SIZES[ids], 4, block_size)


# Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [
        (5, [(0, 2, 3, 1, 4)]),
        (4, [(0, 2, 3), (1, 4)]),  # two are needed
        (2, [(0, 2), (3,), (1,), (4,)]),  # three are needed, four are a power of two
        (1, [(0,), (2,), (3,), (1,), (4,)]),  # five are needed, there are no eight
    ],
)
def test_blocks_by_hand(block_size: int, expected: list[tuple[int, ...]]) -> None:
    assert blocks(block_size) == expected


def test_blocks_do_not_depend_on_the_order_of_the_clients() -> None:
    assert {tuple(blocks(2, clients)) for clients in itertools.permutations(range(5))} == {
        ((0, 2), (3,), (1,), (4,)),
    }


@pytest.mark.parametrize(
    ("clients", "block_size", "number"), [(64, 8, 8), (65, 8, 16), (8, 8, 1), (9, 8, 2), (3, 1, 3)]
)
def test_number_and_evenness_of_blocks(clients: int, block_size: int, number: int) -> None:
    found = cut_blocks(np.arange(clients), np.full(clients, 7), 4, block_size)
    lengths = [len(block) for block in found]
    assert len(found) == number and max(lengths) <= block_size and max(lengths) - min(lengths) <= 1
    assert sum(found, ()) == tuple(range(clients))


def test_ids_are_plain_numbers() -> None:
    assert all(type(client) is int for block in blocks(2) for client in block)


def test_blocks_of_the_plan_have_most_steps_first(tiny_plan: Plan) -> None:
    sizes = tiny_plan.workload.data.train.sizes
    (block,) = tiny_plan.blocks(np.arange(8))
    steps = [-(-int(sizes[client]) // 4) for client in block]
    assert steps == sorted(steps, reverse=True) and sorted(block) == list(range(8))


# The cohort ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "clients"), [("3", 3), ("8", 8), ("0.5", 4), ("0.99", 8), ("0.01", 1), ("1", 1)])
def test_a_cohort_is_a_count_or_a_share(tiny_config: Make, cohort: str, clients: int) -> None:
    plan = prepare(tiny_config(f"cohort={cohort}"))
    assert plan.cohort == plan.workload.task.cohort == clients
    drawn = plan.sample_cohort(0).tolist()
    assert len(drawn) == clients and drawn == sorted(set(drawn)) and set(drawn) <= set(range(8))


def test_a_cohort_larger_than_the_population_is_refused(tiny_config: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(tiny_config("cohort=9"))
    assert caught.value.mistakes == ["cohort: 9 clients a round, but there are only 8 (env.num_clients, eval.unseen)"]


def test_unseen_clients_are_never_drawn(tiny_config: Make) -> None:
    plan = prepare(tiny_config("eval.unseen=0.25", "cohort=3"))
    drawn = {client for round in range(40) for client in plan.sample_cohort(round).tolist()}
    assert sorted(drawn) == plan.trainable.tolist() and len(drawn) == 6  # of 8
    assert prepare(tiny_config("eval.unseen=0.25", "seed=1")).trainable.tolist() != plan.trainable.tolist()
    assert prepare(tiny_config()).trainable.tolist() == list(range(8))
    assert plan.workload.task.trainable == 6 and plan.workload.unseen == set(range(8)) - set(plan.trainable.tolist())
    with pytest.raises(ConfigError, match="cohort: 8 clients a round, but there are only 6"):
        prepare(tiny_config("eval.unseen=0.25", "cohort=8"))


def test_unseen_clients_are_evaluated_in_blocks_of_their_own(tiny_config: Make) -> None:
    plan = prepare(tiny_config("eval.unseen=0.25", "cohort=3", "backend.block_size=8"))
    (unseen, seen) = plan.evaluation_blocks()  # first, as they take an epoch more
    assert sorted(seen) == plan.trainable.tolist() and set(unseen) == plan.workload.unseen
    (everyone,) = prepare(tiny_config("backend.block_size=8")).evaluation_blocks()
    assert sorted(everyone) == list(range(8))


def test_the_cohort_is_a_function_of_seed_and_round(tiny_plan: Plan, tiny_config: Make) -> None:
    rounds = [tuple(tiny_plan.sample_cohort(round)) for round in range(30)]
    assert rounds == [tuple(tiny_plan.sample_cohort(round)) for round in range(30)]
    assert len(set(rounds)) > 20  # of 70
    other = prepare(tiny_config("seed=1"))
    assert rounds != [tuple(other.sample_cohort(round)) for round in range(30)]


# Preparing -------------------------------------------------------------------------------------------------------


def test_facts_of_the_tiny_plan(tiny_plan: Plan) -> None:
    # Down and up in one block: 64 x 2 + 2 + 2 x 64 + 64; a head of 64 x 6 + 6.
    assert tiny_plan.about["row"] == {"size": 712, "adapter": 322, "head": 390}
    assert tiny_plan.params.shape == (712,) and tiny_plan.params.dtype == torch.float32
    assert tiny_plan.about["data"]["clients"] == 8
    frozen = tiny_plan.workload.frozen
    assert tiny_plan.about["backbone"]["parameters"] == sum(value.size for value in frozen.values())
    assert set(tiny_plan.about["memory_mib"]) == {"frozen weights, shared", "clients' rows", "server", "simulators"}


def test_the_seed_decides_the_initial_row_and_the_random_backbone(tiny_plan: Plan, tiny_config: Make) -> None:
    again, other = prepare(tiny_config()), prepare(tiny_config("seed=1"))
    assert torch.equal(again.params, tiny_plan.params) and not torch.equal(other.params, tiny_plan.params)
    sums = [plan.about["backbone"]["sha256"] for plan in (tiny_plan, again, other)]
    assert sums[0] == sums[1] != sums[2]


def test_validation_replaces_the_test_split(tiny_plan: Plan, tiny_config: Make) -> None:
    whole, data = tiny_plan.workload.data, prepare(tiny_config("eval.validation=0.3")).workload.data
    assert whole.train.sizes.tolist() == [11, 12, 8, 12, 9, 10, 9, 9]
    assert data.test.sizes.tolist() == [3, 4, 2, 4, 3, 3, 3, 3]
    assert (data.train.sizes + data.test.sizes).tolist() == whole.train.sizes.tolist()
    assert not np.isin(data.test.values, whole.test.values).any()
    assert data.about == {**whole.about, "evaluated": "validation, 0.3 of the training samples"}
    assert "evaluated" not in whole.about


def test_blocks_count_the_steps_of_the_samples_that_stay(tiny_plan: Plan, tiny_config: Make) -> None:
    plan = prepare(tiny_config("eval.validation=0.9", "backend.block_size=1"))
    assert plan.workload.data.train.sizes.tolist() == [1] * 8  # one step each, so the order is that of the ids
    assert plan.blocks(np.arange(8)) == [(client,) for client in range(8)]


def test_a_client_with_nothing_to_hold_out_is_refused(tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.validation: client 0 has a single training sample"):
        prepare(tiny_config("env.samples_per_client=1", "env.partition=iid", "eval.validation=0.3"))


def test_preparing_does_not_seed_the_global_generator(tiny_config: Make) -> None:
    after = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        prepare(tiny_config())
        after.append(torch.rand(1).item())
    assert after[0] != after[1]


def test_a_wrong_model_is_refused_before_any_data_are_made(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cold"))
    with pytest.raises(ConfigError, match="did you mean 'test_vit'"):
        prepare(tiny_config("model.name=test_vi"))
    assert not (tmp_path / "cold").exists()


def test_a_backbone_without_room_is_refused_before_any_data_are_made(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cold"))
    with pytest.raises(ConfigError, match=r"most of it is frozen weights .*: lower model.img_size, or take a smaller"):
        prepare(tiny_config("model.options={patch_size: 8, embed_dim: 1000000}"))
    assert not (tmp_path / "cold").exists()


@pytest.mark.parametrize(
    ("built", "told"),
    [
        (lambda data: None, "env=shapes: build gave a NoneType, not a FederatedData"),
        (
            lambda data: replace(data, about={"clients": np.int64(8)}),
            "env=shapes: about cannot be written to the run folder as JSON "
            "(Object of type int64 is not JSON serializable)",
        ),
    ],
)
def test_what_an_env_must_give(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, built: Callable[[FederatedData], Any], told: str
) -> None:
    build = Shapes.build
    monkeypatch.setattr(Shapes, "build", lambda *values: built(build(*values)))
    with pytest.raises(DataError) as caught:
        prepare(tiny_config())
    assert str(caught.value) == told


def test_a_plan_without_room_in_memory_is_refused(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=256 << 20))
    with pytest.raises(ConfigError) as caught:
        prepare(tiny_config())
    (mistake,) = caught.value.mistakes
    assert mistake.startswith(
        "memory: the plan needs 0.6 GiB, 0.2 GiB are free; most of it is simulators (0.6 GiB): lower "
    )


def test_the_rows_of_all_clients_count(tiny_config: Make, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim import plan as module

    monkeypatch.setattr(module, "SIMULATOR_BASE_BYTES", 0)
    mib = prepare(tiny_config("algorithm=local", "env.num_clients=400")).about["memory_mib"]
    assert mib["clients' rows"] == round(400 * 712 * 4 / 2**20, 1)
    assert tiny_plan.about["memory_mib"]["clients' rows"] == 0.0  # fedavg's clients keep nothing


def test_a_processor_without_bf16_emulates_it(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, cuda, expected in ((False, False, True), (True, False, False), (False, True, False)):
        monkeypatch.setattr("fedsim.plan.has_bf16", lambda has=has: has)
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert emulates_bf16(tiny_config("precision=bf16")) is expected
        assert not emulates_bf16(tiny_config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("fedsim.plan.has_bf16", lambda: False)
    assert not emulates_bf16(tiny_config("precision=bf16", "backend=ray", "backend.address=10.0.0.1:6379"))
