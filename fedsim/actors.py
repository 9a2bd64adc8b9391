"""The actors of the Ray back end: the server, the simulators, and the frozen weights that a sweep's runs share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from fedsim.algorithm import State
from fedsim.backend import Block, keep_freed_memory, memory_told, own_peak_memory_mib
from fedsim.errors import DataError, FedsimError
from fedsim.models import prefix
from fedsim.models.vit import as_tensors, checksum
from fedsim.server import Server
from fedsim.simulator import Facts, Simulator, Workload

Arrays = dict[str, np.ndarray]


def to_arrays(state: State) -> Arrays:
    """Numpy arrays pass Ray's store without a copy; torch tensors are copied on put and on get."""
    return {name: value.numpy() for name, value in state.items()}


@ray.remote(max_restarts=0)
class CentralActor:
    """The server, in its own process."""

    def __init__(self, workload: Workload, params: np.ndarray) -> None:
        torch.set_num_threads(workload.config.backend.threads)
        keep_freed_memory()
        self._failed: FedsimError | None = None
        try:
            self.server = Server(workload, torch.from_numpy(params.copy()))
        except FedsimError as error:  # kept for `ready`: of an actor that fails here Ray tells a text of its own
            self._failed = error

    def __repr__(self) -> str:
        return "central"

    def ready(self) -> int | FedsimError:
        return self._failed or os.getpid()

    @ray.method(num_returns=2)
    def broadcast(self, round: int, ids: Block) -> tuple[Arrays, Arrays]:
        payload, rows = self.server.broadcast(round, ids)
        return to_arrays(payload), to_arrays(rows)

    def average(self) -> np.ndarray | None:
        average = self.server.average()
        return None if average is None else average.numpy()

    def aggregate(self, round: int, blocks: list[Block], *results: tuple[Arrays, Arrays]) -> Facts:
        return self.server.aggregate(
            round, blocks, [(as_tensors(update), as_tensors(rows)) for update, rows in results]
        )

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.server.save(folder, facts)

    def load(self, folder: Path) -> dict[str, Any]:
        return self.server.load(folder)

    def peak_memory_mib(self) -> float:
        return own_peak_memory_mib()


@ray.remote(max_restarts=0)
class SimulatorActor:
    """One simulator, in its own process, on its share of a GPU or on CPU cores."""

    def __init__(self, workload: Workload, frozen: Arrays, number: int, gpu_fraction: float) -> None:
        torch.set_num_threads(workload.config.backend.threads)
        keep_freed_memory()
        self.number = number
        if gpu_fraction:
            # `num_gpus` is bookkeeping; this is a soft cap, so that neighbours on the card cannot starve each other.
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_fraction))
        device = "cuda" if gpu_fraction else "cpu"
        self.simulator = Simulator(replace(workload, frozen=frozen), device, gpu_fraction)

    def __repr__(self) -> str:
        return f"simulator-{self.number}"

    def ready(self) -> int:
        return os.getpid()

    def probe(self, ids: Block, params: np.ndarray) -> float | FedsimError:
        try:
            with memory_told(ids):
                return self.simulator.probe(ids, torch.from_numpy(params.copy()))
        except FedsimError as error:
            return error

    @ray.method(num_returns=2)
    def train(
        self, round: int, ids: Block, payload: Arrays, rows: Arrays
    ) -> tuple[Facts | FedsimError, tuple[Arrays, Arrays] | None]:
        try:
            with memory_told(ids):
                facts, update, new_rows = self.simulator.train(round, ids, as_tensors(payload), as_tensors(rows))
        except FedsimError as error:  # returned: Ray would print it once more for the result, which nobody reads
            return error, None
        return facts, (to_arrays(update), to_arrays(new_rows))

    @ray.method(num_returns=2)
    def evaluate(
        self, round: int, ids: Block, payload: Arrays, rows: Arrays, average: np.ndarray | None
    ) -> tuple[Facts | FedsimError, None]:
        mean = None if average is None else torch.from_numpy(average.copy())
        try:
            with memory_told(ids):
                return self.simulator.evaluate(round, ids, as_tensors(payload), as_tensors(rows), mean), None
        except FedsimError as error:
            return error, None

    def peak_memory_mib(self) -> float:
        return own_peak_memory_mib()


@ray.remote(max_calls=1)  # then its process ends, and frees the memory of model and images
def fill_prefix(
    workload: Workload, frozen: Arrays, gpu_fraction: float, path: Path, images: slice
) -> FedsimError | None:
    """A stretch of the cached prefix, on what a simulator has; the mistake that ended it, if there is one."""
    if gpu_fraction:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_fraction))
    device, cores = "cuda" if gpu_fraction else "cpu", workload.config.backend.threads
    try:
        prefix.fill(replace(workload, frozen=frozen), device, path, images, cores)
    except FedsimError as error:
        return error
    except OSError as error:
        return DataError(f"model.cached_prefix: {error}; $FEDSIM_CACHE is to be a folder that all nodes see")
    return None


@ray.remote(num_cpus=0, max_restarts=0)
class Weights:
    """Frozen weights by checksum: one copy a node for all runs of a sweep that have the same."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def held(self, checksum: str) -> list[Any]:
        """The reference to them, in a list: Ray would fetch a bare one. Empty: there are none yet."""
        return [self._held[checksum]] if checksum in self._held else []

    def keep(self, checksum: str, frozen: Arrays) -> list[Any]:
        """The reference to those that came first."""
        if checksum not in self._held:
            self._held[checksum] = ray.put(frozen)  # put by this actor, they stay until it ends
        return [self._held[checksum]]


def put_frozen(frozen: Arrays) -> Any:
    """A reference to frozen weights; in a sweep, the one that all runs with the same weights have."""
    try:
        weights = ray.get_actor("weights")
    except ValueError:
        return ray.put(frozen)
    key = checksum(frozen)
    (reference,) = ray.get(weights.held.remote(key)) or ray.get(weights.keep.remote(key, frozen))
    return reference
