"""What becomes of blocks and simulators when something fails: the policy, without Ray and without a clock.

A ``Stage`` knows the blocks of one stage of a round, a ``Pool`` the places of the simulators. The back end tells them
what it saw, and when: ``now`` is in seconds, of a clock that never goes back.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedsim.config import BackendConfig
from fedsim.errors import BlockFailedError

Block = tuple[int, ...]
"""Ids of clients that are trained together as one batch, most steps first."""

WHOLE_TRIES = 2  # failures after which a block of several clients is halved
MARGIN = 10  # a block is hung after so many times what the slowest one took, step for step
MOST_DOUBLINGS = 3  # of that: what failed again and again, in spite of them, does not merely take long
LONGEST_PAUSE_S = 60.0  # between two attempts to start an actor
LOOK_UP_S = 1.0  # the longest wait in which nothing else, such as a signal, is seen to

_log = logging.getLogger(__name__)


@dataclass
class Failures:
    """What went wrong and was mended.

    Attributes:
        actors_replaced: simulators that died or hung.
        hangs: those of them that hung.
        blocks_requeued, blocks_halved: how often that was done.
        central_restarted: how often the server's actor died or hung, and the run went on from a checkpoint.
        updates_skipped: updates that were left out of their rounds, not being finite.
        clients_quarantined: how many clients the run goes on without.
        quarantined: their ids.
    """

    actors_replaced: int = 0
    hangs: int = 0
    blocks_requeued: int = 0
    blocks_halved: int = 0
    central_restarted: int = 0
    updates_skipped: int = 0
    clients_quarantined: int = 0
    quarantined: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Piece:
    """A block on its way, or a part of one that was halved.

    Attributes:
        place: its block in the stage's order, and its first client in that block.
        clients: whom it holds.
        failures: how often it failed.
        facts, result: what it gave when it was done.
        flight: the back end's own, while a simulator has it.
    """

    place: tuple[int, int]
    clients: Block
    failures: int = 0
    facts: Any = None
    result: Any = None
    flight: Any = None


class Stage:
    """The blocks of one stage of a round: each client in them is done exactly once, or quarantined.

    Attributes:
        name: ``"train"`` or ``"evaluate"``.
        round: the round, from 0.
        waiting: what no simulator has.
    """

    def __init__(
        self, name: str, round: int, blocks: Iterable[Block], config: BackendConfig, failures: Failures
    ) -> None:
        self.name, self.round, self._config, self._failures = name, round, config, failures
        self.waiting = deque(Piece((index, 0), block) for index, block in enumerate(blocks))
        self._done: list[Piece] = []

    @property
    def done(self) -> list[Piece]:
        """What is done, in the blocks' order."""
        return sorted(self._done, key=lambda piece: piece.place)

    def finish(self, piece: Piece) -> None:
        """It was done; whoever had it, has it no more."""
        self._done.append(piece)

    def requeue(self, pieces: list[Piece]) -> None:
        """These were lost through no fault of their own: they are next, in their order."""
        self._failures.blocks_requeued += len(pieces)
        self.waiting.extendleft(reversed(pieces))

    def fail(self, piece: Piece, cause: str) -> None:
        """It died, hung, or was lost under a simulator: it is tried again, halved, or its only client is given up.

        Raises:
            BlockFailedError: a single client failed ``max_attempts`` times, and ``on_client_error`` is ``raise``.
        """
        piece.failures += 1
        if len(piece.clients) > 1 and piece.failures >= WHOLE_TRIES:
            self._halve(piece, cause)
        elif len(piece.clients) == 1 and piece.failures >= self._config.max_attempts:
            self._give_up(piece, cause)
        else:
            self.requeue([piece])

    def shrink(self, piece: Piece, cause: str) -> None:
        """It did not fit into the device's memory: halved at once; a single client has failed.

        Raises:
            BlockFailedError: as ``fail``.
        """
        if len(piece.clients) > 1:
            self._halve(piece, cause)
        else:
            self.fail(piece, cause)

    def _halve(self, piece: Piece, cause: str) -> None:
        (index, first), middle = piece.place, (len(piece.clients) + 1) // 2
        self._failures.blocks_halved += 1
        self.waiting.appendleft(Piece((index, first + middle), piece.clients[middle:]))
        self.waiting.appendleft(Piece((index, first), piece.clients[:middle]))
        _log.warning("round %d: clients %s are tried in two halves (%s)", self.round + 1, list(piece.clients), cause)

    def _give_up(self, piece: Piece, cause: str) -> None:
        if self._config.on_client_error == "raise":
            raise BlockFailedError(self.round, list(piece.clients), piece.failures, cause)
        self._failures.quarantined.extend(piece.clients)
        self._failures.clients_quarantined += 1
        _log.warning("round %d: client %d is quarantined (%s)", self.round + 1, piece.clients[0], cause)


@dataclass(eq=False)
class Slot:
    """A place in the pool.

    Attributes:
        number: its own.
        state: ``"absent"`` (no simulator in it), ``"starting"`` or ``"living"``.
        until: when something has to have happened: the next start, the end of this one, the end of the first block.
        pieces: what its simulator was given, in order; the first is the one that runs.
        began: when the first began; ``None`` while its payload is on its way.
        starts, failed_starts: so far, and of late in a row.
        actor, answer: the back end's own: the simulator, and the reference to the sign that it is ready.
    """

    number: int
    state: str = "absent"
    until: float = -math.inf
    pieces: list[Piece] = field(default_factory=list)
    began: float | None = None
    starts: int = 0
    failed_starts: int = 0
    actor: Any = None
    answer: Any = None


