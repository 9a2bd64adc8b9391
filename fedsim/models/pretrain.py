"""A small backbone pre-trained once on an env's public data, for runs where nothing can be downloaded.

The public data are of classes that no client has. The result is kept in the cache under a key of everything it depends
on, with a checksum that is verified whenever it is used.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fedsim.config import Choice, ModelConfig
from fedsim.env import Env
from fedsim.errors import WeightsError, own_code
from fedsim.files import replacing, write_atomically
from fedsim.models.vit import Pixels, checksum, create_backbone, filled, frozen_arrays
from fedsim.rng import stream

EPOCHS = 4
BATCH = 64
PEAK_LR = 1e-3
RECIPE = 1  # part of the key, like the numbers above: raise it when the recipe changes otherwise


def frozen_on_public(model: ModelConfig, env: Env, choice: Choice, cache: Path) -> dict[str, np.ndarray]:
    """The backbone's tensors, pre-trained on ``env.public``; trained on first use, then read from the cache.

    Raises:
        WeightsError: the env has no public data, or too few.
    """
    with own_code(f"env={choice.name}: public"):
        try:
            images, labels = env.public(model.img_size)
        except NotImplementedError:
            raise WeightsError(f"model.weights: env {choice.name!r} has no public data to pre-train on") from None
    if len(images) < BATCH:
        told = f"env {choice.name!r} has {len(images)} public images to pre-train on, it takes at least {BATCH}"
        raise WeightsError(f"model.weights: {told}")
    path = cache / "backbones" / f"{_key(model, images, labels)}.safetensors"
    if not _verified(path):
        _store(_pretrain(model, images, labels), path)
    return frozen_arrays(filled(model, load_file(path)))


def _key(model: ModelConfig, images: np.ndarray, labels: np.ndarray) -> str:
    data = checksum({"images": images, "labels": labels})
    facts = [
        RECIPE,
        EPOCHS,
        BATCH,
        PEAK_LR,
        data,
        model.name,
        model.img_size,
        model.options,
        model.mean,
        model.std,
        timm.__version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _verified(path: Path) -> bool:
    """True where the file is what its checksum says; a damaged one is made anew."""
    digest = path.with_suffix(".sha256")
    if not (path.is_file() and digest.is_file()):
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest().encode() == digest.read_bytes().strip()


def _store(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(state, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    write_atomically(path.with_suffix(".sha256"), digest)


def _pretrain(model: ModelConfig, images: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    """The state of the backbone after training, without the classifier that the training needed."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # timm draws initial weights and dropout from the global generator; restored on leaving
        backbone = create_backbone(model)
        backbone.reset_classifier(int(labels.max()) + 1)
        _train(backbone, Pixels(model, backbone.pretrained_cfg), images, labels)
    backbone.reset_classifier(0)
    print(f"backbone pre-trained on {len(images)} public images in {time.perf_counter() - start:.0f} s (kept)")
    return {name: value.contiguous() for name, value in backbone.state_dict().items()}


def _train(backbone: Any, pixels: Pixels, images: np.ndarray, labels: np.ndarray) -> None:
    """Supervised training of the whole network: AdamW, one cycle, no augmentation (in so few epochs it cost more)."""
    rng = stream(0, "pretrain")
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=PEAK_LR, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.2)
    backbone.train()
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))[: len(images) // BATCH * BATCH]
        for chosen in order.reshape(-1, BATCH):
            batch = pixels(torch.from_numpy(images[chosen]))
            loss = F.cross_entropy(backbone(batch), torch.from_numpy(labels[chosen]), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
