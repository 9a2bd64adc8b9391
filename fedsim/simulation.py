"""One simulation from configuration to run folder: ``run`` starts one, ``resume`` goes on with one."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from torch import Tensor

from fedsim import checkpoint, remote, tracking
from fedsim.backend import Backend, LocalBackend, make_backend
from fedsim.callbacks import Callback, Called
from fedsim.config import BackendConfig, Config, load, to_tree
from fedsim.env import save_partition
from fedsim.errors import CentralLostError, CheckpointError, FedsimError, OutputError, RunError, UserError
from fedsim.files import LOCK, locked, write_atomically
from fedsim.going_on import refuse_gap, refuse_other_inputs, refuse_other_settings, settings_of
from fedsim.interrupts import stoppable
from fedsim.loop import Progress, run_rounds, summarise, write_results
from fedsim.plan import Plan, emulates_bf16, prepare
from fedsim.probe import told, with_sizes
from fedsim.provenance import commit, versions
from fedsim.simulator import guarded
from fedsim.tracking import Tracker, closing_table
from fedsim.uri import is_uri

if TYPE_CHECKING:
    import pandas

MOST_RESTARTS = 3  # of a central actor that is lost again and again before another round is done
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}  # names may look like markup


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what ``summary.json`` holds."""

    folder: Path
    summary: dict[str, Any]

    def adapters(self, client: int) -> dict[str, Tensor]:
        """A client's adapters and head as a state dict with timm's names; see ``fedsim/export.py``.

        Raises:
            UserError: there is no such client, or the algorithm predicts with more than these.
        """
        from fedsim.export import personal_model  # which restores the run by what is below

        return personal_model(self.folder, client).tensors

    def rounds(self) -> pandas.DataFrame:
        """``metrics.jsonl``: a row a round, columns like ``accuracy.mean`` and ``seconds.train``."""
        import pandas

        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return pandas.json_normalize([json.loads(line) for line in lines]).set_index("round")

    def clients(self) -> pandas.DataFrame:
        """``clients.csv``: a row a client."""
        import pandas

        return pandas.read_csv(self.folder / "clients.csv", index_col="client")


def run(config: Config, console: Console | None = None, callbacks: Sequence[Callback] = ()) -> Result:
    """Runs a simulation into a new run folder.

    Args:
        config: what to run.
        console: for a person; default: none.
        callbacks: a user's own code, called after what the run folder is told.

    Raises:
        UserError: a mistake in configuration, data, weights or output; nothing was written then.
        RunError: it had begun, and cannot be written any more, for instance.
    """
    console = console or Console(quiet=True)
    folder = output_folder(config)
    tracking.refuse_missing(config.tracking)
    remote.begin(folder)
    plan = prepare(config)
    with ExitStack() as held:  # until the back end is closed, whose server writes, too
        backend = make_backend(plan.workload, plan.params, remote.shown(folder))
        try:
            plan = with_sizes(plan, backend)
            held.enter_context(_alone(folder))
            _create(folder, plan)
            return _go(plan, backend, folder, _restored(plan, backend, None), console, callbacks)
        finally:
            backend.close()


def resume(folder: Path | str, console: Console | None = None, callbacks: Sequence[Callback] = ()) -> Result:
    """Goes on from the newest valid checkpoint of a run folder; a run without one starts over. Arguments as of ``run``.

    Of a run at a URI: from the newest that is there or in this machine's working folder, of one round from the URI's.

    Raises:
        OutputError: it is no run folder, or another process runs it.
        CheckpointError: no checkpoint can be read, or the configuration, the data or the backbone are not those of the
            run; nothing was touched then.
        RunError: as of ``run``.
    """
    console, place = console or Console(quiet=True), str(folder)
    if is_uri(place):
        with _alone(remote.usable(place)):
            return _resume(remote.fetch(place), console, callbacks)
    folder = Path(folder)
    _refuse_other_folder(folder)
    with _alone(folder):
        return _resume(folder, console, callbacks)


def _resume(folder: Path, console: Console, callbacks: Sequence[Callback]) -> Result:
    config = load(folder / "config.yaml")
    tracking.refuse_missing(config.tracking)
    newest = _newest(folder, console)
    if newest:
        refuse_other_settings(folder, newest, config)
        refuse_gap(folder, newest)
    plan = prepare(config)
    refuse_other_inputs(folder, plan, console)
    backend = make_backend(plan.workload, plan.params, remote.shown(folder))
    try:
        progress = _restored(plan, backend, newest)
        # At a URI they may be of an earlier attempt at these rounds, whose times have other digits.
        progress.metrics_bytes = _bytes_of_lines(folder / "metrics.jsonl", progress.round)
        backend.failures = replace(backend.failures, **progress.failures)
        console.print(f"resuming {remote.shown(folder)} after round {progress.round} of {config.rounds}", **_PLAIN)
        return _go(plan, backend, folder, progress, console, callbacks)
    finally:
        backend.close()


