"""The server: the order of aggregation, what it refuses, what it remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import checkpoint
from fedsim.algorithm import Cohort
from fedsim.config import Config
from fedsim.env import Ragged
from fedsim.errors import CheckpointError, ClientError, OwnCodeError
from fedsim.journal import Latest
from fedsim.plan import Plan, prepare
from fedsim.server import Server, _not_finite
from fedsim.simulator import Workload
from fedsim.store import Store

D = 712
Result = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture
def workload(tiny_plan: Plan) -> Workload:
    """Client i has i + 1 training samples."""
    train = Ragged.of([np.arange(client + 1) for client in range(8)])
    return replace(tiny_plan.workload, data=replace(tiny_plan.workload.data, train=train))


@pytest.fixture
def server(workload: Workload) -> Server:
    return Server(workload, torch.zeros(D))


def deltas(*values: float) -> Result:
    """One client a value, and nothing that it keeps."""
    return {"delta": torch.tensor(values)[:, None].expand(-1, D).clone()}, {}


# Rounds ----------------------------------------------------------------------------------------------------------


def test_broadcast(server: Server) -> None:
    payload, rows = server.broadcast(0, (5, 2))
    assert payload["w"].shape == (1, D) and rows == {}


def test_aggregate_by_hand(server: Server) -> None:
    # Clients 0, 2, 3 have 1, 3, 4 samples: (1 x 8 + 3 x 0 + 4 x 4) / 8 = 3
    facts = server.aggregate(0, [(3, 0), (2,)], [deltas(4.0, 8.0), deltas(0.0)])
    average = server.average()
    assert average is not None and average.tolist() == [3.0] * D
    assert facts["bytes_up"] == 3 * D * 4 and facts["metrics"] == {}


def test_algorithms_see_clients_by_id_whatever_the_blocks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def aggregate(state: Any, cohort: Cohort, update: Any, rows: Any) -> Any:
        seen.append((cohort.round, cohort.ids.tolist(), cohort.sizes.tolist(), update["delta"][:, 0].tolist()))
        return state, rows

    monkeypatch.setattr(server.algorithm, "aggregate", aggregate)
    server.aggregate(6, [(7, 1), (4, 2)], [deltas(70.0, 10.0), deltas(40.0, 20.0)])
    server.aggregate(6, [(4,), (2, 7), (1,)], [deltas(40.0), deltas(20.0, 70.0), deltas(10.0)])
    assert seen == [(6, [1, 2, 4, 7], [2, 3, 5, 8], [10, 20, 40, 70])] * 2


def test_the_order_of_blocks_does_not_change_a_bit(workload: Workload) -> None:
    generator = torch.Generator().manual_seed(0)
    of_client = {client: torch.randn(1, D, generator=generator) for client in range(8)}

    def average(*blocks: tuple[int, ...]) -> Tensor:
        server = Server(workload, torch.zeros(D))
        results: list[Result] = [
            ({"delta": torch.cat([of_client[client] for client in block])}, {}) for block in blocks
        ]
        server.aggregate(0, list(blocks), results)
        return server.state["w"]

    assert torch.equal(average((0, 1, 2, 3, 4, 5, 6, 7)), average((6, 3), (7, 0, 5), (2,), (1, 4)))


def test_rows_are_kept_for_the_client_that_made_them(tiny_config: Callable[..., Config], workload: Workload) -> None:
    local = replace(workload, config=tiny_config("algorithm=local"))
    server = Server(local, torch.full((D,), 0.5))
    own: list[Result] = [({}, {"v": torch.tensor(values)[:, None].expand(-1, D)}) for values in ([7.0, 1.0], [4.0])]
    facts = server.aggregate(0, [(7, 1), (4,)], own)
    _, rows = server.broadcast(1, (1, 3, 4, 7))
    assert rows["v"][:, 0].tolist() == [1.0, 0.5, 4.0, 7.0]
    assert facts["bytes_up"] == 0 and server.average() is None


def test_an_algorithms_metrics_are_facts_of_the_round(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.algorithm, "aggregate", lambda state, *_: ({**state, "metrics": {"drift": 0.5}}, {}))
    assert server.aggregate(0, [(0,)], [deltas(1.0)])["metrics"] == {"drift": 0.5}


def test_metrics_may_be_numbers_of_any_kind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"metrics": {"drift": torch.tensor(0.5), "share": np.float32(0.25)}, "seconds": {"learner": 1}}
    monkeypatch.setattr(server.algorithm, "aggregate", lambda state, *_: ({**state, **told}, {}))
    facts = server.aggregate(0, [(0,)], [deltas(1.0)])
    assert json.loads(json.dumps({name: facts[name] for name in told})) == {
        "metrics": {"drift": 0.5, "share": 0.25},
        "seconds": {"learner": 1.0},
    }


# Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_names_its_client(server: Server, bad: float) -> None:
    results = [deltas(1.0, 2.0), deltas(3.0, 4.0)]
    results[0][0]["delta"][1, 300] = bad
    with pytest.raises(ClientError) as caught:
        server.aggregate(2, [(7, 5), (4, 2)], results)
    error = caught.value
    assert (error.stage, error.round, error.clients) == ("train", 2, [5])
    assert str(error).startswith("train failed in round 3, clients [5]\nupdate 'delta' is not finite: lower local.lr")
    assert not server.state["w"].any()  # nothing was taken


def test_rows_that_are_not_finite_name_their_client(tiny_config: Callable[..., Config], workload: Workload) -> None:
    server = Server(replace(workload, config=tiny_config("algorithm=local")), torch.zeros(D))
    rows = {"v": torch.zeros(2, D)}
    rows["v"][1] = torch.nan
    with pytest.raises(ClientError, match="rows 'v' is not finite") as caught:
        server.aggregate(0, [(0, 1)], [({}, rows)])
    assert caught.value.clients == [1]


def test_an_update_may_be_one_number_a_client(server: Server) -> None:
    update = {"delta": torch.ones(2, D), "loss": torch.tensor([0.5, 1.5]), "done": torch.tensor([True, False])}
    assert server.aggregate(0, [(0, 1)], [(update, {})])["bytes_up"] == 2 * (4 * D + 4 + 1)
    update["loss"][0] = torch.nan
    with pytest.raises(ClientError, match="update 'loss' is not finite") as caught:
        server.aggregate(1, [(5, 3)], [(update, {})])
    assert caught.value.clients == [5]


@pytest.fixture
def skipping(tiny_config: Callable[..., Config], workload: Workload) -> Callable[..., Server]:
    """A server that leaves such updates out."""
    return lambda *settings: Server(replace(workload, config=tiny_config("nonfinite=skip", *settings)), torch.zeros(D))


def taken(server: Server) -> list[int]:
    return server.rounds_taken.read(np.arange(8))["rounds"].tolist()


def test_the_aggregate_is_over_those_who_are_left(skipping: Callable[..., Server]) -> None:
    # Clients 0, 2, 3 have 1, 3, 4 samples; without client 2: (1 x 5 + 4 x 0) / 5 = 1
    server, results = skipping(), [deltas(0.0, 5.0), deltas(8.0)]
    results[1][0]["delta"][0, 7] = torch.inf
    facts = server.aggregate(0, [(3, 0), (2,)], results)
    average = server.average()
    assert average is not None and average.tolist() == [1.0] * D
    assert facts["skipped"] == [2] and facts["bytes_up"] == 3 * D * 4  # it was sent
    assert taken(server) == [1, 0, 0, 1, 0, 0, 0, 0]


def test_of_those_who_are_left_out_nothing_is_kept(skipping: Callable[..., Server]) -> None:
    server = skipping("algorithm=local")
    rows = {"v": torch.ones(3, D)}
    server.aggregate(0, [(0, 1, 2)], [({}, rows)])
    rows = {"v": torch.full((3, D), 2.0)}
    rows["v"][1, 0], rows["v"][2, -1] = torch.nan, -torch.inf
    assert server.aggregate(1, [(0, 1, 5)], [({}, rows)])["skipped"] == [1, 5]
    assert server.store.read(np.arange(8))["v"][:, 3].tolist() == [2, 1, 1, 0, 0, 0, 0, 0]
    assert server.store.seen.tolist() == [True] * 3 + [False] * 5
    assert taken(server) == [2, 1, 1, 0, 0, 0, 0, 0]


def test_a_round_without_anyone_left_changes_nothing(
    skipping: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = skipping()
    server.aggregate(0, [(0,)], [deltas(1.0)])
    server.state["metrics"] = {"drift": 0.5}  # of the round before
    before = dict(server.state)
    monkeypatch.setattr(server.algorithm, "aggregate", their_own_mistake)
    facts = server.aggregate(1, [(0, 1)], [deltas(torch.nan, torch.nan)])
    assert facts == {"bytes_up": 2 * D * 4, "skipped": [0, 1], "metrics": {}, "seconds": {}}
    assert server.state == before and taken(server) == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(1, D), (3, D), ()])
def test_an_update_of_another_number_of_clients(server: Server, shape: tuple[int, ...]) -> None:
    with pytest.raises(ClientError) as caught:
        server.aggregate(0, [(0, 1), (2,)], [({"delta": torch.zeros(shape)}, {}), deltas(1.0)])
    assert caught.value.clients == [0, 1]
    assert caught.value.original == f"update 'delta' has shape {shape}; its first axis must be the 2 clients"


@pytest.mark.parametrize(
    ("other", "shapes"),
    [
        ({"delta": torch.zeros(1, D), "loss": torch.zeros(1)}, f"{{'delta': ({D},), 'loss': ()}}"),
        ({"detla": torch.zeros(1, D)}, f"{{'detla': ({D},)}}"),
        ({"delta": torch.zeros(1, 5)}, "{'delta': (5,)}"),
    ],
)
def test_blocks_whose_updates_differ(server: Server, other: dict[str, Tensor], shapes: str) -> None:
    with pytest.raises(ClientError) as caught:
        server.aggregate(0, [(0, 1), (2,)], [deltas(1.0, 2.0), (other, {})])
    assert caught.value.clients == [2]
    assert caught.value.original == (
        f"update of shapes {shapes} a client, where another block's are {{'delta': ({D},)}}"
    )


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"v": torch.zeros(2, 5)}, r"rows 'v' have shape \(2, 5\), expected \(2, 712\)"),
        ({}, r"a client keeps \['v'\], the algorithm returned rows \[\]"),
    ],
)
def test_rows_that_a_client_cannot_keep(
    tiny_config: Callable[..., Config], workload: Workload, rows: dict[str, Tensor], told: str
) -> None:
    server = Server(replace(workload, config=tiny_config("algorithm=local")), torch.zeros(D))
    with pytest.raises(ClientError, match=told) as caught:
        server.aggregate(0, [(0, 1)], [({}, rows)])
    assert (caught.value.stage, caught.value.clients) == ("aggregate", [0, 1])


def their_own_mistake(*_: Any) -> Any:
    raise ZeroDivisionError("nobody came")


@pytest.mark.parametrize("stage", ["broadcast", "aggregate"])
def test_an_exception_of_the_users_keeps_its_traceback(
    server: Server, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(server.algorithm, stage, their_own_mistake)
    with pytest.raises(ClientError) as caught:
        if stage == "broadcast":
            server.broadcast(3, (5, 2))
        else:
            server.aggregate(3, [(5, 2)], [deltas(1.0, 2.0)])
    error = caught.value
    assert (error.stage, error.round, sorted(error.clients)) == (stage, 3, [2, 5])
    assert "in their_own_mistake" in error.original
    assert error.original.endswith("ZeroDivisionError: nobody came\n")


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("broadcast", {"w": 1.0}),
        ("broadcast", None),
        ("aggregate", None),
        ("aggregate", ({"w": torch.zeros(D), "metrics": {"drift": "much"}}, {})),
        ("aggregate", ({"w": torch.zeros(D), "seconds": [1.0]}, {})),
    ],
)
def test_what_is_no_result_names_the_stage_and_its_clients(
    server: Server, monkeypatch: pytest.MonkeyPatch, stage: str, given: Any
) -> None:
    monkeypatch.setattr(server.algorithm, stage, lambda *_: given)
    with pytest.raises(ClientError) as caught:
        if stage == "broadcast":
            server.broadcast(3, (5, 2))
        else:
            server.aggregate(3, [(5, 2)], [deltas(1.0, 2.0)])
    assert (caught.value.stage, caught.value.round, sorted(caught.value.clients)) == (stage, 3, [2, 5])


def test_an_average_that_is_no_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.algorithm, "average", lambda state: 0.5)
    with pytest.raises(OwnCodeError, match="algorithm=fedavg: average failed"):
        server.average()


def test_what_no_checkpoint_can_hold(server: Server, tmp_path: Path) -> None:
    server.state["seen"] = {1, 2}
    with pytest.raises(OwnCodeError) as caught:
        server.save(tmp_path / "round-00001", {})
    assert str(caught.value).splitlines() == [
        "algorithm=fedavg: a checkpoint of its server state failed",
        "a checkpoint cannot hold '/server/seen', a set; it holds tensors, numbers, text, lists and dicts of them, and "
        "objects with a state_dict",
    ]
    assert not any(tmp_path.iterdir())
    del server.state["seen"]
    server.save(tmp_path / "round-00001", {})
    assert checkpoint.load(tmp_path / "round-00001")["facts"] == {}


@pytest.mark.parametrize("stage", ["init_server", "init_client"])
def test_an_exception_before_the_first_round(workload: Workload, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(type(workload.algorithm()), stage, their_own_mistake)
    with pytest.raises(ClientError) as caught:
        Server(workload, torch.zeros(D))
    assert (caught.value.stage, caught.value.clients) == (stage, [])


# Remembered ------------------------------------------------------------------------------------------------------


def one_round(server: Server, round: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = (1, 2, 4, 7) if round < 2 else (0, 2, 5, 6)
    _, rows = server.broadcast(round, ids)
    kept = {name: torch.randn(value.shape, generator=generator) for name, value in rows.items()}
    sent_up = torch.randn(4, D, generator=generator)
    server.aggregate(round, [ids], [({"delta": sent_up, "v": sent_up}, kept)])


# What is stateless, kept by clients, kept by the server of each client, and kept of the last rounds.
@pytest.mark.parametrize("algorithm", ["fedavg", "local", "fedamp", "pfedseq"])
def test_a_restored_server_goes_on_bit_for_bit(
    tiny_config: Callable[..., Config], tmp_path: Path, algorithm: str
) -> None:
    plan = prepare(tiny_config(f"algorithm={algorithm}"))
    server, restored = Server(plan.workload, plan.params), Server(plan.workload, plan.params)
    for round in range(3):  # the last checkpoint goes on with the journal of those before
        one_round(server, round, seed=round)
        server.save(tmp_path / str(round), {"round": round + 1, "seconds": {"train": 0.5}})
    one_round(restored, 7, seed=7)  # all forgotten
    facts = restored.load(tmp_path / "2")
    assert facts.pop("rounds_taken") == [1, 2, 3, 0, 2, 1, 1, 2]
    assert facts == {"round": 3, "seconds": {"train": 0.5}, "evaluated": {}}
    for round in range(3, 5):
        one_round(server, round, seed=round)
        one_round(restored, round, seed=round)
    everyone = tuple(range(8))
    for one, other in zip(server.broadcast(4, everyone), restored.broadcast(4, everyone), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert server.state.get("metrics") == restored.state.get("metrics")


def test_a_damaged_checkpoint_is_refused(server: Server, tmp_path: Path) -> None:
    server.save(tmp_path / "c", {})
    (tmp_path / "c" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json: damaged"):
        server.load(tmp_path / "c")


@pytest.mark.parametrize("of", ["algorithm=pfedseq", "adapter.width=3", "env.num_clients=7"])
def test_a_checkpoint_of_another_run_is_refused(tiny_config: Callable[..., Config], tmp_path: Path, of: str) -> None:
    other, mine = prepare(tiny_config("algorithm=local", of)), prepare(tiny_config("algorithm=local"))
    Server(other.workload, other.params).save(tmp_path / "c", {})
    with pytest.raises(CheckpointError, match=r"c: of another run \(.*, not {'algorithm': 'local', 'clients': 8,"):
        Server(mine.workload, mine.params).load(tmp_path / "c")


def rows_on_disk(folder: Path) -> list[list[int]]:
    """The clients whose rows a checkpoint's journal holds, part by part."""
    parts: list[list[int]] = []

    class Reader(Store):
        def apply(self, change: Mapping[str, Tensor]) -> None:
            parts.append(change["ids"].tolist())

    class Ignored(Latest):
        def apply(self, change: Mapping[str, Tensor]) -> None:
            pass

    checkpoint.replay(folder, {"rows": Reader({}, 8), "rounds_taken": Ignored(), "evaluated": Ignored()})
    return parts


