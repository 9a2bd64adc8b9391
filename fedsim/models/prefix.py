"""The cached prefix: what the backbone makes of an image before the first adapter, computed once for every image.

A frozen backbone gives all clients the same there, in every epoch of every round: the tokens that enter the first block
with an adapter, or with a bottleneck at its MLP its tokens and the MLP's output (``AdaptedVit.embed``). They are
computed when the run is prepared and kept in one file that all processes of a node map into memory, keyed by the
values of backbone and images, the input's size, the number type and what computed them. Nothing here is random: fedsim
does not augment.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import timm
import torch

from fedsim.cache import cached, content, create
from fedsim.config import ModelConfig
from fedsim.env import FederatedData
from fedsim.errors import ConfigError
from fedsim.models.vit import VitModel, as_tensors
from fedsim.threads import side_by_side

_CHUNK = 32  # images at a time, of each thread: fixed, so that the values do not depend on the number of threads
_RECIPE = 3  # raise it with what changes the tokens' last digits


def token_file(config: ModelConfig, model: VitModel, weights: str, data: FederatedData, folder: Path) -> Path:
    """The file of all images' tokens ``[N, P, T, k]``, from the cache or made now.

    Args:
        config: the backbone's settings.
        model: the backbone, on the device that computes.
        weights: the checksum of its values.
        data: whose images.
        folder: the cache.

    Raises:
        ConfigError: every block has an adapter, or the tokens are too large for fp16.
        DataError: the cache cannot be written.
    """
    if model.module.prefix == 0:
        raise ConfigError(["model.cached_prefix: every block has an adapter; set adapter.blocks=last:N, or 'off'"])

    def embed(part: slice) -> torch.Tensor:
        return model.embed(as_tensors({"images": data.images[part]})["images"])

    def write(path: Path) -> None:
        kind = {"fp16": torch.float16, "fp32": torch.float32}[config.cached_prefix]
        tokens = create(path, (len(data.images), *embed(slice(1)).shape[1:]), str(kind).removeprefix("torch."))

        def fill(start: int) -> None:
            part = slice(start, start + _CHUNK)
            tokens[part] = embed(part).cpu().to(kind).numpy()
            if not np.isfinite(tokens[part]).all():
                raise ConfigError(
                    [f"model.cached_prefix: tokens do not fit {config.cached_prefix}; use fp32, or 'off'"]
                )

        starts = range(0, len(tokens), _CHUNK)
        if model.device.type == "cpu":
            side_by_side(fill, starts)
        else:
            for start in starts:
                fill(start)

    settings = {key: value for key, value in asdict(config).items() if key != "weights"}
    about = {
        "recipe": _RECIPE,
        "timm": timm.__version__,
        "device": model.device.type,
        "model": settings,
        "weights": weights,
        "blocks": model.module.prefix,
        "mlp": model.module.opens_at_mlp,
        "images": content(data.image_file),
    }
    return cached(folder, f"prefix-{data.image_file.name.split('-')[0]}", about, write)
