"""The simulator: trains and evaluates blocks of clients. It keeps nothing between blocks but the model and the data."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithm import Algorithm, Predictor, State, Task
from fedsim.config import Config, algorithm_class
from fedsim.env import FederatedData
from fedsim.errors import ClientError, FedsimError
from fedsim.local import LocalContext
from fedsim.models.frozen import halved
from fedsim.models.vit import VitModel
from fedsim.samples import Samples, room_bytes

T = TypeVar("T")
Facts = dict[str, Any]
"""What the driver sees of a block: ids, and numbers a client ``[C]``."""


@dataclass(frozen=True)
class Workload:
    """Everything a simulator needs; shared by all simulators of a node without a copy.

    Attributes:
        config: the run's configuration.
        task: what the algorithm may know.
        data: the federated data.
        frozen: the backbone's tensors as arrays.
        unseen: ids of the clients that never train (``eval.unseen``).
    """

    config: Config
    task: Task
    data: FederatedData
    frozen: dict[str, np.ndarray]
    unseen: frozenset[int] = frozenset()

    def weights(self) -> dict[str, np.ndarray]:
        """The backbone's tensors as simulators compute with them."""
        return halved(self.frozen) if self.config.precision == "bf16" else self.frozen

    def algorithm(self) -> Algorithm:
        choice = self.config.algorithm
        return algorithm_class(choice.name)(choice.settings, self.task)


