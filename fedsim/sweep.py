"""Many runs on one Ray cluster, one table at the end; ``fedsim/grid.py`` says which runs.

Ray Tune gives every run a process and a placement group of its own, starts as many as fit, starts those again that
crash or lose what they run on, which then go on from their checkpoints, and, where asked, stops early those that fall
behind. Only ``_cluster`` and below know of Tune; the rest holds wherever runs are executed. Data, cached tokens and
pre-trained backbones lie in the cache's files, of which a machine holds one copy in memory.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedsim import config as configuration
from fedsim.actors import Weights
from fedsim.callbacks import Callback
from fedsim.comparison import shown
from fedsim.config import Config
from fedsim.errors import (
    BlockFailedError,
    CentralLostError,
    ConfigError,
    DeviceMemoryError,
    FedsimError,
    NotStartedError,
    OutputError,
    RunError,
)
from fedsim.files import LOCK, locked, write_atomically
from fedsim.grid import Run, Settings, Sweep, load
from fedsim.interrupts import terminate_as_interrupt
from fedsim.ray_backend import connect, gpu_fraction
from fedsim.report import report, seeds_table, write_results
from fedsim.results import flat, flat_summary
from fedsim.simulation import refuse_relative, resume, run
from fedsim.tracking import Record
from fedsim.uri import is_uri

TUNES = ".tune"  # Tune's own folder, while it runs
RETRIES = 2  # of a run whose process died, or that lost what it runs on
CURABLE = (
    BlockFailedError, CentralLostError, DeviceMemoryError, NotStartedError, OutputError, RunError, OSError, RayError
)  # fmt: skip
STOPPED = "stopped"  # a file in the folder of a run that was stopped early: after which round
HALVING = 3  # of so many runs one goes on


def run_sweep(
    sweep: Sweep,
    configs: Mapping[str, Config],
    out: Path,
    console: Console,
    again: str,
    jobs: int | None = None,
    early_stop: bool = False,
) -> bool:
    """Runs what has not finished yet; true if every run has finished then, or was stopped early.

    Args:
        sweep, configs: what ``plan`` found.
        out: the sweep's folder; where it holds this sweep already, that one goes on.
        console: for a person.
        again: the command that goes on.
        jobs: most runs at a time; default: as many as the cluster has room for.
        early_stop: stop runs whose accuracy falls behind that of others after as many rounds (ASHA).

    Raises:
        OutputError: ``out`` is of something else, in use, a URI, relative on a cluster, or cannot be written.
        ConfigError: ``out`` holds runs of another configuration, early stopping would look at the test split, or the
            cluster has no room for a run.
    """
    if early_stop and not all(config.eval.validation for config in configs.values()):
        raise ConfigError(["--early-stop: would choose by the test split; set eval.validation=0.2"])
    runs = sweep.runs()
    if is_uri(out.as_posix().replace(":/", "://", 1)):
        raise OutputError("--out: a URI; the runs of a sweep need a folder, which all nodes see")
    refuse_relative("--out", str(out), next(iter(configs.values())).backend)
    _refuse_other(out, sweep, configs)
    with _alone(out):
        left = {found.name: configs[found.name] for found in runs if not _ended(out / found.name)}
        at_once = f"{jobs} at a time" if jobs else "as many at a time as fit"
        _say(console, f"{len(runs)} runs, {len(runs) - len(left)} of them finished before; {at_once}, in {out}")
        with _cluster(left, out) if left else nullcontext():
            # Not before all that may refuse it: the corrected command finds no other sweep in the folder.
            write_atomically(out / "sweep.yaml", f"# {again}\n{sweep.to_yaml()}")
            board = Board(runs, out, console)
            try:
                if left:
                    _on_tune(left, out, board, jobs, early_stop)
            except KeyboardInterrupt:
                _say(console, f"interrupted; go on with: {again}")
                raise
            finally:
                board.close()
        rows = write_results(out, runs, board.failed)
    if rows:
        console.print(seeds_table(rows))
        report([out], out / "report", Console(quiet=True), rows, _curves(sweep, rows))
    for line in board.failed.values():
        _say(console, line)
    then = f"; try again with: {again}" if board.failed else ""
    _say(console, f"results.csv, table.csv and the page report/index.html in {out}{then}")
    return not board.failed


def _curves(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The keys of the grid whose values are three numbers or more, and what they are called in the table."""
    return {
        key: name
        for key, name in sweep.short.items()
        if key != "seed" and all(_is_number(row[key]) for row in rows) and len({row[key] for row in rows}) > 2
    }


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _ended(folder: Path) -> bool:
    return bool(flat_summary(folder)) or (folder / STOPPED).is_file()


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _refuse_other(out: Path, sweep: Sweep, configs: Mapping[str, Config]) -> None:
    """What ``out`` holds must be this sweep, and its runs must be those that would be run now."""
    if not (out / "sweep.yaml").is_file():
        if out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
            raise OutputError(f"--out: {out} exists and is not the folder of a sweep; choose another")
        return
    before = load(str(out / "sweep.yaml"), [])
    if before.config != sweep.config or _by_name(before) != _by_name(sweep):
        command = (out / "sweep.yaml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        raise OutputError(f"--out: {out} holds another sweep ({command}); choose another folder")
    mistakes = []
    for name, config in configs.items():
        if (out / name / "config.yaml").is_file():
            then, now = _resolved(configuration.load(out / name / "config.yaml")), _resolved(config)
            changed = next((key for key in {**then, **now} if then.get(key) != now.get(key)), None)
            if changed:
                values = f"{changed}={then.get(changed)}, and now it is {now.get(changed)}"
                mistakes.append(f"--out: {out / name} was begun with {values}; choose another folder")
    if mistakes:
        raise ConfigError(mistakes)


def _by_name(sweep: Sweep) -> dict[str, Settings]:
    return {run.name: run.settings for run in sweep.runs()}


def _resolved(config: Config) -> dict[str, Any]:
    return flat(configuration.to_tree(replace(config, output="")))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The lock of a sweep's folder."""
    with ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / LOCK))
        except BlockingIOError:
            raise OutputError(f"--out: {out} is in use by another sweep") from None
        except OSError as error:
            raise OutputError(f"--out: {out} cannot be written to ({error.strerror})") from None
        yield


