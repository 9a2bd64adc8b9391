"""fedsim against Flower's simulation and pfl-research: client updates a second, the same work, in turn.

    python benchmarks/peers.py setup --env DIR
    python benchmarks/peers.py run --env DIR [--size 64 32] [--precision fp32 bf16] [--pairs 5] [--out FILE]

``setup`` makes the peers' virtual environment (about 6 GB): the versions below, and torch, timm and numpy as they are
here. ``run`` measures on two cores. One update: 64 images, batch 16, 4 SGD steps on bottleneck adapters of width 8 in
every block of a ViT-Ti and on a 10-way head; 16 clients a round at 64 px, 32 at 32 px, every client in every round.

- fedsim: Ray, two simulators of one thread, a block each: of 8 clients at 64 px, of 16 at 32 px.
- flower: ``run_simulation``, two workers of one thread (`peer_flower.py`).
- pfl, processes: ``torchrun``, two of one thread (`peer_pfl.py`); pfl, threads: the same in one process of two.

Each has the machine to itself in its turn, A B C D A B C D …: it starts, plays a round that is not counted, and then
those that are; a round is broadcast, local training and aggregation, without evaluation. The rate of a turn is over its
rounds; the ratio of each pair of turns counts, and the median of them is the result. All get the same images, start and
order of samples, so that all must make the same average of the first round: its update may differ from fedsim's by
``TOLERANCE`` of its length, else nothing is reported. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from machine import append, machine
from torch import Tensor

from fedsim import checkpoint
from fedsim.config import load
from fedsim.layout import Layout
from fedsim.plan import Plan, prepare
from fedsim.provenance import versions
from fedsim.ray_backend import RayBackend

HERE = Path(__file__).resolve().parent
PINNED = ("flwr[simulation]==1.41.0", "ray==2.55.1", "pfl==0.6.0")
SHARED = ("torch", "torchvision", "timm", "numpy")  # of one version on both sides: the same kernels
MODEL, IMAGES, BATCH, WIDTH, CLASSES, LR, SEED, PROCESSES = "vit_tiny_patch16_224", 64, 16, 8, 10, 0.05, 0, 2
CLIENTS = {64: 16, 32: 32}  # a round, by the edge of the image
BLOCKS = {64: 8, 32: 16}  # of fedsim: so that each simulator has one
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}")
PEERS = {
    "flower": ("peer_flower.py",),
    "pfl, processes": (*TORCHRUN, "peer_pfl.py"),
    "pfl, threads": ("peer_pfl.py",),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default
}

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Turn:
    """What one of them did in its turn: updates a second, the average after its first round, and versions."""

    rate: float
    average: Values
    versions: dict[str, str]


class Fedsim:
    """The engine that is measured, and the source of everybody's data and start."""

    def __init__(self, size: int, clients: int, precision: str, block_size: int) -> None:
        config = load(None, [
            "algorithm=fedavg", f"seed={SEED}", f"cohort={clients}", f"precision={precision}", f"model={MODEL}",
            "model.weights=random", f"model.img_size={size}", "model.options={}", f"adapter.width={WIDTH}",
            "local.epochs=1", f"local.batch_size={BATCH}", f"local.lr={LR}", f"env.num_clients={clients}",
            f"env.samples_per_client={IMAGES}", f"env.px={size}", f"env.classes={CLASSES}", "env.partition=iid",
            f"backend.simulators={PROCESSES}", f"backend.block_size={block_size}", "backend.dashboard=false",
        ])  # fmt: skip
        self.clients, self.plan = clients, prepare(config)

    def turn(self, rounds: int) -> Turn:
        backend = RayBackend(self.plan.workload, self.plan.params, "peers")
        try:
            self._round(backend, 0)
            with tempfile.TemporaryDirectory() as folder:
                backend.save(Path(folder) / "saved", {"round": 1})
                row = checkpoint.load(Path(folder) / "saved")["server"]["w"]
            seconds = sum(self._round(backend, number) for number in range(1, rounds + 1))
        finally:
            backend.close()
        return Turn(self.clients * rounds / seconds, named(self.plan.workload.task.layout, row), versions())

    def _round(self, backend: RayBackend, number: int) -> float:
        start = time.perf_counter()
        backend.train(number, self.plan.blocks(self.plan.sample_cohort(number)))
        backend.aggregate(number)
        return time.perf_counter() - start


def named(layout: Layout, row: Tensor) -> Values:
    """A row ``[d]`` as the tensors of `peer_work.adapted_vit`, whose linear layers keep their matrices transposed."""
    values = {}
    for name, value in layout.views(row[None]).items():
        name = name.removeprefix("backbone.").replace("adapter.", "")
        if name.endswith("_bias"):
            name = name.removesuffix("_bias") + ".bias"
        elif value.ndim == 3:
            name = name.removesuffix(".weight") + ".weight"
        values[name] = value[0].T.numpy() if value.ndim == 3 else value[0].numpy()
    return values


def export(plan: Plan, folder: Path) -> None:
    """Writes what the peers work on: ``data.npz``, ``values.npz``."""
    data = plan.workload.data
    samples = [data.train[client] for client in range(data.num_clients)]
    np.savez(folder / "data.npz", images=data.images[np.stack(samples)], labels=data.labels[np.stack(samples)])
    frozen = {name.replace(".mlp.", ".mlp.mlp."): value for name, value in plan.workload.frozen.items()}
    np.savez(folder / "values.npz", **frozen, **named(plan.workload.task.layout, plan.params))  # type: ignore[arg-type]


