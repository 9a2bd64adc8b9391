"""The interface of an env: a federated data set, that is, images, labels, and which client holds which.

An env is built once, by the driver. It decodes its images into one uint8 file that every process of a node maps into
memory; labels and index lists are plain arrays. Simulators receive a ``FederatedData`` and read from it.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedsim.errors import ConfigError
from fedsim.files import replacing
from fedsim.rng import stream

PARTITION_ARRAYS = ("train_values", "train_offsets", "test_values", "test_offsets", "about")


@dataclass(frozen=True)
class Ragged:
    """A list of index lists, as two arrays (shared by all processes of a node without a copy).

    Attributes:
        values: ``[total] int64``, the lists one after another.
        offsets: ``[K + 1] int64``; list ``k`` is ``values[offsets[k] : offsets[k + 1]]``.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: list[np.ndarray]) -> Ragged:
        sizes = np.array([len(indices) for indices in lists], dtype=np.int64)
        values = np.concatenate(lists) if lists else np.empty(0)
        return cls(values.astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    @property
    def sizes(self) -> np.ndarray:
        """``[K] int64``, the lists' lengths."""
        return np.diff(self.offsets)

    def sizes_of(self, lists: np.ndarray) -> np.ndarray:
        """``[m] int64``, the lengths of these lists alone: what costs as much as they are, not as all are."""
        return self.offsets[lists + 1] - self.offsets[lists]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> np.ndarray:
        return self.values[self.offsets[k] : self.offsets[k + 1]]


@dataclass(frozen=True)
class FederatedData:
    """Images and labels, and the clients' splits of them.

    Attributes:
        image_file: a ``.npy`` file, ``[N, 3, px, px] uint8``; opened memory-mapped by each process, on first use.
        labels: ``[N] int64``, in ``0 … len(classes) - 1``.
        classes: names of the classes, in the order of the labels.
        train: per client, indices of its training images.
        test: per client, indices of its test images: the client's own distribution, disjoint from its training images.
        about: JSON-serialisable facts for the run folder (source, counts, partition).
        token_file: the images after the frozen prefix of the backbone, ``[N, P, T, k]`` (``fedsim/models/prefix.py``).
    """

    image_file: Path
    labels: np.ndarray
    classes: tuple[str, ...]
    train: Ragged
    test: Ragged
    about: dict[str, Any] = field(default_factory=dict)
    token_file: Path | None = None

    @property
    def num_clients(self) -> int:
        return len(self.train)

    @cached_property
    def images(self) -> np.ndarray:
        return np.load(self.image_file, mmap_mode="r")

    @cached_property
    def inputs(self) -> np.ndarray:
        """What the model reads of each sample: its image, or its tokens where the prefix is cached."""
        return self.images if self.token_file is None else np.load(self.token_file, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # The opened maps stay at home: a pickled memmap would carry all its pixels.
        return {key: value for key, value in self.__dict__.items() if key not in ("images", "inputs")}


def held_out(data: FederatedData, share: float, seed: int) -> FederatedData:
    """The data with a part of each client's training samples in place of its test split.

    ``round(share * n)`` of a client's ``n`` training samples are held out, chosen at random; at least one, and at least
    one stays for training. Both parts keep the order of the training samples. The test split of ``data`` is dropped.

    Args:
        data: the data as the env built them.
        share: in (0, 1), of each client's training samples.
        seed: the run's seed; what is held out is a function of it, of the share and of the client's samples.

    Returns:
        Data whose ``train`` lacks the held-out samples and whose ``test`` is them. ``about["evaluated"]`` says so;
        the counts beside it remain those of the env's split.

    Raises:
        ConfigError: a client has no sample that it could spare.
    """
    poor = np.flatnonzero(data.train.sizes < 2)
    if len(poor):
        more = f" (as have {len(poor) - 1} more)" if len(poor) > 1 else ""
        raise ConfigError(
            [
                f"eval.validation: client {poor[0]} has a single training sample{more}: none can be held out; give "
                "clients at least 2 (env), or set eval.validation=0"
            ]
        )
    train, validation = [], []
    for client in range(data.num_clients):
        samples = data.train[client]
        number = min(max(1, round(share * len(samples))), len(samples) - 1)
        held = np.zeros(len(samples), dtype=bool)
        held[stream(seed, "validation", 0, client).permutation(len(samples))[:number]] = True
        train.append(samples[~held])
        validation.append(samples[held])
    about = {**data.about, "evaluated": f"validation, {share} of the training samples"}
    return replace(data, train=Ragged.of(train), test=Ragged.of(validation), about=about)


def save_partition(
    path: str | Path, train: Ragged, test: Ragged, about: dict[str, Any], labels: np.ndarray | None = None
) -> None:
    """Writes a split, whole or not at all, as ``.npz`` for ``env.partition=file``.

    The split of a run with ``eval.validation`` is saved as it ran: the held-out samples are its test lists, and the
    env's test split is not in the file. ``plan.prepare`` reads this from ``about`` and holds nothing out a second time.

    Args:
        path: the file; its folder exists.
        train: per client, indices of its training images.
        test: per client, indices of its test images.
        about: ``FederatedData.about`` or ``facts``; it has ``images`` and ``labels_crc32``, checked on loading.
        labels: ``[images]``; with them the file tells which classes a client has, without the env.
    """
    path = Path(path)
    parts = (train.values, train.offsets, test.values, test.offsets, np.array(json.dumps(about)))
    arrays = dict(zip(PARTITION_ARRAYS, parts, strict=True))
    if labels is not None:
        arrays["labels"] = labels.astype(np.int32)
    # Opened here: numpy would add .npz to the name.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def saved_about(path: str | Path) -> dict[str, Any]:
    """The facts that ``save_partition`` wrote beside a split; the file is one that an env has read and checked."""
    with np.load(os.path.expanduser(path), allow_pickle=False) as file:
        return dict(json.loads(str(file["about"])))


class Env(ABC):
    """A federated data set. Subclasses live in ``envs/``, one source a file.

    Class attributes:
        Config: a documented frozen dataclass, the keys of the ``env`` section.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(self, seed: int, px: int, cache: Path) -> FederatedData:
        """Reads the source, fills the cache where it is cold, and splits the samples among clients.

        Args:
            seed: the run's seed; the split is a function of it.
            px: edge of the model's input. Larger images are stored at this size, smaller ones at their own
                (the model scales them up), so the cache never grows beyond its source.
            cache: folder for the decoded images; an existing entry is verified and used again.

        Raises:
            DataError: the source is missing, damaged, empty, or cannot be split as asked.
        """

    def public(self, px: int) -> tuple[np.ndarray, np.ndarray]:
        """Public data that no client holds, of other classes: ``[N, 3, px, px] uint8``, ``[N] int64``.

        Used by ``model.weights=public`` to pre-train a small backbone where nothing can be downloaded.
        """
        raise NotImplementedError(f"env {type(self).__name__} has no public data")
