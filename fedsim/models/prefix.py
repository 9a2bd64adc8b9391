"""The cached prefix: what the backbone makes of an image before the first adapter, computed once for every image.

A frozen backbone gives all clients the same there, in every epoch of every round: the tokens that enter the first block
with an adapter, or with a bottleneck at its MLP its tokens and the MLP's output (``AdaptedVit.embed``). They are
computed before the simulators start, on the devices that these will have, and kept in one file that all processes of a
node map into memory, keyed by the values of backbone and images, the input's size, the number type and what computed
them. Nothing here is random: fedsim does not augment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from fedsim.cache import cache_folder, cached, content, create
from fedsim.env import FederatedData
from fedsim.errors import ConfigError
from fedsim.models.vit import VitModel, as_tensors, checksum
from fedsim.simulator import Workload
from fedsim.threads import side_by_side

_CHUNK = 32  # images at a time, of each thread: fixed, so that the values do not depend on who computes how many
_RECIPE = 3  # raise it with what changes the tokens' last digits
_TYPES = {"fp16": torch.float16, "fp32": torch.float32}


def refuse_without(model: VitModel) -> None:
    """Refuses a model whose first block has an adapter.

    Raises:
        ConfigError: there is nothing before it.
    """
    if model.module.prefix == 0:
        raise ConfigError(["model.cached_prefix: every block has an adapter; set adapter.blocks=last:N, or 'off'"])


def with_tokens(workload: Workload, device: str, compute: Callable[[Path], None]) -> Workload:
    """The workload with the file of all images' tokens ``[N, P, T, k]``, from the cache or made now, if it wants one.

    Args:
        workload: as it was planned.
        device: the kind that computes, ``cpu`` or ``cuda``.
        compute: brings `fill` to all images of the file that it is given.

    Raises:
        ConfigError: the tokens are too large for fp16.
        DataError: the cache cannot be written.
    """
    config, data = workload.config.model, workload.data
    if config.cached_prefix == "off":
        return workload
    model = _model(workload, "cpu")

    def write(path: Path) -> None:
        of_one = _tokens(model, data, slice(1)).shape[1:]
        create(path, (len(data.images), *of_one), str(_TYPES[config.cached_prefix]).removeprefix("torch."))
        compute(path)

    settings = {key: value for key, value in asdict(config).items() if key != "weights"}
    about = {
        "recipe": _RECIPE,
        "timm": version("timm"),
        "device": device,
        "model": settings,
        "weights": checksum(workload.frozen),
        "blocks": model.module.prefix,
        "mlp": model.module.opens_at_mlp,
        "images": content(data.image_file),
    }
    file = cached(cache_folder(), f"prefix-{data.image_file.name.split('-')[0]}", about, write)
    return replace(workload, data=replace(data, token_file=file))


def made_here(workload: Workload) -> Workload:
    """`with_tokens`, computed in this process: on its GPU, or on all cores. Raises what that does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return with_tokens(workload, device, lambda path: fill(workload, device, path, slice(len(workload.data.images))))


def parts(images: int, number: int) -> list[slice]:
    """So many stretches of the images, or fewer, as like as whole chunks can be."""
    bounds = [round(k * -(-images // _CHUNK) / number) * _CHUNK for k in range(number + 1)]
    return [slice(a, min(b, images)) for a, b in pairwise(bounds) if a < min(b, images)]


def fill(workload: Workload, device: str, path: Path, images: slice, cores: int | None = None) -> None:
    """Writes the tokens of some images to their places in a file that has room for those of all.

    Args:
        workload: whose backbone and images.
        device: what computes.
        path: the file.
        images: one of `parts`.
        cores: of a CPU; default: all.

    Raises:
        ConfigError: they are too large for fp16.
        OSError: images cannot be read, or the file cannot be written.
    """
    data, model, name = workload.data, _model(workload, device), workload.config.model.cached_prefix
    room = np.lib.format.open_memmap(path, mode="r")
    offset, row = room.offset, room[:1].nbytes

    def work(start: int) -> None:
        part = slice(start, min(start + _CHUNK, images.stop))
        tokens = _tokens(model, data, part).cpu().to(_TYPES[name])
        if not tokens.isfinite().all():
            raise ConfigError([f"model.cached_prefix: tokens do not fit {name}; use fp32, or 'off'"])
        # Not through a map: on a shared disk two nodes would write one page.
        with open(path, "r+b") as file:
            file.seek(offset + start * row)
            file.write(tokens.numpy().tobytes())

    starts = range(images.start or 0, images.stop, _CHUNK)
    if device == "cpu":
        side_by_side(work, starts, cores)
    else:
        for start in starts:
            work(start)


def _model(workload: Workload, device: str) -> VitModel:
    config, data, extra = workload.config, workload.data, workload.algorithm().extra
    return VitModel(config.model, config.adapter, len(data.classes), workload.frozen, device, extra=extra)


def _tokens(model: VitModel, data: FederatedData, images: slice) -> torch.Tensor:
    return model.embed(as_tensors({"images": data.images[images]})["images"])
