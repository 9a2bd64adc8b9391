"""From a configuration to what a run needs: data, backbone, task, initial row, and whether it fits in memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from fedsim.algorithm import Task
from fedsim.cache import cache_folder
from fedsim.config import BackendConfig, Config, algorithm_class, env_class
from fedsim.env import Env, FederatedData, held_out, saved_about
from fedsim.errors import ConfigError, DataError, own_code
from fedsim.layout import Layout
from fedsim.models import prefix, pretrain
from fedsim.models.frozen import has_bf16
from fedsim.models.vit import VitModel, checksum, frozen_arrays, load_backbone, skeleton
from fedsim.rng import stream, torch_stream
from fedsim.simulator import Workload
from fedsim.store import BUDGET_BYTES, Store

# A simulator before it has trained anything: the interpreter, torch, timm, Ray's client. Measured: docs/performance.md.
SIMULATOR_BASE_BYTES = 600 << 20


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Attributes:
        workload: what every simulator needs.
        params: the initial row ``[d]``.
        cohort: clients a round.
        trainable: ids of the clients that may be drawn, in their order.
        about: JSON-serialisable facts on data, backbone and layout.
        largest_block: clients in a block that this machine's memory has room for, as far as can be told before.
    """

    workload: Workload
    params: Tensor
    cohort: int
    trainable: np.ndarray
    about: dict[str, Any]
    largest_block: int = 1

    def sample_cohort(self, round: int) -> np.ndarray:
        """The round's clients ``[M]``, a function of the seed and the round, in the order of their ids."""
        rng = stream(self.workload.config.seed, "cohort", round)
        return np.sort(rng.choice(self.trainable, self.cohort, replace=False))

    def evaluation_blocks(self) -> list[tuple[int, ...]]:
        """All clients; those that never train in blocks of their own, and first: they take an epoch more."""
        unseen = np.array(sorted(self.workload.unseen), dtype=np.int64)
        return (self.blocks(unseen) if len(unseen) else []) + self.blocks(self.trainable)

    def describe_blocks(self) -> str:
        """Number and sizes of the blocks of a round; empty while their size is ``auto``."""
        if not self.workload.config.backend.block_size:
            return ""
        blocks = self.blocks(self.sample_cohort(0))
        lengths = sorted({len(block) for block in blocks})
        return f"{len(blocks)} a round, of {' or '.join(map(str, lengths))} clients"

    def longest(self, number: int) -> tuple[int, ...]:
        """So many of the clients that train, those with most samples."""
        sizes = self.workload.data.train.sizes_of(self.trainable)
        return tuple(self.trainable[np.argsort(-sizes, kind="stable")[:number]].tolist())

    def blocks(self, clients: np.ndarray) -> list[tuple[int, ...]]:
        config, sizes = self.workload.config, self.workload.data.train.sizes_of(clients)
        return cut_blocks(clients, sizes, config.local.batch_size, config.backend.block_size)