class Board(tune.Callback):
    """What a person sees while the runs go on: a table of those that run, and a line for each that has ended.

    Attributes:
        failed: the names of those that failed, and what to say of each.
    """

    def __init__(self, runs: Sequence[Run], out: Path, console: Console) -> None:
        self._runs, self._out, self._console = runs, out, console
        self._ended = sum(_ended(out / found.name) for found in runs)
        self._last: dict[str, dict[str, Any]] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.failed: dict[str, str] = {}
        if self._live:
            self._live.start()

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a restoration that we do ourselves

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._last[trial.config["run"]] = result
        if self._live:
            self._live.update(self._table(trials), refresh=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["run"]
        if error := self._last.pop(name, {}).get("error"):
            _say(self._console, f"{name}: failed, and is tried again ({error})")
        else:
            self._log_death(trial)
            _say(self._console, f"{name}: its process died, see its log; another one goes on in its place")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["run"]
        error = self._last.get(name, {}).get("error")
        if not error:
            self._log_death(trial)
        self._end(name, error or "its process died; see its log")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = trial.config["run"]
        self._end(name, self._last.get(name, {}).get("error", ""))

    def _log_death(self, trial: Any) -> None:
        """Into the run's log, what its process could not write: that it died, and what Ray knows of it."""
        all_told = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        told = all_told.rpartition("Failure # ")[2].partition("\n")[2]
        with (self._out / f"{trial.config['run']}.log").open("a", encoding="utf-8") as log:
            log.write(f"fedsim: the process of this run died\n{told}")

    def _end(self, name: str, error: str) -> None:
        self._ended += 1
        where, summary, last = f"{self._ended}/{len(self._runs)}  {name}", flat_summary(self._out / name), self._last
        if summary:
            mean, seconds = (shown(key, summary[key]) for key in ("accuracy.mean", "seconds.total"))
            _say(self._console, f"{where}  accuracy {mean}  {seconds} s")
        elif error or name not in last:
            self.failed[name] = f"failed: {name} ({error or 'it did not begin; see its log'})"
            _say(self._console, f"{where}  failed")
        else:
            write_atomically(self._out / name / STOPPED, f"{last[name]['round']}\n")
            accuracy = shown("accuracy.mean", last[name]["accuracy"])
            _say(self._console, f"{where}  accuracy {accuracy}  stopped after round {last[name]['round']}")
        write_results(self._out, self._runs, self.failed)

    def _table(self, trials: Sequence[Any]) -> Table:
        table = Table("run", "round", "accuracy", box=None)
        for trial in trials:
            name = trial.config["run"]
            if trial.status == "RUNNING" and "round" in (last := self._last.get(name, {})):
                table.add_row(name, str(last["round"]), shown("accuracy.mean", last["accuracy"]))
        return table


@contextmanager
def _cluster(configs: Mapping[str, Config], out: Path) -> Iterator[None]:
    """A Ray cluster with room for each of the runs, and what they share on it.

    Raises:
        ConfigError: there is no room for one of them, or it would start a dashboard that asks nobody for a token.
    """
    # Tune would move every run into a folder of its own, keep logs beside ours, take Ctrl-C for itself, print a box.
    own = {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    os.environ.update(own)  # before Ray starts processes, which inherit them
    with ExitStack() as undone:
        undone.callback(shutil.rmtree, out / TUNES, ignore_errors=True)
        if connect(next(iter(configs.values())).backend, f"sweep-{uuid.uuid4().hex[:6]}"):
            undone.callback(ray.shutdown)
        _refuse_too_large(configs, ray.cluster_resources())
        weights = Weights.options(name="weights").remote()  # type: ignore[attr-defined]
        undone.callback(ray.kill, weights)
        yield


def _on_tune(configs: Mapping[str, Config], out: Path, board: Board, jobs: int | None, early_stop: bool) -> None:
    """All runs, each as a trial."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is told by the board and the runs' logs
    trainable = tune.with_parameters(_trial, configs=dict(configs), out=out.absolute())
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda point: _resources(configs[point["run"]])),
        param_space={"run": tune.grid_search(list(configs))},
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", max_concurrent_trials=jobs, scheduler=_asha(configs) if early_stop else None
        ),
        run_config=tune.RunConfig(
            name=TUNES,
            storage_path=str(out.absolute()),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[board],
            verbose=0,
        ),
    )
    with terminate_as_interrupt(signal.SIGTERM, signal.SIGHUP):  # Ray, when it starts, sets handlers of its own
        tuner.fit()


def _asha(configs: Mapping[str, Config]) -> tune.schedulers.TrialScheduler:
    most = 1 + max(config.rounds for config in configs.values())  # who gets to the last round writes its results
    every = min(most, max(config.eval.every for config in configs.values()))
    return tune.schedulers.ASHAScheduler("round", grace_period=every, max_t=most, reduction_factor=HALVING)


def _resources(config: Config) -> tune.PlacementGroupFactory:
    """A bundle for the run's own process, and one for each of its simulators."""
    backend = config.backend
    if backend.name == "local":
        return tune.PlacementGroupFactory([{"CPU": backend.threads}])
    share = gpu_fraction(backend)
    unit = {"GPU": share} if share else {"CPU": float(backend.threads)}
    return tune.PlacementGroupFactory([{}, *[unit] * (backend.simulators or 1)])


def _refuse_too_large(configs: Mapping[str, Config], room: Mapping[str, float]) -> None:
    """A run that the whole cluster has no room for would wait for ever."""
    needed = [_resources(config).required_resources for config in configs.values()]
    mistakes = [
        f"backend: a run of the sweep takes {amount:g} {kind}, and the cluster has {room.get(kind, 0):g}; choose fewer "
        "backend.simulators or backend.threads"
        for own in needed for kind, amount in own.items() if amount > room.get(kind, 0)
    ]  # fmt: skip
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))


