"""One round of FedDPA, by hand: a row is one element of the global adapter and one of the personal one.

The mixture halves both: client i's loss is |(w / 2, v / 2) - a_i|^2 / 2, and its gradient in v is (v / 2 - a_i) / 2.
At rate 0.5 from v = 0: a_i / 4, then a_i / 4 + (a_i - a_i / 8) / 4 = 15 / 32 a_i. Client 1's is 15 / 32 * 8 = 3.75.
Global alone, from w = 0: 3/4 of the way, 3 for client 0 and 0 for client 1; the average is 3 / 4.
"""

import pytest
import torch
from by_hand import Federation, equal

from fedsim.algorithm import Task
from fedsim.backend import LocalBackend
from fedsim.config import algorithm_class
from fedsim.layout import Layout
from fedsim.local import LocalContext
from fedsim.plan import prepare

LAYOUT = Layout.of([("a.up", (1,), "adapter"), ("a.personal.up", (1,), "adapter.personal")])


def make(**settings):
    found = algorithm_class("feddpa")
    return found(found.Config(**settings), Task(LAYOUT, 2, 2, 2, 0.5, 1, 2))


def test_one_round_by_hand():
    federation = Federation(make())
    federation.play()
    assert equal(federation.server["w"], [0.75, 0.0])
    assert equal(federation.rows["own"], [[0.0], [3.75]])
    assert equal(federation.sent(), [[0.75, 0.0], [0.75, 0.0]])
    assert equal(federation.personal(), [[0.375, 0.0], [0.375, 1.875]])


def test_the_next_round_goes_on_from_the_own_adapter_and_only_the_global_one_is_sent():
    federation = Federation(make())
    federation.play()
    payload, rows = federation.payload(), federation.rows
    assert {name: value.shape for name, value in payload.items()} == {"w": (1, 1)}
    federation.play()
    # From 3.75 with two more steps: v <- v + (8 - v / 2) / 4 is 5.28125, 6.62109375.
    assert equal(federation.rows["own"], [[0.0], [6.62109375]])
    assert equal(rows["own"], [[0.0], [3.75]])  # what a round got, it left as it was


def test_without_a_share_it_is_fedavg_and_with_all_of_it_local_training():
    nothing, everything = Federation(make(mix=0.0)), Federation(make(mix=1.0))
    nothing.play()
    everything.play()
    assert equal(nothing.personal(), [[0.75, 0.0], [0.75, 0.0]])
    assert equal(everything.personal(), [[0.0, 0.0], [0.0, 6.0]])


def test_on_the_real_model_half_of_each_of_two_equal_adapters_and_heads_is_one(tiny_config):
    plan = prepare(tiny_config("algorithm=feddpa"))
    algorithm, d = plan.workload.algorithm(), plan.params.numel() // 2
    backend = LocalBackend(plan.workload, plan.params)
    simulator, local = backend.simulator, plan.workload.config.local
    ctx = LocalContext(simulator.model, simulator.samples, (0,), local, 0, 0, "train")
    w = plan.params[None, :d] + 0.1 * torch.randn(1, d, generator=torch.Generator().manual_seed(0))
    single = prepare(tiny_config("algorithm=fedavg")).workload.task.layout
    assert [piece.size for piece in plan.workload.task.layout.pieces] == 2 * [piece.size for piece in single.pieces]
    payload, rows = {"w": w}, {"own": w.clone()}
    batch = next(ctx.batches())
    alone = ctx.logits(algorithm.sent(payload, rows), batch)
    torch.testing.assert_close(ctx.logits(algorithm.personalise(payload, rows, ctx), batch), alone)
    backend.close()


@pytest.mark.parametrize("settings", [["cohort=4"], ["cohort=8", "env.partition=dirichlet", "env.alpha=0.3"]])
@pytest.mark.parametrize("name", ["fedrod", "feddpa", "fedsa_lora", "fedpac", "fedfomo"])
def test_what_clients_keep_does_not_depend_on_their_blocks(tiny_config, name, settings):
    """And who was not in a cohort keeps what it had."""
    chosen = [f"algorithm={name}", "local.momentum=0.5", *settings, *(["adapter=lora"] if "lora" in name else [])]
    kept = []
    for size in (8, 1):
        plan = prepare(tiny_config(*chosen, f"backend.block_size={size}"))
        backend = LocalBackend(plan.workload, plan.params)
        everyone, cohorts = torch.arange(8).numpy(), [plan.sample_cohort(round) for round in range(3)]
        before = backend.server.store.read(everyone)
        for round, cohort in enumerate(cohorts):
            backend.train(round, plan.blocks(cohort))
            backend.aggregate(round)
            after = backend.server.store.read(everyone)
            absent = [client for client in range(8) if client not in cohort]
            for key in after:
                assert torch.equal(after[key][absent], before[key][absent])
                assert (after[key][cohort] != before[key][cohort]).flatten(1).any(1).all()
            before = after
        backend.close()
        kept.append(before)
    for key in kept[0]:
        torch.testing.assert_close(kept[0][key], kept[1][key], rtol=0, atol=1e-5)
