"""Ctrl-C and its kin, while a run or a sweep goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedsim.backend import Backend


@contextmanager
def terminate_as_interrupt(*kinds: signal.Signals) -> Iterator[None]:
    """These signals, where they are not ignored (nohup), end the main thread's work like Ctrl-C."""
    with _handling(dict.fromkeys(kinds, signal.default_int_handler)):
        yield


@contextmanager
def stoppable(backend: Backend) -> Iterator[None]:
    """The first Ctrl-C ends the work when the blocks in flight are done; a second one, or SIGTERM, ends it now."""

    def interrupt(number: int, frame: Any) -> None:
        if backend.stopping:
            raise KeyboardInterrupt
        backend.stopping = True
        # No print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after the blocks in flight; Ctrl-C again stops now\n")

    with _handling({signal.SIGINT: interrupt, signal.SIGTERM: signal.default_int_handler}):
        yield


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Callable[[int, Any], Any]]) -> Iterator[None]:
    """Handlers of signals, in the main thread, for those that are not ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for kind, handler in handlers.items():
            if signal.getsignal(kind) is not signal.SIG_IGN:
                before[kind] = signal.signal(kind, handler)
    try:
        yield
    finally:
        for kind, handler_before in before.items():
            signal.signal(kind, handler_before)
