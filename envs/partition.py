"""Splits any labelled images among clients; the arithmetic is in ``counts.py``, the files are in ``saved.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.env import Ragged
from fedsim.errors import DataError
from fedsim.rng import stream
from fedsim.schema import setting

from .counts import capped, dealt, dirichlet, in_domains, official_test, paired, pathological
from .saved import labels_crc32, load_partition

__all__ = ["PartitionConfig", "facts", "load_partition", "partition"]

PARTITIONS = ("iid", "dirichlet", "pathological", "domain", "file")
SMALLEST = 1e-6  # alpha, and the shares for test and for training: above 0


@dataclass(frozen=True)
class PartitionConfig:
    """How images are split among clients."""

    num_clients: int = setting(
        100, "clients in the population; under partition=file the file's number holds", low=1, high=100_000_000
    )
    partition: str = setting(
        "dirichlet",
        "'iid'; 'dirichlet': class proportions of a client from Dir(alpha); 'pathological': the same number of classes "
        "for each client; 'domain': each client within one domain; 'file': a saved partition",
        choices=PARTITIONS,
    )
    alpha: float = setting(0.1, "concentration of 'dirichlet': small = few classes a client, large = iid", low=SMALLEST)
    classes_per_client: int = setting(10, "classes of each client under 'pathological'", low=1)
    samples_per_client: int = setting(
        0, "cap on a client's training images, in its own class proportions; 0: no cap", low=0
    )
    test_share: float = setting(
        0.2,
        "share of a client's images held out for its test split, where the source has no test split",
        low=SMALLEST,
        high=1 - SMALLEST,
    )
    test_samples_per_client: int = setting(0, "cap on a client's test images; 0: no cap", low=0)
    min_samples: int = setting(
        2, "fewest training images of a client under 'dirichlet', moved to it from the richest clients", low=1
    )
    partition_file: str = setting("", "the saved partition that partition=file reads, used as it is")

    def __post_init__(self) -> None:
        if self.partition == "pathological" and 0 < self.samples_per_client < self.classes_per_client:
            raise ValueError(
                f"samples_per_client={self.samples_per_client}: a client could not hold all of its "
                f"classes_per_client={self.classes_per_client} classes"
            )
        if self.partition == "file" and not self.partition_file:
            raise ValueError("partition_file is not set: partition=file reads a saved partition from it")


def partition(
    labels: np.ndarray,
    config: PartitionConfig,
    seed: int,
    domains: np.ndarray | None = None,
    is_test: np.ndarray | None = None,
) -> tuple[Ragged, Ragged]:
    """The clients' train and test indices; list k of both is of client k.

    No image is held twice, but for one case: where the official test split has too few images of a client's classes,
    the client borrows one that another tests on too. A client tests only on classes that it trains on, and (under
    ``partition=domain``) in its own domain.

    Args:
        labels: ``[N] int64``.
        config: how to split.
        seed: the run's seed; the split is a function of all arguments alone.
        domains: ``[N]``, each image's domain (a name or a number), for ``partition=domain``.
        is_test: ``[N] bool``, the official test images. Without it, a share of each client's images is held out.

    Raises:
        DataError: these images cannot be split so, or the saved partition is not one of them.
    """
    if config.partition == "file":
        return load_partition(config.partition_file, labels)
    cells = _cells(labels, domains, config)
    rng = stream(seed, "partition")
    if is_test is None:
        is_test = np.zeros(len(labels), dtype=bool)
        counts = _counts(cells, domains, config, rng, _least(config, len(cells), held_out=True))
        return _held_out(cells, counts, config, rng)
    pool = np.flatnonzero(~is_test)
    least = _least(config, len(pool), held_out=False)
    counts = _counts(cells[pool], None if domains is None else domains[pool], config, rng, least)
    return _official(cells, is_test, counts, config, rng)


def _cells(labels: np.ndarray, domains: np.ndarray | None, config: PartitionConfig) -> np.ndarray:
    if config.partition != "domain":
        return labels
    if domains is None:
        raise DataError("env.partition=domain: the source has no domains; choose from iid, dirichlet, pathological")
    pairs = np.unique(domains, return_inverse=True)[1] * (labels.max() + 1) + labels
    return np.unique(pairs, return_inverse=True)[1]


def _least(config: PartitionConfig, images: int, held_out: bool) -> int:
    """The fewest images of a client: enough for training once its test images are held out.

    More than all ``images``, where even these are too few for one client.
    """
    train = config.min_samples if config.partition == "dirichlet" else 1
    if not held_out:
        return train
    sizes = np.arange(train + 1, images + 1)
    enough = sizes[sizes - _test_sizes(sizes, config) >= train]
    return int(enough[0]) if len(enough) else max(train, images) + 1


def _test_sizes(sizes: np.ndarray, config: PartitionConfig) -> np.ndarray:
    return np.clip(np.rint(config.test_share * sizes), 1, sizes - 1).astype(np.int64)


def _counts(
    cells: np.ndarray, domains: np.ndarray | None, config: PartitionConfig, rng: np.random.Generator, least: int
) -> np.ndarray:
    if config.num_clients * least > len(cells):
        raise DataError(
            f"env.num_clients={config.num_clients}: each needs at least {least} images, "
            f"the source has {len(cells)} to give (most clients: {len(cells) // least})"
        )
    if config.partition == "dirichlet":
        return dirichlet(cells, config.num_clients, config.alpha, least, rng)
    if config.partition == "pathological":
        return pathological(cells, config.num_clients, config.classes_per_client, rng)
    if config.partition == "iid" or domains is None:
        domains = np.zeros(len(cells), dtype=np.int64)
    return in_domains(cells, domains, config.num_clients, least, rng)


def _held_out(
    cells: np.ndarray, counts: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> tuple[Ragged, Ragged]:
    """Holds out a share of each client's own images, of classes that stay in its train split."""
    whole = config.partition == "pathological"  # a swap or a cap must not change the number of classes
    if whole and (counts.max(1) < 2).any():
        client = int(np.argmax(counts.max(1) < 2))
        raise DataError(f"client {client} has one image of each of its classes, none to hold out; use fewer clients")
    counts = paired(counts)
    sizes = counts.sum(1)
    tested = np.minimum(_test_sizes(sizes, config), np.maximum(counts - 1, 0).sum(1))
    trained = np.minimum(sizes - tested, config.samples_per_client or sizes)
    train = capped(counts, trained, rng, keep=whole | (trained == sizes - tested))
    spare = np.where(train > 0, counts - train, 0)
    test = capped(spare, np.minimum(tested, config.test_samples_per_client or tested), rng)
    both = dealt(cells, np.arange(len(cells)), np.concatenate([train, test]), rng)
    at, half = both.offsets[len(train)], len(train)
    return Ragged(both.values[:at], both.offsets[: half + 1]), Ragged(both.values[at:], both.offsets[half:] - at)


