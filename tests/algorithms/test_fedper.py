"""Rounds of FedPer, by hand: of the two elements of a row the first is averaged, the second stays with its client."""

import numpy as np
import pytest
import torch
from by_hand import LR, Federation, QuadraticContext, equal, make

from fedsim.algorithm import Task
from fedsim.algorithms.fedavg import FedAvg
from fedsim.algorithms.fedper import FedPer
from fedsim.backend import LocalBackend
from fedsim.layout import Layout
from fedsim.plan import prepare


def test_two_rounds():
    federation = Federation(make("fedper"))
    federation.play()
    # As FedAvg v_0 = (3, 0), v_1 = (0, 6); the average of the adapters is 3 / 4, the heads are 0 and 6.
    assert equal(federation.sent(), [[0.75, 0.0], [0.75, 6.0]])
    federation.play()
    # Three quarters of the way from there: (3.1875, 0) and (0.1875, 7.5); 3.1875 / 4 + 3 * 0.1875 / 4 = 0.9375.
    assert equal(federation.personal(), [[0.9375, 0.0], [0.9375, 7.5]])


def test_only_the_adapter_goes_up_and_down():
    federation = Federation(make("fedper"))
    federation.play()
    payload = federation.payload()
    update, _ = federation.algorithm.local_update(payload, federation.rows, QuadraticContext([0, 1]))
    assert equal(payload["w"], [[0.75]]) and payload.keys() == {"w"}
    assert equal(update["delta"], [[2.4375], [-0.5625]]) and update.keys() == {"delta"}


def test_the_server_has_no_average():
    federation = Federation(make("fedper"))
    assert federation.algorithm.average(federation.server) is None


def test_with_an_empty_head_it_is_fedavg_bit_for_bit():
    layout = Layout.of([("down", (1,), "adapter"), ("up", (1,), "adapter")])
    task = Task(layout, num_clients=2, cohort=2, num_classes=2, lr=LR, local_epochs=1, trainable=2)
    plain, cut = (Federation(kind(kind.Config(), task)) for kind in (FedAvg, FedPer))
    for _ in range(3):
        plain.play()
        cut.play()
        assert torch.equal(plain.server["w"], cut.server["w"])
        assert torch.equal(plain.personal(), cut.personal())


@pytest.mark.parametrize(("name", "shared"), [("fedper", "adapter"), ("fedrep", "adapter"), ("lgfedavg", "head")])
def test_absent_clients_keep_their_part_and_bytes_are_those_of_the_shared_one(tiny_config, name, shared):
    plan = prepare(tiny_config(f"algorithm={name}", "env.partition=dirichlet", "env.alpha=0.3"))
    backend, layout, everyone = LocalBackend(plan.workload, plan.params), plan.workload.task.layout, np.arange(8)
    kept = torch.cat([plan.params[None, ~layout.mask(shared)]] * 8)
    for round in range(3):
        cohort = plan.sample_cohort(round)
        down = backend.train(round, plan.blocks(cohort))
        up = backend.aggregate(round)
        rows = backend.server.store.read(everyone)["own"]
        assert (rows != kept).any(1).nonzero()[:, 0].tolist() == cohort.tolist()
        expected = 4 * layout.groups[shared] * len(cohort)
        assert up["bytes_up"] == sum(fact["bytes_down"] for fact in down) == expected
        kept = rows
    backend.close()


def test_adapters_are_averaged_by_the_clients_samples(tiny_config):
    """At first all heads are equal, so that the first round is FedAvg's."""
    settings = ["env.partition=dirichlet", "env.alpha=0.3", "cohort=8"]
    averages = {}
    for name in ("fedavg", "fedper"):
        plan = prepare(tiny_config(f"algorithm={name}", *settings))
        backend = LocalBackend(plan.workload, plan.params)
        backend.train(0, plan.blocks(plan.sample_cohort(0)))
        backend.aggregate(0)
        backend.close()
        averages[name] = backend.server.state["w"][plan.workload.task.layout.mask("adapter")]
    assert len(set(plan.workload.data.train.sizes.tolist())) > 2
    # Of rows of two lengths: a processor may add them up in another order.
    torch.testing.assert_close(averages["fedper"], averages["fedavg"], rtol=1e-5, atol=1e-7)
