"""Runs side by side, with numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from fedsim.comparison import Task, over_seeds, shown, signed, tasks, told_apart
from fedsim.results import read


def compared(folder: Path, **runs: tuple[list[float], str]) -> list[Task]:
    """Tasks of runs ``name=(accuracies, settings)``."""
    return tasks([read(write_run(folder / name, values, *text.split())) for name, (values, text) in runs.items()])


@pytest.fixture
def two_rows(tmp_path: Path) -> Task:
    """Ditto, means 0.6 and 0.8, and FedAvg, 0.5, 0.6 and 0.4: the seeds 0, 1 and 1, 0, 2."""
    (task,) = compared(
        tmp_path,
        f1=([0.9, 0.5, 0.5, 0.5], "algorithm=fedavg seed=1"),
        d0=([0.6, 0.4, 0.8, 0.6], "algorithm=ditto seed=0"),
        f0=([0.5, 0.4, 0.7, 0.4], "algorithm=fedavg seed=0"),
        d1=([0.8, 0.8, 0.8, 0.8], "algorithm=ditto seed=1"),
        f2=([0.4, 0.4, 0.4, 0.4], "algorithm=fedavg seed=2"),
    )
    return task


def test_rows_are_runs_that_differ_in_the_seed_the_best_first(two_rows):
    found = [(row.label, [run.seed for run in row.runs]) for row in two_rows.rows]
    assert found == [("ditto", [0, 1]), ("fedavg", [0, 1, 2])]
    assert two_rows.rows[0].mean("accuracy.mean") == pytest.approx(0.7)
    assert two_rows.rows[1].mean("accuracy.mean") == pytest.approx(0.5)
    assert two_rows.rows[1].mean("accuracy.global") is None


def test_a_difference_is_paired_over_the_seeds_in_common(two_rows):
    # 0.5 - 0.6 and 0.6 - 0.8: mean -0.15; deviation 0.1 / sqrt(2), over sqrt(2).
    difference = two_rows.difference(two_rows.rows[1])
    assert difference.by_seed == pytest.approx({0: -0.1, 1: -0.2})
    assert difference.mean == pytest.approx(-0.15)
    assert difference.standard_error == pytest.approx(0.05)
    # Seed 0: three clients worse, one equal; seed 1: one better, three worse.
    assert (difference.better, difference.worse, difference.clients) == (1, 6, 8)


def test_one_seed_has_no_standard_error_and_none_no_difference(tmp_path):
    (task,) = compared(
        tmp_path,
        a=([0.5] * 4, "algorithm=ditto seed=0"),
        b=([0.25] * 4, "algorithm=fedavg seed=0"),
        c=([0.125] * 4, "algorithm=local seed=1"),
    )
    best, second, third = task.rows
    assert (task.difference(second).mean, task.difference(second).standard_error) == (-0.25, None)
    assert task.difference(third) is None
    assert task.difference(best).mean == 0


def test_other_data_and_other_evaluations_are_other_tasks(tmp_path):
    found = compared(
        tmp_path,
        a=([0.5] * 4, "seed=0"),
        b=([0.5] * 4, "seed=0 env.samples_per_client=12"),
        c=([0.5] * 4, "seed=0 eval.validation=0.25"),
        d=([0.5] * 4, "seed=1"),
    )
    assert [(task.label, [run.seed for row in task.rows for run in row.runs]) for task in found] == [
        ("shapes", [0, 1]), ("shapes samples_per_client=12", [0]), ("shapes validation=0.25", [0]),
    ]  # fmt: skip


def test_neither_evaluations_nor_checkpoints_make_another_row_but_a_second_run_of_a_seed_does(tmp_path):
    (task,) = compared(
        tmp_path,
        a=([0.5] * 4, "seed=0"),
        b=([0.5] * 4, "seed=1 eval.every=2 checkpoint.every=2"),
        c=([0.25] * 4, "seed=1"),
    )
    assert [(row.label, [run.seed for run in row.runs]) for row in task.rows] == [
        ("fedavg (a)", [0, 1]),
        ("fedavg (c)", [1]),
    ]


def test_labels_tell_what_most_do_not_share():
    def settings(**values: object) -> dict[str, object]:
        return {f"algorithm.{key}": value for key, value in values.items()}

    assert told_apart([("fedprox", settings(mu=0.1)), ("fedavg", settings(a=1))]) == ["fedprox", "fedavg"]
    # Of two, neither is the usual one; of three, two may be.
    assert told_apart([("x", settings(mu=0.1)), ("x", settings(mu=1))]) == ["x mu=0.1", "x mu=1"]
    three = [
        ("my:X", settings(mu=0.1, a=[1, 2])),
        ("my:X", settings(mu=0.1, a=[1])),
        ("my:X", settings(mu=1, a=[1, 2])),
    ]
    assert told_apart(three) == ["X", "X a=[1]", "X mu=1"]
    both = [("x", {"local.lr": 1, "algorithm.lr": 1}), ("x", {"local.lr": 2, "algorithm.lr": 2})]
    assert told_apart(both) == ["x local.lr=1 algorithm.lr=1", "x local.lr=2 algorithm.lr=2"]


def test_settings_that_differ_have_a_value_a_row(two_rows):
    found = two_rows.differing()
    assert found["algorithm.name"] == ["ditto", "fedavg"]
    assert found["algorithm.lam"][1] is None and "seed" not in found and "local.lr" not in found


def test_a_curve_has_the_rounds_that_all_seeds_evaluated(two_rows, tmp_path):
    points = two_rows.best.points()
    assert [[point.round for point in seeds] for seeds in points] == [[1, 1], [2, 2]]
    assert [point.accuracy for point in points[1]] == pytest.approx([0.6, 0.8])
    folder = two_rows.best.runs[0].folder
    lines = (folder / "metrics.jsonl").read_text().replace('"accuracy": {"mean": 0.3}, ', "")
    (folder / "metrics.jsonl").write_text(lines)
    (task,) = tasks([read(folder), two_rows.best.runs[1]])
    assert [[point.round for point in seeds] for seeds in task.best.points()] == [[2, 2]]


def test_the_distribution_is_that_of_all_seeds_clients(two_rows):
    values, shares = two_rows.best.distribution()
    assert values.tolist() == [0.4, 0.6, 0.8]
    assert shares.tolist() == [1 / 8, 3 / 8, 1]


def test_a_long_distribution_keeps_both_its_ends(tmp_path):
    (task,) = compared(tmp_path, a=([0.5] * 4, "seed=0"))
    task.best.runs[0].clients["accuracy"] = np.arange(10_000) / 10_000
    values, shares = task.best.distribution()
    assert len(values) == len(shares) == 512
    assert (values[0], values[-1], shares[0], shares[-1]) == (0, 0.9999, 1 / 10_000, 1)


def test_the_worst_clients_are_the_best_rows(two_rows):
    assert two_rows.shared_seed == 0
    assert two_rows.worst_clients(3) == [1, 0, 3]


def test_measured_shares_are_means_over_seeds(tmp_path):
    first, second = ({"attention_own_0": 0.25, "mix_0": 1.0}, {"attention_own_0": 0.5, "mix_0": 1.0})
    runs = [
        read(write_run(tmp_path / "0", [0.5] * 4, "seed=0", measured=(first, second))),
        read(write_run(tmp_path / "1", [0.5] * 4, "seed=1", measured=({}, first))),
    ]
    (task,) = tasks(runs)
    assert task.best.measured("attention_") == ([2], {"attention_own_0": [0.375]})
    assert task.best.measured("unheard_") == ([], {})


def test_means_and_numbers_for_a_person():
    assert over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert over_seeds([1.0]) == (1.0, None)
    assert over_seeds([1.0, None]) == (None, None)
    assert [shown(*pair) for pair in (("accuracy.mean", 0.5), ("bytes.up", 1536), ("seconds.total", 1.25))] == [
        "0.500", "1.5 KiB", "1.2",
    ]  # fmt: skip
    assert (shown("accuracy.global", None), signed(-0.0125, None), signed(0.5, 0.25)) == (
        "–",
        "−0.013",
        "+0.500 ± 0.250",
    )
