"""The cache's folder; what lies in it: ``envs/test_source.py``, ``models/test_prefix.py``."""

from pathlib import Path

import pytest

from fedsim.cache import cache_folder


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/fedsim")
