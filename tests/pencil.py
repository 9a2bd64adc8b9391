"""A linear model of a few numbers, for algorithms whose losses look into the model: features, heads, labels.

A sample is its features ``x [k]``. The adapter scales them, ``f = a x``; the logits are ``f W + b``. The adapter's
elements stand in the row first, then the head's weight ``[k, classes]`` and bias, then those of a personal head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.algorithm import Algorithm, Task
from fedsim.config import LocalConfig, algorithm_class
from fedsim.layout import Layout
from fedsim.local import Batch, LocalContext
from fedsim.models.vit import VitModel

Samples = tuple[Sequence[Sequence[float]], Sequence[int]]
"""A client's features ``[n, k]`` and labels ``[n]``."""


def layout_of(dim: int, classes: int, extra: Sequence[str] = ()) -> Layout:
    parts: list[tuple[str, tuple[int, ...], str]] = [("adapter.up", (dim,), "adapter")]
    for group in ["head", *(group for group in extra if group.startswith("head"))]:
        parts += [(f"{group}.weight", (dim, classes), group), (f"{group}.bias", (classes,), group)]
    return Layout.of(parts)


def make(name: str, dim: int, classes: int, clients: int = 2, lr: float = 1.0, **settings: Any) -> Algorithm:
    found = algorithm_class(name)
    task = Task(layout_of(dim, classes, found.extra), clients, clients, classes, lr, 1, clients)
    return found(found.Config(**settings), task)


class LinearModel:
    """Stands in for ``VitModel``."""

    device = torch.device("cpu")
    head = VitModel.head

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def features(self, rows: Tensor, inputs: Tensor) -> Tensor:
        return inputs * self.layout.views(rows)["adapter.up"][:, None]

    def logits(self, rows: Tensor, inputs: Tensor) -> Tensor:
        features = self.features(rows, inputs)
        groups = [group for group in self.layout.groups if group.startswith("head")]
        return torch.stack([self.head(rows, features, group) for group in groups]).sum(0)  # type: ignore[misc]


class LinearContext(LocalContext):
    """A block of clients with such samples: one full batch an epoch, in order, clients with most samples first."""

    def __init__(self, layout: Layout, clients: Sequence[Samples], lr: float = 1.0, batch_size: int = 100) -> None:
        self.model: Any = LinearModel(layout)
        self.ids, self.local = tuple(range(len(clients))), LocalConfig(lr=lr, batch_size=batch_size)
        self.clients, self.classes = clients, layout.pieces[1].shape[1]
        self.sizes = torch.tensor([float(len(labels)) for _, labels in clients])
        self.loss_sum, self.loss_count = torch.zeros(2, len(clients))
        self.steps = torch.zeros(len(clients), dtype=torch.int64)

    def batches(
        self, epochs: int | None = None, split: str = "train", batch_size: int | None = None
    ) -> Iterator[Batch]:
        size, longest = batch_size or self.local.batch_size, int(self.sizes.max())
        for _ in range(self.local.epochs if epochs is None else epochs):
            for start in range(0, longest, size):
                yield batch_of([(x[start : start + size], y[start : start + size]) for x, y in self.clients])

    def class_counts(self) -> Tensor:
        return torch.stack([torch.bincount(torch.tensor(y), minlength=self.classes) for _, y in self.clients]).float()


def batch_of(clients: Sequence[Samples]) -> Batch:
    """Those who have samples, padded to the longest; the padding is of class 0, whoever has that."""
    clients = [client for client in clients if len(client[1])]
    width = max(len(labels) for _, labels in clients)
    inputs = torch.full((len(clients), width, len(clients[0][0][0])), 1e3)
    labels, mask = torch.zeros(len(clients), width, dtype=torch.int64), torch.zeros(len(clients), width)
    for i, (x, y) in enumerate(clients):
        inputs[i, : len(y)], labels[i, : len(y)], mask[i, : len(y)] = torch.tensor(x), torch.tensor(y), 1
    return Batch(inputs, labels, mask)
