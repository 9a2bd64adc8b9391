"""What a person sees of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedsim.tracking.record import Record


class ConsoleProgress:
    """A live line on a terminal; elsewhere one plain line a round."""

    def __init__(self, console: Console, rounds: int, rounds_done: int = 0) -> None:
        self._console, self._rounds = console, rounds
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("round {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("starting", total=rounds, completed=rounds_done)
            self._bar.start()
        self._accuracy = ""
        self._seconds: list[float] = []

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        if "accuracy" in record:
            self._accuracy = f"  accuracy {record['accuracy']['mean']:.3f}"
        line = f"loss {record['loss']:.3f}{self._accuracy}  {record['updates_per_second']:.1f} updates/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["round"], description=line)
            return
        self._seconds.append(record["seconds"]["total"])
        left = float(np.median(self._seconds)) * (self._rounds - record["round"])
        self._console.print(f"round {record['round']}/{self._rounds}  {line}  {duration(left)} left", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """``95`` as ``1:35``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def closing_table(summary: Mapping[str, Any]) -> Table:
    """The end of a run, for a person."""
    accuracy, seconds, sent = summary["accuracy"], summary["seconds"], summary["bytes"]
    table = Table(
        title=f"{summary['algorithm']} on {summary['env']}, {summary['num_clients']} clients", title_justify="left"
    )
    for column in ("accuracy", "", "cost", ""):
        table.add_column(column, justify="right" if not column else "left")
    left = [(name, accuracy.get(key)) for name, key in (
        ("mean", "mean"), ("std over clients", "std"), ("10th percentile", "p10"), ("worst client", "min"),
        ("as sent", "sent"), ("server's average", "global"))]  # fmt: skip
    right = [
        ("bytes up", size(sent["up"])), ("bytes down", size(sent["down"])), ("train", f"{seconds['train']:.1f} s"),
        ("server", f"{seconds['server']:.1f} s"), ("evaluate", f"{seconds['evaluate']:.1f} s"),
        ("updates/s", f"{summary['updates_per_second']:.1f}")]  # fmt: skip
    for (name, value), (cost, amount) in zip(left, right, strict=True):
        table.add_row(name, "–" if value is None else f"{value:.3f}", cost, amount)
    return table


def size(number: float) -> str:
    """Bytes for a person: ``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")
