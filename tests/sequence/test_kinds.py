"""Which kind of scan runs where, and mamba_ssm's operator behind a stand-in of its interface."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fedsim.sequence.scan import kind_for, selective_scan_sequential, selective_scan_with_state

S, L, P, n = 2, 6, 5, 3


class _OperatorWithoutStateGradient(torch.autograd.Function):
    """As mamba_ssm's: the gradient that arrives for the last state is dropped."""

    @staticmethod
    def forward(ctx, y, h):
        return y.clone(), h.clone()

    @staticmethod
    def backward(ctx, dy, dh):
        return dy, None


def _selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    assert u.shape == delta.shape == (S, P, L) and A.shape == (P, n) and B.shape == C.shape == (S, n, L)
    assert all(t.is_contiguous() for t in (u, delta, A, B, C))
    assert z is None and delta_bias is None and not delta_softplus
    y, h = selective_scan_sequential(u.mT, delta.mT, A, B.mT, C.mT, D)
    out, last_state = _OperatorWithoutStateGradient.apply(y.mT, h)
    return (out, last_state) if return_last_state else out


@pytest.fixture
def mamba_ssm(monkeypatch):
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.selective_scan_fn = _selective_scan_fn


def _inputs() -> list[Tensor]:
    """x, delta, A, B, C, D, all with a gradient; A is shared by channels, as `SelectiveSSM`'s."""
    g = torch.Generator().manual_seed(0)
    x, D = torch.randn(S, L, P, generator=g), torch.randn(P, generator=g)
    delta, A = torch.rand(S, L, P, generator=g), -torch.rand(n, generator=g).expand(P, n)
    B, C = torch.randn(2, S, L, n, generator=g)
    return [t.double().requires_grad_() for t in (x, delta, A, B, C, D)]


def test_mamba_ssm_gets_its_layout_and_the_result_is_the_oracles(mamba_ssm):
    inputs = _inputs()
    torch.testing.assert_close(selective_scan_with_state(*inputs, kind="mamba_ssm"), selective_scan_sequential(*inputs))


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["y", "state", "both"])
def test_gradients_through_mamba_ssm_are_the_oracles_also_of_the_state(mamba_ssm, part):
    inputs = _inputs()
    outputs = selective_scan_with_state(*inputs, kind="mamba_ssm")[part], selective_scan_sequential(*inputs)[part]
    losses = [sum((t * t.detach().cos()).sum() for t in pair) for pair in outputs]
    grads = [torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True) for loss in losses]
    torch.testing.assert_close(*grads)


def test_mamba_ssm_refuses_a_start(mamba_ssm):
    with pytest.raises(ValueError, match="cannot start from a state"):
        selective_scan_with_state(*_inputs(), torch.zeros(S, P, n), kind="mamba_ssm")


def _tokens(is_cuda: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype)


def test_on_a_gpu_mamba_ssm_comes_first_where_it_can(mamba_ssm, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__spec__=ModuleSpec("triton", None)))
    h0 = torch.zeros(1)
    assert kind_for(_tokens(False), None) == "torch"
    assert kind_for(_tokens(True), None) == "mamba_ssm"
    assert kind_for(_tokens(True), h0) == "triton"
    assert kind_for(_tokens(True, torch.float64), None) == "triton"
    assert kind_for(_tokens(True, torch.bfloat16), None) == "torch"


def test_on_a_gpu_without_packages_it_is_torch(monkeypatch):
    monkeypatch.setattr("fedsim.sequence.scan.find_spec", lambda name: None)
    assert kind_for(_tokens(True), None) == "torch"
