"""Frozen linear layers, as cheap as they can be had.

In fp32 torch gives products to MKL, whose kernels for AMD's processors stop at AVX2; those of oneDNN have AVX-512, and
take half the time (``docs/performance.md``). The operator is the one that torch's own compiler puts there.

In bf16 autocast would cast every matrix anew in each pass. They are cast once, before simulators share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LINEAR = "_linear_pointwise"
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, _LINEAR)
)
"""Whether this processor's products go there."""


def has_bf16() -> bool:
    """Whether this machine's processor computes in bf16; true where nothing tells. Others emulate it, slowly."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text(encoding="utf-8")


class FrozenLinear(nn.Linear):
    """``x W^T + b``; neither W nor b gets a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)


def freeze(backbone: nn.Module) -> None:
    """Nothing of it gets a gradient any more; its linear layers are ``FrozenLinear``, over the same tensors."""
    backbone.requires_grad_(False)
    for module in backbone.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


def halved(frozen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Backbone tensors with their matrices in bf16; numpy has no such numbers, and takes their bits for ``uint16``."""
    return {
        name: torch.tensor(value).bfloat16().view(torch.uint16).numpy()
        if value.ndim == 2 and name.endswith("weight")
        else value
        for name, value in frozen.items()
    }


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``halved`` made, as bf16; other tensors as they are."""
    return {name: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for name, t in tensors.items()}


class _Product(torch.autograd.Function):
    """``x W^T + b`` for x ``[…, i] float32``, W ``[o, i]``, and b ``[o]`` or None; differentiable in x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = getattr(torch.ops.mkldnn, _LINEAR)(x, weight, bias, "none", [], "")
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]  # a parameter that lives as long as the model; no other tensor is kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradient, ctx.weight.t(), None), None, None  # type: ignore[no-untyped-call]
