"""The store: rows of all clients, in memory or in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.store import Store

TEMPLATE = {"v": torch.tensor([1.0, 2.0, 3.0]), "count": torch.tensor(7)}


def ids(*clients: int) -> np.ndarray:
    return np.array(clients)


def rows(*values: float) -> dict[str, torch.Tensor]:
    """One client a value."""
    v = torch.tensor(values)
    return {"v": v[:, None].expand(-1, 3).clone(), "count": v.long()}


@pytest.fixture(params=[1 << 20, 0], ids=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(TEMPLATE, 5, budget_bytes=request.param, folder=tmp_path)


def test_the_unseen_have_the_template(store: Store) -> None:
    store.write(ids(3), rows(9.0))
    read = store.read(ids(0, 3, 4))
    assert read["v"].tolist() == [[1, 2, 3], [9, 9, 9], [1, 2, 3]]
    assert read["count"].tolist() == [7, 9, 7]
    assert read["count"].dtype == torch.int64 and read["v"].dtype == torch.float32


def test_rows_come_in_the_order_they_are_asked_for(store: Store) -> None:
    store.write(ids(4, 0), rows(40.0, 10.0))
    assert store.read(ids(0, 4))["count"].tolist() == [10, 40]
    assert store.read(ids(4, 0, 4))["count"].tolist() == [40, 10, 40]


def test_what_is_read_and_written_is_a_copy(store: Store) -> None:
    written = rows(5.0)
    store.write(ids(1), written)
    written["v"].fill_(-1.0)
    store.read(ids(1, 2))["v"].fill_(-2.0)
    assert store.read(ids(1, 2))["v"].tolist() == [[5, 5, 5], [1, 2, 3]]
    assert TEMPLATE["v"].tolist() == [1, 2, 3]


def test_seen_are_those_written(store: Store) -> None:
    store.read(ids(0, 1))
    store.write(ids(4, 2), rows(1.0, 2.0))
    assert store.seen.tolist() == [False, False, True, False, True]


def test_rows_take_memory_in_the_order_in_which_clients_come(store: Store) -> None:
    store.write(ids(4, 2), rows(40.0, 20.0))
    store.write(ids(0, 4), rows(10.0, 41.0))
    assert store._rows["count"].tolist() == [20, 41, 10, 0, 0]
    assert store.read(np.arange(5))["count"].tolist() == [10, 7, 20, 7, 41]


def test_a_new_client_twice_at_once_takes_one_row(store: Store) -> None:
    store.write(ids(3, 3), rows(1.0, 2.0))
    store.write(ids(0, 1, 2, 4), rows(3.0, 4.0, 5.0, 6.0))  # there is room for five
    assert store.read(np.arange(5))["count"].tolist() == [3, 4, 5, 2, 6]


def test_changes_are_those_since_the_last_call_and_come_back(store: Store) -> None:
    store.write(ids(4, 2), rows(40.0, 20.0))
    (first,) = store.changes()
    store.write(ids(1, 4), rows(10.0, 41.0))
    (second,) = store.changes()
    assert (first["ids"].tolist(), first["rows.count"].tolist()) == ([2, 4], [20, 40])
    assert (second["ids"].tolist(), second["rows.count"].tolist()) == ([1, 4], [10, 41])
    assert list(store.changes()) == []

    other = Store(TEMPLATE, 5)
    other.write(ids(0), rows(-1.0))
    other.clear()
    other.apply(first)
    other.apply(second)
    assert other.read(np.arange(5))["count"].tolist() == [7, 10, 20, 7, 41]
    assert torch.equal(other.read(np.arange(5))["v"], store.read(np.arange(5))["v"])
    assert other.seen.tolist() == store.seen.tolist()


def test_everything_is_all_that_were_seen(store: Store) -> None:
    store.write(ids(4, 2), rows(40.0, 20.0))
    list(store.changes())
    store.write(ids(1), rows(10.0))
    (everything,) = store.changes(everything=True)
    assert (everything["ids"].tolist(), everything["rows.count"].tolist()) == ([1, 2, 4], [10, 20, 40])
    assert list(store.changes()) == []
    assert store.nbytes == 3 * (8 + 20)  # an id, 3 float32 and 1 int64 each


def test_changes_come_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.store.PART_BYTES", 60)  # two clients of 28 bytes
    store.write(ids(0, 1, 2, 3, 4), rows(0.0, 1.0, 2.0, 3.0, 4.0))
    assert [part["ids"].tolist() for part in store.changes()] == [[0, 1], [2, 3], [4]]


def test_changes_do_not_change_with_the_store(store: Store) -> None:
    store.write(ids(2), rows(20.0))
    (change,) = store.changes()
    store.write(ids(2), rows(21.0))
    assert change["rows.count"].tolist() == [20]


def test_past_the_budget_rows_lie_in_a_file(tmp_path: Path) -> None:
    # 5 clients x (3 float32 + 1 int64) = 100 bytes
    assert Store.bytes_for(TEMPLATE, 5) == 100
    within, beyond = Store(TEMPLATE, 5, budget_bytes=100), Store(TEMPLATE, 5, budget_bytes=99, folder=tmp_path)
    assert not any(isinstance(stored, np.memmap) for stored in within._rows.values())
    assert all(isinstance(stored, np.memmap) for stored in beyond._rows.values())


def test_file_and_memory_hold_the_same(tmp_path: Path) -> None:
    stores = [Store(TEMPLATE, 40, budget, tmp_path) for budget in (1 << 20, 0)]
    rng = np.random.default_rng(0)
    for _ in range(10):
        some = rng.choice(40, 6, replace=False)
        new = rows(*rng.random(6))
        for store in stores:
            store.write(some, new)
    memory, file = (store.read(np.arange(40)) for store in stores)
    assert torch.equal(memory["v"], file["v"]) and torch.equal(memory["count"], file["count"])
    assert 7 in memory["count"]  # some were never seen


def test_stateless_clients_need_nothing() -> None:
    store = Store({}, 5)
    store.write(ids(1, 2), {})
    assert store.read(ids(0, 1)) == {}
    assert [part["ids"].tolist() for part in store.changes()] == [[1, 2]]


def test_other_names_than_the_templates_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"keeps \['count', 'v'\], the algorithm returned rows \['v'\]"):
        store.write(ids(0), {"v": torch.zeros(1, 3)})
    assert not store.seen.any()


def test_other_shapes_than_the_templates_are_refused(store: Store) -> None:
    wrong = {"v": torch.zeros(1, 4), "count": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"rows 'v' have shape \(1, 4\), expected \(1, 3\)"):
        store.write(ids(0), wrong)
    with pytest.raises(ValueError, match=r"rows 'v' have shape \(1, 3\), expected \(2, 3\)"):
        store.write(ids(0, 1), rows(1.0))
    assert not store.seen.any()
