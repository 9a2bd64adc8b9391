"""Weights & Biases, MLflow: services that keep what they were sent, each behind an extra of its own.

A resumed run goes on with the service's own run, whose id lies in the run folder. What the service has already, from
before the run was killed, it is not sent again; what it missed, it is sent from ``metrics.jsonl``.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np

from fedsim.config import Config, to_tree
from fedsim.tracking.record import Record, finite, flat, rounds_after, settings


class WeightsAndBiases:
    """A run of W&B: steps are rounds."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb  # only where it was asked for

        self._histogram, self._rounds = wandb.Histogram, config.rounds
        offline, id_file = config.tracking.wandb_offline, folder / "wandb.id"
        if not _read(id_file):
            id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
        tree = {key: value for key, value in to_tree(config).items() if key not in ("output", "tracking")}
        self._run = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            id=_read(id_file),
            config=tree,
            dir=str(folder.absolute()),
            mode="offline" if offline else None,
            # Offline W&B cannot resume: each of its folders then has the whole run, up to where that got.
            resume=None if offline else "allow",
        )
        for record in rounds_after(folder, self._run.step - 1):
            self.on_round(record, None)

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        if record["round"] < self._run.step:  # the next that it would take
            return
        values = dict[str, object](flat(finite(record)))
        if accuracies is not None:
            values["clients/accuracy"] = self._histogram(accuracies)
        self._run.log(values, step=record["round"], commit=True)

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._run.step > self._rounds else 1)


class MLflow:
    """A run of MLflow: steps are rounds."""

    def __init__(self, config: Config, folder: Path) -> None:
        import mlflow  # only where it was asked for

        self._mlflow, self._folder, self._rounds = mlflow, folder, config.rounds
        id_file = folder / "mlflow.id"
        known = _read(id_file)
        mlflow.set_tracking_uri(config.tracking.mlflow)
        mlflow.set_experiment(config.tracking.project)
        run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=folder.name)
        if not known:
            mlflow.log_params(settings(config))
            mlflow.log_artifact(str(folder / "config.yaml"))
            id_file.write_text(run.info.run_id, encoding="utf-8")
        self._round = int(run.data.metrics.get("round", 0))
        for record in rounds_after(folder, self._round):
            self.on_round(record, None)

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        if record["round"] <= self._round:
            return
        # The round itself, last: a resumed run reads how far MLflow got.
        values = dict(flat(finite(record))) | {"round": float(record["round"])}
        self._mlflow.log_metrics(values, step=record["round"])
        self._round = record["round"]

    def close(self) -> None:
        finished = self._round == self._rounds
        if finished:
            self._mlflow.log_artifact(str(self._folder / "metrics.jsonl"))
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


def _read(file: Path) -> str:
    """What the file says; nothing if there is none, or the machine stopped while it was written."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
