"""Independent pieces of work on all cores of a machine, each on one: their number changes no result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T], cores: int | None = None) -> list[R]:
    """``work`` of every item, in their order, without gradients; on so many cores, by default on all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads of an operation is part of the arithmetic
    try:
        with ThreadPoolExecutor(cores or os.cpu_count() or 1) as pool:
            return list(pool.map(torch.no_grad()(work), items))
    finally:
        torch.set_num_threads(before)
