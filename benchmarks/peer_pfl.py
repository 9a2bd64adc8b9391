"""FedAvg of `peer_work.py` in pfl-research; `peers.py` runs it in the peers' environment.

Alone, with as many threads as there are cores, or with ``torchrun`` as the documentation of pfl recommends, as that
many processes of one thread that share the cohort: the code is the same. A user's data are tensors in memory, and the
model trains in place.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_work import Report, Work, pixels
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """The model with the two methods that pfl wants."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.vit(pixels(images)), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted.from_unweighted(self.loss(images, labels).item())}


class Clock(TrainingProcessCallback):
    """Reports the ends of rounds."""

    def __init__(self, report: Report, work: Work) -> None:
        self.report, self.work = report, work

    def _ended(self) -> None:
        self.report.ended(lambda: {name: value.detach().numpy() for name, value in self.work.trained.items()})

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._ended()
        return Metrics()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self._ended()
        return False, Metrics()


def main(folder: str) -> None:
    work, report = Work(folder), Report(("pfl", "torch", "timm", "numpy"))
    settings = work.settings
    torch.set_num_threads(settings["processes"] // pytorch_ops.distributed.world_size)
    np.random.seed(settings["seed"])  # all processes must draw the same users
    turns = ((client, round) for round in itertools.count() for client in range(settings["clients"]))
    users = FederatedDataset(lambda turn: PyTorchTensorDataset(work.samples(*turn)), lambda: next(turns))
    parameters = list(work.trained.values())
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=settings["rounds"],
            evaluation_frequency=settings["rounds"],  # in the first round only, which is not counted
            train_cohort_size=settings["clients"],
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        PyTorchModel(
            Classifier(work.model),
            local_optimizer_create=lambda _, lr: torch.optim.SGD(parameters, lr=lr),
            central_optimizer=torch.optim.SGD(parameters, lr=1.0),
            amp_dtype=torch.bfloat16 if settings["precision"] == "bf16" else None,
        ),
        NNTrainHyperParams(
            local_batch_size=settings["batch_size"], local_num_epochs=1, local_learning_rate=settings["lr"]
        ),
        callbacks=[Clock(report, work)],
        send_metrics_to_platform=False,
    )
    if pytorch_ops.distributed.global_rank == 0:
        report.write(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
