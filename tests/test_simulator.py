"""The simulator: facts of a block, scores of its models, and whose fault an exception is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import ClientError, ConfigError
from fedsim.local import LocalContext
from fedsim.plan import Plan
from fedsim.simulator import Simulator, guarded, payload_bytes

IDS = (1, 3, 6)


@pytest.fixture
def simulator(tiny_plan: Plan) -> Simulator:
    return Simulator(tiny_plan.workload)


def always(plan: Plan, label: int) -> Tensor:
    """A row that calls everything ``label``: all zero but one bias of the head, which stands last."""
    row = torch.zeros(plan.workload.task.layout.size)
    row[-6 + label] = 1.0
    return row


def holds(plan: Plan, client: int, label: int) -> int:
    """How many test samples of this label the client has."""
    data = plan.workload.data
    return int((data.labels[data.test[client]] == label).sum())


# Training --------------------------------------------------------------------------------------------------------


def test_facts_of_training(simulator: Simulator, tiny_plan: Plan) -> None:
    facts, update, rows = simulator.train(0, IDS, {"w": tiny_plan.params[None]}, {})
    assert facts["ids"].tolist() == [1, 3, 6]
    assert facts["samples"].tolist() == tiny_plan.workload.data.train.sizes[list(IDS)].tolist()
    assert facts["bytes_down"] == 3 * 4 * 712
    assert update["delta"].shape == (3, 712) and update["delta"].abs().sum(1).gt(0).all()
    assert rows == {} and not update["delta"].requires_grad


def test_loss_of_training_is_the_mean_over_samples(tiny_plan: Plan) -> None:
    still = replace(tiny_plan.workload.config.local, lr=0.0)
    workload = replace(tiny_plan.workload, config=replace(tiny_plan.workload.config, local=still))
    row = torch.zeros(1, 712)  # six equal logits
    facts, update, _ = Simulator(workload).train(0, IDS, {"w": row}, {})
    assert facts["loss"] == pytest.approx([np.log(6)] * 3, rel=1e-5)
    assert not update["delta"].any()


def test_training_is_a_function_of_the_round(simulator: Simulator, tiny_plan: Plan) -> None:
    def delta(round: int) -> Tensor:
        return simulator.train(round, IDS, {"w": tiny_plan.params[None]}, {})[1]["delta"]

    assert torch.equal(delta(0), delta(0))
    assert not torch.equal(delta(0), delta(1))


def test_an_algorithm_that_writes_to_its_input_writes_to_a_copy(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(payload: Any, rows: Any, ctx: LocalContext) -> Any:
        return {"delta": payload["w"].zero_().expand(3, -1)}, {"v": rows["v"].zero_()}

    monkeypatch.setattr(simulator.algorithm, "local_update", careless)
    w, v = torch.ones(1, 712), torch.ones(3, 712)
    simulator.train(0, IDS, {"w": w}, {"v": v})
    assert w.all() and v.all()


@pytest.mark.parametrize("kind", ["update", "rows"])
@pytest.mark.parametrize("shape", [(1, 712), (2, 712), (712,), ()])
def test_what_has_not_one_row_a_client_is_the_algorithms_mistake(
    simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, ...]
) -> None:
    good, bad = {"w": torch.zeros(3)}, {"w": torch.zeros(shape)}
    returned = (bad, good) if kind == "update" else (good, bad)
    monkeypatch.setattr(simulator.algorithm, "local_update", lambda payload, rows, ctx: returned)
    with pytest.raises(ClientError) as caught:
        simulator.train(4, IDS, {"w": tiny_plan.params[None]}, {})
    assert (caught.value.stage, caught.value.round, caught.value.clients) == ("train", 4, [1, 3, 6])
    assert caught.value.original == f"{kind} 'w' has shape {shape}; its first axis must be the 3 clients"


@pytest.mark.parametrize("returned", [None, {}, ({"w": None}, {}), ([1], {})])
def test_what_is_no_pair_of_states_is_the_algorithms_mistake(
    simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, returned: Any
) -> None:
    monkeypatch.setattr(simulator.algorithm, "local_update", lambda payload, rows, ctx: returned)
    with pytest.raises(ClientError, match="train failed in round 1"):
        simulator.train(0, IDS, {"w": tiny_plan.params[None]}, {})


# Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", range(6))
def test_scores_by_hand(simulator: Simulator, tiny_plan: Plan, label: int) -> None:
    sent, average = always(tiny_plan, label), always(tiny_plan, (label + 1) % 6)
    facts = simulator.evaluate(0, IDS, {"w": sent[None]}, {}, average)
    assert facts["ids"].tolist() == [1, 3, 6]
    assert facts["total"].tolist() == [len(tiny_plan.workload.data.test[client]) for client in IDS]
    assert facts["sent"].tolist() == facts["personal"].tolist() == [holds(tiny_plan, i, label) for i in IDS]
    assert facts["global"].tolist() == [holds(tiny_plan, i, (label + 1) % 6) for i in IDS]


def test_every_client_is_scored_with_its_own_row(simulator: Simulator, tiny_plan: Plan) -> None:
    labels = [int(tiny_plan.workload.data.labels[tiny_plan.workload.data.test[client][0]]) for client in IDS]
    rows = torch.stack([always(tiny_plan, label) for label in labels])
    facts = simulator.evaluate(0, IDS, {"w": rows}, {}, None)
    expected = [holds(tiny_plan, client, label) for client, label in zip(IDS, labels, strict=True)]
    assert facts["personal"].tolist() == expected and min(expected) > 0
    assert "global" not in facts


def test_what_was_sent_and_what_was_personalised_are_scored_apart(
    simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        simulator.algorithm, "personalise", lambda payload, rows, ctx: always(tiny_plan, 1).expand(3, -1)
    )
    facts = simulator.evaluate(0, IDS, {"w": always(tiny_plan, 0)[None]}, {}, None)
    assert facts["sent"].tolist() == [holds(tiny_plan, client, 0) for client in IDS]
    assert facts["personal"].tolist() == [holds(tiny_plan, client, 1) for client in IDS]


def test_clients_that_never_train_are_scored_after_one_epoch_too(simulator: Simulator, tiny_plan: Plan) -> None:
    payload = {"w": always(tiny_plan, 0)[None]}
    assert "adapted" not in simulator.evaluate(0, IDS, payload, {}, None)
    simulator.unseen = frozenset({*IDS, 0})
    facts = simulator.evaluate(0, IDS, payload, {}, None)
    ctx = simulator._context(0, IDS, "adapt")
    _, correct = simulator._score(ctx, {"adapted": ctx.sgd(payload["w"], epochs=1)})
    assert facts["adapted"].tolist() == correct["adapted"].tolist() != facts["sent"].tolist()
    simulator.unseen = frozenset({0})
    assert np.isnan(simulator.evaluate(0, IDS, payload, {}, None)["adapted"]).all()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_do_not_depend_on_the_batch_size(
    tiny_config: Callable[..., Config], tiny_plan: Plan, batch_size: int
) -> None:
    workload = replace(tiny_plan.workload, config=tiny_config(f"eval.batch_size={batch_size}"))
    facts = Simulator(workload).evaluate(0, IDS, {"w": always(tiny_plan, 2)[None]}, {}, None)
    assert facts["sent"].tolist() == [holds(tiny_plan, client, 2) for client in IDS]
    assert facts["total"].tolist() == [len(tiny_plan.workload.data.test[client]) for client in IDS]


def test_equal_models_are_run_once(simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Tensor] = []
    original = simulator.model.logits

    def counted(rows: Tensor, images: Tensor) -> Tensor:
        runs.append(rows)
        return original(rows, images)

    monkeypatch.setattr(simulator.model, "logits", counted)
    row = always(tiny_plan, 0)
    simulator.evaluate(0, IDS, {"w": row[None]}, {}, row)  # sent = personal = global; at most 7 samples: one batch
    assert len(runs) == 1
    simulator.evaluate(0, IDS, {"w": row[None]}, {}, always(tiny_plan, 1))
    assert len(runs) == 3


def test_models_are_compared_once_a_block(
    tiny_config: Callable[..., Config], tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bool] = []
    original = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(original(a, b)) or compared[-1])
    row = always(tiny_plan, 0)
    for batch_size in (1, 32):
        workload = replace(tiny_plan.workload, config=tiny_config(f"eval.batch_size={batch_size}"))
        Simulator(workload).evaluate(0, IDS, {"w": row[None]}, {}, row.clone())
    assert compared == [True, True]


@pytest.mark.parametrize("shape", [(2, 712), (3, 5), (712,)])
def test_models_that_cannot_be_run_are_the_algorithms_mistake(
    simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(simulator.algorithm, "personalise", lambda payload, rows, ctx: torch.zeros(shape))
    with pytest.raises(ClientError, match="evaluate failed in round 1"):
        simulator.evaluate(0, IDS, {"w": tiny_plan.params[None]}, {}, None)


# Exceptions ------------------------------------------------------------------------------------------------------


def their_own_mistake(*_: Any) -> Any:
    raise ZeroDivisionError("the loss has no samples")


@pytest.mark.parametrize("method", ["local_update", "sent", "personalise"])
def test_an_exception_of_the_users_keeps_its_traceback(
    simulator: Simulator, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(simulator.algorithm, method, their_own_mistake)
    payload = {"w": tiny_plan.params[None]}
    with pytest.raises(ClientError) as caught:
        if method == "local_update":
            simulator.train(4, IDS, payload, {})
        else:
            simulator.evaluate(4, IDS, payload, {}, None)
    error = caught.value
    assert (error.stage, error.round) == ("train" if method == "local_update" else "evaluate", 4)
    assert error.clients == [1, 3, 6]
    assert "in their_own_mistake" in error.original
    assert error.original.endswith("ZeroDivisionError: the loss has no samples\n")


def test_guarded_lets_results_and_fedsims_own_errors_through() -> None:
    def refuse() -> None:
        raise ConfigError(["a: wrong"])

    assert guarded("train", 0, IDS, lambda: 3) == 3
    with pytest.raises(ConfigError, match="a: wrong"):
        guarded("train", 0, IDS, refuse)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_guarded_does_not_swallow_an_interrupt(signal: type[BaseException]) -> None:
    def interrupted() -> None:
        raise signal

    with pytest.raises(signal):
        guarded("train", 0, IDS, interrupted)


# Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({}, 0),
        ({"w": torch.zeros(1, 10)}, 3 * 40),  # the same to each of three clients
        ({"w": torch.zeros(3, 10)}, 3 * 40),  # to each its own
        ({"w": torch.zeros(1, 10), "c": torch.zeros(3, 2, 5), "n": torch.zeros(3, dtype=torch.int64)}, 120 + 120 + 24),
        ({"w": torch.zeros(1, 10, dtype=torch.float16)}, 3 * 20),
    ],
)
def test_payload_bytes(payload: dict[str, Tensor], expected: int) -> None:
    assert payload_bytes(payload, 3) == expected
