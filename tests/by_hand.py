"""Rounds small enough to work out by hand: rows of two elements, quadratic losses, the real local training.

Client i's loss is ``F_i(x) = |x - a_i|^2 / 2``, so an SGD step with rate 0.5 halves the distance to ``a_i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedsim.algorithm import Algorithm, Cohort, ServerState, State, Task
from fedsim.backend import LocalBackend
from fedsim.config import Config, LocalConfig, algorithm_class
from fedsim.layout import Layout
from fedsim.local import Batch, LocalContext
from fedsim.plan import Plan, prepare
from fedsim.server import Server

TARGETS = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
SIZES = torch.tensor([1.0, 3.0])
STEPS = 2
LR = 0.5


class QuadraticContext(LocalContext):
    """The context of a block whose clients have quadratic losses and take ``STEPS`` steps an epoch."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.local = tuple(ids), LocalConfig(lr=LR)
        self.sizes = SIZES[ids]
        self.targets = TARGETS[ids]
        self.loss_sum, self.loss_count = torch.zeros(len(ids)), torch.zeros(len(ids))
        self.steps = torch.zeros(len(ids), dtype=torch.int64)

    def batches(
        self, epochs: int | None = None, split: str = "train", batch_size: int | None = None
    ) -> Iterator[Batch]:
        for _ in range(STEPS * (1 if epochs is None else epochs)):
            labels = torch.zeros(len(self.ids), 1, dtype=torch.int64)
            yield Batch(torch.zeros(len(self.ids), 1), labels, torch.ones(len(self.ids), 1))

    def loss(self, w: Tensor, batch: Batch) -> Tensor:
        return (w - self.targets).square().sum(1) / 2


def make(name: str, **settings: Any) -> Algorithm:
    """A shipped algorithm over a row of two elements: one of the adapter, one of the head."""
    found = algorithm_class(name)
    layout = Layout.of([("adapter", (1,), "adapter"), ("head", (1,), "head")])
    task = Task(layout, num_clients=2, cohort=2, num_classes=2, lr=LR, local_epochs=1, trainable=2)
    return found(found.Config(**settings), task)


class Federation:
    """Two clients and a server, played one round at a time."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        start = torch.zeros(2)
        self.server: ServerState = algorithm.init_server(start, torch.Generator().manual_seed(0))
        self.rows: State = {name: value.expand(2, -1).clone() for name, value in algorithm.init_client(start).items()}
        self.round = 0

    def payload(self) -> State:
        return self.algorithm.broadcast(self.server, torch.arange(2), self.rows)

    def sent(self) -> Tensor:
        """``[2, 2]``, what each client would start from now."""
        return self.algorithm.sent(self.payload(), self.rows).expand(2, -1)

    def personal(self) -> Tensor:
        """``[2, 2]``, what would be evaluated now."""
        return self.algorithm.personalise(self.payload(), self.rows, QuadraticContext([0, 1])).expand(2, -1)

    def play(self) -> None:
        update, rows = self.algorithm.local_update(self.payload(), self.rows, QuadraticContext([0, 1]))
        cohort = Cohort(self.round, torch.arange(2), SIZES)
        self.server, self.rows = self.algorithm.aggregate(self.server, cohort, update, rows)
        self.round += 1


def equal(actual: Tensor, expected: list[Any]) -> bool:
    """Exact equality, bit for bit."""
    return torch.equal(actual, torch.tensor(expected))


def played(config: Config, rounds: int = 2) -> tuple[Plan, Server]:
    """A run's plan, and its server after so many rounds in this process."""
    plan = prepare(config)
    backend = LocalBackend(plan.workload, plan.params)
    for round in range(rounds):
        backend.train(round, plan.blocks(plan.sample_cohort(round)))
        backend.aggregate(round)
    backend.close()
    return plan, backend.server
