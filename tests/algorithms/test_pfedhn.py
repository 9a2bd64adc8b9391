"""pFedHN by hand: what one backward pass writes into the last layer, and what must hold of the rest."""

import numpy as np
import pytest
import torch
from by_hand import SIZES, TARGETS, Federation, equal, make

from fedsim.algorithm import Cohort, Task
from fedsim.backend import LocalBackend
from fedsim.plan import prepare

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def features(federation):
    """``[2, hidden]``, what the last layer sees of each client."""
    with torch.no_grad():
        return federation.server["network"][:-1](federation.server["vector"])


def test_round_one_starts_from_the_initial_row_for_all():
    federation = Federation(make("pfedhn"))
    assert equal(federation.sent(), [[0.0, 0.0]] * 2)
    params = torch.tensor([1.0, -2.0])
    server = federation.algorithm.init_server(params, torch.Generator().manual_seed(1))
    assert torch.equal(federation.algorithm.broadcast(server, torch.arange(2), {})["w"], params.repeat(2, 1))


def test_one_round():
    federation = Federation(make("pfedhn", lr=0.1, clip=1e9, **PLAIN))
    federation.play()
    # Updates were (3, 0) and (0, 6). The last layer's weights are zero, so nothing below it moves; its bias moves by
    # lr times the updates' mean, its weights by lr times the mean of update x features. Clients weigh the same.
    h = features(federation)
    moved = 0.1 / 2 * (1 + h @ h.T) @ torch.tensor([[3.0, 0.0], [0.0, 6.0]])
    assert torch.allclose(federation.sent(), moved)
    assert torch.equal(federation.personal(), federation.sent())
    assert federation.algorithm.average(federation.server) is None


def test_one_backward_pass_is_the_mean_of_the_clients_vector_jacobian_products():
    federation = Federation(make("pfedhn", clip=1e9, **PLAIN))
    federation.play()
    network, delta = federation.server["network"], torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    before = [parameter.detach().clone() for parameter in network.parameters()]
    products = []
    for client in range(2):
        w = network(federation.server["vector"][client])
        products.append(torch.autograd.grad(w, list(network.parameters()), grad_outputs=-delta[client]))
    federation.algorithm.aggregate(federation.server, Cohort(1, torch.arange(2), SIZES), {"delta": delta}, {})
    for old, new, *parts in zip(before, network.parameters(), *products, strict=True):
        torch.testing.assert_close(new, old - 1e-2 * torch.stack(parts).mean(0))


def test_gradients_are_clipped_together():
    federation = Federation(make("pfedhn", clip=1e-3, **PLAIN))
    before = [parameter.detach().clone() for parameter in federation.server["network"].parameters()]
    federation.play()
    after = federation.server["network"].parameters()
    moved = torch.cat([(new - old).flatten() for old, new in zip(before, after, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-2 * 1e-3, rel=1e-3)
    assert federation.server["metrics"]["gradient_norm"] > 1


def test_every_client_gets_a_model_of_its_own():
    federation = Federation(make("pfedhn"))
    for _ in range(300):
        federation.play()
    assert torch.allclose(federation.sent(), TARGETS, atol=0.2)


def test_vectors_are_handed_out_by_the_norms_of_the_updates_not_by_names():
    task = Task(make("fedavg").task.layout, num_clients=6, cohort=3, num_classes=2, lr=0.5, local_epochs=1, trainable=6)
    found = type(make("pfedhn"))
    algorithm = found(found.Config(), task)
    server = algorithm.init_server(torch.zeros(2), torch.Generator().manual_seed(0))
    for round, (ids, lengths) in enumerate((([0, 2, 5], [3.0, 1.0, 2.0]), ([1, 2, 4], [2.0, 9.0, 1.0]))):
        delta = torch.tensor(lengths)[:, None] * torch.tensor([[0.6, 0.8]])
        server, _ = algorithm.aggregate(server, Cohort(round, torch.tensor(ids), torch.ones(3)), {"delta": delta}, {})
    # Of the first round 2, 5, 0; of the second 4, 1, for 2 has one. Client 3 was never heard of.
    assert server["vector"].tolist() == [3, 5, 1, 0, 4, 2]


def test_defaults_are_the_authors():
    network = Federation(make("pfedhn")).server["network"]
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    # Two clients: vectors of 1 + 2 / 4, rounded down, and one vector more than clients. Weights and biases.
    inner = [(100, 100), (100,)] * 3
    assert shapes == [(3, 1), (100, 1), (100,), *inner, (2, 100), (2,)]
    group = Federation(make("pfedhn")).server["optimizer"].param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-2, 0.9, 1e-3)


def test_the_memory_is_that_of_parameters_gradients_and_momentum():
    algorithm = make("pfedhn")
    network = Federation(algorithm).server["network"]
    assert algorithm.memory_bytes() == 3 * 4 * sum(parameter.numel() for parameter in network.parameters())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Federation(make("pfedhn")).play()
    assert torch.equal(before, torch.get_rng_state())


def test_clients_never_heard_of_share_one_model_and_one_row_goes_each_way(tiny_config):
    plan = prepare(tiny_config("algorithm=pfedhn"))
    backend = LocalBackend(plan.workload, plan.params)
    cohort = plan.sample_cohort(0)
    facts = backend.train(0, plan.blocks(cohort))
    expected = 4 * plan.workload.task.layout.size * len(cohort)
    assert backend.aggregate(0)["bytes_up"] == sum(fact["bytes_down"] for fact in facts) == expected
    sent = backend.server.broadcast(1, tuple(range(8)))[0]["w"]
    backend.close()
    absent = np.setdiff1d(np.arange(8), cohort)
    torch.testing.assert_close(sent[absent], sent[absent[:1]].expand(len(absent), -1))
    assert torch.pdist(sent[cohort]).min() > 1e-5
