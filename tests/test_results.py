"""Run folders: which there are, what they tell, and what is wrong with those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import COUNTS, write_run

from fedsim.errors import OutputError
from fedsim.results import Point, class_counts, find, flat, read


def test_runs_are_found_where_they_are_named_and_in_a_folder_of_theirs_once(tmp_path):
    one, two = (write_run(tmp_path / "sweep" / name, [0.5] * 4) for name in ("one", "two"))
    log = tmp_path / "sweep" / "one.log"
    log.touch()
    assert find([two, log, tmp_path / "sweep", tmp_path / "nowhere"]) == [two, one, tmp_path / "nowhere"]


def test_a_run_is_read(tmp_path):
    run = read(write_run(tmp_path / "run", [0.5, 0.25, 0.75, 0.5], "seed=3", measured=({}, {"mix_0": 0.5})))
    assert (run.seed, run.settings["seed"], run.settings["algorithm.name"]) == (3, 3, "fedavg")
    assert "output" not in run.settings and not any(key.startswith("about") for key in run.settings)
    # Half of 1024 and of 2048 bytes a round; 1 s of training and half a second of the server's.
    assert run.points == [Point(1, 0.25, 1536, 1.5), Point(2, 0.5, 3072, 3.0)]
    assert run.measured == {1: {}, 2: {"mix_0": 0.5}}
    assert run.clients["accuracy"].tolist() == [0.5, 0.25, 0.75, 0.5]
    assert run.summary["accuracy.min"] == 0.25


def test_settings_newer_than_the_run_stand_at_their_defaults(tmp_path):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    before = read(folder).settings
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("  clip: 0.0\n", ""))
    assert "clip: " not in file.read_text() and read(folder).settings == before
    file.write_text(file.read_text().replace("nonfinite: raise\n", ""))
    assert "nonfinite" not in file.read_text() and read(folder).settings == before


def test_settings_of_a_users_own_algorithm_are_read_without_it(tmp_path):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("name: fedavg", "name: nowhere:Mine"))
    assert read(folder).settings["algorithm.name"] == "nowhere:Mine"


def test_class_counts_by_hand(tmp_path):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    assert np.array_equal(class_counts(folder), COUNTS)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off"])
def test_a_partition_that_does_not_tell_is_no_error(tmp_path, content):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    (folder / "partition.npz").unlink()
    if content is not None:
        (folder / "partition.npz").write_bytes(content)
    assert class_counts(folder) is None


def test_a_partition_without_labels_does_not_tell(tmp_path):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    with np.load(folder / "partition.npz") as file:
        kept = {name: file[name] for name in file.files if name != "labels"}
    np.savez(folder / "partition.npz", **kept)
    assert class_counts(folder) is None


def without(*keys: str) -> str:
    summary = {"status": "finished", "seed": 0, "rounds": 2, "bytes": {"up": 1, "down": 1}, "seconds": {"total": 1.0},
               "accuracy": {"mean": 0.5, "p10": 0.5, "min": 0.5}}  # fmt: skip
    return json.dumps({key: value for key, value in summary.items() if key not in keys})


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("summary.json", None, r"run: not a finished run \(no summary.json that can be read\)"),
        ("summary.json", "[]", "run: the run ended before its first evaluation"),
        ("summary.json", "{", "run: not a finished run"),
        (
            "summary.json",
            '{"status": "interrupted", "accuracy": {"mean": 1}}',
            r"not a finished run \(interrupted\)",
        ),
        ("summary.json", without("seed"), r"summary.json: damaged \(seed is None\)"),
        ("summary.json", without("bytes"), r"summary.json: damaged \(bytes.up is None\)"),
        ("config.yaml", "a: [", r"config.yaml: damaged \("),
        ("config.yaml", "just a text", r"config.yaml: damaged \("),
        ("config.yaml", "seed: 0", r"config.yaml: damaged \(lacks 'algorithm'\)"),
        ("config.yaml", "about: {2001-01-01: x}", r"config.yaml: damaged \(keys must be str"),
        ("metrics.jsonl", '{"round": 1, "by', r"metrics.jsonl: damaged \("),
        ("metrics.jsonl", "", r"metrics.jsonl: damaged \(no round was evaluated\)"),
        ("metrics.jsonl", None, r"metrics.jsonl: damaged \("),
        ("clients.csv", "client,samples\n0,3\n", r"clients.csv: damaged \(lacks 'test_samples'\)"),
        ("clients.csv", "\x00\xff", r"clients.csv: damaged \("),
        ("clients.csv", "", r"clients.csv: damaged \(no client\)"),
        (
            "clients.csv",
            "client,samples,test_samples,rounds,accuracy_sent,accuracy\n0,3,10,0,0.1,0.5\n",
            r"clients.csv: damaged \(its lines are not those of 4 clients\)",
        ),
        ("summary.json", without("algorithm"), r"summary.json: damaged \(algorithm is None\)"),
        ("config.yaml", "about: {versions: [1]}", r"config.yaml: damaged \(about.versions is \[1\]\)"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, file, content, told):
    folder = write_run(tmp_path / "run", [0.5] * 4)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(OutputError, match=told) as refusal:
        read(folder)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(OutputError, match="not a finished run"):
        read(Path(tmp_path, "nowhere"))


def test_a_tree_is_flattened():
    assert flat({"a": 1, "b": {"c": {"d": 2}, "e": [3]}}) == {"a": 1, "b.c.d": 2, "b.e": [3]}
