"""Samples by index: gathered on the host, or where they all lie on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.env import FederatedData, Ragged
from fedsim.samples import Samples, room_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def data(tmp_path: Path) -> FederatedData:
    np.save(tmp_path / "images.npy", np.arange(4 * 3, dtype=np.uint8).reshape(4, 3, 1, 1))
    one = Ragged.of([np.arange(4)])
    return FederatedData(tmp_path / "images.npy", np.array([0, 1, 1, 0]), ("even", "odd"), one, one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", [11, 12], ids=["no room", "room"])
def test_samples_by_hand(data: FederatedData, device: str, room: int) -> None:
    samples = Samples(data, torch.device(device), room)
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


def test_room_is_a_fifth_of_what_a_simulator_has_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 24 << 30))  # free, in all
    gpu = torch.device("cuda")
    assert room_bytes(gpu, 1.0) == 4 << 30  # not more than is free
    assert room_bytes(gpu, 0.25) == pytest.approx(1.2 * 2**30)  # neighbours will take the rest
    assert room_bytes(torch.device("cpu"), 1.0) == 0
