"""Where rounds are computed: the interface, and the back end in this process. ``ray_backend.py`` has the other one.

Both put the same payloads, blocks and random streams through the same ``Server`` and ``Simulator``, so that results do
not depend on which of them ran, on the number of simulators, or on which of those died.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.algorithm import State
from fedsim.errors import ClientError, DeviceMemoryError, FedsimError
from fedsim.models import prefix
from fedsim.server import Server
from fedsim.simulator import Facts, Simulator, Workload
from fedsim.supervisor import Block, Failures, Piece, Stage


class Backend(ABC):
    """The stages of a round, on whatever hardware there is.

    Attributes:
        failures: so far; its quarantined clients are left out of all blocks, which are otherwise cut as ever.
        stopping: once it is set, no further block is begun: ``KeyboardInterrupt`` when those in flight are done.
    """

    def __init__(self) -> None:
        self.failures = Failures()
        self.stopping = False

    @property
    @abstractmethod
    def simulators(self) -> int:
        """How many blocks are computed at the same time."""

    @abstractmethod
    def describe(self) -> str:
        """One line on what computes."""

    @property
    def gpus(self) -> int:
        """GPUs that simulators can share."""
        return 0

    @property
    def per_gpu(self) -> int:
        """Simulators on each of them."""
        return 1

    def share_gpus(self, per_gpu: int) -> None:
        """Puts so many simulators on each GPU, in place of those that there are; before round 1."""
        raise NotImplementedError

    @abstractmethod
    def probe(self, block: Block) -> float:
        """Seconds of a step of local training of this block, when all simulators take it at the same time.

        Raises:
            DeviceMemoryError: it does not fit into a simulator's memory.
        """

    @abstractmethod
    def train(self, round: int, blocks: list[Block]) -> list[Facts]:
        """Broadcasts to all blocks and trains them; updates wait for ``aggregate``.

        Returns:
            Facts in the blocks' order; of the parts of a block that was halved; not of clients that are quarantined.

        Raises:
            CentralLostError: the server is gone, here and in all stages: ``rebuild`` it.
            BlockFailedError: a client failed too often.
            FedsimError: no client is left.
        """

    @abstractmethod
    def aggregate(self, round: int) -> Facts:
        """The server takes the round's updates, all at once; facts as of ``Server.aggregate``."""

    @abstractmethod
    def evaluate(self, round: int, blocks: list[Block]) -> list[Facts]:
        """Test accuracies of all blocks, in their order."""

    @abstractmethod
    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes a checkpoint of the server with the driver's facts."""

    @abstractmethod
    def load(self, folder: Path) -> dict[str, Any]:
        """Restores a checkpoint; returns the driver's facts."""

    @abstractmethod
    def rebuild(self, round: int) -> None:
        """Puts a new server, as before round 1, in the place of one that was lost in ``round``.

        Raises:
            NotStartedError: none could be started.
        """

    @abstractmethod
    def peak_memory_mib(self) -> dict[str, float]:
        """Peak resident memory by process, in MiB."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the back end holds."""

    def _spared(self, blocks: list[Block]) -> list[Block]:
        """The blocks without quarantined clients: the others keep their company, whenever those were given up."""
        gone = set(self.failures.quarantined)
        spared = [tuple(client for client in block if client not in gone) for block in blocks]
        return [block for block in spared if block]

    def _facts(self, round: int, done: list[Piece]) -> list[Facts]:
        if not done:
            gone = sorted(self.failures.quarantined)
            raise FedsimError(f"round {round + 1}: none of its clients is left; quarantined: {gone}")
        return [piece.facts for piece in done]


