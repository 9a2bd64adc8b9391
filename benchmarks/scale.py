"""What a round costs besides training: seconds of engine and server against population, cohort and length of the row.

    python benchmarks/scale.py [--backend ray] [--simulators 2] [--repeats 5] [--out FILE]
    python benchmarks/scale.py --population 100 100000 --cohort 100 --dim 10000 --backend local

Clients keep a personal row, as in Ditto, but training is one multiplication; so what is measured is sampling, sending,
aggregating, keeping rows, and a checkpoint each round. Evaluation, which costs what the population costs, is left out.
All populations of one cohort and one length take a round in turn, A B C A B C …; the medians count, and ``ratio`` is
that to the first population. Without options: populations 100 to 100,000 with a cohort of 100 and d = 10^4, then
cohorts of 10 and 1,000, and then d = 10^5 and 10^6, of 10,000 clients; the last takes 7 GB of the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import append, machine
from torch import Tensor

from fedsim.algorithm import State
from fedsim.algorithms.fedavg import FedAvg
from fedsim.backend import Backend, make_backend
from fedsim.cache import cached
from fedsim.config import load
from fedsim.env import Env, FederatedData, Ragged
from fedsim.local import LocalContext
from fedsim.loop import Progress, run_rounds
from fedsim.plan import Plan, prepare
from fedsim.provenance import versions
from fedsim.schema import setting
from fedsim.tracking import JsonLines, Tracker

IMAGES, CLASSES, PX = 64, 2, 16
BLOCK_DIM = 500_000  # of an adapter, at most
BLOCK_WIDTH = 64  # of test_vit; its adapter of width r has 2 * 64 r + r + 64 elements, the head 64 * 2 + 2
STAGES = ("train", "server", "checkpoint")
Sizes = tuple[int, int, int]  # population, cohort, d


class Crowd(Env):
    """Any number of clients that share a few images."""

    @dataclass(frozen=True)
    class Config:
        num_clients: int = setting(100, "the population", low=1)

    def build(self, seed: int, px: int, cache: Path) -> FederatedData:
        clients, blank = self.config.num_clients, np.zeros((IMAGES, 3, PX, PX), dtype=np.uint8)
        image_file = cached(cache, "crowd", {"shape": blank.shape}, lambda path: np.save(path, blank))
        train, test = (
            Ragged(np.arange(each * clients) % IMAGES, np.arange(0, each * clients + 1, each)) for each in (2, 1)
        )
        names = tuple(map(str, range(CLASSES)))
        return FederatedData(image_file, np.arange(IMAGES) % CLASSES, names, train, test, {"clients": clients})


class Kept(FedAvg):
    """Ditto without its gradients: clients keep a row of their own, and train it by halving its distance to w."""

    kind = "personal"

    def init_client(self, params: Tensor) -> State:
        return {"v": params}

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        v = rows["v"].lerp(payload["w"], 0.5)
        return {"delta": v - payload["w"]}, {"v": v}


class Run:
    """A simulation that is played one round at a time, with a checkpoint after each."""

    def __init__(self, sizes: Sizes, options: argparse.Namespace, folder: Path) -> None:
        population, cohort, dim = sizes
        blocks = -(-dim // BLOCK_DIM)
        width = max(1, round((dim / blocks - BLOCK_WIDTH - (BLOCK_WIDTH + 1) * CLASSES) / (2 * BLOCK_WIDTH + 1)))
        config = load(None, [
            "algorithm=scale:Kept", "env=scale:Crowd", f"env.num_clients={population}", f"cohort={cohort}",
            "model=test_vit", "model.weights=random", f"model.img_size={PX}", "model.options={patch_size: 8}",
            "adapter=sequential", f"adapter.width={width}", f"adapter.blocks=last:{blocks}", "eval.every=1000000",
            f"backend={options.backend}", f"backend.simulators={options.simulators}", "backend.dashboard=false",
        ])  # fmt: skip
        self.plan: Plan = prepare(config)
        self.backend: Backend = make_backend(self.plan.workload, self.plan.params, folder.name)
        self.backend.evaluate = lambda round, blocks: []  # type: ignore[method-assign]
        (folder / "checkpoints").mkdir(parents=True)
        self.folder, self.trackers = folder, [JsonLines(folder / "metrics.jsonl")]
        self.progress = Progress(0, [0] * population)

    def round(self) -> dict[str, float]:
        """Plays one; its seconds by stage."""
        before = dict(self.progress.seconds)
        config = replace(self.plan.workload.config, rounds=self.progress.round + 1)
        plan = replace(self.plan, workload=replace(self.plan.workload, config=config))
        trackers: list[Tracker] = [*self.trackers]
        run_rounds(plan, self.backend, self.folder, trackers, self.progress)
        return {stage: self.progress.seconds[stage] - before[stage] for stage in STAGES}

    def close(self) -> None:
        self.trackers[0].close()
        self.backend.close()


def measure(populations: list[int], cohort: int, dim: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each population; a round of each in turn."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        runs = [Run((number, cohort, dim), options, Path(folder) / str(number)) for number in populations]
        try:
            for run in runs * options.warm:
                run.round()
            rounds = [[run.round() for run in runs] for _ in range(options.repeats)]
        finally:
            for run in runs:
                run.close()
    totals = [[sum(one.values()) for one in of_run] for of_run in zip(*rounds, strict=True)]
    first = statistics.median(totals[0])
    rows = []
    for run, seconds, stages in zip(runs, totals, zip(*rounds, strict=True), strict=True):
        rows.append({
            "benchmark": "scale", "population": run.plan.workload.data.num_clients, "cohort": cohort,
            "d": len(run.plan.params), "seconds": statistics.median(seconds), "seconds_min": min(seconds),
            "seconds_max": max(seconds), "ratio": statistics.median(seconds) / first,
            **{f"{stage}_seconds": statistics.median(one[stage] for one in stages) for stage in STAGES},
            "backend": options.backend, "simulators": run.backend.simulators, "repeats": options.repeats,
            "machine": machine(), **versions(),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--population", type=int, nargs="+", help="with --cohort and --dim: only these")
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--dim", type=int, default=10_000)
    parser.add_argument("--backend", choices=("ray", "local"), default="ray")
    parser.add_argument("--simulators", type=int, default=2)
    parser.add_argument("--warm", type=int, default=3, help="rounds before those that count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the results as JSON lines")
    options = parser.parse_args()
    if options.backend == "ray":
        import ray

        # Room for the pools of all populations; only one of them works at a time.
        pools = len(options.population or [100] * 4)
        ray.init(address="local", num_cpus=pools * options.simulators, include_dashboard=False, logging_level="warning")
    grid = [(options.population, options.cohort, options.dim)]
    if not options.population:
        grid = [([100, 1_000, 10_000, 100_000], 100, 10_000)]
        grid += [([10_000], cohort, dim) for cohort, dim in ((10, 10_000), (1_000, 10_000), (100, 10**5), (100, 10**6))]
    for populations, cohort, dim in grid:
        for row in measure(populations, cohort, dim, options):
            shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps(shown), flush=True)
            append(row, options.out)


if __name__ == "__main__":
    main()
