"""The Ray back end: one central actor for the server, a supervised pool of simulators.

Parameters never pass through the driver: it hands *references* from the central actor to simulators and back, and waits
only for small facts. Central actor and simulators are siblings, created by the driver. Simulators are caches that hold
nothing: a dead one is replaced and its blocks are done again. What is done when is the policy of ``supervisor.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.job_config import JobConfig
from torch import Tensor

from fedsim import checkpoint
from fedsim.actors import CentralActor, SimulatorActor, fill_prefix, put_frozen
from fedsim.backend import Backend, Block, own_peak_memory_mib
from fedsim.config import BackendConfig
from fedsim.errors import (
    CentralLostError,
    ClientError,
    ConfigError,
    DeviceMemoryError,
    FedsimError,
    NotStartedError,
)
from fedsim.models import prefix
from fedsim.simulator import Facts, Workload
from fedsim.supervisor import Deadlines, Piece, Pool, Slot, Stage, pause_s
from fedsim.tracking.ray_metrics import PoolMetrics, job_metadata
from fedsim.uri import is_uri

JOIN_S = 10.0  # for a cluster's head to take a connection

_log = logging.getLogger(__name__)

# glibc gives threads heaps of their own: what one frees, another takes anew, and memory grows for hundreds of rounds.
_ONE_ARENA = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}


@dataclass
class Flight:
    """References of a block that a simulator was given: to its payload, until that is there, and to its facts."""

    payload: Any
    facts: Any


class RayBackend(Backend):
    """The supervised pool."""

    def __init__(self, workload: Workload, params: Tensor, folder: str) -> None:
        """Starts or joins Ray, and starts the actors; ``folder``: the run's, for their names and for messages.

        Raises:
            ConfigError: the cluster cannot hold the actors.
        """
        super().__init__()
        self.config = workload.config.backend
        self._params, self._folder = params.numpy(), folder
        # Actors are named within the run; a run that was killed may still have actors of its name.
        self._namespace = f"{Path(folder).name}-{uuid.uuid4().hex[:6]}"
        run = Path(folder).name
        metadata = job_metadata(workload.config, run)
        self._own_cluster = connect(
            self.config, self._namespace, self.config.simulators * self.config.threads, metadata
        )
        self._metrics = PoolMetrics(run)
        self._deadlines = Deadlines(self.config)
        self._central_starts = 0
        self._payloads_since: float | None = None  # simulators wait for the server, and nothing comes
        try:
            self.gpu_fraction, simulators = _size_pool(self.config)
            self._work = workload = self._with_tokens(workload, simulators)
            # Apart: the server needs no weights, and the runs of a sweep share them.
            self._workload, self._frozen = ray.put(replace(workload, frozen={})), put_frozen(workload.weights())
            self._central = self._start_central()
            self._start_pool(simulators)
        except BaseException:
            self.close()
            raise
        self._trained: list[Piece] = []

    @property
    def simulators(self) -> int:
        return len(self._pool.slots)

    @property
    def gpus(self) -> int:
        if ray.util.get_current_placement_group() is not None:  # in a sweep a run's place is fixed before it begins
            return 0
        return int(ray.cluster_resources().get("GPU", 0))

    @property
    def per_gpu(self) -> int:
        return math.floor(1 / self.gpu_fraction + 1e-6) if self.gpu_fraction else max(1, self.config.per_gpu)

    def pids(self) -> list[int]:
        """Process ids of the simulators."""
        return ray.get([slot.actor.ready.remote() for slot in self._pool.slots if slot.state != "absent"])

    def describe(self) -> str:
        unit = f"{self.gpu_fraction:g} GPU" if self.gpu_fraction else f"{self.config.threads} CPU"
        url = dashboard_url()
        shown = f", dashboard {url} (token: `ray get-auth-token`)" if url else ""
        return f"Ray: {self.simulators} simulators of {unit} each{shown}"

    # Starts --------------------------------------------------------------------------------------------------------

    def _with_tokens(self, workload: Workload, simulators: int) -> Workload:
        """The workload with its cached prefix, computed where the simulators will be, if it is not there yet."""

        def compute(path: Path) -> None:
            work, frozen = ray.put(replace(workload, frozen={})), ray.put(workload.frozen)
            task = fill_prefix.options(**self._share())
            stretches = prefix.parts(len(workload.data.images), simulators)
            tasks = [task.remote(work, frozen, self.gpu_fraction, path, images) for images in stretches]
            try:
                mistakes = ray.get(tasks)
            except RayError as error:
                raise _own_error(error, "start", 0, ()) from None
            finally:  # of an interrupted run, they would go on in a cluster that is not the run's own
                for reference in tasks:
                    ray.cancel(reference, force=True)
            if mistake := next((error for error in mistakes if error), None):
                raise mistake

        return prefix.with_tokens(workload, "cuda" if self.gpu_fraction else "cpu", compute)

    def _share(self) -> dict[str, float]:
        """What a simulator takes of the cluster."""
        return {"num_cpus": 0 if self.gpu_fraction else self.config.threads, "num_gpus": self.gpu_fraction}

    def _start_central(self) -> Any:
        again = self._central_starts
        self._central_starts += 1
        return CentralActor.options(  # type: ignore[attr-defined]
            name=f"central-r{again}" if again else "central",
            namespace=self._namespace,
            num_cpus=0,
            runtime_env=_ONE_ARENA,
        ).remote(self._workload, self._params)

    def _start_pool(self, simulators: int, starts: int = 0) -> None:
        """So many simulators, and waits for them; ``starts``: how often any was started before, for their names."""
        self._pool = Pool(self.config, simulators)
        for slot in self._pool.slots:
            slot.starts = starts
        self._start_due(time.monotonic())
        self._wait_until_ready()

    def share_gpus(self, per_gpu: int) -> None:
        self.config = replace(self.config, per_gpu=per_gpu)
        self.gpu_fraction, simulators = _size_pool(self.config)
        self._restart_pool(simulators)

    def _restart_pool(self, simulators: int) -> None:
        for slot in self._pool.slots:
            ray.kill(slot.actor)
        self._start_pool(simulators, max(slot.starts for slot in self._pool.slots))

    def _start_due(self, now: float) -> None:
        for slot in self._pool.due(now):
            slot.actor = SimulatorActor.options(  # type: ignore[attr-defined]
                name=f"simulator-{slot.number}-r{slot.starts}" if slot.starts else f"simulator-{slot.number}",
                namespace=self._namespace,
                runtime_env=_ONE_ARENA,
                **self._share(),
            ).remote(self._workload, self._frozen, slot.number, self.gpu_fraction)
            slot.starts += 1
            self._ask_whether_ready(slot, now)

    def _ask_whether_ready(self, slot: Slot, now: float) -> None:
        slot.answer = slot.actor.ready.remote()
        self._pool.starting(slot, now)

    def _wait_until_ready(self) -> None:
        actors = {"central": self._central.ready.remote()}
        actors |= {f"simulator-{slot.number}": slot.answer for slot in self._pool.slots}
        answers = list(actors.values())
        try:
            central, *_ = ray.get(answers, timeout=self.config.start_timeout_s)
        except GetTimeoutError:
            raise ConfigError(
                [
                    f"backend.simulators: {len(answers)} actors did not start within {self.config.start_timeout_s:g} s;"
                    f" the cluster has {ray.available_resources().get('CPU', 0):g} CPUs and "
                    f"{ray.available_resources().get('GPU', 0):g} GPUs free"
                ]
            ) from None
        except RayError as error:
            if not _is_fault(error) or _failed_in_start(error):
                raise _own_error(error, "start", 0, ()) from None
            died = next(name for name, answer in actors.items() if _is_there(answer) and not _whole(answer))
            raise FedsimError(
                f"{died} died while it started ({_line(error).rstrip('.')}); no round was begun: start the run again, "
                "with fewer backend.simulators where memory is short"
            ) from None
        if isinstance(central, FedsimError):
            raise central
        for slot in self._pool.slots:
            self._pool.ready(slot)

    def rebuild(self, round: int) -> None:
        """A new central actor, and the simulators that there are.

        Raises:
            NotStartedError: it did not start, however often this was tried within ``give_up_after_s``.
        """
        self._trained, since, failed_starts = [], time.monotonic(), 0
        while True:
            ray.kill(self._central)
            self._central = self._start_central()
            try:
                self._ask("start", round, self._central.ready, timeout_s=self.config.start_timeout_s)
                return
            except CentralLostError as error:  # where memory is short, or nodes are going, it may well be the next
                failed_starts += 1
                if (waited_s := time.monotonic() - since) >= self.config.give_up_after_s:
                    raise NotStartedError(round, "central actor", waited_s, self._folder) from None
                if failed_starts == 1:
                    _log.warning("%s; another start is tried", error)
            if self.stopping:
                raise KeyboardInterrupt
            time.sleep(pause_s(failed_starts))

    def probe(self, block: Block) -> float:
        params = ray.put(self._params)
        answers = [slot.actor.probe.remote(block, params) for slot in self._pool.slots]
        try:
            seconds = ray.get(answers, timeout=self.config.start_timeout_s)
        except RayError as error:
            if not _is_fault(error):
                raise _own_error(error, "probe", 0, block) from None
            self._restart_pool(self.simulators)  # whatever ended one of them, so large a block did
            raise DeviceMemoryError(f"{len(block)} clients in a block: {_line(error)}") from None
        for answer in seconds:
            if isinstance(answer, FedsimError):
                raise answer
        return max(seconds)

    # Rounds --------------------------------------------------------------------------------------------------------

    def train(self, round: int, blocks: list[Block]) -> list[Facts]:
        self._trained = self._map("train", round, blocks)
        return self._facts(round, self._trained)

    def aggregate(self, round: int) -> Facts:
        trained, self._trained = self._trained, []
        while True:
            clients, results = [piece.clients for piece in trained], [piece.result for piece in trained]
            try:
                return self._ask("aggregate", round, self._central.aggregate, round, clients, *results)
            except RayTaskError as error:  # an argument was lost: so it is certain that nothing was applied
                lost = [piece for piece in trained if not _whole(piece.result)]
                if not lost:
                    raise CentralLostError(round, _line(error)) from None
            self.failures.blocks_requeued += len(lost)
            again = self._map("train", round, [piece.clients for piece in lost])
            trained = [piece for piece in trained if piece not in lost] + again

    def evaluate(self, round: int, blocks: list[Block]) -> list[Facts]:
        return self._facts(round, self._map("evaluate", round, blocks, self._central.average.remote()))

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self._ask("save", facts["round"], self._central.save, folder.absolute(), facts, timeout_s=self._network_s())

    def load(self, folder: Path) -> dict[str, Any]:
        # How much there is to read when a run is resumed, nobody knows before.
        timeout_s = self._network_s() if self.failures.central_restarted else math.inf
        round = checkpoint.round_of(folder)
        return self._ask("load", round, self._central.load, folder.absolute(), timeout_s=timeout_s)

    def _network_s(self) -> float | None:
        """The deadline of what may go over a network, which is no hang however long it takes; ``None``: the usual."""
        return math.inf if is_uri(self._folder) else None

    def _ask(self, stage: str, round: int, method: Any, *values: Any, timeout_s: float | None = None) -> Any:
        """The server's answer; ``timeout_s``: instead of the stage's deadline.

        Raises:
            CentralLostError: it died, or hangs.
            RayTaskError: one of the values was lost; nothing was done.
            FedsimError: the algorithm's own code failed.
        """
        timeout_s, start = self._deadlines.of(stage) if timeout_s is None else timeout_s, time.monotonic()
        try:
            answer = ray.get(method.remote(*values), timeout=None if timeout_s == math.inf else timeout_s)
        except RayError as error:
            if type(error) is GetTimeoutError:
                raise self._hung(stage, round, timeout_s) from None
            if _lost_argument(error):
                raise
            if _is_fault(error):
                raise CentralLostError(round, _line(error)) from None
            raise _own_error(error, stage, round, ()) from None
        if isinstance(answer, FedsimError):
            raise answer
        self._deadlines.kept(stage, time.monotonic() - start)
        return answer

    def _hung(self, stage: str, round: int, after_s: float) -> CentralLostError:
        self._deadlines.passed(stage)
        setting = "start_timeout_s" if stage == "start" else "min_deadline_s"
        return CentralLostError(round, f"no answer to {stage} within {after_s:g} s; see backend.{setting}")

    # Blocks --------------------------------------------------------------------------------------------------------

    def _map(self, name: str, round: int, blocks: list[Block], *shared: Any) -> list[Piece]:
        """Every block done exactly once, by whichever simulator is free; what is done, in the blocks' order."""
        stage, pool = Stage(name, round, self._spared(blocks), self.config, self.failures), self._pool
        self._payloads_since = None
        for slot in pool.slots:
            if slot.pieces:  # of a stage that was broken off: nobody waits for them, but the simulator does them first
                self._ask_whether_ready(slot, time.monotonic())
        while stage.waiting or pool.busy:
            if self.stopping and not pool.busy:
                raise KeyboardInterrupt
            self._start_due(time.monotonic())
            while not self.stopping and stage.waiting and (free := pool.free(len(stage.waiting))):
                self._submit(stage, free, stage.waiting.popleft(), shared)
            self._metrics.pool(len(stage.waiting), len(pool.living))
            self._wait(stage)
        return stage.done

    def _submit(self, stage: Stage, slot: Slot, piece: Piece, shared: tuple[Any, ...]) -> None:
        payload, rows = self._central.broadcast.remote(stage.round, piece.clients)
        method = getattr(slot.actor, stage.name)
        facts, piece.result = method.remote(stage.round, piece.clients, payload, rows, *shared)
        piece.flight = Flight(payload, facts)
        slot.pieces.append(piece)

    def _wait(self, stage: Stage) -> None:
        """Waits for the next thing to happen, and sees to it, and to what should have happened."""
        pool = self._pool
        awaited = {ref: slot for slot in pool.slots if (ref := _awaited(slot)) is not None}
        wait_s = pool.wait_s(time.monotonic())
        self._payloads_since = (self._payloads_since or time.monotonic()) if self._payloads() else None
        if awaited:
            for ref in ray.wait(list(awaited), num_returns=1, timeout=wait_s, fetch_local=False)[0]:
                self._see(stage, awaited[ref])
        else:
            time.sleep(wait_s)
        now = time.monotonic()
        self._watch_server(stage.round, now)
        for slot in pool.late(now):
            if not _is_there(_awaited(slot)):
                self.failures.hangs += slot.state == "living"
                self._lose(stage, slot, "no answer in time")
        if (alone_s := pool.alone_s(now)) >= self.config.give_up_after_s:
            raise NotStartedError(stage.round, "simulator", alone_s, self._folder)

    def _watch_server(self, round: int, now: float) -> None:
        """A payload that does not come is no fault of the simulator that waits for it, but a hang of the server."""
        deadline_s = self._deadlines.of("broadcast")
        late = self._payloads_since is not None and now - self._payloads_since >= deadline_s
        if late and not any(map(_is_there, self._payloads())):
            raise self._hung("broadcast", round, deadline_s)

    def _payloads(self) -> list[Any]:
        """References to what simulators wait for to begin."""
        flights = [slot.pieces[0].flight for slot in self._pool.living if slot.pieces]
        return [flight.payload for flight in flights if flight.payload is not None]

    def _see(self, stage: Stage, slot: Slot) -> None:
        """What this simulator was waited for has come."""
        if slot.state == "starting":
            try:
                ray.get(slot.answer)
                self._pool.ready(slot)
            except RayError as error:
                self._lose(stage, slot, _line(error))
            return
        piece = slot.pieces[0]
        if piece.flight.payload is not None:
            piece.flight.payload = None  # the object store may drop it after the simulator
            now = time.monotonic()
            if self._payloads_since is not None:
                self._deadlines.kept("broadcast", now - self._payloads_since)
                self._payloads_since = None
            self._pool.begun(slot, stage.name, self._steps(stage.name, piece.clients), now)
            return
        try:
            piece.facts = ray.get(piece.flight.facts)
        except RayError as error:
            self._see_fault(stage, slot, piece, error)
            return
        if isinstance(piece.facts, DeviceMemoryError):
            self._pool.dropped(slot)
            stage.shrink(piece, str(piece.facts))
        elif isinstance(piece.facts, FedsimError):
            raise piece.facts
        else:
            if slot.began is not None:
                self._metrics.block(stage.name, time.monotonic() - slot.began)
            self._pool.finished(slot, stage.name, self._steps(stage.name, piece.clients), time.monotonic())
            stage.finish(piece)

    def _see_fault(self, stage: Stage, slot: Slot, piece: Piece, error: RayError) -> None:
        if not _is_fault(error):
            raise _own_error(error, stage.name, stage.round, piece.clients) from None
        self._ask("ready", stage.round, self._central.ready)
        if _lost_argument(error):  # the simulator lives, its payload was lost
            self._pool.dropped(slot)
            stage.fail(piece, _line(error))
        else:
            self._lose(stage, slot, _line(error))

    def _lose(self, stage: Stage, slot: Slot, cause: str) -> None:
        """A simulator died, hung, or did not start: another one in its place, and its blocks are done again."""
        ray.kill(slot.actor)  # one that is unreachable, or hangs, may still live
        now, started = time.monotonic(), slot.state == "living"
        pieces = self._pool.lost(slot, now)
        if started:
            self.failures.actors_replaced += 1
        if started or slot.failed_starts == 1:
            _log.warning(
                "round %d: simulator-%d: %s; %d of %d live, another start is tried",
                stage.round + 1, slot.number, cause.rstrip("."), len(self._pool.living), self.simulators,
            )  # fmt: skip
        stage.requeue(pieces[1:])  # they waited behind the one that was running
        if pieces:
            stage.fail(pieces[0], cause)
        self._start_due(now)

    def _steps(self, stage: str, block: Block) -> int:
        """Batches of the block's longest client, in a unit in which blocks of one stage compare."""
        config, data, ids = self._work.config, self._work.data, np.array(block)
        steps = config.local.epochs * math.ceil(data.train.sizes_of(ids).max() / config.local.batch_size)
        if stage == "evaluate":
            steps += math.ceil(data.test.sizes_of(ids).max() / config.eval.batch_size)
        return max(1, steps)

    # The end -----------------------------------------------------------------------------------------------------

    def peak_memory_mib(self) -> dict[str, float]:
        peaks = {"driver": own_peak_memory_mib()}
        actors = {"central": self._central, **{f"simulator-{slot.number}": slot.actor for slot in self._pool.living}}
        for name, actor in actors.items():
            with contextlib.suppress(RayError):  # one that died after the last round has nothing left to tell
                peaks[name] = ray.get(actor.peak_memory_mib.remote(), timeout=30)
        return peaks

    def close(self) -> None:
        if hasattr(self, "_pool"):
            for slot in self._pool.slots:
                if slot.actor is not None:
                    ray.kill(slot.actor)
        if hasattr(self, "_central"):
            ray.kill(self._central)
        if self._own_cluster:
            ray.shutdown()