def test_a_checkpoint_costs_what_changed(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    plan = prepare(tiny_config("algorithm=local"))
    server = Server(plan.workload, plan.params)

    def round_of(number: int, *ids: int) -> int:
        """Bytes that its checkpoint adds."""
        kept: list[Result] = [({}, {"v": torch.randn(len(ids), D)})]
        server.aggregate(number, [ids], kept)
        server.save(tmp_path / str(number), {})
        return (tmp_path / str(number) / "changes.journal").stat().st_size

    sizes = [round_of(0, 0, 1, 2, 3), round_of(1, 4, 5), round_of(2, 6, 7)]
    assert rows_on_disk(tmp_path / "2") == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert 0 < sizes[1] - sizes[0] == sizes[2] - sizes[1] < sizes[0]
    # Eight rows are live. The journal goes on until more than sixteen are in it; then it begins anew.
    for number, ids in enumerate([(0, 1, 2), (0, 1, 2), (0, 1, 2), (0,)], 3):
        round_of(number, *ids)
    assert rows_on_disk(tmp_path / "5") == [[0, 1, 2, 3], [4, 5], [6, 7], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert rows_on_disk(tmp_path / "6") == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_an_evaluation_is_in_the_checkpoints_after_it(server: Server, tmp_path: Path) -> None:
    first = {"ids": np.array([0, 1]), "total": np.array([4.0, 5.0], np.float32)}
    second = {"ids": np.array([1]), "total": np.array([5.0], np.float32), "sent": np.array([3.0], np.float32)}
    for number, evaluated in enumerate([{}, first, {}, second, {}]):
        server.save(tmp_path / str(number), {"evaluated": evaluated})
    for number, expected in enumerate([{}, first, first, second, second]):
        found = server.load(tmp_path / str(number))["evaluated"]
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in expected.items()
        }


def test_after_a_save_that_failed_the_next_one_has_all(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tiny_config("algorithm=local"))
    server, restored = Server(plan.workload, plan.params), Server(plan.workload, plan.params)
    one_round(server, 0, seed=0)
    server.save(tmp_path / "0", {})
    before = server.store.read(np.arange(8))["v"]
    one_round(server, 1, seed=1)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="1: cannot be written: no more"):
        patch.setattr("fedsim.checkpoint._flush", no_more)
        server.save(tmp_path / "1", {})
    restored.load(tmp_path / "0")
    assert torch.equal(restored.store.read(np.arange(8))["v"], before)
    one_round(server, 2, seed=2)
    server.save(tmp_path / "2", {})
    restored.load(tmp_path / "2")
    assert torch.equal(restored.store.read(np.arange(8))["v"], server.store.read(np.arange(8))["v"])