@contextmanager
def restored(folder: Path, console: Console) -> Iterator[tuple[Plan, LocalBackend, int]]:
    """A run as its newest valid checkpoint left it, in this process: its plan, its back end, and the rounds done.

    Raises:
        OutputError: it is no run folder.
        CheckpointError: no checkpoint can be read, or the configuration, the data or the backbone are not those of the
            run.
    """
    _refuse_other_folder(folder)
    newest = _newest(folder, console)
    if newest is None:
        raise CheckpointError(f"{remote.shown(folder)}: the run has no checkpoint yet")
    config = load(folder / "config.yaml")
    refuse_other_settings(folder, newest, config)
    plan = prepare(replace(config, backend=replace(config.backend, name="local")))
    refuse_other_inputs(folder, plan, console)
    backend = LocalBackend(plan.workload, plan.params)
    try:
        yield plan, backend, _restored(plan, backend, newest).round
    finally:
        backend.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock of a run's folder, which is made.

    Raises:
        OutputError: another process has it, or it cannot be written.
    """
    lock = remote.lock_of(folder)
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock))
        except BlockingIOError:
            raise OutputError(f"{remote.shown(folder)}: in use by another process") from None
        except OSError as error:
            raise OutputError(f"{remote.shown(folder)}: cannot be written ({error})") from None
        yield


def _newest(folder: Path, console: Console) -> Path | None:
    """The newest valid checkpoint of a run; ``None``: it has made none yet.

    Raises:
        CheckpointError: all that there are cannot be read.
    """
    newest, damaged = checkpoint.newest(folder / "checkpoints")
    for line in damaged:
        console.print(f"skipped: {line}", **_PLAIN)
    if newest is None and damaged:
        raise CheckpointError(f"{remote.shown(folder)}: no valid checkpoint is left")
    return newest


def _bytes_of_lines(path: Path, lines: int) -> int:
    """Of the first so many lines, or of those that there are."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(len(line) for line in islice(file, lines))


def _restored(plan: Plan, backend: Backend, newest: Path | None) -> Progress:
    """Where the checkpoint stands, with the back end's server brought there; without one: the start."""
    kept = settings_of(plan.workload.config)
    if newest is None:
        return Progress(0, [0] * plan.workload.data.num_clients, settings=kept)
    facts = backend.load(newest)
    try:
        replace(backend.failures, **facts["failures"])  # as resume will
        return Progress(**{**facts, "settings": kept})  # its own may have had fewer rounds
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{newest}: of another version of fedsim ({error})") from None


@contextmanager
def _begun() -> Iterator[None]:
    """What ends a run that has begun is no mistake of the caller's any more."""
    try:
        yield
    except UserError as error:
        raise RunError(str(error)) from error


@_begun()
def _go(
    plan: Plan, backend: Backend, folder: Path, progress: Progress, console: Console, callbacks: Sequence[Callback]
) -> Result:
    console.print(backend.describe(), **_PLAIN)
    if tried := told(plan):
        console.print(tried, **_PLAIN)
    config, clients = plan.workload.config, plan.workload.data.num_clients
    memory_gib = sum(plan.about["memory_mib"].values()) / 1024
    console.print(
        f"{config.algorithm.name}: {plan.cohort} of {clients} clients a round, blocks: {plan.describe_blocks()}; "
        f"{len(plan.params)} numbers a client; at most about {memory_gib:.1f} GiB of memory", **_PLAIN
    )  # fmt: skip
    blocks = len(plan.blocks(plan.sample_cohort(0)))
    if blocks < backend.simulators:
        console.print(f"only {blocks} of {backend.simulators} simulators have work: lower backend.block_size")
    if emulates_bf16(config):
        console.print("this machine's processor has no bf16 and emulates it: precision=fp32 is faster here")
    losses, furthest = 0, progress.round
    try:
        # Set after Ray has started, which sets a handler of its own.
        with stoppable(backend):
            while True:
                try:
                    if losses:
                        backend.rebuild(progress.round)
                        progress = _restored(plan, backend, _newest(folder, console))
                    _play(plan, backend, folder, progress, console, callbacks)
                    break
                except CentralLostError as error:
                    losses = 1 if progress.round > furthest else losses + 1
                    furthest = max(furthest, progress.round)
                    if losses > MOST_RESTARTS:
                        raise
                    backend.failures.central_restarted += 1
                    console.print(f"{error}; going on from the newest checkpoint", **_PLAIN)
    except (KeyboardInterrupt, FedsimError) as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        progress.failures = asdict(backend.failures)
        # First: what comes after may fail too, on a disk that is full.
        console.print(f"{status}; go on with: python -m fedsim resume {remote.shown(folder)}", **_PLAIN)
        write_results(folder, plan, progress, summarise(plan, progress, {}, status))
        remote.finish(folder)
        raise
    summary = summarise(plan, progress, backend.peak_memory_mib(), "finished")
    write_results(folder, plan, progress, summary)
    remote.finish(folder)
    for callback in callbacks:
        name = f"{type(callback).__name__}.on_run_end"
        guarded(name, plan.workload.config.rounds - 1, (), partial(callback.on_run_end, summary))
    console.print(closing_table(summary))
    console.print(f"results in {remote.shown(folder)}", **_PLAIN)
    return Result(folder, summary)


