"""Drivers that are killed at set moments. Each is forked off this process, which has imported what takes the longest.

What outlives a driver are its files. So a moment is that before one of its changes to files: what was written by then
is there, and no more. A line of input is ``{"arguments": […], "moment": n}``: of the command line, and the number of
the change, from 1, before which the driver is killed; 0: it is not. A line of output is ``{"code": …, "changes": …}``:
the exit code, -9 if it was killed, and how many changes were begun.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from typing import Any

import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import fedsim.algorithms.pfedseq
import fedsim.envs.shapes
import fedsim.simulation  # noqa: F401
from fedsim.__main__ import main
from fedsim.files import LOCK

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")


def drive(arguments: list[str], moment: int) -> tuple[int, int]:
    counted = memoryview(mmap.mmap(-1, 8)).cast("Q")  # shared with the child
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        def watch(event: str, values: tuple[Any, ...]) -> None:
            if event in CHANGES or (event == "open" and writes(*values)):
                counted[0] += 1
                if counted[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        os._exit(main(arguments))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), counted[0]


def writes(path: Any, mode: str | None, flags: int) -> bool:
    # TensorBoard opens its file for every number, in a thread: so many moments would leave few for all else. And each
    # driver makes the lock anew, in which nothing outlives it.
    mentioned = str(path)
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and "tfevents" not in mentioned and not mentioned.endswith(LOCK)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(dict(zip(("code", "changes"), drive(**json.loads(line)), strict=True))), flush=True)
