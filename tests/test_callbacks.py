"""fedsim as a library: a run, a user's own code in it, what it gives."""

import json

import numpy as np
import pytest

import fedsim
from fedsim.errors import ClientError


class Diary(fedsim.Callback):
    def __init__(self):
        self.pages = []

    def on_run_start(self, plan, rounds_done):
        self.pages.append(("start", plan.cohort, rounds_done))

    def on_round_end(self, record, accuracies):
        self.pages.append((record["round"], None if accuracies is None else accuracies.mean()))

    def on_run_end(self, summary):
        self.pages.append(("end", summary["status"]))


def test_a_callback_sees_the_start_every_round_and_the_end(tiny_config, tmp_path):
    diary = Diary()
    result = fedsim.run(tiny_config("eval.every=2", f"output={tmp_path / 'run'}"), callbacks=[diary])
    mean = result.summary["accuracy"]["mean"]
    assert diary.pages == [("start", 4, 0), (1, None), (2, mean), ("end", "finished")]
    # Gone on with, there is nothing left to do.
    again = Diary()
    fedsim.resume(result.folder, callbacks=[again])
    assert again.pages == [("start", 4, 2), ("end", "finished")]


@pytest.mark.parametrize(("method", "round"), [("on_run_start", 1), ("on_round_end", 2), ("on_run_end", 2)])
def test_a_failing_callback_stops_the_run_and_is_named(tiny_config, tmp_path, method, round):
    def fail(*values):
        if method != "on_round_end" or values[0]["round"] == 2:
            raise KeyError("mine")

    broken = fedsim.Callback()
    setattr(broken, method, fail)
    with pytest.raises(ClientError, match=f"Callback.{method} failed in round {round}") as caught:
        fedsim.run(tiny_config(f"output={tmp_path / 'run'}"), callbacks=[broken])
    assert "KeyError: 'mine'" in str(caught.value)
    status = json.loads((tmp_path / "run" / "summary.json").read_text())["status"]
    assert status == ("finished" if method == "on_run_end" else "failed")


def test_a_result_as_frames(tiny_config, tmp_path):
    result = fedsim.run(tiny_config(f"output={tmp_path / 'run'}"))
    rounds, clients = result.rounds(), result.clients()
    assert rounds.index.tolist() == [1, 2] and rounds["updates"].tolist() == [4, 4]
    assert rounds["accuracy.mean"].iloc[-1] == result.summary["accuracy"]["mean"]
    assert clients.index.tolist() == list(range(8))
    assert np.isclose(clients["accuracy"].mean(), result.summary["accuracy"]["mean"], atol=1e-6)


def test_names_that_there_are_not():
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        fedsim.runn  # noqa: B018 – the access is what is tested
