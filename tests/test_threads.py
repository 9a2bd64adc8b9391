"""Pieces of work on all cores."""

from __future__ import annotations

import threading

import pytest
import torch

from fedsim.threads import side_by_side


def test_results_stand_in_the_items_order_and_nothing_is_differentiated():
    one = torch.ones((), requires_grad=True)
    found = side_by_side(lambda k: (float(k * one), (k * one).requires_grad, torch.get_num_threads()), range(20))
    assert found == [(float(k), False, 1) for k in range(20)]


def test_the_caller_has_its_threads_and_gradients_back_and_the_error_of_the_work():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda k: 1 // k, [1, 0])
        assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


def test_pieces_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=60)  # which one thread alone would never pass
    assert sorted(side_by_side(lambda _: both.wait(), range(2))) == [0, 1]
