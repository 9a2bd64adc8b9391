"""timm, imported without torch's compiler.

Two lines in timm and torchvision (a decorator of a model that is none of ours, a detection operator) import
``torch._dynamo`` and with it sympy: 80 MiB that every simulator would hold for itself and none would use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_DETECTION = "torchvision.ops.roi_align"


@contextmanager
def without_compiler() -> Iterator[None]:
    """While timm is imported, what would import the compiler does not; the operator does so when it is called."""
    if "torch._dynamo" in sys.modules or "torchvision" in sys.modules:
        yield
        return
    disable, stand_in = torch.compiler.disable, ModuleType(_DETECTION)
    vars(stand_in).update({name: _later(name) for name in ("roi_align", "RoIAlign")})
    sys.modules[_DETECTION], torch.compiler.disable = stand_in, _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules[_DETECTION]


def _later(name: str) -> Callable[..., Any]:
    return lambda *values, **more: getattr(import_module(_DETECTION), name)(*values, **more)


def _unchanged(function: Callable[..., Any] | None = None, recursive: bool = True, **_: Any) -> Any:
    """``torch.compiler.disable`` for code that is never compiled."""
    return function or _unchanged