class Pool:
    """The places of the simulators, and how long each may take."""

    def __init__(self, config: BackendConfig, simulators: int) -> None:
        self._config = config
        self.slots = [Slot(number) for number in range(simulators)]
        self._slowest_s: dict[str, float] = {}  # seconds per step, by stage
        self._last_lived = math.inf

    @property
    def living(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.state == "living"]

    @property
    def busy(self) -> bool:
        return any(slot.pieces for slot in self.slots)

    # Starts --------------------------------------------------------------------------------------------------------

    def due(self, now: float) -> list[Slot]:
        """Places in which a simulator is to be started now."""
        return [slot for slot in self.slots if slot.state == "absent" and slot.until <= now]

    def starting(self, slot: Slot, now: float) -> None:
        """Its simulator was started, or asked anew whether it is ready; blocks that it had are forgotten."""
        slot.state, slot.until = "starting", now + self._config.start_timeout_s
        slot.pieces, slot.began = [], None

    def ready(self, slot: Slot) -> None:
        slot.state, slot.until, slot.failed_starts = "living", math.inf, 0

    def lost(self, slot: Slot, now: float) -> list[Piece]:
        """Its simulator is no more. A start that failed is tried again after a pause, twice as long each time.

        Returns:
            What it had been given, in order.
        """
        slot.failed_starts += slot.state == "starting"
        pieces, slot.pieces, slot.began = slot.pieces, [], None
        slot.state, slot.until = "absent", now + pause_s(slot.failed_starts)
        return pieces

    # Blocks --------------------------------------------------------------------------------------------------------

    def free(self, waiting: int) -> Slot | None:
        """Which simulator is given the next of so many blocks that wait."""
        # A second block in flight hides the call's latency; near the end of the round it would only be unfair.
        depth = 2 if waiting > len(self.living) else 1
        slot = min(self.living, key=lambda slot: len(slot.pieces), default=None)
        return slot if slot is not None and len(slot.pieces) < depth else None

    def begun(self, slot: Slot, stage: str, steps: int, now: float) -> None:
        """Its first block has all that it needs; the block's time starts."""
        failures = slot.pieces[0].failures
        slot.began = now
        slot.until = now + deadline_s(self._config, steps, self._slowest_s.get(stage), failures)

    def finished(self, slot: Slot, stage: str, steps: int, now: float) -> None:
        """Its first block was done: what that took is remembered."""
        if slot.began is not None:
            self._slowest_s[stage] = max(self._slowest_s.get(stage, 0.0), (now - slot.began) / steps)
        self.dropped(slot)

    def dropped(self, slot: Slot) -> None:
        """Its first block ended in another way; the simulator lives."""
        slot.pieces.pop(0)
        slot.began, slot.until = None, math.inf

    # Time ----------------------------------------------------------------------------------------------------------

    def late(self, now: float) -> list[Slot]:
        """Places whose simulator should have started, or done its first block, by now."""
        return [slot for slot in self.slots if slot.state != "absent" and slot.until <= now]

    def wait_s(self, now: float) -> float:
        """How long nothing has to be done, if nothing happens."""
        return max(0.0, min(LOOK_UP_S, *(slot.until - now for slot in self.slots)))

    def alone_s(self, now: float) -> float:
        """For how long no simulator has lived, as far as this was asked."""
        if self.living or self._last_lived > now:
            self._last_lived = now
        return now - self._last_lived


class Deadlines:
    """How long the server may take for each stage: as simulators for their blocks, every stage being of one step.

    A stage under which it hung has twice as long when it is repeated. So what merely takes long is done in the end.
    """

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._slowest_s: dict[str, float] = {}
        self._hangs: Counter[str] = Counter()

    def of(self, stage: str) -> float:
        """Seconds after which it counts as hung."""
        return deadline_s(self._config, 1, self._slowest_s.get(stage), self._hangs[stage])

    def kept(self, stage: str, took_s: float) -> None:
        """It answered in this time."""
        self._slowest_s[stage] = max(self._slowest_s.get(stage, 0.0), took_s)
        self._hangs[stage] = 0

    def passed(self, stage: str) -> None:
        """It hung."""
        self._hangs[stage] += 1


def pause_s(failed_starts: int) -> float:
    """Seconds to wait before an actor is started once more: 0, 1, 2, 4, … 60."""
    return min(LONGEST_PAUSE_S, 2.0 ** (failed_starts - 1)) if failed_starts else 0.0


def deadline_s(config: BackendConfig, steps: int, slowest_s: float | None, failures: int = 0) -> float:
    """Seconds after which a block, or a stage of the server, counts as hung; the first three failures double them.

    Args:
        config: with the least deadline, and the one that holds while nothing is measured (``start_timeout_s``).
        steps: batches of the block's longest client.
        slowest_s: seconds per step of the slowest one so far; ``None``: there was none.
        failures: how often it failed.
    """
    usual_s = config.start_timeout_s if slowest_s is None else MARGIN * slowest_s * steps
    return float(max(config.min_deadline_s, usual_s) * 2 ** min(failures, MOST_DOUBLINGS))
