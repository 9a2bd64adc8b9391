"""One named class per failure.

Every class here keeps its constructor arguments in ``args`` (they go to ``super().__init__``), so that it survives
pickling, and with it the way from a Ray worker to the driver.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_NAMED = 8  # choices in one message


class FedsimError(Exception):
    """Base of every failure that fedsim raises on purpose."""


class UserError(FedsimError):
    """A mistake of the caller: the command line prints it as one line and exits with 2."""


class ConfigError(UserError):
    """All the mistakes of one configuration, reported together."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n".join(self.mistakes)


class DataError(UserError):
    """An image source, archive or partition that cannot be used: what, where."""


class WeightsError(UserError):
    """Weights that do not fit the model: which tensor, which shapes."""


class OutputError(UserError):
    """A run folder that exists, is missing, or cannot be written."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class RunError(FedsimError):
    """A run that had begun and cannot go on, of what before would have been a mistake: a full disk, for instance."""


class OwnCodeError(FedsimError):
    """An exception out of an algorithm's or an env's own code where no client is simulated.

    Attributes:
        what: whose code, and which part of it.
        original: the original traceback, as text.
    """

    def __init__(self, what: str, original: str) -> None:
        super().__init__(what, original)
        self.what, self.original = what, original

    def __str__(self) -> str:
        return f"{self.what} failed\n{self.original.rstrip()}"


class ClientError(FedsimError):
    """An exception out of an algorithm's or an env's own code while clients were simulated.

    Attributes:
        stage: ``"train"`` or ``"evaluate"``, or a server stage (``"broadcast"``, ``"aggregate"``).
        round: the round, from 0.
        clients: ids of the block's clients.
        original: the original traceback, as text.
    """

    def __init__(self, stage: str, round: int, clients: list[int], original: str) -> None:
        super().__init__(stage, round, clients, original)
        self.stage, self.round, self.clients, self.original = stage, round, clients, original

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.clients[:8])) + (", …" if len(self.clients) > 8 else "")
        return f"{self.stage} failed in round {self.round + 1}, clients [{shown}]\n{self.original.rstrip()}"


class BlockFailedError(FedsimError):
    """A block of clients whose simulator died under it too often."""

    def __init__(self, round: int, clients: list[int], attempts: int, cause: str) -> None:
        super().__init__(round, clients, attempts, cause)
        self.round, self.clients, self.attempts, self.cause = round, clients, attempts, cause

    def __str__(self) -> str:
        return (
            f"round {self.round + 1}: the simulators of clients {self.clients} died {self.attempts} times; "
            f"the last one: {self.cause}"
        )


class DeviceMemoryError(FedsimError):
    """A block that does not fit into the memory of the GPU: it is halved."""


class CentralLostError(FedsimError):
    """The central actor died or hangs; the run goes on from the newest checkpoint."""

    def __init__(self, round: int, cause: str) -> None:
        super().__init__(round, cause)
        self.round, self.cause = round, cause

    def __str__(self) -> str:
        return f"round {self.round + 1}: the central actor is lost ({self.cause})"


class NotStartedError(FedsimError):
    """No simulator, or no central actor, has lived for longer than ``backend.give_up_after_s``."""

    def __init__(self, round: int, actor: str, waited_s: float, folder: str) -> None:
        super().__init__(round, actor, waited_s, folder)
        self.round, self.actor, self.waited_s, self.folder = round, actor, waited_s, folder

    def __str__(self) -> str:
        return (
            f"round {self.round + 1}: no {self.actor} could be started for {self.waited_s:.0f} s; the last checkpoint "
            f"is whole; once the cluster has room: python -m fedsim resume {self.folder}"
        )


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Runs code that may be a user's own, and simulates no client.

    Raises:
        DataError: there is not enough memory for it.
        OwnCodeError: it failed; fedsim's own errors stay what they are.
    """
    try:
        yield
    except FedsimError:
        raise
    except MemoryError as error:
        raise DataError(f"{what}: not enough memory ({error})") from None
    except Exception:
        raise OwnCodeError(what, traceback.format_exc()) from None


def nearest(name: str, choices: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` with the choice most like ``name``, else the choices, or of many the nearest few."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]!r}?"
    if len(choices) > MOST_NAMED:
        choices = [*difflib.get_close_matches(name, choices, n=MOST_NAMED, cutoff=0), "…"]
    return f"; choose from {', '.join(choices)}" if choices else ""