def peers_turn(name: str, env: Path, folder: Path, settings: dict[str, Any]) -> Turn:
    """A peer's turn, in processes of its own; one that fails is played once more: pfl's may abort as they end."""
    # The first round is not counted.
    (folder / "settings.json").write_text(json.dumps({**settings, "rounds": settings["rounds"] + 1}), encoding="utf-8")
    command = [env / "bin" / "python", *PEERS[name], folder]
    for last in (False, True):
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=3600)
        if not done.returncode:
            break
        if last:
            raise SystemExit(f"{name} failed twice, exit code {done.returncode}:\n{done.stderr[-4000:]}")
        print(f"{name} failed, exit code {done.returncode}; once more", file=sys.stderr)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    with np.load(folder / "average.npz") as arrays:
        average = {key: arrays[key] for key in arrays.files}
    return Turn(settings["clients"] * settings["rounds"] / sum(report["seconds"][1:]), average, report["versions"])


def difference(ours: Values, theirs: Values, start: Values) -> float:
    """Length of the difference of two averages' updates, relative to that of ours.

    Raises:
        KeyError: they did not train the same tensors.
    """
    apart = sum(float(np.square(theirs[name] - ours[name]).sum()) for name in ours)
    return (apart / sum(float(np.square(ours[name] - start[name]).sum()) for name in ours)) ** 0.5


def measure(size: int, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row for each peer and each pair of precisions, of one size."""
    clients, block_size = options.clients or CLIENTS[size], options.block_size or BLOCKS[size]
    ours = {kind: Fedsim(size, clients, kind, block_size) for kind in options.precision}
    plan = next(iter(ours.values())).plan
    start = named(plan.workload.task.layout, plan.params)
    settings = {
        "model": MODEL, "img_size": size, "classes": CLASSES, "width": WIDTH, "clients": clients, "batch_size": BATCH,
        "lr": LR, "seed": SEED, "rounds": options.rounds, "processes": PROCESSES,
    }  # fmt: skip
    turns: dict[tuple[str, str], list[Turn]] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        export(plan, Path(folder))
        for number in range(options.pairs):
            for kind in options.precision:
                turns.setdefault(("fedsim", kind), []).append(ours[kind].turn(options.rounds))
                for peer in PEERS:
                    turn = peers_turn(peer, options.env, Path(folder), {**settings, "precision": kind})
                    refuse_other_work(peer, kind, turn, turns["fedsim", kind][-1], start)
                    turns.setdefault((peer, kind), []).append(turn)
            told = ", ".join(f"{' '.join(who)} {done[-1].rate:.2f}" for who, done in turns.items())
            print(f"{size} px, pair {number + 1} of {options.pairs}, updates a second: {told}", file=sys.stderr)
    for (peer, theirs), played in turns.items():
        for kind in options.precision:
            if peer == "fedsim" or (theirs != kind and theirs != "fp32"):
                continue
            pairs = [(a.rate, b.rate) for a, b in zip(turns["fedsim", kind], played, strict=True)]
            ratios = [a / b for a, b in pairs]
            yield {
                "benchmark": "peers", "model": MODEL, "img_size": size, "clients": clients, "precision": kind,
                "peer": peer, "peer_precision": theirs,
                "fedsim_updates_per_second": statistics.median(a for a, _ in pairs),
                "peer_updates_per_second": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                "difference": difference(turns["fedsim", theirs][0].average, played[0].average, start),
                "pairs": options.pairs, "rounds": options.rounds, "block_size": block_size,
                "processes": PROCESSES, "machine": machine(), "load_before": options.load,
                "peer_versions": played[0].versions, **versions(),
            }  # fmt: skip


def refuse_other_work(peer: str, precision: str, theirs: Turn, ours: Turn, start: Values) -> None:
    """A comparison of speed is one of the same work on the same kernels only."""
    for name in theirs.versions.keys() & SHARED:
        if theirs.versions[name] != ours.versions[name]:
            told = f"{name} {theirs.versions[name]}, here is {ours.versions[name]}"
            raise SystemExit(f"--env: the peers have {told}; run setup again")
    apart = difference(ours.average, theirs.average, start)
    if not apart <= TOLERANCE[precision]:
        raise SystemExit(f"{peer}: its update of the first round differs from fedsim's by {apart:.2g} of its length")


def setup(env: Path) -> None:
    """Makes the peers' environment."""
    shared = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in SHARED]
    venv.create(env, with_pip=True)
    subprocess.run([env / "bin" / "python", "-m", "pip", "install", *PINNED, *shared], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("task", choices=("setup", "run"))
    parser.add_argument("--env", type=Path, required=True, help="the peers' virtual environment")
    parser.add_argument("--size", type=int, nargs="+", choices=CLIENTS, default=list(CLIENTS), help="edge of the image")
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="that count, in a turn")
    parser.add_argument("--clients", type=int, help="a round; default: 16 at 64 px, 32 at 32 px")
    parser.add_argument("--block-size", type=int, help="of fedsim; default: 8 at 64 px, 16 at 32 px")
    parser.add_argument("--out", type=Path, help="append the results as JSON lines")
    options = parser.parse_args()
    options.env = options.env.absolute()
    if options.task == "setup":
        setup(options.env)
        return
    if not (options.env / "bin" / "python").exists():
        parser.error(f"--env: no virtual environment in {str(options.env)!r}; run setup first")
    options.load = os.getloadavg()[0]
    os.environ.update(ENVIRONMENT)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSES])  # inherited by all that start here
    for size in options.size:
        for row in measure(size, options):
            shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps(shown), flush=True)
            append(row, options.out)


if __name__ == "__main__":
    main()
