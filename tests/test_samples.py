"""Samples by index: gathered on the host, or where they all lie on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.env import FederatedData, Ragged
from fedsim.samples import Samples

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def data(tmp_path: Path) -> FederatedData:
    np.save(tmp_path / "images.npy", np.arange(4 * 3, dtype=np.uint8).reshape(4, 3, 1, 1))
    one = Ragged.of([np.arange(4)])
    return FederatedData(tmp_path / "images.npy", np.array([0, 1, 1, 0]), ("even", "odd"), one, one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room_bytes", [11, 12, None], ids=["no room", "room", "what there is"])
def test_samples_by_hand(data: FederatedData, device: str, room_bytes: int | None) -> None:
    samples = Samples(data, torch.device(device), room_bytes)
    inputs, labels = samples.take(np.array([[3, 0], [1, 1]]))
    assert inputs.dtype == torch.uint8 and inputs.device.type == labels.device.type == device
    assert inputs[..., 0, 0].tolist() == [[[9, 10, 11], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]]
    assert labels.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_where_there_is_room_the_file_is_read_once(data: FederatedData, device: str) -> None:
    read_again, held = Samples(data, torch.device(device), 0), Samples(data, torch.device(device), 12)
    data.__dict__["inputs"] = np.zeros((4, 3, 1, 1), np.uint8)
    assert read_again.take(np.array([[3]]))[0].sum() == 0
    assert held.take(np.array([[3]]))[0].sum() == 9 + 10 + 11
