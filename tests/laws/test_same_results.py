"""Laws of the engine, over every shipped algorithm."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from run_folders import results

from fedsim import registry
from fedsim.algorithm import Algorithm, State
from fedsim.backend import Backend, Block, LocalBackend
from fedsim.config import Config
from fedsim.env import Ragged
from fedsim.local import LocalContext
from fedsim.plan import Plan, prepare
from fedsim.simulation import resume, run
from fedsim.simulator import Facts, Simulator

ALGORITHMS = registry.names("fedsim.algorithms", Algorithm)
SETTINGS = {"ffa_lora": ["adapter=lora"], "fedsa_lora": ["adapter=lora"]}
"""What an algorithm cannot run without."""


def chosen(algorithm: str) -> list[str]:
    return [f"algorithm={algorithm}", *SETTINGS.get(algorithm, [])]


def play(plan: Plan, backend: Backend, rounds: int = 2) -> list[dict[str, np.ndarray]]:
    """All numbers that a client sees in some rounds: losses, and correct test samples of every model."""
    seen = []
    everyone = np.arange(plan.workload.data.num_clients)
    for round in range(rounds):
        trained = backend.train(round, plan.blocks(plan.sample_cohort(round)))
        backend.aggregate(round)
        facts = trained + backend.evaluate(round, plan.blocks(everyone))
        seen += [{k: v for k, v in fact.items() if isinstance(v, np.ndarray)} for fact in facts]
    return seen


def rows_sent(plan: Plan, backend: LocalBackend) -> torch.Tensor:
    """``[N, d]``, what every client would start from now."""
    ids = tuple(range(plan.workload.data.num_clients))
    payload, rows = backend.server.broadcast(0, ids)
    return backend.server.algorithm.sent(payload, rows).expand(len(ids), -1)


def assert_equal(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def local_rounds(config: Config, rounds: int = 2) -> tuple[Plan, LocalBackend, list[dict[str, np.ndarray]]]:
    plan = prepare(config)
    backend = LocalBackend(plan.workload, plan.params)
    try:
        return plan, backend, play(plan, backend, rounds)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all runs of this file: starting it costs more than the runs."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="warning", namespace="laws")
    yield
    ray.shutdown()


class Pool(LocalBackend):
    """Three simulators in this process, each with every third block, the last block first; what would travel, does."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.workload, plan.params)
        self.plan = plan
        self.pool = [Simulator(travelled(plan.workload)) for _ in range(3)]

    def train(self, round: int, blocks: list[Block]) -> list[Facts]:
        done = self._each(blocks, lambda k, block: self.pool[k].train(round, block, *self._sent(round, block)))
        self._trained = [(block, result[1:]) for block, result in zip(blocks, done, strict=True)]
        return [fact for fact, *_ in done]

    def evaluate(self, round: int, blocks: list[Block]) -> list[Facts]:
        average = self.server.average()
        return self._each(
            blocks, lambda k, block: self.pool[k].evaluate(round, block, *self._sent(round, block), average)
        )

    def _sent(self, round: int, block: Block) -> tuple[State, State]:
        return travelled(self.server.broadcast(round, block))

    def _each(self, blocks: list[Block], work: Callable[[int, Block], Any]) -> list[Any]:
        done = {index: travelled(work(index % 3, blocks[index])) for index in reversed(range(len(blocks)))}
        return [done[index] for index in range(len(blocks))]


def travelled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_which_simulator_has_which_block_and_when_changes_nothing(tiny_config, algorithm):
    settings = [*chosen(algorithm), "backend.block_size=2"]
    _, _, expected = local_rounds(tiny_config(*settings))
    pool = Pool(prepare(tiny_config(*settings)))
    try:
        assert_equal(play(pool.plan, pool), expected)
    finally:
        pool.close()