def no_more(_: Path) -> None:
    raise OSError("no more")


def test_a_checkpoint_that_does_not_fit_is_refused(server: Server, tmp_path: Path) -> None:
    server.store = Store({"v": torch.zeros(2)}, 8)
    server.store.write(np.array([3]), {"v": torch.zeros(1, 2)})
    server.save(tmp_path / "c", {})
    server.store = Store({}, 8)
    with pytest.raises(CheckpointError, match="c: does not fit this run: ValueError: a client keeps"):
        server.load(tmp_path / "c")


def test_the_server_draws_from_the_seed(tiny_config: Callable[..., Config], workload: Workload) -> None:
    def drawn(*overrides: str) -> Tensor:
        server = Server(replace(workload, config=tiny_config("algorithm=pfedseq", *overrides)), torch.zeros(D))
        return server.state["calibrator"].learners[0].W_B

    assert torch.equal(drawn(), drawn()) and not torch.equal(drawn(), drawn("seed=1"))


def test_a_sum_that_overflows_is_of_finite_numbers() -> None:
    nan, inf, large = float("nan"), float("inf"), 3e38
    assert _not_finite(torch.tensor([[large, large], [1.0, 2.0]])).tolist() == [False, False]
    rows = torch.tensor([[large, large], [nan, 0.0], [inf, -inf], [0.0, -inf], [1.0, 2.0]])
    assert _not_finite(rows).tolist() == [False, True, True, True, False]
