"""What a user's own code may do while a run goes on: ``fedsim.run(config, callbacks=[Mine()])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.simulator import guarded
from fedsim.tracking.record import Record

if TYPE_CHECKING:
    from fedsim.plan import Plan


class Callback:
    """Override what is wanted. An exception in any of these stops the run, with its own traceback."""

    def on_run_start(self, plan: Plan, rounds_done: int) -> None:
        """Before the first round that is left; of a run that goes on after a lost central actor: again."""

    def on_round_end(self, record: Record, accuracies: np.ndarray | None) -> None:
        """A round is done.

        Args:
            record: its line of ``metrics.jsonl``. After ``resume``, rounds that no checkpoint has are done again.
            accuracies: ``[N] float64``, of all clients that take part, if the round was evaluated.
        """

    def on_run_end(self, summary: dict[str, Any]) -> None:
        """The run has finished; ``summary`` is ``summary.json``."""


class Called:
    """A callback as a tracker that is told of by name where it fails."""

    def __init__(self, callback: Callback, plan: Plan, rounds_done: int) -> None:
        self._callback = callback
        guarded(f"{type(callback).__name__}.on_run_start", rounds_done, (),
                lambda: callback.on_run_start(plan, rounds_done))  # fmt: skip

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        name, round = f"{type(self._callback).__name__}.on_round_end", record["round"] - 1
        guarded(name, round, (), lambda: self._callback.on_round_end(record, accuracies))

    def close(self) -> None:
        pass
