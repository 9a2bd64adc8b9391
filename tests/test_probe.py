"""Sizes found by trying: the choice by hand, on a back end whose speed is a formula; and on the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsim.backend import LocalBackend
from fedsim.config import Config
from fedsim.errors import ConfigError, DeviceMemoryError
from fedsim.plan import Plan, prepare
from fedsim.probe import Trial, choose, told, with_sizes
from fedsim.ray_backend import RayBackend
from fedsim.simulation import resume, run

Make = Callable[..., Config]
AUTO = "backend.block_size=auto"
SHARED = ("env.num_clients=40", "cohort=40", AUTO, "backend.per_gpu=auto", "backend.simulators=0")


class Formula:
    """Two simulators, or as many as share two GPUs; a step of a block takes ``seconds(per_gpu, clients)``."""

    def __init__(self, seconds: Callable[[int, int], float], gpus: int = 0, room: int = 1000, most: int = 9) -> None:
        self._seconds, self.gpus, self.per_gpu, self._room, self._most = seconds, gpus, 1, room, most
        self.asked: list[tuple[int, int]] = []

    @property
    def simulators(self) -> int:
        return self.gpus * self.per_gpu or 2

    def share_gpus(self, per_gpu: int) -> None:
        assert self.gpus
        self.per_gpu = per_gpu
        if per_gpu > self._most:
            raise ConfigError(["backend.simulators: 9 actors did not start within 300 s"])

    def probe(self, block: tuple[int, ...]) -> float:
        self.asked.append((self.per_gpu, len(block)))
        if len(block) * self.per_gpu > self._room:
            raise DeviceMemoryError("too large")
        return self._seconds(self.per_gpu, len(block))


def sized(plan: Plan, backend: Any) -> tuple[int, int]:
    found = with_sizes(plan, backend).workload.config.backend
    return found.per_gpu, found.block_size


@pytest.fixture
def plan(tiny_config: Make) -> Plan:
    return prepare(tiny_config("env.num_clients=40", "cohort=40", AUTO))


def test_the_first_that_no_other_beats_by_more_than_a_twentieth():
    trials = [Trial(1, 1, 10.0), Trial(1, 2, 19.0), Trial(1, 4, 19.9), Trial(2, 1, 19.9)]
    assert choose(trials) == trials[1]
    assert choose([*trials, Trial(1, 8, 20.0)]).block_size == 4


def test_sizes_grow_up_to_a_cohorts_share_of_one_simulator(plan: Plan):
    backend = Formula(lambda per_gpu, clients: 1 + 0.1 * clients)
    assert sized(plan, backend) == (2, 20)
    assert backend.asked == [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (1, 20)]


def test_it_stops_when_two_sizes_in_a_row_brought_nothing(plan: Plan):
    backend = Formula(lambda per_gpu, clients: max(4, clients))
    assert sized(plan, backend) == (2, 4)
    assert backend.asked == [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16)]


def test_a_block_that_does_not_fit_ends_the_trials(plan: Plan):
    backend = Formula(lambda per_gpu, clients: 1.0, room=5)
    assert sized(plan, backend) == (2, 4)
    assert backend.asked[-1] == (1, 8)
    with pytest.raises(DeviceMemoryError, match="not even a block of one client"):
        with_sizes(plan, Formula(lambda per_gpu, clients: 1.0, room=0))


def test_the_clients_of_a_trial_are_those_with_most_samples(plan: Plan):
    sizes = plan.workload.data.train.sizes
    assert sorted(sizes[list(plan.longest(3))].tolist()) == sorted(sizes.tolist())[-3:]


def test_a_gpu_is_shared_by_as_many_as_it_takes_to_fill_it(tiny_config: Make):
    plan = prepare(tiny_config(*SHARED))
    half_full = Formula(lambda per_gpu, clients: max(2.0, per_gpu * clients / 8), gpus=2)
    found = with_sizes(plan, half_full)  # 2 GPUs do 16 client steps a second from 8 clients on a GPU, and not before
    assert (found.workload.config.backend.per_gpu, found.workload.config.backend.block_size) == (1, 16)
    latency = Formula(lambda per_gpu, clients: max(1.0, clients / 4), gpus=2)  # each simulator is alone on its part
    assert sized(plan, latency) == (4, 4)
    assert latency.per_gpu == 4
    assert told(found).startswith("1 simulators a GPU with blocks of 16 clients, by trial (")


def test_more_simulators_than_a_gpu_has_memory_for_are_no_mistake(tiny_config: Make, caplog: Any):
    plan = prepare(tiny_config(*SHARED))
    backend = Formula(lambda per_gpu, clients: max(1.0, clients / 4), gpus=2, most=2)
    assert sized(plan, backend) == (2, 4) and backend.per_gpu == 2
    told = "backend.simulators: 9 actors did not start within 300 s"
    assert caplog.messages == [f"4 simulators on a GPU did not start: {told}"]
    with pytest.raises(ZeroDivisionError):  # but what is wrong with a trial itself is told
        with_sizes(plan, Formula(lambda per_gpu, clients: 1 / 0, gpus=2))


@pytest.mark.parametrize("given", ["backend.simulators=4", "backend.gpu_fraction=0.5"])
def test_where_simulators_are_given_only_blocks_are_tried(tiny_config: Make, given: str):
    plan = prepare(tiny_config(*SHARED, given))
    backend = Formula(lambda per_gpu, clients: max(1.0, clients / 4), gpus=2)
    backend.per_gpu = 2  # as the back end makes of it
    assert sized(plan, backend) == (2, 4)
    assert {per_gpu for per_gpu, _ in backend.asked} == {2}


def test_numbers_are_taken_as_they_are_and_without_gpus_nothing_is_shared(tiny_config: Make):
    never = Formula(lambda per_gpu, clients: 1 / 0)
    plan = prepare(tiny_config("backend.block_size=3", "backend.per_gpu=auto"))
    assert sized(plan, never) == (1, 3)
    assert told(with_sizes(plan, never)) == ""


def test_auto_is_a_word_for_these_two_alone(tiny_config: Make):
    assert tiny_config(AUTO).backend.block_size == 0
    with pytest.raises(ConfigError, match=r"^backend\.simulators: 'auto' is not a whole number"):
        tiny_config("backend.simulators=auto")


def test_a_run_folder_holds_what_was_found_and_goes_on_with_it(tiny_config: Make, tmp_path: Path):
    config = tiny_config(AUTO, f"output={tmp_path / 'run'}", "rounds=1")
    first = run(config)
    saved = yaml.safe_load((first.folder / "config.yaml").read_text())
    sizes = [trial["block_size"] for trial in saved["about"]["probe"]]
    assert saved["backend"]["block_size"] in sizes and sizes[:2] == [1, 2]
    again = resume(first.folder).summary
    assert again["accuracy"] == first.summary["accuracy"]


def test_on_ray_all_simulators_take_the_block(tiny_config: Make):
    plan = prepare(tiny_config("backend=ray", "backend.simulators=2", "backend.dashboard=false", AUTO))
    backend = RayBackend(plan.workload, plan.params, "probe")
    try:
        assert backend.probe((0, 1)) > 0
        assert with_sizes(plan, backend).workload.config.backend.block_size >= 1
    finally:
        backend.close()


def test_a_probe_leaves_no_trace(tiny_config: Make):
    """Its streams are its own: the rounds after it are those without it."""
    plan = prepare(tiny_config())
    backends = [LocalBackend(plan.workload, plan.params) for _ in range(2)]
    backends[0].probe((0, 1, 2))
    for backend in backends:
        backend.train(0, plan.blocks(plan.sample_cohort(0)))
        backend.aggregate(0)
    assert torch.equal(backends[0].server.average(), backends[1].server.average())
