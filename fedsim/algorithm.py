"""The interface that every algorithm implements, and the glossary of shapes.

Symbols, as in the docstrings of all algorithms:

====== =====================================================================
``C``  clients of a block (or of a cohort), always the leading axis
``d``  length of a client's row: adapters and head, flat, float32
``w``  the server's row ``[d]``; ``[1, d]`` when it is sent to all alike
``w_i`` what client i is sent; ``v_i`` its personal row; ``F_i`` its local loss
``n_i`` its number of training samples
====== =====================================================================

An algorithm is a value with methods that take values and return values: what it remembers, it returns. It is written
once for a block of clients, never for one client at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedsim.layout import Layout

if TYPE_CHECKING:
    from fedsim.local import Batch, LocalContext

State = dict[str, Tensor]
"""Named tensors; client-side ones have a leading axis C (or 1: the same for every client)."""

ServerState = dict[str, Any]
"""What the server remembers: tensors, and objects with ``state_dict()`` and ``load_state_dict()`` (modules,
optimisers, a history), which live in the central actor and are checkpointed through these two methods."""

Predictor = Callable[["Batch"], Tensor]
"""Where no row says it: scores ``[m, b, classes]`` of a batch; the largest is what is predicted."""


@dataclass(frozen=True)
class Task:
    """What an algorithm may know of the run before it starts.

    Attributes:
        layout: names and groups of the row.
        num_clients: the population, N.
        cohort: clients a round, M.
        num_classes: outputs of the head.
        lr: the clients' learning rate.
        local_epochs: epochs of a client's local training.
        trainable: clients that may ever train: all but the share ``eval.unseen``.
    """

    layout: Layout
    num_clients: int
    cohort: int
    num_classes: int
    lr: float
    local_epochs: int
    trainable: int


@dataclass(frozen=True)
class Cohort:
    """The clients whose updates are aggregated, in the order of their ids.

    Attributes:
        round: the round, from 0.
        ids: ``[C] int64``.
        sizes: ``[C] float32``, n_i.
    """

    round: int
    ids: Tensor
    sizes: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """``sum_i n_i x_i / sum_i n_i`` over ``[C, d]``, giving ``[d]``."""
        return (self.sizes / self.sizes.sum()) @ values


@dataclass(frozen=True)
class NoSettings:
    """The Config of an algorithm that has nothing to set."""


class Algorithm(ABC):
    """A federated algorithm. Subclasses live in ``algorithms/``, one a file.

    Class attributes:
        Config: a documented frozen dataclass; its fields are the keys ``algorithm.*``.
        kind: ``"global"`` or ``"personal"``.
        paper: its citation, on one line.
        extra: what its rows have a second one of: ``"adapter.personal"``, ``"head.personal"``. They are groups of the
            layout, after all others (``"adapter"`` and ``"head"`` cover them); their outputs are added to the first's.
        needs: groups without which it cannot run, such as ``"adapter.A"``; refused before the run.
    """

    Config: ClassVar[type] = NoSettings
    kind: ClassVar[str] = "personal"
    paper: ClassVar[str] = ""
    extra: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, task: Task) -> None:
        self.config = config
        self.task = task

    # On the server -----------------------------------------------------------------------------------------------

    def init_server(self, params: Tensor, generator: torch.Generator) -> ServerState:
        """The server before round 1. ``params [d]``: the initial row; ``generator``: for whatever else is drawn."""
        return {"w": params.clone()}

    def init_client(self, params: Tensor) -> State:
        """What a client keeps before it is first seen, ``[*shape]`` without the axis C; ``{}``: a stateless client."""
        return {}

    def broadcast(self, server: ServerState, ids: Tensor, rows: State) -> State:
        """What the clients ``ids [C]`` are sent; ``rows`` is what they keep. A leading axis of 1 is shared."""
        return {"w": server["w"][None]}

    @abstractmethod
    def aggregate(self, server: ServerState, cohort: Cohort, update: State, rows: State) -> tuple[ServerState, State]:
        """The server after the round, and the clients' rows (``rows``: as ``local_update`` returned them).

        A server state's ``"metrics"``, if there is one, is a dict of floats: it goes to the metrics of the round; so
        does ``"seconds"``, of parts of the server's work, to the seconds by stage.
        """

    def average(self, server: ServerState) -> Tensor | None:
        """The server's average row ``[d]``, evaluated as ``accuracy.global``; ``None`` where there is none."""
        return server.get("w")

    def memory_bytes(self) -> int:
        """Bytes that the server's state will grow to, for the plan."""
        return 4 * self.task.layout.size

    # On a simulator ----------------------------------------------------------------------------------------------

    @abstractmethod
    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        """Local training of a block: ``(update, new rows)``, every tensor with a leading axis C."""

    def sent(self, payload: State, rows: State) -> Tensor:
        """The model that each client holds before any local training, ``[C, d]`` or ``[1, d]``."""
        return payload["w"]

    def personalise(self, payload: State, rows: State, ctx: LocalContext) -> Tensor | Predictor:
        """The model that is evaluated, ``[C, d]`` or ``[1, d]``; may train locally. Default: what was sent.

        Where no row predicts as the method does (neighbours, ensembles): a ``Predictor``.
        """
        return self.sent(payload, rows)
