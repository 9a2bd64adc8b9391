"""Sums and distributions, by hand, whatever order the blocks came in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsim.metrics import Evaluation, by_client, client_rows, distribution, train_loss

Facts = dict[str, Any]


def facts(ids: list[int], **values: Any) -> Facts:
    return {"ids": np.array(ids), **{key: np.array(value, dtype=np.float32) for key, value in values.items()}}


TRAINED = [facts([5, 1], loss=[2.0, 4.0], samples=[1, 3]), facts([3], loss=[1.0], samples=[6])]
EVALUATED = [
    facts([2, 0], total=[4, 10], sent=[1, 5], personal=[4, 6], **{"global": [2, 0]}),
    facts([1], total=[2], sent=[0], personal=[1], **{"global": [2]}),
]


def test_by_client_orders_by_id() -> None:
    ids, values = by_client(TRAINED, "loss")
    assert ids.tolist() == [1, 3, 5] and values.tolist() == [4.0, 1.0, 2.0]


def test_train_loss_is_weighted_by_samples() -> None:
    assert train_loss(TRAINED) == (1 * 2.0 + 3 * 4.0 + 6 * 1.0) / 10
    assert train_loss(TRAINED[::-1]) == train_loss(TRAINED)


def test_train_loss_is_of_those_who_were_not_skipped() -> None:
    assert train_loss(TRAINED, [1]) == (6 * 1.0 + 1 * 2.0) / 7
    assert math.isnan(train_loss(TRAINED, [1, 3, 5]))


def test_train_loss_does_not_depend_on_the_order_of_blocks_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    blocks = [facts([i], loss=[rng.random()], samples=[rng.integers(1, 9)]) for i in range(50)]
    shuffled = [blocks[i] for i in rng.permutation(50)]
    assert train_loss(shuffled) == train_loss(blocks)


def test_distribution_by_hand() -> None:
    # Accuracies 1/4, 1/2, 3/4, 1; percentiles lie at places 0.3, 1.5 and 2.7 of 0 … 3.
    found = distribution(np.array([3, 1, 4, 2]), np.array([4, 4, 4, 4]))
    assert found == pytest.approx(
        {
            "mean": 0.625,
            "weighted": 0.625,
            "std": math.sqrt(0.078125),
            "p10": 0.325,
            "p50": 0.625,
            "p90": 0.925,
            "min": 0.25,
            "max": 1.0,
        }
    )


def test_weighted_is_over_samples_and_mean_over_clients() -> None:
    found = distribution(np.array([9, 0]), np.array([9, 1]))
    assert (found["weighted"], found["mean"]) == (0.9, 0.5)


def test_evaluation_by_hand() -> None:
    evaluation = Evaluation(EVALUATED)
    assert evaluation.ids.tolist() == [0, 1, 2] and evaluation.total.tolist() == [10, 2, 4]
    assert evaluation.accuracy.tolist() == [0.6, 0.5, 1.0] and evaluation.sent.tolist() == [0.5, 0.0, 0.25]
    summary = evaluation.summary()
    assert summary["mean"] == pytest.approx(0.7) and summary["weighted"] == pytest.approx(11 / 16)
    assert summary["sent"] == pytest.approx(0.25) and summary["global"] == pytest.approx(0.5)


def test_without_an_average_global_is_none() -> None:
    blocks = [{key: value for key, value in block.items() if key != "global"} for block in EVALUATED]
    assert Evaluation(blocks).summary()["global"] is None


def test_among_some_clients() -> None:
    evaluation = Evaluation(EVALUATED)
    found = evaluation.among(np.array([True, False, True]))
    assert found == {"clients": 2, "mean": 0.8, "sent": 0.375, "adapted": None}
    nobody = evaluation.among(np.zeros(3, dtype=bool))
    assert nobody == {"clients": 0, "mean": None, "sent": None, "adapted": None}


def test_what_clients_that_never_trained_make_of_one_epoch_is_of_their_blocks_alone() -> None:
    first = {
        "ids": np.array([2, 0]),
        "total": np.array([4, 10]),
        "personal": np.array([1, 1]),
        "sent": np.array([1, 1]),
    }
    other = {"ids": np.array([1]), "total": np.array([2]), "personal": np.array([1]), "sent": np.array([0])}
    unknown = np.array([math.nan, math.nan])
    evaluation = Evaluation([first | {"adapted": unknown}, other | {"adapted": np.array([2])}])
    assert evaluation.among(np.array([False, True, False]))["adapted"] == 1.0
    assert evaluation.among(np.array([True, True, False]))["adapted"] is None


def test_client_rows() -> None:
    rows = client_rows(np.array([20, 30, 40]), np.array([2, 0, 1]), Evaluation(EVALUATED))
    assert rows[2] == {
        "client": 2,
        "samples": 40,
        "test_samples": 4,
        "rounds": 1,
        "accuracy_sent": 0.25,
        "accuracy": 1.0,
        "quarantined": 0,
    }
    assert [row["client"] for row in rows] == [0, 1, 2]


def test_client_rows_before_any_evaluation() -> None:
    (row,) = client_rows(np.array([20]), np.array([0]), None)
    assert (row["samples"], row["test_samples"]) == (20, 0)
    assert math.isnan(float(row["accuracy"])) and math.isnan(float(row["accuracy_sent"]))


def test_a_client_that_was_quarantined_has_no_accuracy() -> None:
    evaluation = Evaluation([{key: value[:2] for key, value in EVALUATED[0].items()}])
    rows = client_rows(np.array([20, 30, 40]), np.array([2, 0, 1]), evaluation, quarantined=[1])
    assert [row["quarantined"] for row in rows] == [0, 1, 0]
    missing = rows[1]
    assert math.isnan(missing["accuracy"]) and missing["test_samples"] == 0
