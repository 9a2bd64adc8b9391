"""The work that `peers.py` gives to all: adapters in a timm model, one client's samples, one client's training.

Plain PyTorch, as a user of Flower or of pfl-research would write it. It runs in their environment, where fedsim is not
installed; `overhead.py` has its bare loop from here.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """A block's MLP and a bottleneck after it."""

    def __init__(self, mlp: nn.Module, dim: int, width: int) -> None:
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return h + self.up(F.gelu(self.down(h)))


def adapted_vit(name: str, img_size: int, classes: int, width: int) -> nn.Module:
    """A frozen timm model of random values, with an adapter in every block; these and the head are trained."""
    model: Any = timm.create_model(name, img_size=img_size, num_classes=classes).requires_grad_(False)
    for block in model.blocks:
        block.mlp = Adapter(block.mlp, model.embed_dim, width)
        for part in (block.mlp.down, block.mlp.up):
            part.requires_grad_(True)
    model.head.requires_grad_(True)
    return model.eval()


def without_fused_attention(model: nn.Module) -> nn.Module:
    """For bf16 on CPUs, where the fused attention is slower; fedsim does the same."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def pixels(images: Tensor) -> Tensor:
    """``[..., 3, px, px] uint8`` to the model's input, ``float32`` in ±1."""
    return images.float().div_(127.5).sub_(1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What clients train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Work:
    """What one process needs, made once from the folder that `peers.py` fills.

    Attributes:
        settings: of the run: ``model``, ``img_size``, ``clients``, ``batch_size``, ``lr``, ``rounds``, ….
        model: with the frozen and the initial values.
        trained: what its clients train, by name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        with np.load(self.folder / "data.npz") as arrays:
            self.images, self.labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
        with np.load(self.folder / "values.npz") as arrays:
            values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.model = adapted_vit(*(self.settings[name] for name in ("model", "img_size", "classes", "width")))
        self.model.load_state_dict(values)
        self.trained = trained(self.model)
        if self.settings["precision"] == "bf16":
            without_fused_attention(self.model)

    def samples(self, client: int, round: int) -> tuple[Tensor, Tensor]:
        """The client's images ``[n, 3, px, px] uint8`` and labels ``[n]``, in this round's order: fedsim's."""
        key = (zlib.crc32(b"train.batches"), round, client)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.settings["seed"], spawn_key=key)))
        order = torch.from_numpy(rng.permutation(len(self.labels[client])))
        return self.images[client][order], self.labels[client][order]

    def train(self, client: int, round: int) -> None:
        """One local epoch of SGD."""
        size, bf16 = self.settings["batch_size"], self.settings["precision"] == "bf16"
        images, labels = self.samples(client, round)
        optimizer = torch.optim.SGD(self.trained.values(), lr=self.settings["lr"])
        for batch, targets in zip(images.split(size), labels.split(size), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(self.model(pixels(batch)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Report:
    """When the rounds of a run ended, and what the first one made of the model."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages
        self._ends: list[float] = []
        self._first: dict[str, np.ndarray] = {}

    def ended(self, values: Callable[[], dict[str, np.ndarray]]) -> None:
        """Called before the first round and after each; ``values``: gives what clients train, averaged."""
        self._ends.append(time.perf_counter())
        if len(self._ends) == 2:
            self._first = {name: value.copy() for name, value in values().items()}

    def write(self, folder: Path) -> None:
        """``report.json``: seconds of each round, and versions; ``average.npz``: the model after the first."""
        facts = {
            "seconds": np.diff(self._ends).tolist(),
            "versions": {package: metadata.version(package) for package in self._packages},
        }
        np.savez(folder / "average.npz", **self._first)  # type: ignore[arg-type]
        (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")
