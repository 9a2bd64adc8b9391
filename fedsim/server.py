"""The server: an algorithm's server half, what it remembers, and the store of what clients keep.

It lives in the central actor, or in the driver's process under the local back end; either way it is this class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import checkpoint
from fedsim.algorithm import Cohort, State
from fedsim.errors import CheckpointError, ClientError, OwnCodeError, own_code
from fedsim.journal import Journal, Journaled, Latest
from fedsim.rng import torch_stream
from fedsim.simulator import Facts, Workload, guarded, refuse_other_axes
from fedsim.store import Store


class Server:
    """The server's state, and the stages of a round that happen on it."""

    def __init__(self, workload: Workload, params: Tensor) -> None:
        self.algorithm = workload.algorithm()
        self.sizes = torch.from_numpy(workload.data.train.sizes).float()
        generator = torch_stream(workload.config.seed, "server")
        nobody: tuple[int, ...] = ()
        self.state = guarded("init_server", 0, nobody, lambda: self.algorithm.init_server(params, generator))
        template = guarded("init_client", 0, nobody, lambda: self.algorithm.init_client(params))
        self.store = Store(template, workload.data.num_clients)
        self.rounds_taken = Store({"rounds": torch.tensor(0)}, workload.data.num_clients)
        self.evaluated = Latest()
        self._skips = workload.config.nonfinite == "skip"
        self._journal: Journal | None = None
        # A checkpoint of another run is told by these.
        self.run = {"algorithm": workload.config.algorithm.name, "clients": workload.data.num_clients, "d": len(params)}

    def broadcast(self, round: int, ids: tuple[int, ...]) -> tuple[State, State]:
        """What the clients are sent, and what they keep: ``(payload, rows)``."""
        rows = self.store.read(np.array(ids))
        clients = torch.tensor(ids)

        def work() -> State:
            payload = self.algorithm.broadcast(self.state, clients, rows)
            return {name: value.detach() for name, value in payload.items()}

        return guarded("broadcast", round, ids, work), rows

    def average(self) -> Tensor | None:
        """The average row ``[d]``, if the algorithm has one."""
        with own_code(f"algorithm={self.run['algorithm']}: average"):
            average = self.algorithm.average(self.state)
            return None if average is None else average.detach()

    def aggregate(self, round: int, blocks: list[tuple[int, ...]], results: list[tuple[State, State]]) -> Facts:
        """Applies all blocks' ``(update, new rows)`` at once, in the order of the clients' ids.

        Returns:
            Facts: bytes up, of all clients; ids of those who were ``skipped``, of whom nothing is taken and nothing is
            changed; the algorithm's ``metrics`` and ``seconds``, if anyone is left for it.

        Raises:
            ClientError: the algorithm failed, what a block returned is not like the others', or it is not finite and
                ``nonfinite`` is ``raise``.
        """
        ids = torch.tensor([client for block in blocks for client in block])
        order = ids.argsort()
        ids = ids[order]
        update = _stack(round, blocks, "update", [update for update, _ in results], order)
        rows = _stack(round, blocks, "rows", [rows for _, rows in results], order)
        facts = {"bytes_up": sum(value.numel() * value.element_size() for value in update.values()), "skipped": []}
        bad = self._nonfinite(round, ids, {"update": update, "rows": rows})
        if bad.any():
            facts["skipped"] = ids[bad].tolist()
            ids, update, rows = ids[~bad], _without(bad, update), _without(bad, rows)
        if not len(ids):
            return {**facts, "metrics": {}, "seconds": {}}
        cohort = Cohort(round, ids, self.sizes[ids])

        def apply() -> tuple[State, Facts]:
            state, new_rows = self.algorithm.aggregate(self.state, cohort, update, rows)
            told = {name: {key: float(v) for key, v in state.get(name, {}).items()} for name in ("metrics", "seconds")}
            self.store.write(ids.numpy(), new_rows)
            return state, told

        self.state, told = guarded("aggregate", round, tuple(ids.tolist()), apply)
        self.rounds_taken.write(ids.numpy(), {"rounds": self.rounds_taken.read(ids.numpy())["rounds"] + 1})
        return {**facts, **told}

    def _nonfinite(self, round: int, ids: Tensor, states: dict[str, State]) -> Tensor:
        """Which of the clients have a NaN or an infinite number in what they returned, ``[C] bool``.

        Raises:
            ClientError: some have, and ``nonfinite`` is ``raise``.
        """
        found = torch.zeros(len(ids), dtype=torch.bool)
        for kind, state in states.items():
            for name, value in state.items():
                bad = _not_finite(value[:, None].flatten(1))
                if bad.any() and not self._skips:
                    told = f"{kind} {name!r} is not finite: lower local.lr, look at the data, or set nonfinite=skip"
                    raise ClientError("train", round, ids[bad].tolist(), told)
                found |= bad
        return found

    # Checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes a checkpoint of the server, of what clients keep, and of the driver's ``facts``.

        What grows with the population is written where it changed since the last checkpoint. Of it the driver sends
        ``facts["evaluated"]``, arrays ``[C]``, once after an evaluation; ``rounds_taken`` is counted here.

        Raises:
            CheckpointError: it cannot be written.
            OwnCodeError: the algorithm remembers what no checkpoint can hold.
        """
        facts = dict(facts)
        if evaluated := facts.pop("evaluated", {}):
            self.evaluated.set({name: torch.tensor(value) for name, value in evaluated.items()})
        what = f"algorithm={self.run['algorithm']}: a checkpoint of its server state"
        with own_code(what):
            server = {key: _captured(value) for key, value in self.state.items() if not isinstance(value, Journaled)}
        tree = {"run": self.run, "server": server, "facts": facts}
        before, self._journal = self._journal, None  # should this one fail
        try:
            self._journal = checkpoint.save(folder, tree, self._journaled(), before)
        except TypeError as error:
            held = "tensors, numbers, text, lists and dicts of them, and objects with a state_dict"
            raise OwnCodeError(what, f"{error}; it holds {held}") from None

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores a checkpoint and returns the driver's facts, with ``evaluated`` and with ``rounds_taken [N]``.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        saved = checkpoint.load(folder)
        if saved.get("run") != self.run:
            raise CheckpointError(f"{folder}: of another run ({saved.get('run')}, not {self.run})")
        try:
            for key, value in saved["server"].items():
                if hasattr(self.state.get(key), "load_state_dict"):
                    self.state[key].load_state_dict(value)
                else:
                    self.state[key] = value
            self._journal = None
            checkpoint.replay(folder, self._journaled())
            taken = self.rounds_taken.read(np.arange(len(self.sizes)))["rounds"].tolist()
            evaluated = {name: value.numpy() for name, value in self.evaluated.value.items()}
            return {**saved["facts"], "rounds_taken": taken, "evaluated": evaluated}
        except Exception as error:  # an algorithm's own load_state_dict raises whatever it likes
            raise CheckpointError(f"{folder}: does not fit this run: {type(error).__name__}: {error}") from error

    def _journaled(self) -> dict[str, Journaled]:
        own = {"rows": self.store, "rounds_taken": self.rounds_taken, "evaluated": self.evaluated}
        return own | {f"server.{key}": value for key, value in self.state.items() if isinstance(value, Journaled)}


def _captured(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _stack(round: int, blocks: list[tuple[int, ...]], kind: str, states: list[State], order: Tensor) -> State:
    """One state of all blocks' clients, in the given order."""
    expected = _shapes(states[0])
    for ids, state in zip(blocks, states, strict=True):
        refuse_other_axes(round, ids, kind, state)
        if _shapes(state) != expected:
            told = f"{kind} of shapes {_shapes(state)} a client, where another block's are {expected}"
            raise ClientError("train", round, list(ids), told)
    return {name: torch.cat([state[name] for state in states]).index_select(0, order) for name in states[0]}


def _not_finite(values: Tensor) -> Tensor:
    """Which rows of ``[C, ...]`` have a NaN or an infinite number, ``[C] bool``: a finite sum has neither in it."""
    if values.sum(1).isfinite().all():
        return torch.zeros(len(values), dtype=torch.bool)
    return ~values.isfinite().all(1)


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in state.items()}


def _without(bad: Tensor, state: State) -> State:
    return {name: value[~bad] for name, value in state.items()}