def _trial(point: Mapping[str, str], configs: Mapping[str, Config], out: Path) -> None:
    """One run, in a process of its own; its words go to its log."""
    name = point["run"]
    folder = out / name
    with (out / f"{name}.log").open("a", encoding="utf-8", buffering=1) as log:
        console = Console(file=log, width=160)
        try:
            if (folder / "config.yaml").is_file():
                resume(folder, console, [ToTune()])
            else:
                if not (folder / "metrics.jsonl").exists():
                    shutil.rmtree(folder, ignore_errors=True)  # it was stopped before it began
                run(replace(configs[name], output=str(folder)), console, [ToTune()])
        except Exception as error:
            told = f"fedsim: {error}" if isinstance(error, FedsimError) else traceback.format_exc()
            with suppress(OSError):  # the disk may be full
                _say(console, told)
            line = str(error).strip().partition("\n")[0] or type(error).__name__
            tune.report({"error": line, "round": 0, "accuracy": 0.0})
            if _curable(error):
                raise  # Tune tries again, as it does where a process died


def _curable(error: Exception) -> bool:
    """Whether the run, from its checkpoint, may end another way: it lost what it runs on, or could not write."""
    return isinstance(error, CURABLE) or type(error) is FedsimError  # the base: an actor died while it started


class ToTune(Callback):
    """Tells Tune how far a run is, and how good."""

    def __init__(self) -> None:
        self._accuracy = 0.0

    def on_round_end(self, record: Record, accuracies: np.ndarray | None) -> None:
        self._accuracy = record.get("accuracy", {}).get("mean", self._accuracy)
        tune.report({"round": record["round"], "accuracy": self._accuracy})
