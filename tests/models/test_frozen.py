"""Frozen linear layers, on whichever products this processor has; what they must give is worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.models import frozen
from fedsim.models.frozen import FrozenLinear, freeze, halved, unpacked


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def linear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    """``W = [[1, 2], [3, 4], [5, 6]]``, ``b = [1, 0, -1]``."""
    if request.param and not frozen.ONEDNN:
        pytest.skip("this processor has no AVX-512, or this torch no oneDNN")
    monkeypatch.setattr(frozen, "ONEDNN", request.param)
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    freeze(layer)
    return layer


def test_the_product(linear: nn.Linear) -> None:
    assert isinstance(linear, FrozenLinear)
    assert linear(torch.tensor([1.0, 10.0])).tolist() == [22.0, 43.0, 64.0]
    assert linear(torch.ones(4, 5, 2)).eq(torch.tensor([4.0, 7.0, 10.0])).all()


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[1.0, 10.0], [0.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [10.0, 1.0]]).t(),
        torch.tensor([[1.0, 10.0, 9.0], [0.0, 1.0, 9.0]])[:, :2],
        torch.tensor([[[1.0, 10.0]], [[0.0, 1.0]]]),
    ],
    ids=["dense", "transposed", "sliced", "of three axes"],
)
def test_however_the_input_lies(linear: nn.Linear, x: Tensor) -> None:
    assert linear(x).flatten(0, -2).tolist() == [[22.0, 43.0, 64.0], [3.0, 4.0, 5.0]]


def test_the_input_gets_its_gradient_and_nothing_else_gets_one(linear: nn.Linear) -> None:
    x = torch.tensor([[1.0, 10.0], [0.0, 1.0]], requires_grad=True)
    linear(x).backward(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0], [9.0, 12.0]]
    assert linear.weight.grad is None and linear.bias.grad is None


def test_a_gradient_of_a_gradient(linear: nn.Linear) -> None:
    # f = |W x + b|^2 / 2 has the second derivative W^T W = [[35, 44], [44, 56]].
    x = torch.tensor([[1.0, 10.0]], requires_grad=True)
    (first,) = torch.autograd.grad(linear(x).square().sum() / 2, x, create_graph=True)
    assert first.tolist() == [[22.0 + 3 * 43 + 5 * 64, 44.0 + 4 * 43 + 6 * 64]]
    (second,) = torch.autograd.grad(first[0, 1], x)
    assert second.tolist() == [[44.0, 56.0]]


def test_in_bf16_it_is_torchs_own(linear: nn.Linear) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(torch.tensor([[1.0, 10.0]]))
    assert found.dtype == torch.bfloat16 and found.tolist() == [[22.0, 43.0, 64.0]]


def test_freezing_keeps_tensors_and_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    freeze(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [type(module) for module in model] == [FrozenLinear, nn.LayerNorm]


def test_matrices_are_halved_and_nothing_else() -> None:
    arrays = {"weight": np.array([[1.0, 1 + 2**-9]], dtype=np.float32), "bias": np.array([1 + 2**-9], dtype=np.float32)}
    arrays["pos_embed"] = np.full((1, 1, 1), 1 + 2**-9, dtype=np.float32)
    packed = halved(arrays)
    assert packed["weight"].dtype == np.uint16 and packed["bias"] is arrays["bias"]
    found = unpacked({name: torch.from_numpy(value) for name, value in packed.items()})
    assert found["weight"].dtype == torch.bfloat16 and found["weight"].tolist() == [[1.0, 1.0]]  # a step is 2^-7
    assert found["bias"].tolist() == [1 + 2**-9] and found["pos_embed"].dtype == torch.float32
    assert arrays["weight"][0, 1] == np.float32(1 + 2**-9)
