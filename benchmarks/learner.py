"""What pFedSeq's server step costs beside the training that it follows, in the same rounds.

    python benchmarks/learner.py [--cohort 10 100] [--window 10] [--speed fp32] [--rounds 5] [--out FILE]

ViT-Ti at 64 px, adapters of width 8 in the last three blocks and a head of 100 classes, so that d = 29,116; a client
trains one epoch on 64 images in batches of 16; two simulators on Ray, blocks of 8 clients. The learner is the default
one, 64 entries of state a channel. The history's window of ten rounds is full before rounds are counted: 100 tokens
with a cohort of 10, as with ``--cohort 20 --window 5``. The server's step: the learner is trained by one step, the
memory is built anew, and what is sent to the next cohort is calibrated, which training asks for once more. Once as the
configuration says, in fp32, and once in the setting that makes training cheapest, bf16 with a cached prefix. Images are
noise: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import ray
from machine import about, append

from fedsim.config import load
from fedsim.plan import prepare
from fedsim.ray_backend import RayBackend

PX = 64
SPEEDS = {"fp32": ["precision=fp32"], "bf16, cached prefix": ["precision=bf16", "model.cached_prefix=fp16"]}


def seconds(cohort: int, window: int, speed: list[str], rounds: int) -> list[tuple[float, float]]:
    """Of training and of the server's step, a pair a round."""
    plan = prepare(load(None, [
        "algorithm=pfedseq", "algorithm.mix=1.0", "algorithm.held_out=0", f"algorithm.window={window}",
        "algorithm.state_size=64", "backend.block_size=8",
        "env=noise:Noise", f"env.num_clients={max(100, cohort)}", f"cohort={cohort}",
        "model=vit_tiny_patch16_224", "model.weights=random", "model.options={}", f"model.img_size={PX}",
        "adapter=sequential", "adapter.width=8", "adapter.blocks=last:3", "local.epochs=1", "local.batch_size=16",
        "backend=ray", "backend.simulators=2", "backend.dashboard=false", *speed,
    ]))  # fmt: skip
    backend, found = RayBackend(plan.workload, plan.params, "learner"), []
    try:
        for round in range(window + rounds):
            start = time.perf_counter()
            backend.train(round, plan.blocks(plan.sample_cohort(round)))
            trained = time.perf_counter()
            backend.aggregate(round)
            following = plan.blocks(plan.sample_cohort(round + 1))
            payloads = [backend._central.broadcast.remote(round + 1, block)[0] for block in following]
            ray.wait(payloads, num_returns=len(payloads), fetch_local=False)
            found.append((trained - start, time.perf_counter() - trained))
    finally:
        backend.close()
    return found[window:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cohort", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--window", type=int, default=10, help="rounds of the history")
    parser.add_argument("--speed", nargs="+", choices=SPEEDS, default=list(SPEEDS), help="of training")
    parser.add_argument("--rounds", type=int, default=5, help="counted, after those that fill the window")
    parser.add_argument("--out", type=Path, help="append each result as a JSON line")
    options = parser.parse_args()
    for cohort in options.cohort:
        for name in options.speed:
            pairs = seconds(cohort, options.window, SPEEDS[name], options.rounds)
            ratios = [server / train for train, server in pairs]
            row: dict[str, Any] = {
                "benchmark": "learner", "cohort": cohort, "tokens": options.window * cohort, "speed": name,
                "train_s": statistics.median(train for train, _ in pairs),
                "server_s": statistics.median(server for _, server in pairs),
                "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                "rounds": options.rounds, **about(),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            append(row, options.out)


if __name__ == "__main__":
    main()
