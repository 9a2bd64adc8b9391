"""One round of FedSA-LoRA by hand: a row is one element of A, averaged, and one of B, the client's own."""

import torch
from by_hand import Federation, equal

from fedsim.algorithm import Task
from fedsim.backend import LocalBackend
from fedsim.config import algorithm_class
from fedsim.layout import Layout
from fedsim.plan import prepare

LAYOUT = Layout.of([("x.A", (1,), "adapter.A"), ("x.B", (1,), "adapter.B")])


def test_a_is_averaged_and_b_stays():
    found = algorithm_class("fedsa_lora")
    federation = Federation(found(found.Config(), Task(LAYOUT, 2, 2, 2, 0.5, 1, 2)))
    federation.play()
    # A: 3 and 0, with 1 and 3 samples; B: 3/4 of the way to 0 and to 8.
    assert equal(federation.sent(), [[0.75, 0.0], [0.75, 6.0]])
    assert federation.payload()["w"].tolist() == [[0.75]]
    assert federation.algorithm.average(federation.server) is None
    federation.play()
    # A from 0.75: 3.1875 and 0.1875; B goes on from its own.
    assert equal(federation.sent(), [[0.9375, 0.0], [0.9375, 7.5]])


def test_only_a_goes_up_and_the_head_stays(tiny_config):
    plan = prepare(tiny_config("algorithm=fedsa_lora", "adapter=lora"))
    layout, backend = plan.workload.task.layout, LocalBackend(plan.workload, plan.params)
    backend.train(0, plan.blocks(plan.sample_cohort(0)))
    facts = backend.aggregate(0)
    payload, rows = backend.server.broadcast(1, tuple(range(8)))
    sent = backend.server.algorithm.sent(payload, rows)
    backend.close()
    assert facts["bytes_up"] == 4 * 4 * layout.groups["adapter.A"]
    for group, shared in {"adapter.A": True, "adapter.B": False, "head": False}.items():
        part = sent[:, layout.mask(group)]
        assert torch.equal(part, part[:1].expand_as(part)) is shared