def _play(
    plan: Plan, backend: Backend, folder: Path, progress: Progress, console: Console, callbacks: Sequence[Callback]
) -> None:
    """The rounds that are left, with trackers that begin where ``progress`` stands."""
    begun = tracking.start(plan.workload, backend, folder, progress.round, progress.metrics_bytes, console)
    trackers: list[Tracker] = list(begun)
    try:
        trackers += [Called(callback, plan, progress.round) for callback in callbacks]
        run_rounds(plan, backend, folder, trackers, progress)
    finally:
        for tracker in trackers:
            tracker.close()


def output_folder(config: Config) -> Path:
    """Where the run will be written; of a URI, the working folder.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    if is_uri(config.output):
        if config.backend.name == "ray" and config.output.startswith("memory:"):
            raise OutputError("output: memory:// is of one process, and Ray's actors are others; take backend=local")
        return remote.new(config.output)
    if config.backend.name == "ray":
        refuse_relative("output", config.output or "runs/…", config.backend)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.output or f"runs/{stamp}-{config.algorithm.name.rpartition(':')[2]}")
    try:
        taken = folder.exists() and (not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir()))
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise OutputError(f"output: {str(folder)[:80]!r} cannot be a folder ({error.args[-1]})") from None
    if taken:
        raise OutputError(
            f"output: {folder} exists; choose another"
            + (f", or go on with it: python -m fedsim resume {folder}" if (folder / "config.yaml").is_file() else "")
        )
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output: {parent} cannot be written to")
    return folder


def refuse_relative(key: str, path: str, config: BackendConfig) -> None:
    """Refuses a path that every node of the cluster that is joined would understand in its own way; ``key``: whose.

    Raises:
        OutputError: it is relative, and a cluster is joined.
    """
    joined = config.address or os.environ.get("RAY_ADDRESS", "") or _cluster_of_the_caller()
    if joined not in ("", "local") and not Path(path).is_absolute():
        raise OutputError(
            f"{key}: {path} is relative, which on the nodes of the cluster {joined} are as many folders; give the "
            "absolute path of one that all nodes see"
        )


def _cluster_of_the_caller() -> str:
    """The address of a cluster of several nodes that the calling program has joined itself; else an empty text."""
    ray = sys.modules.get("ray")  # which is not imported for this
    if ray is None or not ray.is_initialized() or sum(node["Alive"] for node in ray.nodes()) < 2:
        return ""
    return str(ray.get_runtime_context().gcs_address)


def _create(folder: Path, plan: Plan) -> None:
    """A run folder in which nothing has been played yet.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        _write_inputs(folder, plan)
    except OSError as error:
        raise OutputError(f"output: {remote.shown(folder)} cannot be written ({error})") from None
    remote.push(folder)


def _write_inputs(folder: Path, plan: Plan) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    # Without its own output, so that the file runs again as it is.
    tree = to_tree(replace(plan.workload.config, output=""))
    tree["about"] = {**plan.about, "versions": versions(), "commit": commit(), "python": platform.python_version()}
    data = plan.workload.data
    save_partition(folder / "partition.npz", data.train, data.test, data.about, data.labels)
    write_atomically(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(tree)), sort_keys=False))


def _refuse_other_folder(folder: Path) -> None:
    if not os.path.isfile(folder / "config.yaml"):
        raise OutputError(f"{remote.shown(folder)}: not a run folder (no config.yaml)")
