"""Where metrics go."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import TINY
from rich.console import Console

from fedsim.__main__ import main
from fedsim.config import load
from fedsim.env import FederatedData, Ragged
from fedsim.errors import ConfigError
from fedsim.plan import Plan
from fedsim.simulation import resume, run
from fedsim.tracking import (
    ConsoleProgress,
    JsonLines,
    MLflow,
    TensorBoard,
    WeightsAndBiases,
    closing_table,
    duration,
    flat,
    size,
    start,
    tensorboard,
)
from fedsim.tracking.tensorboard import partition_picture


def record(round: int, total: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"round": round, "loss": 1.5, "seconds": {"total": total}, "updates_per_second": 4.25} | more


# metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_a_line_a_round(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.on_round({"round": 1, "loss": 0.5}, None)
    assert path.read_text() == '{"round": 1, "loss": 0.5}\n'  # at once: a run may be killed
    lines.on_round({"round": 2}, np.ones(3))
    assert lines.bytes_written == len(path.read_bytes())
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"round": 1, "loss": 0.5}, {"round": 2}]


def test_lines_past_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept, lost = b'{"round": 1}\n', b'{"round": 2}\n{"rou'
    path.write_bytes(kept + lost)
    lines = JsonLines(path, keep_bytes=len(kept))
    lines.on_round({"round": 2, "again": True}, None)
    lines.close()
    assert path.read_bytes() == kept + b'{"round": 2, "again": true}\n'


def test_a_run_that_starts_over_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 1}\n')
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_a_file_that_is_shorter_than_the_checkpoint_says_is_not_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n")
    JsonLines(path, keep_bytes=10).close()
    assert path.read_bytes() == b"{}\n"


def test_json_has_no_nan(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.on_round({"round": 1, "loss": math.nan, "accuracy": {"mean": math.inf, "list": [1.0, -math.inf]}}, None)
    lines.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"round": 1, "loss": null, "accuracy": {"mean": null, "list": [1.0, null]}}\n'


# Scalars ---------------------------------------------------------------------------------------------------------


def test_flat_names_numbers_by_their_path() -> None:
    nested = {"round": 3, "loss": 1, "bytes": {"up": 8, "x": {"y": 0.5}}, "ok": True, "none": None, "text": "1"}
    assert list(flat(nested)) == [("loss", 1.0), ("bytes/up", 8.0), ("bytes/x/y", 0.5)]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def steps(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_tensorboard_has_the_scalars_and_the_histogram(tmp_path: Path, tiny_plan: Plan) -> None:
    board = TensorBoard(tmp_path, tiny_plan.workload.config, tiny_plan.workload.data)
    board.on_round(record(1), None)
    board.on_round(record(2, accuracy={"mean": 0.75}), np.array([0.5, 1.0]))
    board.close()
    assert steps(tmp_path) == [(1, 1.5), (2, 1.5)]
    assert steps(tmp_path, "seconds/total") == [(1, 2.0), (2, 2.0)]
    assert steps(tmp_path, "accuracy/mean") == [(2, 0.75)]
    (histogram,) = events(tmp_path).Histograms("clients/accuracy")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (2, 2.0, 1.5)


def test_tensorboard_has_the_settings_and_who_holds_what(tmp_path: Path, tiny_plan: Plan) -> None:
    from PIL import Image
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = tiny_plan.workload.data
    TensorBoard(tmp_path, tiny_plan.workload.config, data).close()
    found = events(tmp_path)
    told = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(told).session_start_info.hparams
    assert (settings["algorithm.name"].string_value, settings["local.lr"].number_value) == ("fedavg", 0.1)
    told = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    compared = {info.name.tag for info in HParamsPluginData.FromString(told).experiment.metric_infos}
    assert compared == {"accuracy/mean", "accuracy/p10", "loss"}  # tags of the run's own curves
    (sizes,) = found.Histograms("clients/training_images")
    assert (sizes.step, sizes.histogram_value.num, sizes.histogram_value.sum) == (0, 8, data.train.sizes.sum())
    (picture,) = found.Images("clients/partition")
    drawn = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert picture.step == 0 and (drawn == partition_picture(data)).all()


def test_tensorboard_is_on_disk_before_a_checkpoint_is(
    tmp_path: Path, tiny_config: Any, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, list[str]]] = []
    monkeypatch.setattr("fedsim.tracking.tensorboard.flush", lambda path: flushed[-1][1].append(path.name))
    board = TensorBoard(tmp_path, tiny_config("rounds=5", "checkpoint.every=2"), tiny_plan.workload.data)
    for round in range(1, 6):
        flushed.append((round, []))
        board.on_round(record(round), None)
    board.close()
    (file,) = tmp_path.iterdir()
    both = [file.name, tmp_path.name]
    assert flushed == [(1, []), (2, both), (3, []), (4, both), (5, both)]


@pytest.mark.parametrize(("rounds_done", "kept"), [(1, [(1, 1.5), (2, 9.0)]), (0, [(1, 9.0), (2, 9.0)])])
def test_tensorboard_hides_what_a_killed_run_wrote_past_its_checkpoint(
    rounds_done: int, kept: list[tuple[int, float]], tmp_path: Path, tiny_plan: Plan
) -> None:
    run = tiny_plan.workload.config, tiny_plan.workload.data
    killed = TensorBoard(tmp_path, *run)
    for round in (1, 2, 3):
        killed.on_round(record(round), None)
    killed.close()
    resumed = TensorBoard(tmp_path, *run, rounds_done)
    for round in range(rounds_done + 1, 3):
        resumed.on_round(record(round, loss=9.0), None)
    resumed.close()
    assert steps(tmp_path) == kept
    assert len(events(tmp_path).Images("clients/partition")) == 1
    assert len(events(tmp_path).Histograms("clients/training_images")) == 1


def split(labels: list[int], classes: int, *clients: list[int]) -> FederatedData:
    train = Ragged.of([np.array(images) for images in clients])
    return FederatedData(Path("-"), np.array(labels), tuple(map(str, range(classes))), train, train)


def test_the_picture_of_the_partition() -> None:
    # Client 0 has four images of class 0, client 1 one of class 1; the square roots are 1 and 1/2.
    picture = partition_picture(split([0, 0, 0, 0, 1], 2, [0, 1, 2, 3], [4]))
    assert picture.shape == (512, 512, 3) and picture.dtype == np.uint8
    most, half, none = [42, 120, 214], [148, 188, 234], [255, 255, 255]  # 255 - 213 / 2 = 148.5, 187.5, 234.5
    assert picture[::256, ::256].tolist() == [[none, half], [most, none]]  # class 0 is the lowest
    assert (picture == picture[::256, ::256].repeat(256, 0).repeat(256, 1)).all()


def test_neighbours_share_a_column_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "MOST_PIXELS", 2)
    # Clients 0 and 1 have two images each on average, client 2 has one of the other class.
    picture = partition_picture(split([0, 0, 0, 0, 1], 2, [0, 1, 2], [3], [4]))
    most, other, none = [42, 120, 214], [104, 160, 226], [255, 255, 255]  # 255 - 213 * sqrt(1 / 2) = 104.4, …
    assert picture.tolist() == [[none, other], [most, none]]


# Services --------------------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """What of W&B's interface is used; it keeps what it is sent, run by run, and goes on after its last step."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.runs: dict[str, FakeWandbRun] = {}

    def init(self, *, id: str, mode: str | None, resume: str | None, **about: Any) -> FakeWandbRun:
        self.inits.append({"id": id, "mode": mode, "resume": resume, **about})
        if resume != "allow" or id not in self.runs:
            self.runs[id] = FakeWandbRun()
        return self.runs[id]

    def Histogram(self, values: np.ndarray) -> tuple[str, list[float]]:
        return "histogram", values.tolist()