class Simulator:
    """Trains and evaluates blocks on one device; ``gpu_share``: how much of a GPU's memory it may take."""

    def __init__(self, workload: Workload, device: str = "cpu", gpu_share: float = 1.0) -> None:
        config = workload.config
        self.config, self.algorithm = config, workload.algorithm()
        self.unseen = workload.unseen
        classes, extra = workload.task.num_classes, self.algorithm.extra
        self.model = VitModel(config.model, config.adapter, classes, workload.frozen, device, config.precision, extra)
        self.samples = Samples(workload.data, self.model.device, room_bytes(self.model.device, gpu_share))

    def train(self, round: int, ids: tuple[int, ...], payload: State, rows: State) -> tuple[Facts, State, State]:
        """Local training of a block: facts, ``update [C, …]``, and the clients' new rows.

        Raises:
            ClientError: the algorithm failed, or returned a tensor that has not one row a client.
        """
        ctx = self._context(round, ids, "train")
        payload, rows = self._to_device(payload), self._to_device(rows)

        def work() -> tuple[State, State]:
            update, new_rows = self.algorithm.local_update(payload, rows, ctx)
            return _to_host(update), _to_host(new_rows)

        update, new_rows = guarded("train", round, ids, work)
        refuse_other_axes(round, ids, "update", update)
        refuse_other_axes(round, ids, "rows", new_rows)
        facts = {
            "ids": np.array(ids),
            "loss": (ctx.loss_sum / ctx.loss_count.clamp(min=1)).cpu().numpy(),
            "samples": ctx.sizes.cpu().numpy(),
            "bytes_down": payload_bytes(payload, len(ids)),
        }
        return facts, update, new_rows

    def evaluate(self, round: int, ids: tuple[int, ...], payload: State, rows: State, average: Tensor | None) -> Facts:
        """Test accuracies of a block: of what was sent, of what ``personalise`` gives, and of the server's average.

        Returns:
            Facts with ``total [C]``, the test samples, and the correct ones under ``sent``, ``personal`` and,
            where there is an average, ``global``; where some clients never train, also ``adapted``: for these, what was
            sent after one local epoch, the same for all algorithms; NaN for the others.

        Raises:
            ClientError: the algorithm failed, or gave models that cannot be run.
        """
        ctx = self._context(round, ids, "personalise")
        payload, rows = self._to_device(payload), self._to_device(rows)
        sent = guarded("evaluate", round, ids, lambda: self.algorithm.sent(payload, rows))
        personal = guarded("evaluate", round, ids, lambda: self.algorithm.personalise(payload, rows, ctx))
        models: dict[str, Tensor | Predictor] = {"sent": sent, "personal": personal}
        if average is not None:
            models["global"] = average[None].to(self.model.device)
        if self.unseen.issuperset(ids):
            fresh = self._context(round, ids, "adapt")
            models["adapted"] = guarded("evaluate", round, ids, lambda: fresh.sgd(sent, epochs=1))
        total, correct = guarded("evaluate", round, ids, lambda: self._score(ctx, models))
        unknown = {"adapted": np.full(len(ids), np.nan)} if self.unseen else {}
        return {"ids": np.array(ids), "total": total, **unknown, **correct}

    def probe(self, ids: tuple[int, ...], params: Tensor) -> float:
        """Seconds that a step of local training takes such a block: batch, forward and backward pass.

        Args:
            ids: C clients; their first batches are taken.
            params: the row ``[d]`` of all of them.
        """
        ctx = self._context(0, ids, "probe")
        w = params.to(self.model.device)[None].expand(len(ids), -1)

        def step_s() -> float:
            start = time.perf_counter()
            float(ctx.grad(w, next(ctx.batches(epochs=1))).sum())  # which waits for a GPU
            return time.perf_counter() - start

        return min([step_s() for _ in range(3)][1:])  # the first warms up; others can only disturb

    def _score(
        self, ctx: LocalContext, models: dict[str, Tensor | Predictor]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Test samples ``[C]``, and the correct ones under each model; equal models are run once."""
        first = {name: next(other for other in models if _same(models[other], models[name])) for name in models}
        total = torch.zeros(len(ctx.ids), device=self.model.device)
        correct = {name: torch.zeros_like(total) for name in dict.fromkeys(first.values())}
        with torch.inference_mode():
            for batch in ctx.batches(split="test", batch_size=self.config.eval.batch_size):
                total[: batch.clients] += batch.mask.sum(1)
                for name, hits in correct.items():
                    model = models[name]
                    scores = ctx.logits(model, batch) if isinstance(model, Tensor) else model(batch)
                    found = scores.argmax(-1)
                    hits[: batch.clients] += ((found == batch.labels) * batch.mask).sum(1)
        return total.cpu().numpy(), {name: correct[first[name]].cpu().numpy() for name in models}

    def _context(self, round: int, ids: tuple[int, ...], purpose: str) -> LocalContext:
        local = self.config.local.in_round(round, self.config.rounds)
        return LocalContext(self.model, self.samples, ids, local, self.config.seed, round, purpose)

    def _to_device(self, state: State) -> State:
        # A copy even on the CPU: what came out of Ray's store is shared memory that an algorithm must not write to.
        return {name: value.to(self.model.device, copy=True) for name, value in state.items()}


def guarded(stage: str, round: int, ids: tuple[int, ...], work: Callable[[], T]) -> T:
    """Runs an algorithm's own code; its exception becomes a ``ClientError`` with the original traceback.

    Raises:
        ClientError: with stage, round and clients.
    """
    try:
        return work()
    except FedsimError:
        raise
    except Exception:
        raise ClientError(stage, round, list(ids), traceback.format_exc()) from None


def refuse_other_axes(round: int, ids: tuple[int, ...], kind: str, state: State) -> None:
    """What a block returns has one row a client: a leading axis C.

    Raises:
        ClientError: which tensor has another.
    """
    for name, value in state.items():
        if value.shape[:1] != (len(ids),):
            told = f"{kind} {name!r} has shape {tuple(value.shape)}; its first axis must be the {len(ids)} clients"
            raise ClientError("train", round, list(ids), told)


def payload_bytes(payload: State, clients: int) -> int:
    """Bytes sent down to so many clients: a shared tensor is sent to each of them."""
    return sum(value.numel() * value.element_size() // len(value) * clients for value in payload.values())


def _same(a: Tensor | Predictor, b: Tensor | Predictor) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _to_host(state: State) -> State:
    # Copies that do not wait for one another, and one wait for all of them.
    host = {name: value.detach().contiguous().to("cpu", non_blocking=True) for name, value in state.items()}
    if any(value.is_cuda for value in state.values()):
        torch.cuda.synchronize()
    return host
