"""What a cached prefix brings: updates a second with it and without, in turn.

    python benchmarks/prefix.py [--clients 32] [--block-size 4] [--repeats 5] [--out FILE]

ViT-Ti at 64 px, adapters of width 8 in the last three blocks; a client trains one epoch on 64 images in batches of 16;
two simulators on Ray for each of the two, which work in turn, A B A B …; the median of the pairs
counts. The tokens are computed before the first round, once for every image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import ray
from machine import about, append

from fedsim.config import load
from fedsim.plan import prepare
from fedsim.ray_backend import RayBackend


class Pool:
    """Two simulators, and their rounds."""

    def __init__(self, clients: int, block_size: int, precision: str, cached: str) -> None:
        self._plan = prepare(load(None, [
            "algorithm=fedavg", "env=noise:Noise", f"env.num_clients={clients}", f"cohort={clients}",
            "model=vit_tiny_patch16_224", "model.weights=random", "model.options={}", "model.img_size=64",
            "adapter=sequential", "adapter.width=8", "adapter.blocks=last:3", "local.epochs=1", "local.batch_size=16",
            "backend=ray", "backend.simulators=2", f"backend.block_size={block_size}", f"precision={precision}",
            f"model.cached_prefix={cached}",
        ]))  # fmt: skip
        self.backend = RayBackend(self._plan.workload, self._plan.params, f"prefix-{precision}-{cached}")

    def updates_per_second(self, round: int) -> float:
        start, cohort = time.perf_counter(), self._plan.sample_cohort(round)
        self.backend.train(round, self._plan.blocks(cohort))
        self.backend.aggregate(round)
        return len(cohort) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=32, help="of a round")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="append each result as a JSON line")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning")
    for precision in options.precision:
        pools = [Pool(options.clients, options.block_size, precision, cached) for cached in ("fp16", "off")]
        turns = [[pool.updates_per_second(round) for pool in pools] for round in range(options.repeats + 1)][1:]
        for pool in pools:
            pool.backend.close()
        ratios = [with_it / without for with_it, without in turns]
        row = {
            "benchmark": "prefix", "precision": precision, "block_size": options.block_size,
            "cached_updates_per_second": statistics.median(with_it for with_it, _ in turns),
            "updates_per_second": statistics.median(without for _, without in turns),
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "repeats": options.repeats, **about(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        append(row, options.out)
    ray.shutdown()


if __name__ == "__main__":
    main()