def _awaited(slot: Slot) -> Any:
    """The reference to what is expected next of a simulator; ``None``: nothing is."""
    if slot.state == "starting":
        return slot.answer
    if not slot.pieces:
        return None
    flight = slot.pieces[0].flight
    return flight.facts if flight.payload is None else flight.payload


def _is_there(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0, fetch_local=False)[0])


def _whole(reference: Any) -> bool:
    """Whether a result can still be fetched; only asked after a fault, for it brings the result to the driver."""
    try:
        ray.get(reference)
    except RayError:
        return False
    return True


def connect(config: BackendConfig, name: str, cpus: int = 0, metadata: dict[str, str] | None = None) -> bool:
    """Joins the cluster that is named or running, else starts one; true if it ends with this process's part in it.

    ``cpus``: of the one that is started; 0: as many as the machine has.

    Raises:
        ConfigError: it would start a dashboard that asks nobody for a token, or there is no cluster where one is named.
    """
    if ray.is_initialized():
        return False
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    quiet: dict[str, Any] = {
        "job_config": JobConfig(metadata=metadata),
        "namespace": name,
        "logging_level": "warning",
        "log_to_driver": True,
    }
    if address and address != "local":
        _join(address, "backend.address" if config.address else "RAY_ADDRESS", **quiet)
    else:
        if config.dashboard and os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
            told = "RAY_AUTH_MODE=disabled lets everybody on this machine run code through it"
            raise ConfigError([f"backend.dashboard: {told}; unset that, or set backend.dashboard=false"])
        # Ray's own words on its token, each time anew; ours are in `describe`.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        # "local" said out loud: a bare init joins whatever cluster a stale file in its temporary folder names.
        ray.init(address="local", num_cpus=cpus or None, include_dashboard=config.dashboard, **quiet)
    return True


