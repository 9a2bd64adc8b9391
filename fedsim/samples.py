"""The samples of all clients, where a model computes: on a GPU that has room for them, else on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.env import FederatedData
from fedsim.models.vit import as_tensors

DEVICE_SHARE = 0.2
"""Of the memory that a simulator has on a GPU: what is left is for blocks of clients."""


def room_bytes(device: torch.device, gpu_share: float) -> float:
    """Bytes that samples may take of a GPU of which the simulator has a share; 0 of a CPU, which has them anyhow."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return DEVICE_SHARE * min(free, gpu_share * total)


class Samples:
    """Inputs and labels by index, on the model's device.

    On a GPU nothing waits for it: what is copied there is pinned first, and where all inputs have room, as images in
    uint8 or as tokens, they are there once and for all, and only indices are copied.

    Attributes:
        data: the federated data.
    """

    def __init__(self, data: FederatedData, device: torch.device, room_bytes: float = 0) -> None:
        """``room_bytes``: for all inputs on the device."""
        self.data, self._device = data, device
        self._held: tuple[Tensor, Tensor] | None = None
        if data.inputs.nbytes <= room_bytes:
            arrays = as_tensors({"inputs": data.inputs, "labels": data.labels})
            self._held = arrays["inputs"].to(device), arrays["labels"].to(device)

    def take(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """``[m, b] int64`` to inputs ``[m, b, …]`` and labels ``[m, b] int64``."""
        if self._held is None:
            return self.send(self.data.inputs[index]), self.send(self.data.labels[index])
        where = self.send(index)
        return self._held[0][where], self._held[1][where]

    def send(self, array: np.ndarray) -> Tensor:
        """The array on the device; a CPU's tensor shares its memory."""
        tensor = torch.from_numpy(array)
        # A copy out of memory that is not pinned would wait for all that the GPU was given before.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
