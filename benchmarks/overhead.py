"""What the engine costs: client updates a second of fedsim on Ray against a bare PyTorch loop, side by side.

    python benchmarks/overhead.py [--model vit_tiny_patch16_224 --img-size 64 --precision fp32 bf16 --out FILE]

One update: 64 images, batch 16, 4 SGD steps on bottleneck adapters of width 8 in every block and a 10-way head. The
bare loop is what a researcher would write: a timm model with the adapters as modules, one client after another, in as
many processes of one thread as there are simulators, no framework at all. Both work on the same number of clients in
turn, A B A B …, on the same machine; the ratio of each pair counts, and the median of them is the result. fedsim in
bf16 is compared with the loop in fp32, which is what one writes, and with the loop in bf16. Weights are random: speed
does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about, append
from peer_work import adapted_vit, pixels, trained, without_fused_attention
from torch.nn import functional as F

IMAGES, BATCH, WIDTH, CLASSES = 64, 16, 8, 10


def bare_process(pipe: Connection, name: str, img_size: int) -> None:
    """Trains as many clients as it is told, in the precision that it is told, one after another from the same start."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 3, img_size, img_size), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, CLASSES, IMAGES))
    models = {"fp32": adapted_vit(name, img_size, CLASSES, WIDTH)}
    models["bf16"] = without_fused_attention(copy.deepcopy(models["fp32"]))
    start = [parameter.detach().clone() for parameter in trained(models["fp32"]).values()]
    while told := pipe.recv():
        clients, precision = told
        model = models[precision]
        parameters = list(trained(model).values())
        for _ in range(clients):
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            for chosen in rng.permutation(IMAGES).reshape(-1, BATCH):
                batch = pixels(torch.from_numpy(images[chosen]))
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = F.cross_entropy(model(batch), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        pipe.send(clients)


def measure(precision: str, pipes: list[Connection], options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row for each precision of the loop."""
    from fedsim.config import load  # not in the processes of the loop
    from fedsim.plan import prepare
    from fedsim.ray_backend import RayBackend

    plan = prepare(load(None, [
        "algorithm=fedavg", f"cohort={options.clients}", f"precision={precision}", f"model={options.model}",
        "model.weights=random", f"model.img_size={options.img_size}", "model.options={}", f"adapter.width={WIDTH}",
        "local.epochs=1", f"local.batch_size={BATCH}", f"env.num_clients={4 * options.clients}",
        f"env.samples_per_client={IMAGES}", f"env.px={options.img_size}", "env.classes_per_client=8",
        f"backend.simulators={options.processes}", f"backend.block_size={options.block_size}",
        "backend.dashboard=false",
    ]))  # fmt: skip
    backend = RayBackend(plan.workload, plan.params, "overhead")  # a run without its files

    def fedsim(round: int) -> float:
        start = time.perf_counter()
        backend.train(round, plan.blocks(plan.sample_cohort(round)))
        backend.aggregate(round)
        return options.clients / (time.perf_counter() - start)

    def bare(precision: str) -> float:
        start = time.perf_counter()
        for pipe in pipes:
            pipe.send((options.clients // options.processes, precision))
        for pipe in pipes:
            pipe.recv()
        return options.clients / (time.perf_counter() - start)

    loops = sorted({"fp32", precision})
    turns: list[tuple[float, dict[str, float]]] = []
    try:
        for number in range(options.repeats + 1):
            turns.append((fedsim(number), {loop: bare(loop) for loop in loops}))
    finally:
        backend.close()
    for loop in loops:
        pairs = [(ours, theirs[loop]) for ours, theirs in turns[1:]]  # the first is warm-up
        ratios = [ours / theirs for ours, theirs in pairs]
        yield {
            "benchmark": "overhead", "model": options.model, "img_size": options.img_size,
            "block_size": options.block_size, "precision": precision, "bare_precision": loop,
            "fedsim_updates_per_second": statistics.median(ours for ours, _ in pairs),
            "bare_updates_per_second": statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "repeats": options.repeats, "processes": options.processes, **about(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--clients", type=int, default=16, help="clients in one measurement")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the result as one JSON line")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(options.processes)]
    workers = [
        context.Process(target=bare_process, args=(theirs, options.model, options.img_size), daemon=True)
        for _, theirs in pipes
    ]
    for worker in workers:
        worker.start()
    ours = [pipe for pipe, _ in pipes]
    for precision in options.precision:
        for row in measure(precision, ours, options):
            print(json.dumps(row, indent=2), flush=True)
            append(row, options.out)
    for pipe in ours:
        pipe.send(None)


if __name__ == "__main__":
    main()
