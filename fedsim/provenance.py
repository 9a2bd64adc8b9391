"""What code a run was made with."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

from fedsim import __version__

_PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "omegaconf")


def versions() -> dict[str, str]:
    """Versions of fedsim and of what its results depend on."""
    return {"fedsim": __version__, **{name: metadata.version(name) for name in _PACKAGES}}


def commit() -> str | None:
    """The commit of the checkout that runs, with a + where it was changed; ``None`` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