class FakeWandbRun:
    def __init__(self) -> None:
        self.step = 0
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_codes: list[int] = []

    def log(self, data: dict[str, Any], step: int, commit: bool) -> None:
        assert commit and step >= self.step
        self.logged.append((step, data))
        self.step = step + 1

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class FakeMlflow(types.ModuleType):
    """What of MLflow's interface is used, none of its global state; it takes every point that it is sent.

    Attributes:
        calls: what changed something, as ``(method, arguments)``; of a batch, ``params`` or ``metrics``.
        experiments: ids by name.
    """

    entities = types.SimpleNamespace(Metric=Metric, Param=Param)
    MlflowException = type("MlflowException", (Exception,), {})

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []
        self.metrics: dict[str, float] = {}
        self.experiments: dict[str, str] = {}
        registry = types.SimpleNamespace(resolve_tags=lambda: {"mlflow.user": "me"})
        self.tracking = types.SimpleNamespace(context=types.SimpleNamespace(registry=registry))

    def MlflowClient(self, tracking_uri: str) -> FakeMlflowClient:
        self.calls.append(("MlflowClient", tracking_uri))
        return FakeMlflowClient(self)


class FakeMlflowClient:
    def __init__(self, mlflow: FakeMlflow) -> None:
        self._mlflow = mlflow

    def get_experiment_by_name(self, name: str) -> Any:
        found = self._mlflow.experiments.get(name)
        return found and types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        self._mlflow.calls.append(("create_experiment", name))
        self._mlflow.experiments[name] = f"e{len(self._mlflow.experiments)}"
        return self._mlflow.experiments[name]

    def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> Any:
        self._mlflow.calls.append(("create_run", experiment_id, tags, run_name))
        return self.get_run("r7")

    def get_run(self, run_id: str) -> Any:
        info, data = types.SimpleNamespace(run_id=run_id), types.SimpleNamespace(metrics=dict(self._mlflow.metrics))
        return types.SimpleNamespace(info=info, data=data)

    def update_run(self, run_id: str, status: str) -> None:
        self._mlflow.calls.append(("update_run", run_id, status))

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        if params:
            self._mlflow.calls.append(("params", run_id, dict(params)))
        if metrics:
            self.take(run_id, {metric.key: metric.value for metric in metrics}, {metric.step for metric in metrics})

    def take(self, run_id: str, values: dict[str, float], steps: set[int]) -> None:
        (step,) = steps
        self._mlflow.calls.append(("metrics", run_id, values, step))
        self._mlflow.metrics |= values

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self._mlflow.calls.append(("log_artifact", run_id, local_path))

    def set_terminated(self, run_id: str, status: str) -> None:
        self._mlflow.calls.append(("set_terminated", run_id, status))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def write_metrics(folder: Path, rounds: int) -> None:
    lines = [json.dumps(record(round)) + "\n" for round in range(1, rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))