def cut_blocks(clients: np.ndarray, sizes: np.ndarray, batch_size: int, block_size: int) -> list[tuple[int, ...]]:
    """Clients in blocks of at most ``block_size``, most steps first.

    A function of clients and sizes alone, never of the number of simulators. The number of blocks is a power of two
    where that many clients exist, and blocks are of equal length up to one client, so that 1, 2, 4, 8 … simulators
    find equal shares.
    """
    steps = -(-sizes // batch_size)
    order = np.lexsort((clients, -steps))
    needed = -(-len(clients) // block_size)
    number = min(len(clients), 1 << (needed - 1).bit_length())
    return [tuple(block.tolist()) for block in np.array_split(clients[order], number)]


def prepare(config: Config) -> Plan:
    """Builds data and backbone, and refuses what cannot run.

    Raises:
        UserError: of whatever kind fits the mistake.
        OwnCodeError: the code of the env or of the algorithm failed.
    """
    # A wrong name costs one line now, not after the data was decoded.
    backbone = {"frozen weights": sum(value.nbytes for value in skeleton(config.model).state_dict().values())}
    _refuse_without_room(backbone, "model.img_size, or take a smaller model")
    env, data = _built(config)
    data = _evaluated(config, data)
    trainable = _trainable(config, data.num_clients)
    cohort = _cohort(config.cohort, len(trainable))
    frozen = _frozen(config, env)
    algorithm = algorithm_class(config.algorithm.name)
    model = VitModel(config.model, config.adapter, len(data.classes), frozen, extra=algorithm.extra)
    _refuse_without_groups(config, algorithm.needs, model.layout)
    task = Task(
        layout=model.layout,
        num_clients=data.num_clients,
        cohort=cohort,
        num_classes=len(data.classes),
        lr=config.local.lr,
        local_epochs=config.local.epochs,
        trainable=len(trainable),
    )
    if config.model.cached_prefix != "off":
        prefix.refuse_without(model)
    unseen = frozenset(np.setdiff1d(np.arange(data.num_clients), trainable).tolist())
    workload = Workload(config, task, data, frozen, unseen)
    params = model.initial(torch_stream(config.seed, "params"))
    about = {
        "data": data.about,
        "backbone": {"sha256": checksum(frozen), "parameters": sum(v.size for v in frozen.values())},
        "row": {"size": model.layout.size, **model.layout.groups},
    }
    plan = Plan(workload, params, cohort, trainable, about)
    with own_code(f"algorithm={config.algorithm.name}"):
        parts = memory_bytes(plan, model)
    about["memory_mib"] = {name: round(value / (1 << 20), 1) for name, value in parts.items()}
    _refuse_without_room(parts, "backend.block_size, backend.simulators, local.batch_size or env.num_clients")
    return replace(plan, largest_block=_largest_block(plan, model, sum(parts.values())))


def _built(config: Config) -> tuple[Env, FederatedData]:
    """The env and its data.

    Raises:
        OwnCodeError: the env's own code failed.
        DataError: it raised this, or gave what no run can take.
    """
    name = config.env.name
    with own_code(f"env={name}: build"):
        env = env_class(name)(config.env.settings)
        data = env.build(config.seed, config.model.img_size, cache_folder())
    if not isinstance(data, FederatedData):
        raise DataError(f"env={name}: build gave a {type(data).__name__}, not a FederatedData")
    try:
        json.dumps(data.about)
    except (TypeError, ValueError) as error:
        raise DataError(f"env={name}: about cannot be written to the run folder as JSON ({error})") from None
    return env, data


def _refuse_without_groups(config: Config, needs: tuple[str, ...], layout: Layout) -> None:
    missing = [group for group in needs if not layout.mask(group).any()]
    if missing:
        lora = "; set adapter=lora" if missing[0].startswith("adapter.") else ""
        told = f"{config.algorithm.name} needs {missing[0]!r}, which adapter={config.adapter.kind} has not{lora}"
        raise ConfigError([f"algorithm: {told}"])


def _evaluated(config: Config, data: FederatedData) -> FederatedData:
    """The data with what ``eval.validation`` asks for as test split.

    The split saved by a run with ``eval.validation`` is used as it is, under the same ``about["evaluated"]``.

    Raises:
        ConfigError: samples would be held out of such a split again, or cannot be held out.
    """
    share, settings = config.eval.validation, config.env.settings
    if getattr(settings, "partition", "") == "file":
        before = saved_about(settings.partition_file).get("evaluated")
        if before and share:
            raise ConfigError(
                [
                    f"eval.validation: env.partition_file {settings.partition_file!r} already evaluates held-out "
                    f"samples ({before}); set eval.validation=0 to use it as it is"
                ]
            )
        if before:
            return replace(data, about={**data.about, "evaluated": before})
    return held_out(data, share, config.seed) if share else data


def _trainable(config: Config, num_clients: int) -> np.ndarray:
    """All clients but the share ``eval.unseen``, drawn by the seed."""
    unseen = min(round(config.eval.unseen * num_clients), num_clients - 1)
    order = stream(config.seed, "unseen").permutation(num_clients)
    return np.sort(order[unseen:])


def _cohort(asked: float, trainable: int) -> int:
    count = max(1, round(asked * trainable)) if asked < 1 else int(asked)
    if count > trainable:
        raise ConfigError(
            [f"cohort: {count} clients a round, but there are only {trainable} (env.num_clients, eval.unseen)"]
        )
    return count


def _frozen(config: Config, env: Env) -> dict[str, np.ndarray]:
    if config.model.weights == "public":
        return pretrain.frozen_on_public(config.model, env, config.env, cache_folder())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # timm draws random weights from the global generator; restored on leaving
        return frozen_arrays(load_backbone(config.model))


def memory_bytes(plan: Plan, model: VitModel) -> dict[str, int]:
    """What the run will take at its peak on this machine, by part; rough, and meant to be on the safe side."""
    config, data, task = plan.workload.config, plan.workload.data, plan.workload.task
    algorithm = plan.workload.algorithm()
    block = max(1, config.backend.block_size) * _client_bytes(plan, model)
    return {
        "frozen weights, shared": sum(v.nbytes for v in plan.workload.frozen.values()),
        "clients' rows": min(Store.bytes_for(algorithm.init_client(plan.params), data.num_clients), BUDGET_BYTES),
        "server": algorithm.memory_bytes() + 4 * 4 * task.layout.size * plan.cohort,
        "simulators": _simulators_here(config.backend) * (SIMULATOR_BASE_BYTES + block),
    }


def _client_bytes(plan: Plan, model: VitModel) -> int:
    """What a simulator takes of this machine's memory for each client of a block."""
    config, backbone = plan.workload.config, model.module.backbone
    rows = 4 * plan.workload.task.layout.size * 8
    if torch.cuda.is_available():
        return rows  # the rest is in the GPU's own
    tokens = int(backbone.pos_embed.shape[1]) if backbone.pos_embed is not None else 0
    adapted = config.adapter.count(len(backbone.blocks))
    # Kept for the backward pass of one transformer block, per token: about 16 vectors of the model's width.
    return int(config.local.batch_size * tokens * backbone.num_features * 4 * 16 * (adapted + 2) + rows)


def _largest_block(plan: Plan, model: VitModel, needed: int) -> int:
    """Clients in a block for which there is room beside what the plan needs."""
    backend = plan.workload.config.backend
    free = max(0, psutil.virtual_memory().available - needed)
    more = free // (max(1, _simulators_here(backend)) * _client_bytes(plan, model))
    return int(max(1, backend.block_size) + more)


def _simulators_here(backend: BackendConfig) -> int:
    """Simulators that this machine will carry; none where a cluster is joined, whose nodes are others."""
    if backend.name == "local":
        return 1
    if backend.address or os.environ.get("RAY_ADDRESS"):
        return 0
    return (
        backend.simulators
        or torch.cuda.device_count() * max(1, backend.per_gpu)
        or (os.cpu_count() or 1) // backend.threads
    )


def emulates_bf16(config: Config) -> bool:
    """Whether simulators will compute in bf16 on processors of this machine, which have none."""
    on_cpus_here = _simulators_here(config.backend) and not torch.cuda.is_available()
    return bool(on_cpus_here and config.precision == "bf16" and not has_bf16())


def _refuse_without_room(parts: dict[str, int], what_to_lower: str) -> None:
    needed, available = sum(parts.values()), psutil.virtual_memory().available
    if needed > available:
        largest = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            [
                f"memory: the plan needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free; most of it is "
                f"{largest} ({parts[largest] / 2**30:.1f} GiB): lower {what_to_lower}"
            ]
        )
