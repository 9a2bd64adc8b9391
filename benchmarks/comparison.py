"""The comparison of all algorithms: choose each one's settings on held-out data, then measure, then write the table.

    python benchmarks/comparison.py choose DATASET --out CHOOSE [--jobs N] [--only NAME,…]
    python benchmarks/comparison.py run comparison_DATASET --out RUNS [--jobs N] [--only NAME,…]
    python benchmarks/comparison.py run comparison_DATASET --out UNSEEN [--jobs N] seed=0 eval.unseen=0.2
    python benchmarks/comparison.py run comparison_DATASET --out COST --jobs 1 seed=0 rounds=5 eval.every=5
    python benchmarks/comparison.py run comparison_DATASET --out SOON seed=0 rounds=25 eval.every=5
    python benchmarks/comparison.py table RUNS UNSEEN COST

``comparison.yaml`` beside this file says on what data, and from which four settings of an algorithm ``choose`` takes
the best, and writes them down as the sweep ``configs/sweeps/comparison_DATASET.yaml``: by the mean accuracy on a fifth
of every client's training samples, held out (``eval.validation=0.2``), after half the rounds, seed 0; the test split
has no part in it. That pFedSeq's clients end with what they are sent, without any more epochs, is one of the choices,
and read off the same runs. ``run`` gives what ``python -m fedsim sweep`` gives, sooner: its processes start once. Both
go on where they were stopped. ``table`` takes accuracies and bytes from RUNS, what clients get that never trained from
UNSEEN, and the seconds of a round, the median of five, from COST, runs that had the machine for themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from fedsim import config as configuration
from fedsim import simulation as engine
from fedsim.config import Config
from fedsim.errors import nearest
from fedsim.grid import SWEEPS, Settings, overrides, plan

HERE = Path(__file__).resolve().parent


def choose(dataset: str, only: Sequence[str], settings_of_all: Sequence[str], out: Path, jobs: int) -> None:
    """Tries every candidate of every algorithm (or of `only` these), and writes the best of each as a sweep over seeds.

    Of the algorithms that are not tried, the sweep keeps what was chosen before.
    """
    suite = yaml.safe_load((HERE / "comparison.yaml").read_text(encoding="utf-8"))
    refuse_unknown(only, suite["algorithms"])
    data = suite["datasets"][dataset]
    common = [*suite["settings"], *data.get("settings", ())]
    tried = [
        *settings_of_all,
        f"rounds={data['rounds'] // 2}",
        f"eval.every={data['rounds']}",
        "eval.validation=0.2",
    ]
    candidates = {
        "-".join([name, *map(str, values)]): (name, dict(zip(grid, map(str, values), strict=True)))
        for name, grid in suite["algorithms"].items()
        if not only or name in only
        for values in itertools.product(*grid.values())
    }
    configs = {
        folder: configuration.load(data["config"], [*common, *tried, *variant(suite, name), *overrides(settings)])
        for folder, (name, settings) in candidates.items()
    }
    run_all(configs, out, jobs)
    best: dict[str, tuple[float, Settings]] = {}
    for folder, (name, settings) in candidates.items():
        accuracy = summary_of(out / folder).get("accuracy", {"mean": 0.0})
        ends = [(accuracy["mean"], settings)]
        if name.startswith("pfedseq"):
            ends.append((accuracy.get("sent", 0.0), settings | {"algorithm.finetune_epochs": "0"}))
        best[name] = max([*([best[name]] if name in best else []), *ends], key=lambda end: end[0])
    chosen = {name: [*variant(suite, name), *overrides(settings)] for name, (_, settings) in best.items()}
    sweep = SWEEPS / f"comparison_{dataset}.yaml"
    before = yaml.safe_load(sweep.read_text(encoding="utf-8"))["variants"] if sweep.exists() else {}
    variants = {name: (before | chosen)[name] for name in suite["algorithms"] if name in before | chosen}
    tree = {"config": data["config"], "settings": common, "variants": variants, "grid": {"seed": [0, 1, 2]}}
    header = (
        f"# FEDSIM_DATA=DIR python -m fedsim sweep comparison_{dataset}\n"
        f"# Each algorithm with its settings, chosen by: python benchmarks/comparison.py choose {dataset}\n"
    )
    text = header + yaml.safe_dump(tree, sort_keys=False, width=120)
    sweep.write_text(text, encoding="utf-8")
    for name, (accuracy, settings) in sorted(best.items(), key=lambda item: -item[1][0]):
        print(f"| `{name}` | {accuracy:.3f} | {', '.join(overrides(settings))} |")


def refuse_unknown(only: Sequence[str], known: Collection[str]) -> None:
    """Ends with one line where `--only` names what there is not."""
    for name in only:
        if name not in known:
            raise SystemExit(f"--only: unknown algorithm {name!r}{nearest(name, known)}")


def variant(suite: Mapping[str, Any], name: str) -> list[str]:
    own: list[str] = suite["variants"].get(name, [])
    return own if any(text.startswith("algorithm=") for text in own) else [f"algorithm={name}", *own]


def summary_of(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run, else nothing."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return summary if summary["status"] == "finished" else {}


def run_all(configs: Mapping[str, Config], out: Path, jobs: int) -> None:
    """Every run that has not finished yet, each into a folder of its own, ``jobs`` at a time."""
    left = {name: config for name, config in configs.items() if not summary_of(out / name)}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run_one, config, out / name): name for name, config in left.items()}
        for number, ended in enumerate(as_completed(running), 1):
            print(f"{number}/{len(left)} {running[ended]}: {ended.result()}", flush=True)


def run_one(config: Config, folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = replace(config.checkpoint, every=config.rounds)
    try:
        summary = engine.run(replace(config, output=str(folder), checkpoint=checkpoint)).summary
    except Exception as error:  # one that fails must not stop the others
        return f"failed: {type(error).__name__}: {error}"
    for large in folder.glob("checkpoints/*"):
        shutil.rmtree(large)
    mean, sent = summary["accuracy"]["mean"], summary["accuracy"]["sent"]
    return f"{mean:.4f}, as sent {sent:.4f}, {summary['seconds']['total']:.0f} s"


def table(runs: Path, unseen: Path, cost: Path) -> None:
    """Prints the comparison as Markdown, best personalised accuracy first."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(runs.glob("*-seed=*")):
        if summary := summary_of(folder):
            seeds.setdefault(folder.name.rpartition("-seed=")[0], []).append(summary)
    columns = [
        "personalised",
        "worst tenth",
        "as sent",
        "global",
        "unseen: sent, after an epoch",
        "MiB up",
        "s a round",
    ]
    print(f"| algorithm | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for name, summaries in sorted(seeds.items(), key=lambda item: -over_seeds(item[1], "mean")[0]):
        cells = [told(*over_seeds(summaries, key)) for key in ("mean", "p10", "sent", "global")]
        kept = summary_of(unseen / name).get("unseen", {})
        cells.append(", ".join(f"{kept[key]:.3f}" if key in kept else "–" for key in ("sent", "adapted")))
        cells.append(f"{summaries[0]['bytes']['up'] / 2**20:.1f}")
        cells.append(seconds_a_round(cost / name))
        print(f"| `{name}` ({len(summaries)}) | {' | '.join(cells)} |")


def over_seeds(summaries: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation over runs; NaN where there is no such model."""
    values = [summary["accuracy"][key] for summary in summaries]
    if None in values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def told(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def seconds_a_round(folder: Path) -> str:
    """Median of training and of the server's work, over the rounds of a run."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "–"
    rounds = [json.loads(line)["seconds"] for line in lines]
    return " + ".join(f"{statistics.median(r[stage] for r in rounds):.2f}" for stage in ("train", "server"))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("choose", "run", "table"))
    parser.add_argument("what", help="a data set, a sweep, or the folder RUNS")
    parser.add_argument("settings", nargs="*", help="of the runs; for table: UNSEEN COST")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="these algorithms, with commas between them")
    given = parser.parse_intermixed_args(arguments)
    only = given.only.split(",") if given.only else []
    if given.task == "choose":
        choose(given.what, only, given.settings, given.out, given.jobs)
    elif given.task == "run":
        configs = plan(given.what, given.settings)[1]
        algorithm = {name: name.partition("-seed=")[0] for name in configs}
        refuse_unknown(only, set(algorithm.values()))
        kept = {name: config for name, config in configs.items() if not only or algorithm[name] in only}
        run_all(kept, given.out, given.jobs)
    else:
        table(Path(given.what), *map(Path, given.settings))


if __name__ == "__main__":
    main(sys.argv[1:])