SENT = {"loss": 1.5, "seconds/total": 2.0, "updates_per_second": 4.25}  # of `record`


def test_wandb_is_told_what_runs_and_every_round(tmp_path: Path, tiny_config: Any, wandb: FakeWandb) -> None:
    write_metrics(tmp_path, 0)
    tracker = WeightsAndBiases(tiny_config("tracking.wandb=true", "tracking.project=mine"), tmp_path)
    tracker.on_round(record(1, loss=math.nan), None)
    tracker.on_round(record(2, accuracy={"mean": 0.75}), np.array([0.5, 1.0]))
    tracker.close()
    (about,) = wandb.inits
    config = about.pop("config")
    assert about == {
        "project": "mine", "name": tmp_path.name, "id": (tmp_path / "wandb.id").read_text(), "dir": str(tmp_path),
        "mode": None, "resume": "allow",
    }  # fmt: skip
    assert (config["algorithm"], config["local"]["lr"]) == ({"name": "fedavg"}, 0.1)
    assert not {"output", "tracking"} & set(config)
    (run,) = wandb.runs.values()
    assert run.logged == [
        (1, {name: value for name, value in SENT.items() if name != "loss"}),
        (2, {**SENT, "accuracy/mean": 0.75, "clients/accuracy": ("histogram", [0.5, 1.0])}),
    ]
    assert run.exit_codes == [0]  # two rounds are all


@pytest.mark.parametrize("done", [1, 3])
def test_wandb_goes_on_without_a_round_twice_or_left_out(
    done: int, tmp_path: Path, tiny_config: Any, wandb: FakeWandb
) -> None:
    config = tiny_config("tracking.wandb=true", "rounds=4")
    write_metrics(tmp_path, 0)
    killed = WeightsAndBiases(config, tmp_path)
    for round in (1, 2):
        killed.on_round(record(round), None)
    killed.close()
    write_metrics(tmp_path, done)  # the checkpoint stands before what W&B has, or behind it
    resumed = WeightsAndBiases(config, tmp_path)
    for round in range(done + 1, 5):
        resumed.on_round(record(round), None)
    resumed.close()
    (run,) = wandb.runs.values()
    assert run.logged == [(round, SENT) for round in (1, 2, 3, 4)]
    assert run.exit_codes == [1, 0]