class LocalBackend(Backend):
    """One simulator in this process; Ray is not imported."""

    def __init__(self, workload: Workload, params: Tensor) -> None:
        super().__init__()
        workload = prefix.made_here(workload)
        self._workload, self._params = workload, params
        # The number of threads is part of the arithmetic: the same as that of a simulator's actor.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(workload.config.backend.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.server = Server(workload, params)
            self.simulator = Simulator(replace(workload, frozen=workload.weights()), device)
        except BaseException:
            self.close()
            raise
        self._trained: list[tuple[Block, tuple[State, State]]] = []

    @property
    def simulators(self) -> int:
        return 1

    def describe(self) -> str:
        return f"one simulator in this process, on {self.simulator.model.device}"

    def probe(self, block: Block) -> float:
        with memory_told(block):
            return self.simulator.probe(block, self._params)

    def train(self, round: int, blocks: list[Block]) -> list[Facts]:
        def work(piece: Piece) -> None:
            sent = self.server.broadcast(round, piece.clients)
            piece.facts, *piece.result = self.simulator.train(round, piece.clients, *sent)

        done = self._map("train", round, blocks, work)
        self._trained = [(piece.clients, (piece.result[0], piece.result[1])) for piece in done]
        return self._facts(round, done)

    def aggregate(self, round: int) -> Facts:
        trained, self._trained = self._trained, []
        return self.server.aggregate(round, [block for block, _ in trained], [result for _, result in trained])

    def evaluate(self, round: int, blocks: list[Block]) -> list[Facts]:
        average = self.server.average()

        def work(piece: Piece) -> None:
            sent = self.server.broadcast(round, piece.clients)
            piece.facts = self.simulator.evaluate(round, piece.clients, *sent, average)

        return self._facts(round, self._map("evaluate", round, blocks, work))

    def _map(self, name: str, round: int, blocks: list[Block], work: Callable[[Piece], None]) -> list[Piece]:
        stage = Stage(name, round, self._spared(blocks), self._workload.config.backend, self.failures)
        while stage.waiting:
            if self.stopping:
                raise KeyboardInterrupt
            piece = stage.waiting.popleft()
            try:
                with memory_told(piece.clients):
                    work(piece)
            except DeviceMemoryError as error:
                stage.shrink(piece, str(error))
            else:
                stage.finish(piece)
        return stage.done

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.server.save(folder, facts)

    def load(self, folder: Path) -> dict[str, Any]:
        return self.server.load(folder)

    def rebuild(self, round: int) -> None:
        self.server = Server(self._workload, self._params)

    def peak_memory_mib(self) -> dict[str, float]:
        return {"driver": own_peak_memory_mib()}

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)


@contextmanager
def memory_told(ids: Block) -> Iterator[None]:
    """Tells a block that is too large for the memory from a mistake in an algorithm's code.

    Raises:
        DeviceMemoryError: where a GPU's memory, or as far as allocators notice it the machine's, was too short.
    """
    try:
        yield
    except (ClientError, MemoryError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, ClientError) else error
        if not _short_of_memory(cause):
            raise
        told = str(cause).rpartition("DefaultCPUAllocator: ")[2].partition(". ")[0] or "out of memory"
        raise DeviceMemoryError(f"{len(ids)} clients in a block: {told}") from None


def _short_of_memory(error: BaseException | None) -> bool:
    # torch's allocator for the CPU has no exception of its own.
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def own_peak_memory_mib() -> float:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def keep_freed_memory() -> None:
    """What this process frees, it keeps for its next use; where the allocator is not glibc's, nothing changes.

    A block frees and takes the same activations at every step. glibc gives pieces back to the kernel that are larger
    than any freed before, and at each return the kernel fills them with zeros (``docs/performance.md``).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mmap_threshold, trim_threshold, gib, most_of_old_glibc = -3, -1, 1 << 30, 32 << 20  # malloc.h
        _ = mallopt(mmap_threshold, gib) or mallopt(mmap_threshold, most_of_old_glibc)
        mallopt(trim_threshold, gib)


def make_backend(workload: Workload, params: Tensor, folder: str) -> Backend:
    """The back end that the configuration names; ``folder``: the run's, for the names of actors and for messages."""
    if workload.config.backend.name == "local":
        return LocalBackend(workload, params)
    from fedsim.ray_backend import RayBackend

    return RayBackend(workload, params, folder)