# On Ray itself: one of each kind, what is stateless, kept by clients, learned by the server, or added to the row. The
# law above has every algorithm; a pool of actors takes ten seconds to start.
@pytest.mark.parametrize(
    ("algorithm", "simulators"),
    [("pfedseq", 1), ("pfedseq", 2), ("pfedseq", 3), ("fedavg", 2), ("scaffold", 2), ("pfedhn", 2), ("fedrod", 2)],
)
def test_any_number_of_simulators_gives_what_no_ray_gives_bit_for_bit(cluster, tiny_config, algorithm, simulators):
    from fedsim.ray_backend import RayBackend

    settings = [*chosen(algorithm), "backend.block_size=2"]
    _, _, expected = local_rounds(tiny_config(*settings))
    plan = prepare(tiny_config(*settings, "backend=ray", f"backend.simulators={simulators}"))
    backend = RayBackend(plan.workload, plan.params, f"laws-{algorithm}-{simulators}")
    try:
        assert backend.simulators == simulators
        assert_equal(play(plan, backend), expected)
    finally:
        backend.close()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_of_clients_equals_blocks_of_one(tiny_config, algorithm):
    plan, backend, _ = local_rounds(tiny_config(*chosen(algorithm), "backend.block_size=8"))
    alone_plan, alone_backend, _ = local_rounds(tiny_config(*chosen(algorithm), "backend.block_size=1"))
    torch.testing.assert_close(rows_sent(plan, backend), rows_sent(alone_plan, alone_backend), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_of_clients_of_unequal_size_equal_blocks_of_one(tiny_config, algorithm):
    settings = [*chosen(algorithm), "env.partition=dirichlet", "env.alpha=0.3", "cohort=8"]
    plan, backend, _ = local_rounds(tiny_config(*settings, "backend.block_size=8"))
    assert len(set(plan.workload.data.train.sizes.tolist())) > 2
    alone_plan, alone_backend, _ = local_rounds(tiny_config(*settings, "backend.block_size=1"))
    torch.testing.assert_close(rows_sent(plan, backend), rows_sent(alone_plan, alone_backend), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_second_run_equals_the_first(tiny_config, algorithm):
    config = tiny_config(*chosen(algorithm))
    assert_equal(local_rounds(config)[2], local_rounds(config)[2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_local_step_is_one_of_the_optimiser_that_was_chosen(tiny_config, algorithm):
    """Seen by what clipping to nothing leaves: after a round all clients are sent what they were sent before."""

    def moved(*settings: str) -> float:
        plan = prepare(tiny_config(*chosen(algorithm), *settings))
        backend = LocalBackend(plan.workload, plan.params)
        before = rows_sent(plan, backend)
        backend.train(0, plan.blocks(plan.sample_cohort(0)))
        backend.aggregate(0)
        backend.close()
        return float((rows_sent(plan, backend) - before).abs().max())

    # pFedHN's hypernetwork has a weight decay of its own.
    assert moved("local.clip=1e-9") < (1e-4 if algorithm == "pfedhn" else 1e-6)
    assert moved() > 1e-4


def test_a_new_seed_changes_cohort_batches_and_initial_adapters(tiny_config):
    one, other = prepare(tiny_config("seed=1")), prepare(tiny_config("seed=2"))
    assert [one.sample_cohort(r).tolist() for r in range(5)] != [other.sample_cohort(r).tolist() for r in range(5)]
    assert not torch.equal(one.params, other.params)
    first = [next(iter(context(plan).batches())).inputs for plan in (one, other)]
    assert not torch.equal(first[0], first[1])


def test_a_new_seed_shuffles_the_same_data_in_another_order(tiny_config):
    plan = prepare(tiny_config("seed=1"))
    reseeded = replace(plan, workload=replace(plan.workload, config=replace(plan.workload.config, seed=2)))
    labels = [torch.cat([batch.inputs.sum((2, 3, 4)) for batch in context(p).batches()], 1) for p in (plan, reseeded)]
    assert not torch.equal(labels[0], labels[1])
    assert torch.equal(labels[0].sort(1).values, labels[1].sort(1).values)


def context(plan: Plan) -> LocalContext:
    return Simulator(plan.workload)._context(0, (0, 1), "train")


def test_zero_calibration_is_fedavg(tiny_config):
    plain = local_rounds(tiny_config("algorithm=fedavg"), rounds=3)
    calibrated = local_rounds(
        tiny_config("algorithm=pfedseq", "algorithm.gain=0", "algorithm.finetune_epochs=0"), rounds=3
    )
    assert_equal(plain[2], calibrated[2])
    assert torch.equal(plain[1].server.average(), calibrated[1].server.average())


def test_calibration_is_not_fedavg(tiny_config):
    settings = ["algorithm=pfedseq", "algorithm.finetune_epochs=0", "cohort=8"]
    plan, backend, _ = local_rounds(tiny_config(*settings), rounds=3)
    sent = rows_sent(plan, backend)
    assert (sent - backend.server.average()).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_renaming_clients_permutes_results_and_changes_nothing_else(tiny_config, algorithm):
    """With one full batch a round, so that the order in which a client's samples are drawn does not matter."""
    plan = prepare(tiny_config(*chosen(algorithm), "cohort=8", "local.batch_size=64"))
    data, order = plan.workload.data, [3, 1, 7, 0, 2, 6, 5, 4]
    renamed = replace(
        data, train=Ragged.of([data.train[k] for k in order]), test=Ragged.of([data.test[k] for k in order])
    )
    sent = []
    for held in (data, renamed):
        workload = replace(plan.workload, data=held)
        backend = LocalBackend(workload, plan.params)
        play(replace(plan, workload=workload), backend, rounds=3)
        backend.close()
        sent.append(rows_sent(plan, backend))
    torch.testing.assert_close(sent[0][order], sent[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stop_and_resume_gives_bit_identical_results(tiny_config, tmp_path, algorithm, stopped_after):
    settings = [*chosen(algorithm), "rounds=4", "eval.every=2"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))

    with stopped_after(2):
        run(tiny_config(*settings, f"output={tmp_path / 'stopped'}"))
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "interrupted"
    resume(tmp_path / "stopped")
    assert results(tmp_path / "stopped") == results(tmp_path / "undisturbed")