def test_offline_wandb_has_the_whole_run_in_its_newest_folder(
    tmp_path: Path, tiny_config: Any, wandb: FakeWandb
) -> None:
    config = tiny_config("tracking.wandb=true", "tracking.wandb_offline=true")
    write_metrics(tmp_path, 1)
    (tmp_path / "wandb.id").write_text("w1")
    tracker = WeightsAndBiases(config, tmp_path)
    tracker.on_round(record(2), None)
    assert [(about["id"], about["mode"], about["resume"]) for about in wandb.inits] == [("w1", "offline", None)]
    assert wandb.runs["w1"].logged == [(1, SENT), (2, SENT)]


def test_mlflow_is_told_what_runs_and_every_round(tmp_path: Path, tiny_config: Any, mlflow: FakeMlflow) -> None:
    write_metrics(tmp_path, 0)
    tracker = MLflow(tiny_config("tracking.mlflow=sqlite:///m.db"), tmp_path)
    tracker.on_round(record(1, loss=math.nan), None)
    tracker.on_round(record(2, accuracy={"mean": 0.75}), np.array([0.5, 1.0]))
    tracker.close()
    names = [call[0] for call in mlflow.calls]
    run_id, params = mlflow.calls.pop(names.index("params"))[1:]
    assert (run_id, params["algorithm.name"], params["local.lr"], params["adapter.targets"]) == (
        "r7",
        "fedavg",
        "0.1",
        "['qkv', 'mlp']",
    )
    assert not [name for name in params if name.startswith(("output", "tracking"))]
    assert mlflow.calls == [
        ("MlflowClient", "sqlite:///m.db"),
        ("create_experiment", "fedsim"),
        ("create_run", "e0", {"mlflow.user": "me"}, tmp_path.name),
        ("log_artifact", "r7", str(tmp_path / "config.yaml")),
        ("metrics", "r7", {"seconds/total": 2.0, "updates_per_second": 4.25, "round": 1.0}, 1),
        ("metrics", "r7", {**SENT, "accuracy/mean": 0.75, "round": 2.0}, 2),
        ("log_artifact", "r7", str(tmp_path / "metrics.jsonl")),
        ("set_terminated", "r7", "FINISHED"),
    ]
    assert (tmp_path / "mlflow.id").read_text() == "r7"


@pytest.mark.parametrize("there", ["before", "meanwhile"])
def test_an_experiment_that_another_run_has_made_is_used(
    there: str, tmp_path: Path, tiny_config: Any, mlflow: FakeMlflow, monkeypatch: Any
) -> None:
    def made_by_another(client: FakeMlflowClient, name: str) -> str:
        mlflow.experiments[name] = "theirs"
        raise mlflow.MlflowException("RESOURCE_ALREADY_EXISTS")

    monkeypatch.setattr(FakeMlflowClient, "create_experiment", made_by_another)
    if there == "before":
        mlflow.experiments["fedsim"] = "theirs"
    write_metrics(tmp_path, 0)
    MLflow(tiny_config("tracking.mlflow=sqlite:///m.db"), tmp_path)
    assert [call[1] for call in mlflow.calls if call[0] == "create_run"] == ["theirs"]


@pytest.mark.parametrize("done", [1, 3])
def test_mlflow_goes_on_without_a_round_twice_or_left_out(
    done: int, tmp_path: Path, tiny_config: Any, mlflow: FakeMlflow
) -> None:
    config = tiny_config("tracking.mlflow=sqlite:///m.db", "rounds=4")
    write_metrics(tmp_path, 0)
    killed = MLflow(config, tmp_path)
    for round in (1, 2):
        killed.on_round(record(round), None)
    killed.close()
    write_metrics(tmp_path, done)
    resumed = MLflow(config, tmp_path)
    for round in range(done + 1, 5):
        resumed.on_round(record(round), None)
    resumed.close()
    assert [call[0] for call in mlflow.calls].count("create_run") == 1
    assert [call[3] for call in mlflow.calls if call[0] == "metrics"] == [1, 2, 3, 4]
    assert [call[0] for call in mlflow.calls].count("params") == 1
    states = [call[1:] for call in mlflow.calls if call[0] in ("update_run", "set_terminated")]
    assert states == [("r7", "KILLED"), ("r7", "RUNNING"), ("r7", "FINISHED")]


# A run and its trackers ------------------------------------------------------------------------------------------


