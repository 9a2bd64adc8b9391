"""What one more simulator costs in private memory, and what the frozen weights and the data add to that.

    python benchmarks/memory.py [--repeats 5] [--out FILE]

Starts pools of two simulators over a small and a large backbone (ViT-Ti, ViT-B) and over little and much data, and
reads each simulator's private memory (USS: what would be freed if it ended) before any training and after a round.
Weights lie in Ray's object store and images in a memory-mapped file, so both should add next to nothing. With one
adapter and blocks of two there are few activations; with twelve and blocks of eight there are those of a run. Linux.

Then plays 200 rounds of pFedSeq on drawn images, evaluated every tenth, with a checkpoint after each, and compares the
resident memory of every process after them with that after the first 20: what leaks would show. Each is done as
often as ``--repeats`` says, with new actors; medians count, the least and the most are told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from machine import about, append

from fedsim.config import load
from fedsim.loop import Progress, run_rounds
from fedsim.plan import prepare
from fedsim.ray_backend import RayBackend
from fedsim.tracking import JsonLines

ROUNDS = (20, 200)


def private_mib(model: str, clients: int, adapted: str, block: int) -> dict[str, float]:
    """Private and resident memory of a simulator, the mean of two, and the sizes of what they share.

    ``adapted``: the blocks with adapters; ``block``: clients that are trained together.
    """
    config = load(None, [
        "algorithm=fedavg", f"cohort={2 * block}", f"model={model}", "model.weights=random", "model.img_size=64",
        "model.options={}", f"adapter.blocks={adapted}", "local.epochs=1", f"env.num_clients={clients}", "env.px=64",
        "env.samples_per_client=64", "backend.simulators=2", f"backend.block_size={block}", "backend.dashboard=false",
    ])  # fmt: skip
    plan = prepare(config)
    backend = RayBackend(plan.workload, plan.params, "memory")
    try:
        processes = [psutil.Process(pid) for pid in backend.pids()]
        idle = [process.memory_full_info().uss for process in processes]
        backend.train(0, plan.blocks(plan.sample_cohort(0)))
        full = [process.memory_full_info() for process in processes]
    finally:
        backend.close()
    return {
        "weights_mib": sum(value.nbytes for value in plan.workload.frozen.values()) / 2**20,
        "images_mib": plan.workload.data.images.nbytes / 2**20,
        "private_idle_mib": statistics.fmean(idle) / 2**20,
        "private_after_a_round_mib": statistics.fmean(info.uss for info in full) / 2**20,
        "resident_after_a_round_mib": statistics.fmean(info.rss for info in full) / 2**20,
    }


def growth() -> dict[str, float]:
    """Resident memory after the last of ``ROUNDS`` over that after the first, by process; and in MiB."""
    plan = prepare(load(None, [
        "algorithm=pfedseq", "model.weights=random", "eval.every=10", "backend=ray", "backend.simulators=2",
        "backend.dashboard=false",
    ]))  # fmt: skip
    backend = RayBackend(plan.workload, plan.params, "memory-growth")
    pids = {"driver": os.getpid(), "central": ray.get(backend._central.ready.remote())}
    pids |= {f"simulator-{number}": pid for number, pid in enumerate(backend.pids())}
    resident: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        lines = JsonLines(folder / "metrics.jsonl")
        progress = Progress(0, [0] * plan.workload.data.num_clients)
        try:
            for rounds in ROUNDS:
                config = replace(plan.workload.config, rounds=rounds)
                longer = replace(plan, workload=replace(plan.workload, config=config))
                run_rounds(longer, backend, folder, [lines], progress)
                resident.append({name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in pids.items()})
        finally:
            lines.close()
            backend.close()
    first, last = resident
    ratios = {f"{process}_ratio": last[process] / first[process] for process in last}
    return ratios | {f"{process}_mib": last[process] for process in last}


def repeated(measure: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """The median of each number, and with ``_min`` and ``_max`` its spread."""
    runs = [measure() for _ in range(repeats)]
    row = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        row |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the results as JSON lines")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    told = {"repeats": options.repeats, **about()}
    measures: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = [
        (
            {"benchmark": "memory", "model": model, "adapted": adapted, "block": block},
            partial(private_mib, model, clients, adapted, block),
        )
        for model, clients, adapted, block in (
            ("vit_tiny_patch16_224", 8, "last:1", 2),
            ("vit_base_patch16_224", 8, "last:1", 2),
            ("vit_tiny_patch16_224", 400, "last:1", 2),
            ("vit_tiny_patch16_224", 16, "all", 8),
        )
    ]
    measures.append(({"benchmark": "growth", "rounds": ROUNDS}, growth))
    for what, measure in measures:
        row = what | repeated(measure, options.repeats) | told
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}))
        append(row, options.out)
    ray.shutdown()


if __name__ == "__main__":
    main()
