"""What the engine costs: client updates a second of fedsim on Ray against a bare PyTorch loop, side by side.

    python benchmarks/overhead.py [--model vit_tiny_patch16_224 --img-size 64 --clients 16 --repeats 5 --out FILE]

One update: 64 images, batch 16, 4 SGD steps on bottleneck adapters of width 8 in every block and a 10-way head. The
bare loop is what a researcher would write: a timm model with the adapters as modules, one client after another, in as
many processes of one thread as there are simulators, no framework at all. Both work on the same number of clients in
turn, A B A B …, on the same machine; the ratio of each pair counts, and the median of them is the result. Weights are
random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import append, machine
from peer_work import adapted_vit, pixels, trained
from torch.nn import functional as F

IMAGES, BATCH, WIDTH, CLASSES = 64, 16, 8, 10


def bare_process(pipe: Connection, name: str, img_size: int) -> None:
    """Trains as many clients as it is told, one after another, each from the same start."""
    torch.set_num_threads(1)
    rng, model = np.random.default_rng(0), adapted_vit(name, img_size, CLASSES, WIDTH)
    images = rng.integers(0, 256, (IMAGES, 3, img_size, img_size), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, CLASSES, IMAGES))
    parameters = list(trained(model).values())
    start = [parameter.detach().clone() for parameter in parameters]
    while clients := pipe.recv():
        for _ in range(clients):
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            for chosen in rng.permutation(IMAGES).reshape(-1, BATCH):
                batch = pixels(torch.from_numpy(images[chosen]))
                loss = F.cross_entropy(model(batch), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        pipe.send(clients)


def fedsim_backend(options: argparse.Namespace) -> tuple[Any, Any]:
    """A fedsim run without its files: the plan, and a started Ray back end."""
    from fedsim.config import load
    from fedsim.plan import prepare
    from fedsim.ray_backend import RayBackend

    config = load(None, [
        "algorithm=fedavg", f"cohort={options.clients}", f"model={options.model}", "model.weights=random",
        f"model.img_size={options.img_size}", "model.options={}", f"adapter.width={WIDTH}", "local.epochs=1",
        f"local.batch_size={BATCH}", f"env.num_clients={4 * options.clients}", f"env.samples_per_client={IMAGES}",
        f"env.px={options.img_size}", "env.classes_per_client=8", f"backend.simulators={options.processes}",
        f"backend.block_size={options.block_size}", "backend.dashboard=false",
    ])  # fmt: skip
    plan = prepare(config)
    return plan, RayBackend(plan.workload, plan.params, "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64)
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
    plan, backend = fedsim_backend(options)

    def bare() -> float:
        start = time.perf_counter()
        for ours, _ in pipes:
            ours.send(options.clients // options.processes)
        for ours, _ in pipes:
            ours.recv()
        return options.clients / (time.perf_counter() - start)

    def fedsim(round: int) -> float:
        start = time.perf_counter()
        backend.train(round, plan.blocks(plan.sample_cohort(round)))
        backend.aggregate(round)
        return options.clients / (time.perf_counter() - start)

    bare(), fedsim(0)  # warm
    pairs = [(fedsim(k + 1), bare()) for k in range(options.repeats)]
    backend.close()
    for ours, _ in pipes:
        ours.send(0)
    ratios = [ours / theirs for ours, theirs in pairs]
    row = {
        "benchmark": "overhead", "model": options.model, "img_size": options.img_size, "block_size": options.block_size,
        "fedsim_updates_per_second": statistics.median(ours for ours, _ in pairs),
        "bare_updates_per_second": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "repeats": options.repeats, "processes": options.processes, "torch": torch.__version__,
        "machine": machine(),
    }  # fmt: skip
    print(json.dumps(row, indent=2))
    append(row, options.out)


if __name__ == "__main__":
    main()
