"""Weights & Biases, MLflow: services that keep what they were sent, each behind an extra of its own.

A resumed run goes on with the service's own run, whose id lies in the run folder. What the service has already, from
before the run was killed, it is not sent again; what it missed, it is sent from ``metrics.jsonl``.
"""

from __future__ import annotations

import time
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
    """A run of MLflow: steps are rounds. MLflow's own state, what a notebook has set and begun, stays as it is."""

    def __init__(self, config: Config, folder: Path) -> None:
        import mlflow  # only where it was asked for

        self._mlflow, self._folder, self._rounds = mlflow, folder, config.rounds
        self._client = mlflow.MlflowClient(tracking_uri=config.tracking.mlflow)
        id_file = folder / "mlflow.id"
        self._id = _read(id_file)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = mlflow.tracking.context.registry.resolve_tags()  # whose run, of which program
            experiment = self._experiment(config.tracking.project)
            self._id = self._client.create_run(experiment, tags=tags, run_name=folder.name).info.run_id
            params = [mlflow.entities.Param(key, str(value)) for key, value in settings(config).items()]
            self._client.log_batch(self._id, params=params)
            self._client.log_artifact(self._id, str(folder / "config.yaml"))
            id_file.write_text(self._id, encoding="utf-8")
        self._round = int(self._client.get_run(self._id).data.metrics.get("round", 0))
        for record in rounds_after(folder, self._round):
            self.on_round(record, None)

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        if record["round"] <= self._round:
            return
        # The round itself, last: a resumed run reads how far MLflow got.
        values = dict(flat(finite(record))) | {"round": float(record["round"])}
        now_ms, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        metrics = [metric(name, value, now_ms, record["round"]) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)
        self._round = record["round"]

    def close(self) -> None:
        finished = self._round == self._rounds
        if finished:
            self._client.log_artifact(self._id, str(self._folder / "metrics.jsonl"))
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _experiment(self, name: str) -> str:
        """The id of the experiment with this name, which is made where there is none."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except self._mlflow.MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # it was not another run that made it meanwhile
                    raise
        return found.experiment_id


def _read(file: Path) -> str:
    """What the file says; nothing if there is none, or the machine stopped while it was written."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