def _join(address: str, named: str, **quiet: Any) -> None:
    """Joins the cluster at this address, which stands in ``named``.

    Raises:
        ConfigError: there is none.
    """
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or "/" in address or not port.isdecimal():
            raise ConfigError([f"{named}: {address!r} is no HOST:PORT, which a head has 6379 for unless it was told"])
        try:  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_S).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError([f"{named}: no cluster answers at {address} ({error})"]) from None
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError([f"{named}: the cluster at {address} cannot be joined: {told}"]) from None


def gpu_fraction(config: BackendConfig) -> float:
    """The share of a GPU that a simulator takes; 0 in a cluster without GPUs.

    With ``per_gpu=auto`` it leaves room for all ``simulators`` that are asked for.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        return 0.0
    return config.gpu_fraction or 1 / (config.per_gpu or max(1, math.ceil(config.simulators / gpus)))


def _size_pool(config: BackendConfig) -> tuple[float, int]:
    """The share of a GPU that a simulator takes (0 without GPUs), and the number of simulators."""
    resources, fraction = ray.cluster_resources(), gpu_fraction(config)
    if ray.util.get_current_placement_group() is not None:  # a run of a sweep: its actors land in its own group
        return fraction, config.simulators or 1
    gpus = int(resources.get("GPU", 0))
    most = gpus * math.floor(1 / fraction + 1e-6) if gpus else int(resources.get("CPU", 1)) // config.threads
    wanted = config.simulators or max(1, most)
    if wanted > max(1, most):
        unit = f"{fraction:g} GPU" if gpus else f"{config.threads} CPU"
        raise ConfigError([f"backend.simulators: {wanted} simulators of {unit} each, the cluster has room for {most}"])
    return fraction, wanted


def dashboard_url() -> str:
    """The dashboard's address, or an empty text."""
    url = ray._private.worker.get_dashboard_url()  # the public API returns it from ray.init only
    return f"http://{url}" if url else ""


def _is_fault(error: RayError) -> bool:
    """True unless it is an exception of the code that ran."""
    return not isinstance(error, RayTaskError) or _lost_argument(error)


def _lost_argument(error: RayError) -> bool:
    """True where a task could not begin: it then wears the error of its argument, one of Ray's own."""
    # Plain RayError: Ray's stand-in for an exception of the code that cannot be pickled.
    cause = error.cause if isinstance(error, RayTaskError) else None
    return isinstance(cause, RayError) and type(cause) is not RayError


def _own_error(error: RayError, stage: str, round: int, block: Block) -> FedsimError:
    """The failure itself, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, FedsimError):
        return cause
    return ClientError(stage, round, list(block), str(error))


def _failed_in_start(error: RayError) -> bool:
    """True where an actor died of an exception while it started."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def _line(error: RayError) -> str:
    """What Ray says, in one line: of an exception while an actor started its end, where that stands."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if _failed_in_start(error) else 0]
