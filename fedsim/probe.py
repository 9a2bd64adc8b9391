"""``block_size=auto`` and ``per_gpu=auto``: what this machine does fastest, found by trying before round 1.

One step of local training is timed on blocks of 1, 2, 4 … clients, by all simulators at the same time, as in a round.
What is found stands in the run's ``config.yaml``, with what was tried: how clients are put into blocks is part of the
arithmetic, and a run that is resumed or repeated from that file has the sizes that it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from fedsim.backend import Backend
from fedsim.errors import DeviceMemoryError, FedsimError
from fedsim.plan import Plan

_log = logging.getLogger(__name__)

GAIN = 1.05
"""A larger size has to be that much faster: it costs memory, and leaves fewer blocks to share out."""
GPU_SHARES = (1, 2, 4)
"""Simulators on a GPU that are tried."""


@dataclass(frozen=True)
class Trial:
    """A size that was tried, and what all simulators together did: clients times steps, a second."""

    per_gpu: int
    block_size: int
    client_steps_per_second: float


def with_sizes(plan: Plan, backend: Backend) -> Plan:
    """The plan with sizes in place of ``auto``, and the back end with as many simulators on a GPU.

    Raises:
        DeviceMemoryError: not even one client fits into a block.
    """
    asked = plan.workload.config.backend
    given = asked.per_gpu or asked.gpu_fraction or asked.simulators
    shares = GPU_SHARES if backend.gpus and not given else (backend.per_gpu,)
    trials: list[Trial] = []
    if len(shares) > 1 or not asked.block_size:
        for per_gpu in shares:
            if per_gpu != backend.per_gpu and not _shared(backend, per_gpu):
                break
            trials += _tried(plan, backend, per_gpu)
        if not trials:
            raise DeviceMemoryError("backend.block_size: not even a block of one client fits into the memory")
    best = choose(trials) if trials else Trial(shares[0], asked.block_size, 0.0)
    if best.per_gpu != backend.per_gpu:
        backend.share_gpus(best.per_gpu)
    config, per_gpu = plan.workload.config, asked.per_gpu or best.per_gpu
    sized = replace(config, backend=replace(asked, per_gpu=per_gpu, block_size=best.block_size))
    about = plan.about | ({"probe": [asdict(trial) for trial in trials]} if trials else {})
    return replace(plan, workload=replace(plan.workload, config=sized), about=about)


def choose(trials: list[Trial]) -> Trial:
    """The first, from the smallest sizes on, that no other beats by more than ``GAIN``."""
    most = max(trial.client_steps_per_second for trial in trials)
    ordered = sorted(trials, key=lambda trial: (trial.per_gpu, trial.block_size))
    return next(trial for trial in ordered if trial.client_steps_per_second * GAIN >= most)


def told(plan: Plan) -> str:
    """What was tried and taken, in a line for a person; empty where nothing was tried."""
    trials = [Trial(**trial) for trial in plan.about.get("probe", ())]
    taken = plan.workload.config.backend
    several = len({trial.per_gpu for trial in trials}) > 1

    def named(per_gpu: int, block_size: int) -> str:
        return f"{per_gpu} simulators a GPU with blocks of {block_size}" if several else f"blocks of {block_size}"

    shown = [f"{named(trial.per_gpu, trial.block_size)}: {trial.client_steps_per_second:g}" for trial in trials]
    found = f"{named(taken.per_gpu, taken.block_size)} clients, by trial (clients x steps a second: {', '.join(shown)})"
    return found if trials else ""


def _shared(backend: Backend, per_gpu: int) -> bool:
    """Whether so many simulators on each GPU have started: fewer did, so what others lack is room."""
    try:
        backend.share_gpus(per_gpu)
    except FedsimError as error:
        _log.warning("%d simulators on a GPU did not start: %s", per_gpu, error)
        return False
    return True


def _tried(plan: Plan, backend: Backend, per_gpu: int) -> list[Trial]:
    """Blocks of growing size, until two in a row have brought nothing, or one does not fit."""
    trials: list[Trial] = []
    for size in _sizes(plan, backend):
        block = plan.longest(size)
        try:
            seconds = backend.probe(block)
        except DeviceMemoryError:
            break
        trials.append(Trial(per_gpu, size, round(backend.simulators * size / seconds, 3)))
        if len(trials) - trials.index(choose(trials)) > 2:
            break
    return trials


def _sizes(plan: Plan, backend: Backend) -> Iterator[int]:
    """1, 2, 4 …, up to what the memory is planned for, and to a cohort's share of one simulator."""
    asked = plan.workload.config.backend.block_size
    if asked:
        yield asked
        return
    most, size = min(-(-plan.cohort // backend.simulators), plan.largest_block), 1
    while size < most:
        yield size
        size *= 2
    yield most
