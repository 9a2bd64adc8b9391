"""The history: past tokens within a window, worked by hand."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import journal
from fedsim.history import History

budgets = pytest.mark.parametrize("budget_bytes", [1 << 20, 0], ids=["memory", "file"])


def filled(capacity: int, *rounds: list[int], **settings: Any) -> History:
    """A history after these rounds' clients; the token of client c in round t is ``[t, c]``."""
    history = History(capacity, 2, **settings)
    for t, clients in enumerate(rounds):
        ids = torch.tensor(clients)
        history.append(t, ids, torch.stack([torch.full_like(ids, t), ids], 1).float())
    return history


def content(history: History) -> list[tuple[int, int]]:
    """``(round, client)`` of all tokens; the tokens themselves say the same."""
    found = list(zip(history.rounds().tolist(), history.clients().tolist(), strict=True))
    assert history.tokens().tolist() == [list(pair) for pair in found]
    return found


def test_empty() -> None:
    history = History(3, 2)
    assert len(history) == 0 and content(history) == []
    assert history.tokens().shape == (0, 2)


def test_in_time_order_and_in_the_order_of_the_clients_given() -> None:
    history = filled(5, [7, 3], [4])
    assert len(history) == 3
    assert content(history) == [(0, 7), (0, 3), (1, 4)]


def test_the_oldest_are_overwritten() -> None:
    history = filled(3, [1, 2], [3, 4])  # places: 0, 1, then 2, 0
    assert len(history) == 3
    assert content(history) == [(0, 2), (1, 3), (1, 4)]


def test_twice_around() -> None:
    history = filled(3, [1, 2], [3, 4], [5, 6], [7])
    assert content(history) == [(2, 5), (2, 6), (3, 7)]


def test_exactly_full() -> None:
    assert content(filled(4, [1, 2], [3, 4])) == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_of_more_than_its_capacity_at_once_the_last_stay() -> None:
    history = filled(3, [1, 2], [3, 4, 5, 6, 7])
    assert content(history) == [(1, 5), (1, 6), (1, 7)]
    history.append(2, torch.tensor([8]), torch.tensor([[2.0, 8.0]]))
    assert content(history) == [(1, 6), (1, 7), (2, 8)]


@budgets
def test_a_client_keeps_its_newest(budget_bytes: int) -> None:
    history = filled(9, [1, 2], [1, 3], [1], [2, 1], per_client=2, budget_bytes=budget_bytes)
    assert content(history) == [(0, 2), (1, 3), (2, 1), (3, 2), (3, 1)]  # of client 1: rounds 2 and 3


@budgets
def test_what_a_client_drops_takes_no_room_from_others(budget_bytes: int) -> None:
    history = filled(3, [7, 1], [1], [1, 1], [1], per_client=2, budget_bytes=budget_bytes)
    assert content(history) == [(0, 7), (2, 1), (3, 1)]
    history.append(4, torch.tensor([8]), torch.tensor([[4.0, 8.0]]))  # but now there is no room
    assert content(history) == [(2, 1), (3, 1), (4, 8)]


def test_a_token_dropped_between_others_moves_none_of_them_until_the_array_is_full() -> None:
    history = filled(4, [1, 2], [2], [2], per_client=1)  # six rows, of which client 2 left two
    assert history._places.tolist() == [0, 3] and content(history) == [(0, 1), (2, 2)]
    history.append(3, torch.tensor([3, 2]), torch.tensor([[3.0, 3.0], [3.0, 2.0]]))
    assert history._places.tolist() == [0, 4, 5] and content(history) == [(0, 1), (3, 3), (3, 2)]
    history.append(4, torch.tensor([2]), torch.tensor([[4.0, 2.0]]))  # no row is free: those held move to the front
    assert history._places.tolist() == [0, 1, 2] and content(history) == [(0, 1), (3, 3), (4, 2)]
    assert history.tokens(2).tolist() == [[3, 3], [4, 2]] and history.tokens(0).shape == (0, 2)


def test_tokens_with_a_gap_between_them_lie_as_those_without_do() -> None:
    gap, whole = filled(4, [1, 2], [2], per_client=1), filled(4, [1, 2])
    assert gap._places.tolist() == [0, 2]
    assert gap.tokens().stride() == whole.tokens().stride() == (16, 1)  # rows of 64 bytes


