"""What an algorithm may do with the data of a block of clients: batches, gradients, local training.

A block's clients are sorted by their number of steps, most first, so that those who have fewer leave the batch early:
at every step the clients still training are the first ``batch.clients``. A client's last, partial batch is padded and
masked.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.config import LocalConfig
from fedsim.models.vit import VitModel
from fedsim.rng import stream, torch_stream
from fedsim.samples import Samples

Loss = Callable[[Tensor, "Batch"], Tensor]
"""From rows ``[m, d]`` and a batch of m clients to one loss a client ``[m]``."""


@dataclass(frozen=True)
class Batch:
    """One step's samples of the first m clients of a block.

    Attributes:
        inputs: images ``[m, b, 3, px, px] uint8``; with a cached prefix, their tokens ``[m, b, P, T, k]``.
        labels: ``[m, b] int64``.
        mask: ``[m, b] float32``, 0 on padding.
        left: places below m ``[k] int64`` of clients that have left all the same: all padding. Only where a block is
            not sorted by its steps, as in parts of the clients' samples.
    """

    inputs: Tensor
    labels: Tensor
    mask: Tensor
    left: Tensor | None = None

    @property
    def clients(self) -> int:
        """m, the clients that still train."""
        return len(self.labels)


class LocalContext:
    """A block of C clients in one round. Everything is for the whole block.

    Attributes:
        ids: ``[C]`` client ids, in the block's order.
        sizes: ``[C] float32``, n_i.
        local: the clients' training settings, with this round's learning rate.
        loss_sum, loss_count: ``[C]`` training losses seen so far, summed over samples, and their number; they lie on
            the model's device, so that a step does not wait for it.
        steps: ``[C] int64``, gradients taken so far.
    """

    def __init__(
        self,
        model: VitModel,
        samples: Samples,
        ids: tuple[int, ...],
        local: LocalConfig,
        seed: int,
        round: int,
        purpose: str,
    ) -> None:
        self.model, self.samples, self.data, self.ids, self.local = model, samples, samples.data, ids, local
        self.seed, self.round, self.purpose = seed, round, purpose
        self._hold([self.data.train[client] for client in ids])
        self.loss_sum, self.loss_count = torch.zeros(2, len(ids), device=model.device)
        self.steps = torch.zeros(len(ids), dtype=torch.int64, device=model.device)
        # One stream a client for the whole round: a second pass over the data draws other batches than the first.
        self._orders = [stream(seed, f"{purpose}.batches", round, client) for client in ids]

    def _hold(self, own: list[np.ndarray]) -> None:
        self._own = own
        self.sizes = torch.tensor([float(len(samples)) for samples in own], device=self.model.device)

    @property
    def lr(self) -> float:
        """The learning rate of this round."""
        return self.local.lr

    def generator(self, purpose: str) -> list[torch.Generator]:
        """One stream a client, on the CPU, for whatever an algorithm draws itself."""
        return [torch_stream(self.seed, f"{self.purpose}.{purpose}", self.round, client) for client in self.ids]

    # Data --------------------------------------------------------------------------------------------------------

    def batches(
        self, epochs: int | None = None, split: str = "train", batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Batches of ``local.batch_size`` samples of each client: shuffled every epoch, or the test split in order.

        Raises:
            ValueError: ``split`` is neither ``"train"`` nor ``"test"``.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split {split!r} is neither 'train' nor 'test'")
        epochs = self.local.epochs if epochs is None else epochs
        if split == "test":
            yield from self._cut([self.data.test[client] for client in self.ids], batch_size or self.local.batch_size)
            return
        for _ in range(epochs):
            orders = [rng.permutation(own) for rng, own in zip(self._orders, self._own, strict=True)]
            yield from self._cut(orders, batch_size or self.local.batch_size)

    def split(self, share: float) -> tuple[LocalContext, LocalContext]:
        """Two contexts of the same block: of the clients' training samples without a part, and of that part.

        ``round(share * n)`` of a client's ``n`` samples are in the second, at least one; the last one never is. They
        are drawn once: the same in all rounds. Losses and steps are counted together with this context's.
        """
        kept, held = copy.copy(self), copy.copy(self)
        chosen = [self._draw(own, min(max(1, round(share * len(own))), len(own) - 1)) for own in self._own]
        kept._hold([own[~mask] for own, mask in zip(self._own, chosen, strict=True)])
        held._hold([own[mask] for own, mask in zip(self._own, chosen, strict=True)])
        return kept, held

    def _draw(self, own: np.ndarray, number: int) -> np.ndarray:
        """``[n] bool``, true for so many of a client's samples."""
        if number < 1:
            return np.zeros(len(own), dtype=bool)
        # Keyed by the client's first sample, not by its id: renaming the clients changes nothing.
        order = stream(self.seed, "split", 0, int(own[0])).permutation(len(own))
        return order < number

    def class_counts(self) -> Tensor:
        """Training samples of each class: ``[C, classes] float32``."""
        counts = [np.bincount(self.data.labels[own], minlength=len(self.data.classes)) for own in self._own]
        return torch.from_numpy(np.stack(counts)).float().to(self.model.device)

    def _cut(self, indices: list[np.ndarray], size: int) -> Iterator[Batch]:
        longest = max(len(own) for own in indices)
        for start in range(0, longest, size):
            parts = [own[start : start + size] for own in indices]
            clients = max(i + 1 for i, part in enumerate(parts) if len(part))
            yield self._gather(parts[:clients])

    def _gather(self, parts: list[np.ndarray]) -> Batch:
        width = max(len(part) for part in parts)
        index = np.zeros((len(parts), width), dtype=np.int64)
        mask = np.zeros((len(parts), width), dtype=np.float32)
        for i, part in enumerate(parts):
            index[i, : len(part)], mask[i, : len(part)] = part, 1
        left = np.array([i for i, part in enumerate(parts) if not len(part)], dtype=np.int64)
        sent = self.samples.send
        return Batch(*self.samples.take(index), sent(mask), sent(left) if len(left) else None)

    # Model -------------------------------------------------------------------------------------------------------

    def features(self, w: Tensor, batch: Batch) -> Tensor:
        """Pooled features ``[m, b, k]`` under the rows ``w [C, d]`` or ``[1, d]``."""
        return self.model.features(self._rows(w, batch), batch.inputs)

    def logits(self, w: Tensor, batch: Batch) -> Tensor:
        """Logits ``[m, b, classes]`` under the rows ``w [C, d]`` or ``[1, d]``."""
        return self.model.logits(self._rows(w, batch), batch.inputs)

    def head(self, w: Tensor, features: Tensor, group: str = "head") -> Tensor:
        """Logits ``[m, b, classes]`` of features ``[m, b, k]`` under one head of the rows ``w [C, d]`` or ``[1, d]``.

        ``group`` picks it where a row has two: ``"head"`` or ``"head.personal"``.
        """
        rows = w.expand(len(features), -1) if len(w) == 1 else w[: len(features)]
        return self.model.head(rows, features, group)

    def loss(self, w: Tensor, batch: Batch) -> Tensor:
        """F_i on the batch: each client's mean cross-entropy ``[m]``."""
        return client_mean(cross_entropy(self.logits(w, batch), batch.labels), batch.mask)

    def grad(self, w: Tensor, batch: Batch, loss: Loss | None = None) -> Tensor:
        """The gradient of each client's loss at its row: ``[C, d]``, zero for clients that no longer train.

        Args:
            w: rows ``[C, d]`` or ``[1, d]``.
            batch: the samples.
            loss: one loss a client from rows and batch; default: cross-entropy.
        """
        gradient = torch.zeros(len(self.ids), w.shape[1], device=w.device)
        gradient[: batch.clients] = self._active_grad(self._rows(w, batch), batch, loss)
        return gradient

    def sgd(
        self,
        w: Tensor,
        epochs: int | None = None,
        mask: Tensor | None = None,
        pull: Callable[[Tensor], Tensor] | None = None,
        loss: Loss | None = None,
        gradient: Callable[[Tensor, Batch], Tensor] | None = None,
        lr: float | None = None,
    ) -> Tensor:
        """Local training, ``SGD(F_i; w_i)`` for every client of the block, by the optimiser of the settings.

        Args:
            w: rows ``[C, d]`` or ``[1, d]`` to start from; left as they are.
            epochs: default ``local.epochs``.
            mask: ``[d] bool``; only these elements are trained.
            pull: from the rows ``[C, d]`` an extra gradient ``[C, d]``, such as ``mu (w - w0)``.
            loss: as for ``grad``.
            gradient: from the rows ``[C, d]`` and a batch what to descend ``[C, d]``, in place of the loss's gradient.
            lr: default ``local.lr``.

        Returns:
            The trained rows ``[C, d]``.
        """
        w = w.expand(len(self.ids), -1).clone()
        mask = None if mask is None else mask.to(w.device)
        optimiser = Optimiser(self.local if lr is None else dataclasses.replace(self.local, lr=lr), w)
        for batch in self.batches(epochs):
            m = batch.clients
            slope = gradient(w, batch)[:m] if gradient else self._active_grad(w[:m], batch, loss)
            if pull is not None:
                slope += pull(w)[:m]
            if mask is not None:
                slope *= mask
            optimiser.step(w[:m], slope, mask, batch.left)
        return w

    def _rows(self, w: Tensor, batch: Batch) -> Tensor:
        return w.expand(batch.clients, -1) if len(w) == 1 else w[: batch.clients]

    def _active_grad(self, w: Tensor, batch: Batch, loss: Loss | None = None) -> Tensor:
        w = w.detach().requires_grad_()
        losses = (loss or self.loss)(w, batch)
        (gradient,) = torch.autograd.grad(losses.sum(), w)
        m, samples = batch.clients, batch.mask.sum(1)
        self.steps[:m] += samples > 0
        self.loss_sum[:m] += losses.detach() * samples
        self.loss_count[:m] += samples
        return gradient.contiguous()  # it may be an expanded view; it is changed in place


