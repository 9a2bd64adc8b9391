"""FedOpt by hand: the mean update of round 1 is FedAvg's, D = (0.75, 4.5), D^2 = (0.5625, 20.25)."""

import json
from math import sqrt

import pytest
import torch
from by_hand import Federation, equal, make

from fedsim.backend import LocalBackend
from fedsim.plan import prepare
from fedsim.simulation import resume, run

HALVES = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "eps": 1.0}


@pytest.mark.parametrize(
    ("optimizer", "m", "s"),
    [
        # s starts at eps^2 = 1.
        ("adam", (0.375, 2.25), (0.78125, 10.625)),
        # 1 is above 0.5625 and below 20.25: 1 - 0.28125 and 1 + 10.125.
        ("yogi", (0.375, 2.25), (0.71875, 11.125)),
        ("adagrad", (0.75, 4.5), (1.5625, 21.25)),
    ],
)
def test_one_round_of_the_adaptive_ones(optimizer, m, s):
    federation = Federation(make("fedopt", optimizer=optimizer, **HALVES))
    federation.play()
    assert equal(federation.server["m"], m)
    assert equal(federation.server["s"], s)
    expected = [moment / (sqrt(second) + 1) for moment, second in zip(m, s, strict=True)]
    assert federation.server["w"].tolist() == pytest.approx(expected)


def test_the_second_round_goes_on_from_the_moments_of_the_first():
    federation = Federation(make("fedopt", optimizer="adam", **HALVES))
    federation.play()
    w = federation.server["w"]
    mean = 0.75 * (torch.tensor([1.0, 6.0]) - w)  # three quarters of the way to the targets' weighted mean
    federation.play()
    m = 0.5 * torch.tensor([0.375, 2.25]) + 0.5 * mean
    s = 0.5 * torch.tensor([0.78125, 10.625]) + 0.5 * mean.square()
    torch.testing.assert_close(federation.server["w"], w + m / (s.sqrt() + 1))


def test_two_rounds_of_momentum():
    federation = Federation(make("fedopt", optimizer="momentum", beta1=0.5, lr=0.5))
    federation.play()
    assert equal(federation.server["w"], [0.375, 2.25])
    federation.play()
    # D = 0.75 (0.625, 3.75); m = (0.375, 2.25) + D = (0.84375, 5.0625).
    assert equal(federation.server["w"], [0.796875, 4.78125])


def test_defaults_are_on():
    adam, momentum = Federation(make("fedopt")), Federation(make("fedopt", optimizer="momentum"))
    adam.play()
    momentum.play()
    # 0.01 m / (sqrt(s) + eps), with m = D / 10 and s = D^2 / 100 + 1e-6 less a hundredth.
    expected = [0.001 * D / (sqrt(0.99e-6 + D**2 / 100) + 0.001) for D in (0.75, 4.5)]
    assert adam.server["w"].tolist() == pytest.approx(expected, rel=1e-5)
    assert equal(momentum.server["w"], [0.75, 4.5])


def test_without_momentum_at_rate_one_it_is_fedavg_bit_for_bit(tiny_config):
    def average(*settings):
        plan = prepare(tiny_config(*settings, "env.partition=dirichlet", "env.alpha=0.3"))
        backend = LocalBackend(plan.workload, plan.params)
        for round in range(2):
            backend.train(round, plan.blocks(plan.sample_cohort(round)))
            backend.aggregate(round)
        backend.close()
        return backend.server.average()

    plain = average("algorithm=fedavg")
    bare = ("algorithm=fedopt", "algorithm.optimizer=momentum", "algorithm.beta1=0", "algorithm.lr=1")
    assert torch.equal(plain, average(*bare))
    assert not torch.equal(plain, average("algorithm=fedopt"))


@pytest.mark.parametrize("optimizer", ["yogi", "adagrad", "momentum"])
def test_moments_are_in_the_checkpoint(tiny_config, tmp_path, stopped_after, optimizer):
    settings = ["algorithm=fedopt", f"algorithm.optimizer={optimizer}", "rounds=3", "eval.every=3"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    with stopped_after(1):
        run(tiny_config(*settings, f"output={tmp_path / 'stopped'}"))
    resume(tmp_path / "stopped")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "stopped")
    ]
    assert losses[0] == losses[1]
