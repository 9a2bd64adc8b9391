"""Run folders written by hand: four clients, three classes, two rounds."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import TINY

from fedsim import config

COUNTS = [[2, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]]  # of the training images, by client and class


def write_run(
    folder: Path,
    accuracies: Sequence[float],
    *settings: str,
    bytes: tuple[int, int] = (1024, 2048),
    seconds: float = 10.0,
    average: float | None = None,
    measured: Sequence[Mapping[str, float]] = ({}, {}),
) -> Path:
    """A finished run.

    Args:
        folder: is made.
        accuracies: of the four clients.
        settings: on top of the tiny run's.
        bytes: up and down, of both rounds.
        seconds: of the whole run; a tenth of it is a round's training, a twentieth the server's work in it.
        average: accuracy of the server's average.
        measured: by the algorithm, in both rounds.
    """
    tree = config.to_tree(config.load(None, [*TINY, "env.num_clients=4", "cohort=2", *settings]))
    seed, name = tree["seed"], tree["algorithm"]["name"]
    mean = sum(accuracies) / 4
    data = {"classes": 3, "partition": "pathological"}
    tree["about"] = {"data": data, "versions": {"fedsim": "0.1.0", "torch": "2.6.0"}, "commit": f"abc{seed}"}
    accuracy = {
        "mean": mean,
        "p10": min(accuracies) + 0.01,
        "min": min(accuracies),
        "sent": mean / 2,
        "global": average,
    }
    summary = {
        **{"algorithm": name, "env": "shapes", "model": "test_vit", "seed": seed, "rounds": 2, "num_clients": 4},
        **{"accuracy": accuracy, "bytes": dict(zip(("up", "down"), bytes, strict=True)), "seconds": {"total": seconds}},
        "status": "finished",
    }
    records = [
        {
            "round": round,
            "accuracy": {"mean": mean * round / 2},
            "bytes": {"up": bytes[0] // 2, "down": bytes[1] // 2},
            "seconds": {"train": seconds / 10, "server": seconds / 20, "evaluate": 1.0},
            "algorithm": dict(own),
        }
        for round, own in zip((1, 2), measured, strict=True)
    ]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"client": client, "samples": sum(counts), "test_samples": 10, "rounds": client, "accuracy_sent": 0.1,
         "accuracy": accuracy, "quarantined": 0}
        for client, (accuracy, counts) in enumerate(zip(accuracies, COUNTS, strict=True))
    ]  # fmt: skip
    with (folder / "clients.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    np.savez_compressed(
        folder / "partition.npz",
        train_values=np.arange(8),
        train_offsets=np.array([0, 3, 5, 6, 8]),
        labels=np.array([0, 0, 1, 1, 2, 2, 0, 1]),
        about=np.array(json.dumps(data)),
    )
    return folder


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """All that a run wrote, apart from times and memory: its summary, its records, and ``clients.csv``."""
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for measured in ("seconds", "updates_per_second", "peak_memory_mib"):
        summary.pop(measured)
        for record in records:
            record.pop(measured, None)
    return summary, records, (folder / "clients.csv").read_text()