class Optimiser:
    """The rules of ``torch.optim``'s SGD, Adam and AdamW for a block: a state, and a count of steps, for each client.

    Each client's gradient is clipped by its own norm, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        local: the settings.
        w: the rows ``[C, d]`` that will be trained.
    """

    def __init__(self, local: LocalConfig, w: Tensor) -> None:
        self.local = local
        kept = int(local.momentum > 0) if local.optimizer == "sgd" else 2
        self.moments = [torch.zeros_like(w) for _ in range(kept)]
        self.steps = torch.zeros(len(w), 1, dtype=torch.float64, device=w.device)

    def step(self, w: Tensor, gradient: Tensor, mask: Tensor | None = None, left: Tensor | None = None) -> None:
        """One step of the first m clients, in place.

        Args:
            w: their rows ``[m, d]``.
            gradient: ``[m, d]``, zero outside the mask; overwritten.
            mask: ``[d] bool``; only these elements are trained.
            left: ``[k] int64``, clients among them that stay as they are.
        """
        state = [w, self.steps[: len(w)], *(moment[: len(w)] for moment in self.moments)]
        before = [] if left is None else [value[left] for value in state]
        self._step(w, gradient, mask)
        for value, old in zip(state, before, strict=False):
            value[left] = old

    def _step(self, w: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        local, m = self.local, len(w)
        if local.clip:
            gradient *= (local.clip / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        if local.weight_decay:
            decayed = w if mask is None else w * mask
            if local.optimizer == "adamw":
                w.sub_(decayed, alpha=local.lr * local.weight_decay)
            else:
                gradient.add_(decayed, alpha=local.weight_decay)
        if local.optimizer == "sgd":
            if local.momentum:
                gradient = self.moments[0][:m].mul_(local.momentum).add_(gradient)
            w.sub_(gradient, alpha=local.lr)
            return
        (beta1, beta2), (first, second) = local.betas, (moment[:m] for moment in self.moments)
        self.steps[:m] += 1
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Clients of a block have taken different numbers of steps from the second epoch on.
        unbiased1, unbiased2 = (1 - beta ** self.steps[:m] for beta in (beta1, beta2))
        denominator = (second.sqrt() / unbiased2.sqrt().to(w.dtype)).add_(local.eps)
        w.sub_((local.lr / unbiased1).to(w.dtype) * first / denominator)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample: ``[m, b, classes]``, ``[m, b]`` to ``[m, b]``."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def client_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each client's real samples: ``[m, b]``, ``[m, b]`` to ``[m]``; 0 for a client without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
