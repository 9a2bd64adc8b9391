"""An env for benchmarks: any number of clients that share images of noise, on which speed does not depend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.cache import cached
from fedsim.env import Env, FederatedData, Ragged
from fedsim.schema import setting

IMAGES = 64
"""Of a client."""
SETS = 10
"""Different ones: client k has those of client k + SETS."""


class Noise(Env):
    """Clients that share images of noise."""

    @dataclass(frozen=True)
    class Config:
        num_clients: int = setting(100, "the population", low=1)
        classes: int = setting(100, "labels, in turn", low=2)

    def build(self, seed: int, px: int, cache: Path) -> FederatedData:
        images = np.random.default_rng(0).integers(0, 256, (SETS * IMAGES, 3, px, px), dtype=np.uint8)
        file = cached(cache, "noise", {"shape": images.shape}, lambda path: np.save(path, images))
        lists = [np.arange(IMAGES) + k % SETS * IMAGES for k in range(self.config.num_clients)]
        names = tuple(map(str, range(self.config.classes)))
        return FederatedData(file, np.arange(len(images)) % len(names), names, Ragged.of(lists), Ragged.of(lists))
