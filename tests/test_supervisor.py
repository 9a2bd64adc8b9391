"""The pool's policy, by hand: no Ray, no processes, and a clock that is a number."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.config import BackendConfig
from fedsim.errors import BlockFailedError
from fedsim.supervisor import Deadlines, Failures, Piece, Pool, Slot, Stage, deadline_s

QUARANTINE = BackendConfig(on_client_error="quarantine")


def stage_of(*blocks: tuple[int, ...], config: BackendConfig = QUARANTINE) -> Stage:
    return Stage("train", 0, blocks, config, Failures())


def failures(stage: Stage) -> Failures:
    return stage._failures


def waiting(stage: Stage) -> list[tuple[int, ...]]:
    return [piece.clients for piece in stage.waiting]


# Blocks ----------------------------------------------------------------------------------------------------------


def test_a_block_that_failed_once_is_next_again_whole():
    stage = stage_of((4, 2), (3, 1))
    stage.fail(stage.waiting.popleft(), "died")
    assert waiting(stage) == [(4, 2), (3, 1)]
    assert failures(stage) == Failures(blocks_requeued=1)


def test_a_block_that_failed_twice_is_halved_in_the_order_of_its_clients():
    stage = stage_of((4, 2, 9, 7, 5), (3, 1))
    for _ in range(2):
        stage.fail(stage.waiting.popleft(), "died")
    assert waiting(stage) == [(4, 2, 9), (7, 5), (3, 1)]
    assert failures(stage) == Failures(blocks_requeued=1, blocks_halved=1)


def test_what_is_done_stands_in_the_blocks_order_halves_in_the_place_of_their_block():
    stage = stage_of((4, 2, 9), (3, 1), (8,))
    for _ in range(2):
        stage.fail(stage.waiting.popleft(), "died")
    pieces = [stage.waiting.popleft() for _ in range(4)]
    for piece in reversed(pieces):
        stage.finish(piece)
    assert [piece.clients for piece in stage.done] == [(4, 2), (9,), (3, 1), (8,)]


def test_one_deadly_client_of_four_costs_seven_deaths_and_only_itself():
    stage, deaths = stage_of((6, 5, 4, 3)), 0
    while stage.waiting:
        piece = stage.waiting.popleft()
        if 5 in piece.clients:
            deaths += 1
            stage.fail(piece, "died")
        else:
            stage.finish(piece)
    # Two of the block of four, two of its half (6, 5), three of the client itself.
    assert deaths == 7
    assert [piece.clients for piece in stage.done] == [(6,), (4, 3)]
    # Not put back: what was halved, twice, and the client that was given up.
    assert failures(stage) == Failures(
        blocks_requeued=4, blocks_halved=2, clients_quarantined=1, quarantined=[5]
    )  # fmt: skip


def test_a_client_that_failed_three_times_stops_the_run_unless_asked_otherwise():
    stage = stage_of((5,), config=BackendConfig())
    for _ in range(2):
        stage.fail(stage.waiting.popleft(), "exit code 1")
    with pytest.raises(BlockFailedError) as failure:
        stage.fail(stage.waiting.popleft(), "exit code 2")
    assert failure.value.args == (0, [5], 3, "exit code 2")


def test_blocks_that_waited_behind_another_did_not_fail():
    stage = stage_of((5,), (6,), (7,))
    pieces = [stage.waiting.popleft() for _ in range(3)]
    stage.requeue(pieces[1:])
    assert waiting(stage) == [(6,), (7,)]
    assert [piece.failures for piece in pieces] == [0, 0, 0]
    assert failures(stage).blocks_requeued == 2


def test_a_block_too_large_for_the_gpu_is_halved_at_once_and_has_not_failed():
    stage = stage_of((1, 2, 3, 4))
    stage.shrink(stage.waiting.popleft(), "out of memory")
    assert waiting(stage) == [(1, 2), (3, 4)]
    assert [piece.failures for piece in stage.waiting] == [0, 0]
    assert failures(stage) == Failures(blocks_halved=1)


def test_a_single_client_too_large_for_the_gpu_fails_like_any_other():
    stage = stage_of((1,))
    for _ in range(3):
        stage.shrink(stage.waiting.popleft(), "out of memory")
    assert failures(stage).quarantined == [1]


# Deadlines -------------------------------------------------------------------------------------------------------


def test_the_deadline_is_ten_times_the_slowest_step_but_not_below_the_least():
    config = BackendConfig(min_deadline_s=60, start_timeout_s=300)
    assert deadline_s(config, steps=4, slowest_s=None) == 300  # nothing was measured
    assert deadline_s(config, steps=4, slowest_s=2.5) == 100
    assert deadline_s(config, steps=4, slowest_s=0.01) == 60


def test_each_failure_of_a_block_doubles_its_deadline():
    config = BackendConfig(min_deadline_s=60)
    assert [deadline_s(config, 4, 2.5, failures) for failures in range(6)] == [100, 200, 400, 800, 800, 800]
    assert deadline_s(config, 4, 0.01, failures=1) == 120


def test_the_servers_stages_have_deadlines_like_blocks_of_one_step():
    deadlines = Deadlines(BackendConfig(min_deadline_s=60, start_timeout_s=300))
    assert deadlines.of("aggregate") == 300  # nothing was measured
    for took_s, then in ((0.5, 60), (8.0, 80), (1.0, 80)):  # the slowest counts
        deadlines.kept("aggregate", took_s)
        assert deadlines.of("aggregate") == then
    assert deadlines.of("save") == 300


def test_a_stage_under_which_the_server_hung_has_twice_as_long_until_it_answers():
    deadlines = Deadlines(BackendConfig(min_deadline_s=60, start_timeout_s=300))
    for expected in (300, 600, 1200):
        assert deadlines.of("aggregate") == expected
        deadlines.passed("aggregate")
    assert deadlines.of("broadcast") == 300
    deadlines.kept("aggregate", 1.0)
    assert deadlines.of("aggregate") == 60


def pool_of(simulators: int, **settings: float) -> Pool:
    """A pool whose simulators all live."""
    pool = Pool(BackendConfig(**settings), simulators)  # type: ignore[arg-type]
    for slot in pool.slots:
        pool.starting(slot, 0.0)
        pool.ready(slot)
    return pool


def given(slot: Slot, *clients: int) -> list[Piece]:
    slot.pieces += [Piece((client, 0), (client,)) for client in clients]
    return slot.pieces


def test_a_blocks_time_starts_with_its_payload_and_a_slower_stage_has_a_longer_deadline():
    pool = pool_of(1, min_deadline_s=2, start_timeout_s=300)
    (slot,) = pool.slots
    given(slot, 1)
    assert pool.late(1e9) == []  # the payload is on its way: that is not the simulator's time
    pool.begun(slot, "train", steps=5, now=100)
    assert (slot.until, pool.late(399.9), pool.late(400)) == (400, [], [slot])
    pool.finished(slot, "train", steps=5, now=110)  # 2 s a step
    given(slot, 2)
    pool.begun(slot, "train", steps=3, now=200)
    assert slot.until == 200 + 10 * 2 * 3
    pool.finished(slot, "train", steps=3, now=201)  # faster: the slowest counts
    given(slot, 3)
    pool.begun(slot, "train", steps=1, now=300)
    assert slot.until == 300 + 10 * 2 * 1
    pool.dropped(slot)
    given(slot, 4)
    pool.begun(slot, "evaluate", steps=1, now=400)
    assert slot.until == 400 + 300


def test_a_second_block_begins_when_the_first_is_done():
    pool = pool_of(1, min_deadline_s=2)
    (slot,) = pool.slots
    _, second = given(slot, 1, 2)
    pool.begun(slot, "train", steps=1, now=0)
    pool.finished(slot, "train", steps=1, now=1)
    assert (slot.pieces, slot.began) == ([second], None)
    assert pool.late(1e9) == []


def test_blocks_go_to_the_idlest_simulator_two_deep_until_few_are_left():
    pool = pool_of(2)
    one, other = pool.slots
    assert pool.free(5) is one
    given(one, 1)
    assert pool.free(4) is other
    given(other, 2)
    assert pool.free(3) is one  # three wait for two simulators: a second one hides the call's latency
    given(one, 3)
    assert pool.free(2) is None
    other.pieces.clear()
    assert pool.free(1) is other


# Simulators ------------------------------------------------------------------------------------------------------


def test_a_simulator_that_died_is_replaced_at_once_and_its_blocks_come_back_in_order():
    pool = pool_of(2)
    slot = pool.slots[0]
    given(slot, 7, 8)
    pool.begun(slot, "train", steps=1, now=5)
    assert [piece.clients for piece in pool.lost(slot, now=6)] == [(7,), (8,)]
    assert pool.due(6) == [slot]
    assert pool.living == [pool.slots[1]]
    assert not pool.busy


def test_starts_that_fail_are_tried_again_after_pauses_that_double_up_to_a_minute():
    pool = pool_of(2, start_timeout_s=300)
    slot, now, pauses = pool.slots[0], 0.0, []
    pool.lost(slot, now)
    for _ in range(9):
        assert pool.due(now) == [slot]
        pool.starting(slot, now)
        assert (pool.late(now + 299), pool.late(now + 300)) == ([], [slot])
        now += 300
        pool.lost(slot, now)
        pauses.append(slot.until - now)
        assert pool.due(slot.until - 0.5) == []
        now = slot.until
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    pool.starting(slot, now)
    pool.ready(slot)
    pool.lost(slot, now)
    assert pool.due(now) == [slot]  # it lived: the next start is tried at once


def test_how_long_no_simulator_has_lived():
    pool = pool_of(2)
    one, other = pool.slots
    assert pool.alone_s(100) == 0
    pool.lost(one, 150)
    assert pool.alone_s(160) == 0
    pool.lost(other, 170)
    assert pool.alone_s(760) == 600  # since it was last seen that one lives
    pool.starting(one, 800)
    assert pool.alone_s(800) == 640
    pool.ready(one)
    assert pool.alone_s(900) == 0


def test_it_waits_until_the_next_deadline_and_looks_up_every_second():
    pool = pool_of(2, min_deadline_s=2)
    slot = pool.slots[0]
    assert pool.wait_s(0) == 1
    pool._slowest_s["train"] = 0.0
    given(slot, 1)
    pool.begun(slot, "train", steps=1, now=10)
    assert [pool.wait_s(now) for now in (10, 11.25, 12, 13)] == [1, 0.75, 0, 0]


# All of it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_hangs_or_runs_out_of_memory_every_client_is_done_once(seed):
    rng, now = np.random.default_rng(seed), 0.0
    blocks = [(0, 1, 2, 3), (4, 5, 6), (7, 8), (9,)]
    stage, pool = stage_of(*blocks), pool_of(3)
    given_up: list[Piece] = []
    for _ in range(2000):
        if not stage.waiting and not pool.busy:
            break
        now += 1
        for slot in pool.due(now):
            pool.starting(slot, now)
            if rng.random() < 0.5:
                pool.ready(slot)
            else:
                pool.lost(slot, now)
        while stage.waiting and (slot := pool.free(len(stage.waiting))):
            slot.pieces.append(stage.waiting.popleft())
        busy = [slot for slot in pool.living if slot.pieces]
        if not busy:
            continue
        slot = busy[rng.integers(len(busy))]
        pool.begun(slot, "train", 1, now)
        piece, event = slot.pieces[0], rng.choice(["done", "died", "too large"], p=[0.5, 0.4, 0.1])
        if event == "done" and 5 not in piece.clients:
            pool.finished(slot, "train", 1, now)
            stage.finish(piece)
        elif event == "too large":
            pool.dropped(slot)
            stage.shrink(piece, event)
        else:
            first, *behind = pool.lost(slot, now)
            given_up.append(first)
            stage.requeue(behind)
            stage.fail(first, event)
    done = [client for piece in stage.done for client in piece.clients]
    gone = failures(stage).quarantined
    assert given_up and 5 in gone
    assert sorted(done + gone) == list(range(10))
    assert failures(stage).clients_quarantined == len(gone)
    assert [client for block in blocks for client in block if client in done] == done