def test_a_stopped_run_resumes_in_all_of_them(
    tmp_path: Path, tiny_config: Any, stopped_after: Any, wandb: FakeWandb, mlflow: FakeMlflow
) -> None:
    settings = ["tracking.wandb=true", "tracking.mlflow=sqlite:///m.db", "rounds=3", f"output={tmp_path / 'run'}"]
    with stopped_after(2):
        run(tiny_config(*settings))
    resume(tmp_path / "run")
    assert [step for step, _ in steps(tmp_path / "run" / "tensorboard")] == [1, 2, 3]
    (sent,) = wandb.runs.values()
    assert [step for step, _ in sent.logged] == [1, 2, 3]
    assert [call[3] for call in mlflow.calls if call[0] == "metrics"] == [1, 2, 3]


def sent(folder: Path, name: str) -> dict[int, float]:
    """Of a run's ``metrics.jsonl``, a number of each round that has it."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["round"]: value for record in records for key, value in flat(record) if key == name}


def offline_records(file: Path) -> Iterator[Any]:
    """What offline W&B wrote for ``wandb sync``: a log as LevelDB has it, in blocks of 32 KiB, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # too few for a head: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_the_real_wandb_has_the_whole_of_a_resumed_run_in_its_newest_folder(
    tmp_path: Path, tiny_config: Any, stopped_after: Any, monkeypatch: Any
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # which would take a network
    folder = tmp_path / "run"
    asked = ["tracking.wandb=true", "tracking.wandb_offline=true", "tracking.project=mine"]
    with stopped_after(2):
        run(tiny_config(*asked, "rounds=3", "eval.every=3", f"output={folder}"))
    resume(folder)
    wandb.teardown()
    (file,) = (folder / "wandb" / "latest-run").glob("*.wandb")
    records = list(offline_records(file))
    (about,) = (record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert (about.run_id, about.project, about.display_name) == ((folder / "wandb.id").read_text(), "mine", "run")
    assert (config["algorithm"], config["local"]["lr"]) == ({"name": "fedavg"}, 0.1)
    assert not {"output", "tracking"} & set(config)
    history = {record.history.step.num: record.history for record in records if record.HasField("history")}
    told = {
        step: {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in own.item}
        for step, own in history.items()
    }
    assert {step: own["loss"] for step, own in told.items()} == sent(folder, "loss")
    assert {step: own["accuracy/mean"] for step, own in told.items() if "accuracy/mean" in own} == sent(
        folder, "accuracy/mean"
    )
    assert sum(told[3]["clients/accuracy/values"]) == 8
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_the_real_mlflow_has_every_round_of_a_resumed_run_once(
    tmp_path: Path, tiny_config: Any, stopped_after: Any, monkeypatch: Any
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    folder, store, theirs = tmp_path / "run", (tmp_path / "store").as_uri(), (tmp_path / "theirs").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    client = mlflow.MlflowClient(store)

    def found() -> Any:
        return client.get_run((folder / "mlflow.id").read_text())

    with mlflow.start_run() as active:  # a notebook's own
        with stopped_after(2):
            run(tiny_config(f"tracking.mlflow={store}", "tracking.project=mine", "rounds=3", f"output={folder}"))
        assert found().info.status == "KILLED"
        resume(folder)
        now = mlflow.get_tracking_uri(), mlflow.active_run().info.run_id, os.environ.get("MLFLOW_EXPERIMENT_ID")
        assert now == (theirs, active.info.run_id, None)
    assert not mlflow.get_run(active.info.run_id).data.metrics
    (one,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (one.info.run_id, one.info.run_name, one.info.status) == (found().info.run_id, "run", "FINISHED")
    assert (one.data.params["algorithm.name"], one.data.params["local.lr"]) == ("fedavg", "0.1")
    assert not [name for name in one.data.params if name.startswith(("output", "tracking"))]
    for name in ("loss", "accuracy/mean", "bytes/up"):
        points = client.get_metric_history(one.info.run_id, name)
        assert [(point.step, point.value) for point in points] == list(sent(folder, name).items())
    for file in ("config.yaml", "metrics.jsonl"):
        assert Path(client.download_artifacts(one.info.run_id, file)).read_bytes() == (folder / file).read_bytes()


def test_a_tracker_that_fails_is_left_out_with_one_line(
    tmp_path: Path, tiny_config: Any, wandb: FakeWandb, mlflow: FakeMlflow, monkeypatch: Any, caplog: Any
) -> None:
    def fail(*ignored: Any, **named: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(FakeMlflowClient, "take", fail)
    monkeypatch.setattr(TensorBoard, "close", fail)
    settings = ["tracking.wandb=true", "tracking.mlflow=sqlite:///m.db"]
    assert run(tiny_config(*settings, f"output={tmp_path / 'run'}")).summary["status"] == "finished"
    told = [line.getMessage() for line in caplog.records if line.name == "fedsim.tracking"]
    assert told == [
        f"{name} fails, and is left out: ConnectionError: no route" for name in ("W&B", "MLflow", "TensorBoard")
    ]


def test_what_cannot_be_written_to_the_run_folder_stops_the_run(tmp_path: Path, tiny_plan: Plan) -> None:
    lines, *others = start(tiny_plan.workload, None, tmp_path, 0, 0, Console(quiet=True))  # type: ignore[arg-type]
    for tracker in others:
        tracker.close()
    lines.close()
    with pytest.raises(ValueError, match="closed file"):
        lines.on_round(record(1), None)


def test_a_service_is_imported_only_where_it_is_asked_for(tmp_path: Path, tiny_config: Any, monkeypatch: Any) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert run(tiny_config(f"output={tmp_path / 'run'}")).summary["status"] == "finished"


def test_a_missing_package_costs_one_line_and_leaves_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    asked = ["tracking.wandb=true", "tracking.mlflow=sqlite:///m.db"]
    assert main(["run", *TINY, *asked, f"output={tmp_path / 'run'}"]) == 2
    wandb_line, mlflow_line = capsys.readouterr().err.splitlines()
    assert wandb_line.startswith("fedsim: tracking.wandb: ") and 'pip install "fedsim-ray[wandb]"' in wandb_line
    assert mlflow_line.startswith("fedsim: tracking.mlflow: ") and 'pip install "fedsim-ray[mlflow]"' in mlflow_line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tracking.wandb_offline=true", "tracking: wandb_offline is for wandb=true"),
        (
            "tracking.mlflow=true",
            "tracking: mlflow is a URI such as sqlite:///mlflow.db or http://host:5000, not 'true'",
        ),
    ],
)
def test_mistakes_in_the_section(setting: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [setting])
    assert caught.value.mistakes == [told]


# For a person ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (95, "1:35"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_plain_lines_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=200)
    progress = ConsoleProgress(console, rounds=4)
    progress.on_round(record(1, total=10.0), None)
    progress.on_round(record(2, total=20.0, accuracy={"mean": 0.5}), np.array([0.5]))
    progress.on_round(record(3, total=90.0), None)  # the median round takes 20 s
    progress.close()
    assert printed(console) == [
        "round 1/4  loss 1.500  4.2 updates/s  0:30 left",
        "round 2/4  loss 1.500  accuracy 0.500  4.2 updates/s  0:30 left",
        "round 3/4  loss 1.500  accuracy 0.500  4.2 updates/s  0:20 left",
    ]


def test_a_live_line_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    progress = ConsoleProgress(console, rounds=4, rounds_done=1)
    progress.on_round(record(2), None)
    progress.close()
    text = "\n".join(printed(console))
    assert "round 2/4" in text and "loss 1.500" in text


def summary(**accuracy: float | None) -> dict[str, Any]:
    return {
        "algorithm": "fedavg",
        "env": "shapes",
        "num_clients": 24,
        "accuracy": {"mean": 0.7, "std": 0.1, "p10": 0.5, "min": 0.25, "sent": 0.6} | accuracy,
        "bytes": {"up": 1536, "down": 0},
        "seconds": {"train": 1.25, "server": 0.5, "evaluate": 2.0, "total": 9.0},
        "updates_per_second": 12.34,
    }


def table_lines(**accuracy: float | None) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(summary(**accuracy)))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed(console)]


def test_closing_table() -> None:
    lines = table_lines(**{"global": 0.4})
    assert lines[0][0] == "fedavg on shapes, 24 clients"
    for row in (
        ["mean", "0.700", "bytes up", "1.5 KiB"],
        ["std over clients", "0.100", "bytes down", "0 B"],
        ["10th percentile", "0.500", "train", "1.2 s"],
        ["worst client", "0.250", "server", "0.5 s"],
        ["as sent", "0.600", "evaluate", "2.0 s"],
        ["server's average", "0.400", "updates/s", "12.3"],
    ):
        assert row in lines


@pytest.mark.parametrize("accuracy", [{}, {"global": None}])
def test_closing_table_without_an_average(accuracy: dict[str, None]) -> None:
    assert ["server's average", "–", "updates/s", "12.3"] in table_lines(**accuracy)
