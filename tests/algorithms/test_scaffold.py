"""SCAFFOLD by hand.

Two steps of rate 0.5 go three quarters of the way to the minimum of the corrected loss, which lies at a - (c - c_i).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import TARGETS, Federation, QuadraticContext, equal, make, played

from fedsim.algorithm import Cohort
from fedsim.config import LocalConfig
from fedsim.local import Batch


class UnevenContext(QuadraticContext):
    """Client 1 takes two steps, client 0 leaves after one."""

    def __init__(self):
        super().__init__([1, 0])

    def batches(self, epochs=None, split="train", batch_size=None):
        for m, batch in zip([2, 1], super().batches(epochs), strict=True):
            yield Batch(batch.inputs[:m], batch.labels[:m], batch.mask[:m])

    def loss(self, w, batch):
        return (w - self.targets[: batch.clients]).square().sum(1) / 2


def test_two_rounds():
    federation = Federation(make("scaffold"))
    federation.play()
    # As FedAvg. The gradients were (-4, 0), (-2, 0) and (0, -8), (0, -4): c_i is their mean.
    assert equal(federation.server["w"], [0.75, 4.5])
    assert equal(federation.rows["c_i"], [[-3.0, 0.0], [0.0, -6.0]])
    assert equal(federation.server["c"], [-1.5, -3.0])
    federation.play()
    # c - c_i = (1.5, -3), (-1.5, 3), so the minima are (2.5, 3) and (1.5, 5); three quarters of the way to them are
    # (1.3125, -1.125) and (0.5625, 0.375), whose weighted mean is (0.75, 0).
    assert equal(federation.server["w"], [1.5, 4.5])
    # Client 0's own gradients, at (0.75, 4.5) and half-way to (2.5, 3): (-3.25, 4.5), (-2.375, 3.75).
    assert equal(federation.rows["c_i"], [[-2.8125, 4.125], [0.9375, -3.375]])
    assert equal(federation.server["c"], [-0.9375, 0.375])


def test_the_servers_rate_scales_the_mean():
    federation = Federation(make("scaffold", lr_s=0.5))
    federation.play()
    assert equal(federation.server["w"], [0.375, 2.25])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_it_ends_where_the_mean_of_all_losses_is_least(momentum, monkeypatch):
    monkeypatch.setattr("by_hand.LocalConfig", lambda lr: LocalConfig(lr=lr, momentum=momentum))
    federation = Federation(make("scaffold"))
    for _ in range(100):
        federation.play()
    # The clients are as far from it as ever, yet do not drift: c_i are their gradients there, and c is none.
    assert torch.allclose(federation.server["w"], torch.tensor([2.0, 4.0]), atol=1e-4)
    assert torch.allclose(federation.rows["c_i"], torch.tensor([2.0, 4.0]) - TARGETS, atol=1e-4)
    assert torch.allclose(federation.server["c"], torch.zeros(2), atol=1e-4)


def test_c_i_divides_by_the_steps_that_each_client_took():
    algorithm, ctx = make("scaffold"), UnevenContext()
    ctx.steps += 7  # taken before
    payload = {"w": torch.zeros(1, 2), "c": torch.zeros(1, 2)}
    update, rows = algorithm.local_update(payload, {"c_i": torch.zeros(2, 2)}, ctx)
    # Client 1 saw the gradients -8 and -4, client 0 only -4.
    assert equal(update["delta"], [[0.0, 6.0], [2.0, 0.0]])
    assert equal(rows["c_i"], [[0.0, -6.0], [-4.0, 0.0]])
    assert equal(update["dc_i"], [[0.0, -6.0], [-4.0, 0.0]])


def test_with_momentum_c_i_is_still_a_mean_of_gradients():
    ctx = UnevenContext()
    ctx.local = replace(ctx.local, momentum=0.5)
    payload = {"w": torch.zeros(1, 2), "c": torch.zeros(1, 2)}
    update, rows = make("scaffold").local_update(payload, {"c_i": torch.zeros(2, 2)}, ctx)
    # Client 1 goes to 4, where its gradient is -4, and on by 0.5 (4 + 0.5 8) to 8. It applied -8 one and a half times
    # and -4 once: -16 / 2.5.
    assert equal(update["delta"], [[0.0, 8.0], [2.0, 0.0]])
    assert torch.allclose(rows["c_i"], torch.tensor([[0.0, -6.4], [-4.0, 0.0]]))


@pytest.mark.parametrize(("population", "trainable", "c"), [(2, 2, -3.0), (3, 2, -3.0), (3, 3, -2.0)])
def test_c_is_a_mean_over_all_clients_that_ever_train_whoever_took_part(population, trainable, c):
    federation = Federation(make("scaffold"))
    federation.algorithm.task = replace(federation.algorithm.task, num_clients=population, trainable=trainable)
    update = {"delta": torch.tensor([[0.0, 6.0]]), "dc_i": torch.tensor([[0.0, -6.0]])}
    cohort = Cohort(0, torch.tensor([1]), torch.tensor([3.0]))
    server, _ = federation.algorithm.aggregate(federation.server, cohort, update, {})
    assert equal(server["c"], [0.0, c])
    assert equal(server["w"], [0.0, 6.0])


UNEVEN = ("env.partition=dirichlet", "env.alpha=0.3")


def test_round_one_is_fedavg_bit_for_bit_and_round_two_is_not(tiny_config):
    for rounds, same in ((1, True), (2, False)):
        averages = [
            played(tiny_config(f"algorithm={name}", *UNEVEN), rounds)[1].average() for name in ("fedavg", "scaffold")
        ]
        assert torch.equal(*averages) == same


def test_blocks_of_unequal_clients_keep_what_each_keeps_alone_and_the_others_keep_theirs(tiny_config):
    kept = []
    for size in (8, 1):
        plan, server = played(tiny_config("algorithm=scaffold", *UNEVEN, f"backend.block_size={size}"), 2)
        kept.append(server.store.read(np.arange(8))["c_i"])
    torch.testing.assert_close(*kept, rtol=0, atol=1e-4)
    took_part = np.union1d(plan.sample_cohort(0), plan.sample_cohort(1))
    assert kept[0].any(1).nonzero()[:, 0].tolist() == took_part.tolist() != list(range(8))
    torch.testing.assert_close(server.state["c"], kept[1].mean(0))
