"""TensorBoard: a run's scalars, its clients' distributions, its settings, and who holds what."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.config import Config
from fedsim.env import FederatedData
from fedsim.files import flush
from fedsim.tracking.record import Record, flat, settings

COMPARED = ("accuracy/mean", "accuracy/p10", "loss")  # with the settings of other runs, under HPARAMS
MOST_PIXELS = 1024  # across the picture of the partition
NONE, ALL = np.array([255.0, 255, 255]), np.array([42.0, 120, 214])  # colours of no image and of the most


class TensorBoard:
    """An event file; what a killed run wrote past its checkpoint is hidden."""

    def __init__(self, folder: Path, config: Config, data: FederatedData, rounds_done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import; only runs need it
        from torch.utils.tensorboard.summary import hparams

        self._folder, self._every, self._rounds = folder, config.checkpoint.every, config.rounds
        # Step 0 is what is known before round 1; a run without a checkpoint begins with it again.
        self._writer = SummaryWriter(str(folder), purge_step=rounds_done + 1 if rounds_done else 0)
        if not rounds_done:
            # Not `add_hparams`: it makes a second run, without the curves, of every run.
            for summary in hparams(settings(config), dict.fromkeys(COMPARED, 0.0))[:2]:
                self._writer.file_writer.add_summary(summary, 0)  # type: ignore[attr-defined]
            self._writer.add_histogram("clients/training_images", data.train.sizes, 0)
            self._writer.add_image("clients/partition", partition_picture(data), 0, dataformats="HWC")
            self._writer.flush()

    def on_round(self, record: Record, accuracies: np.ndarray | None) -> None:
        for name, value in flat(record):
            self._writer.add_scalar(name, value, record["round"])
        if accuracies is not None:
            self._writer.add_histogram("clients/accuracy", accuracies, record["round"])
        self._writer.flush()
        if record["round"] % self._every == 0 or record["round"] == self._rounds:
            # A checkpoint comes next; one that outlives a loss of power without this would leave a gap.
            for path in (*self._folder.iterdir(), self._folder):
                flush(path)

    def close(self) -> None:
        self._writer.close()


def partition_picture(data: FederatedData) -> np.ndarray:
    """Training images of every client (across) in every class (upwards): ``[height, width, 3] uint8``.

    The darker, the more, by the square root. Where there are more clients than pixels, neighbours share a column.
    """
    clients, classes = data.num_clients, len(data.classes)
    width = min(clients, MOST_PIXELS)
    column = np.arange(clients) * width // clients
    cells = np.repeat(column, data.train.sizes) * classes + data.labels[data.train.values]
    images = np.bincount(cells, minlength=width * classes).reshape(width, classes) / np.bincount(column)[:, None]
    shades = np.sqrt(images / images.max()).T[::-1, :, None]
    picture = (NONE + shades * (ALL - NONE)).round().astype(np.uint8)
    edge = max(1, MOST_PIXELS // 2 // max(width, classes))
    return picture.repeat(edge, 0).repeat(edge, 1)