def _official(
    cells: np.ndarray, is_test: np.ndarray, counts: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> tuple[Ragged, Ragged]:
    """Divides the official test images as the training images were divided."""
    spread = np.zeros((len(counts), cells.max() + 1), dtype=np.int64)
    spread[:, : counts.shape[1]] = counts
    sizes = spread.sum(1)
    whole = np.full(len(counts), config.partition == "pathological")
    train = capped(spread, np.minimum(sizes, config.samples_per_client or sizes), rng, keep=whole)
    images = np.flatnonzero(is_test)
    test = official_test(spread, train, np.bincount(cells[images], minlength=spread.shape[1]), rng)
    totals = test.sum(1)
    test = capped(test, np.minimum(totals, config.test_samples_per_client or totals), rng)
    given = dealt(cells, images, test, rng)
    return dealt(cells, np.flatnonzero(~is_test), train, rng), _lent(given, cells, images, train, rng)


def _lent(given: Ragged, cells: np.ndarray, images: np.ndarray, train: np.ndarray, rng: np.random.Generator) -> Ragged:
    """Lends a client whose test split is empty a test image of its largest class that has any."""
    if given.sizes.min() > 0:
        return given
    of_cell = Ragged.of([images[cells[images] == cell] for cell in range(train.shape[1])])
    lists = [given[client] for client in range(len(given))]
    for client in np.flatnonzero(given.sizes == 0):
        weights = np.where(of_cell.sizes > 0, train[client], 0)
        if not weights.any():
            raise DataError(f"client {client}: the source has no test image of any class that it trains on")
        lists[client] = rng.choice(of_cell[int(weights.argmax())], 1)
    return Ragged.of(lists)


def facts(labels: np.ndarray, config: PartitionConfig, train: Ragged, test: Ragged) -> dict[str, Any]:
    """What a run folder says of a split."""
    owners = np.repeat(np.arange(len(train)), train.sizes)
    held = len(np.unique(owners * (labels.max() + 1) + labels[train.values]))
    return {
        "partition": config.partition,
        "clients": len(train),
        "images": len(labels),
        "labels_crc32": labels_crc32(labels),
        "train_samples": _spread(train.sizes),
        "test_samples": _spread(test.sizes),
        "classes_per_client_mean": round(held / len(train), 2),
    }


def _spread(sizes: np.ndarray) -> dict[str, float]:
    return {
        "total": int(sizes.sum()),
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
    }