def test_of_one_client_twice_at_once_the_later_stays() -> None:
    history = History(4, 1, per_client=1)
    history.append(0, torch.tensor([5, 6, 5]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert history.clients().tolist() == [6, 5] and history.tokens().tolist() == [[2], [3]]


@budgets
def test_rounds_too_old_are_dropped(budget_bytes: int) -> None:
    history = filled(9, [1, 2], [3], [1, 2, 4], rounds=2, budget_bytes=budget_bytes)
    assert content(history) == [(1, 3), (2, 1), (2, 2), (2, 4)]
    history.append(5, torch.tensor([1]), torch.tensor([[5.0, 1.0]]))  # rounds 3 and 4 left nothing
    assert content(history) == [(5, 1)]


def test_the_capacity_bounds_a_window_of_rounds() -> None:
    assert content(filled(3, [1, 2], [3, 4], [5], rounds=2)) == [(1, 3), (1, 4), (2, 5)]
    assert content(filled(2, [1, 2], [3, 4], [5], rounds=2)) == [(1, 4), (2, 5)]


def test_both_windows() -> None:
    history = filled(9, [1, 2], [1, 2], [1], [1, 3], rounds=3, per_client=2)
    assert content(history) == [(1, 2), (2, 1), (3, 1), (3, 3)]


@budgets
def test_sequences_are_padded_in_front(budget_bytes: int) -> None:
    history = filled(9, [4, 2], [2], [9, 2], budget_bytes=budget_bytes)
    tokens, mask = history.sequences(torch.tensor([9, 5, 2, 4]))
    assert mask.tolist() == [[False, False, True], [False] * 3, [True] * 3, [False, False, True]]
    none = [0, 0]
    assert tokens.tolist() == [
        [none, none, [2, 9]],
        [none, none, none],
        [[0, 2], [1, 2], [2, 2]],
        [none, none, [0, 4]],
    ]
    assert tokens.dtype == torch.float32 and mask.dtype == torch.bool


def test_sequences_of_a_given_length() -> None:
    history, ids = filled(9, [4, 2], [2], [9, 2]), torch.tensor([4, 2])
    tokens, mask = history.sequences(ids, length=2)
    assert tokens.tolist() == [[[0, 0], [0, 4]], [[1, 2], [2, 2]]]
    assert mask.tolist() == [[False, True], [True, True]]
    tokens, mask = history.sequences(ids, length=4)
    assert tokens.shape == (2, 4, 2) and tokens[1].tolist() == [[0, 0], [0, 2], [1, 2], [2, 2]]
    assert mask.tolist() == [[False] * 3 + [True], [False] + [True] * 3]
    assert history.sequences(ids, length=0)[0].shape == (2, 0, 2)


def test_sequences_are_as_long_as_the_longest_asked_for() -> None:
    history = filled(9, [4, 2], [2], [2])
    assert history.sequences(torch.tensor([4]))[0].tolist() == [[[0, 4]]]
    tokens, mask = history.sequences(torch.tensor([4, 4]))  # one client twice
    assert tokens.tolist() == [[[0, 4]], [[0, 4]]] and mask.all()


def test_sequences_of_nobody() -> None:
    for history, ids in ((filled(3), [1, 2]), (filled(3, [5]), [1, 2]), (filled(3, [5]), [])):
        tokens, mask = history.sequences(torch.tensor(ids, dtype=torch.int64))
        assert tokens.shape == (len(ids), 0, 2) and mask.shape == (len(ids), 0)


@budgets
def test_bf16_rounds_to_eight_bits(budget_bytes: int) -> None:
    # Between 1 and 2 bfloat16 has steps of 2^-7, between 256 and 512 of 2; half steps go to the even one.
    history = History(1, 5, dtype="bf16", budget_bytes=budget_bytes)
    given = [1.0 + 2**-7, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 257.0, -3.0e38]
    history.append(0, torch.tensor([6]), torch.tensor([given]))
    kept = [1.0 + 2**-7, 1.0, 1.0 + 2**-6, 256.0, float(torch.tensor(-3.0e38).bfloat16())]
    assert history.tokens().dtype == torch.float32
    assert history.tokens().tolist() == [kept]
    assert history.sequences(torch.tensor([6]))[0].tolist() == [[kept]]
    assert [part["tokens"].dtype for part in history.changes()] == [torch.bfloat16]


def test_tokens_are_copied_in_and_sequences_out() -> None:
    history, tokens = History(2, 2), torch.ones(1, 2, requires_grad=True)
    history.append(0, torch.tensor([1]), tokens)
    tokens.detach().zero_()
    assert not history.tokens().requires_grad
    for read in (history.clients(), history.rounds(), history.sequences(torch.tensor([1]))[0]):
        assert not read.requires_grad
        read.fill_(7)
    assert history.tokens().tolist() == [[1.0, 1.0]]
    assert history.clients().tolist() == [1] and history.rounds().tolist() == [0]


def test_tokens_are_read_without_a_copy_and_move_to_the_front_when_the_end_is_reached() -> None:
    history = History(4, 1, rounds=2)  # an array of six
    rows = []
    for round in range(4):
        history.append(round, torch.tensor([1, 2]), torch.tensor([[2.0 * round], [2.0 * round + 1]]))
        tokens = history.tokens()
        assert tokens.flatten().tolist() == [float(n) for n in range(max(0, 2 * round - 2), 2 * round + 2)]
        assert history.tokens(3).flatten().tolist() == tokens.flatten().tolist()[-3:]
        rows.append(tokens.storage_offset() // tokens.stride(0))
    assert rows == [0, 0, 2, 0]


def taken(history: History, everything: bool = False) -> list[list[int]]:
    """The clients of what it gives away, by part."""
    return [part["clients"].tolist() for part in history.changes(everything)]


@pytest.mark.parametrize("rounds", [[], [[1, 2]], [[1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6], [7]]])
def test_everything_comes_back(rounds: list[list[int]]) -> None:
    history, other = filled(3, *rounds), filled(3, [91, 92, 93, 94])
    other.clear()
    for part in history.changes(everything=True):
        other.apply(part)
    assert content(other) == content(history)
    for one in (history, other):  # and both go on alike
        one.append(9, torch.tensor([8, 9]), torch.tensor([[9.0, 8.0], [9.0, 9.0]]))
    assert content(other) == content(history)
    assert content(other)[-2:] == [(9, 8), (9, 9)]


def test_changes_are_the_tokens_since_the_last_call() -> None:
    history = filled(3, [1, 2])
    assert taken(history) == [[1, 2]] and taken(history) == []
    history.append(1, torch.tensor([3]), torch.tensor([[1.0, 3.0]]))
    history.append(2, torch.tensor([4]), torch.tensor([[2.0, 4.0]]))  # client 1 makes room
    assert history.nbytes == 3 * (16 + 2 * 4)  # client, round, and 2 float32 each
    assert taken(history) == [[3, 4]]
    assert taken(history, everything=True) == [[2, 3, 4]] and taken(history) == []


def test_what_came_and_went_between_two_calls_is_no_change() -> None:
    history = filled(2, [1, 2])
    assert taken(history) == [[1, 2]]
    history.append(1, torch.tensor([3, 4, 5]), torch.zeros(3, 2))
    assert taken(history) == [[4, 5]]
    mine = filled(9, [1, 2], [1], per_client=1)
    assert taken(mine) == [[2, 1]]


def test_changes_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.history.PART_BYTES", 50)  # two tokens of 24 bytes
    assert taken(filled(9, [1, 2, 3], [4, 5])) == [[1, 2], [3, 4], [5]]


def test_changes_do_not_change_with_the_history() -> None:
    history = filled(2, [1, 2])
    (saved,) = history.changes()
    history.append(1, torch.tensor([3]), torch.tensor([[1.0, 3.0]]))
    assert saved["clients"].tolist() == [1, 2] and saved["tokens"].tolist() == [[0, 1], [0, 2]]


def naive(past: list[tuple[int, int]], capacity: int, rounds: int | None, per_client: int | None) -> list[Any]:
    """What stays of all tokens ever appended, ``(round, client)``."""
    found: list[tuple[int, int]] = []
    for t, c in reversed(past):
        old = rounds is not None and t <= past[-1][0] - rounds
        many = per_client is not None and sum(client == c for _, client in found) >= per_client
        if not old and not many and len(found) < capacity:
            found.insert(0, (t, c))
    return found


@budgets
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("windows", [(None, None), (4, None), (None, 2), (5, 3)])
def test_many_random_rounds(
    windows: tuple[int | None, int | None], dtype: str, budget_bytes: int, tmp_path: Path
) -> None:
    rng = random.Random(0)

    def new() -> History:
        return History(12, 2, rounds=windows[0], per_client=windows[1], dtype=dtype, budget_bytes=budget_bytes)

    history, resumed = new(), new()
    before: journal.Journal | None = None
    past: list[tuple[int, int]] = []
    for t in range(0, 120, 2):
        clients = rng.sample(range(8), rng.choice([0, 1, 2, 3, 5, 8]))
        ids, tokens = torch.tensor(clients, dtype=torch.int64), torch.tensor([[t, c] for c in clients]).view(-1, 2)
        past += [(t, c) for c in clients]
        if rng.random() < 0.5:  # one of them is saved
            before = journal.write(tmp_path / str(t), {"history": resumed}, before)
            if rng.random() < 0.5:  # and goes on from there
                resumed = new()
                journal.read(before.path, before.bytes, {"history": resumed})
        expected = naive(past, 12, *windows)
        for one in (history, resumed):
            one.append(t, ids, tokens.float())
            assert content(one) == expected
            assert len(one) == len(expected)
        everyone = torch.randperm(8)
        tokens, mask = resumed.sequences(everyone)
        for client, its, known in zip(everyone.tolist(), tokens, mask, strict=True):
            assert its[known].tolist() == [[t, c] for t, c in expected if c == client]
            assert known.tolist() == sorted(known.tolist()) and not its[~known].any()
    assert len(past) > 100


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_changes_hold_the_tokens_as_they_are_stored(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    history, other = (History(4, 3, per_client=2, dtype=dtype) for _ in range(2))
    for t in range(5):
        history.append(t, torch.tensor([1, t]), torch.randn(2, 3, generator=generator))
    (saved,) = history.changes()
    assert len(history) == 4 and torch.equal(saved["tokens"].float(), history.tokens())
    other.apply(saved)
    (loaded,) = other.changes()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in saved.items())


def test_a_smaller_history_takes_what_it_would_keep() -> None:
    other = filled(2)
    for part in filled(5, [1, 2], [3, 4]).changes():
        other.apply(part)
    assert content(other) == [(1, 3), (1, 4)]


def test_past_the_budget_tokens_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    History(5, 20, budget_bytes=896)  # an array of 7 tokens x 20 float32, each at a multiple of 64 bytes
    History(5, 20, budget_bytes=448, dtype="bf16")
    for budget_bytes, dtype in ((895, "fp32"), (447, "bf16")):
        with pytest.raises(FileNotFoundError):
            History(5, 20, budget_bytes=budget_bytes, dtype=dtype)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are read from /proc")
def test_the_file_is_gone_with_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    history = filled(3, [1, 2], budget_bytes=0)
    assert mapped() and not list(tmp_path.iterdir())  # it has no name any more
    del history
    assert not mapped()


def test_memory_bytes() -> None:
    # Of seven tokens, as many again as half of five; 80 and 40 bytes, at multiples of 64.
    assert History.memory_bytes(5, 20) == 7 * 128
    assert History.memory_bytes(5, 20, dtype="bf16") == 7 * 64
    assert History.memory_bytes(5, 20, budget_bytes=64) == 64


def test_no_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="a history of 0 tokens holds nothing"):
        History(0, 2)


def test_windows_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="a history of 0 rounds holds nothing"):
        History(3, 2, rounds=0)
    with pytest.raises(ValueError, match="a history of -1 tokens per client holds nothing"):
        History(3, 2, per_client=-1)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is one of fp32, bf16, not 'fp16'"):
        History(3, 2, dtype="fp16")


def test_tokens_of_another_shape_are_refused() -> None:
    history = filled(3, [1])
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 1\), expected \(2, 2\)"):
        history.append(1, torch.tensor([4, 5]), torch.ones(2, 1))
    assert content(history) == [(0, 1)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget_bytes", [1 << 30, 0])
def test_every_token_begins_alike_wherever_it_lies(dtype: str, budget_bytes: int) -> None:
    history = History(3, 5, dtype=dtype, budget_bytes=budget_bytes)
    for round in range(6):
        history.append(round, torch.tensor([0, 1]), torch.full((2, 5), float(round)))
        assert {row.data_ptr() % 64 for row in history._tokens} == {0}
        assert history.tokens().shape == (min(3, 2 * round + 2), 5)
    assert history.tokens()[:, 4].tolist() == [4.0, 5.0, 5.0]
