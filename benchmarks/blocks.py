"""What blocks bring: client updates a second by block size, on the CPU or a GPU.

    python benchmarks/blocks.py [--sizes 1,2,4,8,16,32,64] [--setup tiny32 ...] [--precision fp32 bf16] [--processes 1]
                                [--repeats 5] [--out FILE]

One update: a client's 64 images in batches of 16, one epoch of SGD on its adapters of width 8 and its head. Sizes are
measured in turn, 1 2 4 … 1 2 4 …, and each is told as a ratio to size 1 of the same turn; the median of the turns
counts. Weights are random: speed does not depend on them. With ``--processes N``, so many simulators work at the same
time: on shares of one GPU, or on a core each.

On a GPU each row also has the share of the card's bf16 rate that the arithmetic of the updates comes to: operations
are counted by torch's FlopCounterMode, the rate is that of a product of two matrices of 8,192, measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from machine import about, append, machine
from torch.utils.flop_counter import FlopCounterMode

from fedsim.backend import memory_told
from fedsim.config import load
from fedsim.errors import DeviceMemoryError
from fedsim.plan import prepare
from fedsim.simulator import Simulator

SETUPS = {
    "tiny32": ("vit_tiny_patch16_224", 32),
    "tiny64": ("vit_tiny_patch16_224", 64),
    "tiny224": ("vit_tiny_patch16_224", 224),
    "base224": ("vit_base_patch16_224", 224),
}
IMAGES, BATCH, EDGE = 64, 16, 8192


class Updates:
    """A simulator, and blocks of its clients to train."""

    def __init__(self, setup: str, precision: str, largest: int, device: str) -> None:
        model, img_size = SETUPS[setup]
        torch.set_num_threads(1)
        config = load(None, [
            "algorithm=fedavg", f"cohort={largest}", f"model={model}", "model.weights=random", "model.options={}",
            f"model.img_size={img_size}", f"precision={precision}", "adapter.width=8", "local.epochs=1",
            f"local.batch_size={BATCH}", f"env.num_clients={largest}", f"env.samples_per_client={IMAGES}",
            f"env.px={img_size}", "env.classes_per_client=8", "backend=local",
            f"backend.block_size={largest}",
        ])  # fmt: skip
        plan = prepare(config)
        self.simulator = Simulator(replace(plan.workload, frozen=plan.workload.weights()), device)
        self._payload = {"w": plan.params[None]}

    def train(self, size: int) -> None:
        """One block of so many; a ``DeviceMemoryError`` where it does not fit."""
        block = tuple(range(size))
        with memory_told(block):
            self.simulator.train(0, block, self._payload, {})


def process(pipe: Connection, setup: str, precision: str, largest: int, device: str) -> None:
    """Trains blocks of the sizes that it is told, until it is told 0."""
    updates = Updates(setup, precision, largest, device)
    while size := pipe.recv():
        try:
            updates.train(size)
            pipe.send(size)
        except DeviceMemoryError:
            pipe.send(0)


class Pool:
    """Processes that train at the same time."""

    def __init__(self, processes: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(processes)]
        self._pipes = [ours for ours, _ in pairs]
        for _, theirs in pairs:
            context.Process(target=process, args=(theirs, *arguments), daemon=True).start()

    def updates_per_second(self, size: int) -> float:
        """Of all processes together; 0: a block does not fit into the memory."""
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(size)
        done = [pipe.recv() for pipe in self._pipes]
        return len(done) * size / (time.perf_counter() - start) if all(done) else 0.0

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(0)


def flops_of_an_update(setup: str, precision: str, device: str) -> int:
    updates = Updates(setup, precision, 1, device)
    with FlopCounterMode(display=False) as counter:
        updates.train(1)
    return counter.get_total_flops()


def matrix_flops_per_second() -> float:
    """Of a product of two bf16 matrices on the GPU; the best of ten."""
    a, b = (torch.randn(EDGE, EDGE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * EDGE**3 / min(seconds[2:])


def measured(rate: Callable[[int], float], sizes: list[int], repeats: int) -> dict[int, list[float]]:
    """Updates a second by size, a number a turn; a size that does not fit ends the row of sizes."""
    for position, size in enumerate(sizes):
        if not rate(size):  # which also warms up
            sizes = sizes[:position]
            break
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _, size in itertools.product(range(repeats), sizes):
        found[size].append(rate(size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--setup", nargs="+", choices=SETUPS, default=["tiny32", "tiny64"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append each result as a JSON line")
    options = parser.parse_args()

    sizes = [int(size) for size in options.sizes.split(",")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, peak = machine(), 0.0
    if device == "cuda":
        name, peak = f"{torch.cuda.get_device_name()}; {name}", matrix_flops_per_second()
    for setup, precision, processes in itertools.product(options.setup, options.precision, options.processes):
        pool = Pool(processes, setup, precision, max(sizes), device)
        rates = measured(pool.updates_per_second, list(sizes), options.repeats)
        pool.close()
        flops = flops_of_an_update(setup, precision, device) if peak else 0
        for size, found in rates.items():
            ratios = [rate / alone for rate, alone in zip(found, rates[sizes[0]], strict=True)]
            row = {
                "benchmark": "blocks", "setup": setup, "precision": precision, "processes": processes,
                "block_size": size, "updates_per_second": statistics.median(found),
                f"ratio_to_{sizes[0]}": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                "repeats": options.repeats, **about(), "machine": name,
            }  # fmt: skip
            if peak:
                row |= {"matrix_tflops": peak / 1e12, "share_of_it": flops * row["updates_per_second"] / peak}
            print(json.dumps(row), flush=True)
            append(row, options.out)


if __name__ == "__main__":
    main()
