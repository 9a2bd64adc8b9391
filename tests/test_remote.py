"""Runs at URIs: killed or cut off at every single call, they go on to the same bits, on this machine or on another."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from conftest import TINY
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from rich.console import Console
from safetensors.torch import load_file

from fedsim import checkpoint, config, loop, remote, simulation
from fedsim import uri as at
from fedsim.__main__ import main
from fedsim.errors import OutputError
from fedsim.files import locked
from fedsim.journal import Journal
from fedsim.loop import Progress
from fedsim.remote import working_folder
from fedsim.simulation import Result, resume, run
from fedsim.store import Store
from fedsim.tracking import JsonLines

URI = "faulty://bucket/run"

# A file system that fails ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


def counted(changes: bool) -> Callable[[Any], Any]:
    """A method of ``Faulty`` whose outermost calls may fail."""

    def wrap(method: Any) -> Any:
        def call(self: Any, *values: Any, **named: Any) -> Any:
            if Faulty.within:
                return method(self, *values, **named)
            Faulty.within = True
            try:
                Faulty.fault(changes)
                return method(self, *values, **named)
            finally:
                Faulty.within = False

        return call

    return wrap


class Faulty(MemoryFileSystem):
    """Files in memory. Any call may fail, by ``fault(changes)``, and a write then leaves half of what it was given."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Callable[[bool], None]] = staticmethod(lambda changes: None)
    within: ClassVar[bool] = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("faulty:/"))

    ls, info = (counted(False)(getattr(MemoryFileSystem, name)) for name in ("ls", "info"))
    rm, mkdir = (counted(True)(getattr(MemoryFileSystem, name)) for name in ("rm", "mkdir"))

    @counted(True)
    def mv(self, path1: str, path2: str, **_: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        self.store[target] = MemoryFile(self, target, self.store.pop(source).getvalue())

    @counted(True)
    def _open(self, path: str, mode: str = "rb", **named: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **named)
        file = HalfWritten(self, self._strip_protocol(path))
        file.commit()
        return file


class HalfWritten(MemoryFile):
    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        Faulty.fault(True)
        return super().write(bytes(data)[len(data) // 2 :])


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits before another attempt, and no power is lost."""
    monkeypatch.setattr(at, "BACK_OFF_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(checkpoint, "_flush", lambda path: None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """``machine("here")``: from now on, what runs runs on the machine of this name."""
    monkeypatch.setattr(Faulty, "store", {})
    monkeypatch.setattr(Faulty, "pseudo_dirs", [""])
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "here"))
    return lambda name: monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / name))


@pytest.fixture
def faults(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[list[bool]]]:
    """``with faults(OSError, 3) as calls:`` the third call fails, of all or of those that change something.

    Where the error is ``Killed``, so do all later ones. The list has an element for every call that counts.
    """

    @contextmanager
    def within(error: type[BaseException], number: int, changes: bool = False) -> Iterator[list[bool]]:
        calls: list[bool] = []

        def fault(call_changes: bool) -> None:
            if call_changes or not changes:
                calls.append(call_changes)
                if len(calls) == number or (error is Killed and len(calls) > number):
                    raise error("cut off")

        with monkeypatch.context() as patched:
            patched.setattr(Faulty, "fault", staticmethod(fault))
            yield calls

    return within


@pytest.fixture
def offline(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """``with offline():`` every call fails."""

    def fault(changes: bool) -> None:
        raise OSError("no route to host")

    @contextmanager
    def within() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(Faulty, "fault", staticmethod(fault))
            yield

    return within


# A run without clients ------------------------------------------------------------------------------------------------

ROUNDS, ROW = 3, 256
EXPECTED = ([0.0, 1, 2, 3, 0, 0, 0, 0], '{"round": 1}\n{"round": 2}\n{"round": 3}\n')


class Played:
    """A run that is saved as any other: a round is a line of ``metrics.jsonl``, and a client's row in the store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.done = folder, Store({"row": torch.zeros(ROW)}, 8), 0
        self.journal: Journal | None = None

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        before, self.journal = self.journal, None
        self.journal = checkpoint.save(folder, {"facts": facts}, {"rows": self.store}, before)

    def play(self, rounds: int = ROUNDS, client: int | None = None, seconds: str = "") -> Played:
        """On to so many rounds; ``client``: who takes part, default: another each time; ``seconds``: in the lines."""
        while self.done < rounds:
            self.done += 1
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(f'{{"round": {self.done}{seconds}}}\n')
            self.store.write(np.array([client or self.done]), {"row": torch.full((1, ROW), float(self.done))})
            loop._save(self, self.folder, Progress(self.done, []), keep=2)  # type: ignore[arg-type]
        return self

    def holds(self) -> tuple[list[float], str]:
        """The clients' rows, and ``metrics.jsonl``."""
        rows = self.store.read(np.arange(8))["row"]
        return rows[:, 0].tolist(), (self.folder / "metrics.jsonl").read_text(encoding="utf-8")


def begun(uri: str = URI, seed: int = 0) -> Played:
    folder = remote.new(uri)
    remote.begin(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\n", encoding="utf-8")
    remote.push(folder)
    return Played(folder)


def resumed(uri: str = URI) -> Played:
    again = Played(remote.fetch(uri))
    newest = simulation._newest(again.folder, Console(quiet=True))
    if newest:
        again.done = checkpoint.load(newest)["facts"]["round"]
        checkpoint.replay(newest, {"rows": again.store})
    lines = again.folder / "metrics.jsonl"
    JsonLines(lines, simulation._bytes_of_lines(lines, again.done)).close()
    return again


def names(uri: str = URI) -> list[str]:
    """All that is at the URI, pieces of journals without their checksums."""
    return sorted(name.partition("-")[0] if "/journal/" in name else name for name in at.sizes(at.files_at(uri)))


def whole(*rounds: int) -> list[str]:
    files = ("manifest.json", "pieces.json", "state.json", "state.safetensors")
    return [f"checkpoints/round-{round:05d}/{file}" for round in rounds for file in files]


def pieces(uri: str = URI) -> list[int]:
    """Bytes of the pieces of journals, in the order of their names."""
    return [size for name, size in sorted(at.sizes(at.files_at(uri)).items()) if "/journal/" in name]


# Killed, cut off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_run_that_is_killed_at_any_change_goes_on_to_the_same_bits(where, machine, faults):
    found = []
    for number in itertools.count(1):
        uri = f"faulty://bucket/{number}/run"
        machine("here")
        with faults(Killed, number, changes=True) as calls, suppress(Killed):
            begun(uri).play()
        if len(calls) < number:
            break
        machine(where)
        if "config.yaml" not in names(uri):
            with pytest.raises(OutputError, match=f"{uri}: not a run folder"):
                remote.fetch(uri)
            continue
        again = resumed(uri)
        found.append(again.done)
        assert again.play().holds() == EXPECTED
        remote.finish(again.folder)
        machine("later")
        later = resumed(uri)
        assert (later.done, later.holds()) == (ROUNDS, EXPECTED)
        left = {name for name in names(uri) if "/journal/" not in name}
        assert {*whole(3), "config.yaml", "metrics.jsonl"} <= left <= {*whole(1, 2, 3), "config.yaml", "metrics.jsonl"}
    # A run whose first upload was whole has made its first checkpoint here, too.
    assert found == sorted(found) and {*found} == ({1, 2, 3} if where == "here" else {0, 1, 2, 3})


def test_a_call_that_fails_once_leaves_no_trace(machine, faults, caplog):
    begun("faulty://bucket/undisturbed/run").play()
    expected = names("faulty://bucket/undisturbed/run")
    for number in itertools.count(1):
        uri = f"faulty://bucket/{number}/run"
        disturbed = begun(uri)
        with faults(OSError, number) as calls:
            disturbed.play()
        assert names(uri) == expected and not caplog.messages
        if len(calls) < number:
            break
    assert number > 20 * ROUNDS


def test_a_network_that_is_gone_is_said_and_the_next_upload_catches_up(machine, offline, caplog):
    cut_off = begun().play(1)
    (size,) = pieces()
    with offline():
        cut_off.play(2)
    then = "(no route to host); the next upload catches up"
    assert caplog.messages == [f"{URI} lacks round-00002 {then}", f"{URI} lacks what has changed {then}"]
    assert names() == ["checkpoints/journal/000000000000000", *whole(1), "config.yaml", "metrics.jsonl"]
    cut_off.play(3)
    assert pieces() == [size, 2 * size]  # the second has what rounds 2 and 3 added
    assert names()[2:] == [*whole(1, 3), "config.yaml", "metrics.jsonl"]
    machine("elsewhere")
    assert resumed().holds() == EXPECTED


def test_a_run_that_ends_after_a_failure_uploads_its_last_checkpoint(machine, offline):
    cut_off = begun().play(2)
    with offline():
        cut_off.play(3)
    remote.finish(cut_off.folder)
    machine("elsewhere")
    assert resumed().done == 3 and resumed().holds() == EXPECTED


# What is uploaded, and what is not ------------------------------------------------------------------------------------


def test_a_checkpoint_adds_what_its_journal_has_grown_by(machine, monkeypatch):
    played = begun().play(1)
    (size,) = pieces()
    assert 4 * ROW < size < 4 * ROW + 512
    played.play(3)
    assert pieces() == [size, size, size]
    listed = json.loads((played.folder / "checkpoints/round-00003/pieces.json").read_text())
    assert [name.partition("-")[0] for name in listed] == [f"{start:015d}" for start in (0, size, 2 * size)]
    monkeypatch.setattr(played.store, "changes", lambda everything: iter(()))
    played.play(4)
    assert pieces() == [size, size, size]


def test_pieces_of_a_journal_that_was_begun_anew_are_gone_with_their_checkpoints(machine):
    """Three parts are more than twice the one row that there is: the third checkpoint begins anew, and the fifth."""
    played, found = begun(), []
    for rounds in (1, 2, 3, 4, 5):
        played.play(rounds, client=1)
        found.append(len(pieces()))
    assert found == [1, 2, 3, 2, 3]
    machine("elsewhere")
    assert resumed().holds()[0] == [0, 5, 0, 0, 0, 0, 0, 0]


def test_files_that_have_grown_or_may_be_rewritten_are_sent_and_links_are_not(machine):
    folder = begun().folder
    (folder / "tensorboard").mkdir()
    for name in ("tensorboard/grows", "tensorboard/stays", "summary.json", "half.tmp"):
        (folder / name).write_text("12")
    (folder / "link").symlink_to(folder / "summary.json")
    remote.push(folder)
    for name, text in (("tensorboard/grows", "345"), ("tensorboard/stays", "34"), ("summary.json", "34")):
        (folder / name).write_text(text)
    remote.push(folder)
    found = {name: at.content(at.files_at(URI), name) for name in names()}
    expected = {"tensorboard/grows": b"345", "tensorboard/stays": b"12", "summary.json": b"34"}
    assert found == {**expected, "config.yaml": b"seed: 0\n"}


def test_what_lies_beside_is_left_alone(machine):
    played = begun()
    others = [
        f"/bucket/{name}" for name in ("runs", "run2/config.yaml", "run/mine", "run/checkpoints/mine/round-00000/1")
    ]
    for name in others:
        Faulty.store[name] = MemoryFile(None, name, b"1")
    played.play()
    assert all(Faulty.store[name].getvalue() == b"1" for name in others)


def test_names_that_lead_out_of_the_folder_are_not_followed(machine):
    begun()
    Faulty.store["/bucket/run/../evil"] = MemoryFile(None, "evil", b"1")
    machine("elsewhere")
    folder = remote.fetch(URI)
    assert [path.name for path in folder.parent.rglob("*") if path.is_file()] == ["config.yaml"]


# Which checkpoint is the newest ---------------------------------------------------------------------------------------


def test_a_folder_here_that_is_ahead_goes_on(machine, offline):
    ahead = begun().play(1)
    with offline():
        ahead.play(2)
    assert resumed().done == 2
    machine("elsewhere")
    assert resumed().done == 1


def test_a_folder_here_that_is_behind_is_replaced(machine):
    behind = begun().play(1)
    (behind.folder / "stale").touch()
    machine("elsewhere")
    resumed().play()
    machine("here")
    again = resumed()
    assert (again.done, again.holds(), (again.folder / "stale").exists()) == (3, EXPECTED, False)


def test_of_one_round_the_uris_checkpoint_counts_and_lines_stay_whole(machine, offline):
    """Two attempts at round 2, whose lines have other lengths."""
    here = begun().play(1)
    with offline():
        here.play(2, seconds=', "seconds": 0.123')
    mine = here.folder / "checkpoints/round-00002/manifest.json"
    before = mine.read_bytes()
    machine("elsewhere")
    there = resumed().play(2, seconds=', "seconds": 1')
    machine("here")
    again = resumed()
    assert mine.read_bytes() == (there.folder / "checkpoints/round-00002/manifest.json").read_bytes() != before
    assert again.play().holds() == (EXPECTED[0], '{"round": 1}\n{"round": 2, "seconds": 0.123}\n{"round": 3}\n')


def test_a_folder_here_of_another_run_at_that_uri_does_not_count(machine):
    begun().play()
    Faulty.store.clear()
    machine("elsewhere")
    begun(seed=1).play(1)
    machine("here")
    assert resumed().done == 1
    Faulty.store.clear()
    assert begun().play(1).holds()[0] == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["state.json", "pieces.json", "manifest.json", "journal"])
@pytest.mark.parametrize("damage", ["deleted", "torn"])
def test_a_damaged_checkpoint_is_passed_over_and_replaced(damage, name, machine):
    begun().play()
    found = max(file for file in Faulty.store if f"round-00003/{name}" in file or f"/{name}/" in file)
    if damage == "deleted":
        del Faulty.store[found]
    else:
        Faulty.store[found].truncate(Faulty.store[found].size // 2)
    machine("elsewhere")
    again = resumed()
    assert (again.done, again.play().holds()) == (2, EXPECTED)
    machine("later")
    later = resumed()
    assert (later.done, later.holds()) == (3, EXPECTED)


def test_a_checkpoint_that_metrics_do_not_reach_is_none(machine):
    begun().play(2)
    Faulty.store["/bucket/run/metrics.jsonl"].truncate(len('{"round": 1}\n'))
    machine("elsewhere")
    again = resumed()
    assert (again.done, again.play().holds()) == (1, EXPECTED)


def test_a_server_on_another_machine_fetches_the_checkpoint_that_it_is_to_load(machine):
    begun().play()
    machine("elsewhere")
    folder = checkpoint.folder_of(working_folder(URI) / "checkpoints", 3)
    assert not folder.parent.exists()
    assert checkpoint.load(folder)["facts"]["round"] == 3
    store = Store({"row": torch.zeros(ROW)}, 8)
    checkpoint.replay(folder, {"rows": store})
    assert store.read(np.arange(8))["row"][:, 0].tolist() == EXPECTED[0]


# Refused --------------------------------------------------------------------------------------------------------------


def refused(uri: str, *settings: str) -> str:
    with pytest.raises(OutputError) as caught:
        run(config.load(None, [*TINY, f"output={uri}", *settings]))
    (line,) = str(caught.value).splitlines()
    return line


def test_what_cannot_be_used_costs_one_line(machine):
    begun(f"{URI}/begun")
    on = f"python -m fedsim resume {URI}/begun"
    assert refused(f"{URI}/begun") == f"output: {URI}/begun exists; choose another, or go on with it: {on}"
    assert refused(URI) == f"output: {URI} exists; choose another"
    assert refused("s3://me:secret@bucket/run").startswith("output: a URI with a password would be printed")
    assert refused("faulty://bucket/a/../b") == "output: faulty://bucket/a/../b has '..' in it"
    assert refused("nowhere://b/run").startswith("output: nowhere://b/run cannot be used (Unrecognized filesystem")
    assert refused("faulty://bucket/" + "x" * 245).endswith("too long a URI (269 characters when quoted, at most 255)")
    assert refused("memory://run", "backend=ray").startswith("output: memory:// is of one process")
    for method in (resume, remote.copy):
        with pytest.raises(OutputError) as caught:
            method("faulty://bucket/nothing")
        assert str(caught.value) == "faulty://bucket/nothing: not a run folder (no config.yaml)"


def test_a_run_that_lives_here_is_of_nobody_else(machine):
    live = begun().play(1)
    before = {path: path.read_bytes() for path in live.folder.rglob("*") if path.is_file()}
    with locked(remote.lock_of(live.folder)), pytest.raises(OutputError) as caught:
        resume(URI)
    assert str(caught.value) == f"{URI}: in use by another process"
    assert {path: path.read_bytes() for path in live.folder.rglob("*") if path.is_file()} == before
    assert not remote.lock_of(live.folder).is_relative_to(live.folder)


@pytest.mark.parametrize(
    ("readable", "told"), [(False, "{}: cannot be read"), (True, "output: {} cannot be written to")]
)
def test_without_credentials_a_run_does_not_begin(readable, told, machine, monkeypatch, tmp_path):
    def denied(changes: bool) -> None:
        if changes or not readable:
            raise PermissionError("ACCESS_DENIED\nrequest 123")

    monkeypatch.setattr(Faulty, "fault", staticmethod(denied))
    assert refused(URI) == f"{told.format(URI)} (ACCESS_DENIED)"
    assert not Faulty.store and not list(tmp_path.iterdir())


def test_a_working_folder_knows_its_uri(tmp_path):
    for uri in ("s3://bucket/a/run", "s3://bucket", "file:///a/run", "gs://b/run?region=x&endpoint=http://c/d"):
        folder = working_folder(uri, tmp_path)
        assert remote.uri_of(folder) == uri == remote.shown(folder)
    assert working_folder("gs://b/run?endpoint=http://c/d").name == "run"
    for path in (Path("runs/one"), Path("/s3:/bucket/run"), Path("one"), tmp_path):
        assert remote.uri_of(path) is None and remote.shown(path) == str(path)
    assert [at.is_uri(text) for text in ("a.b+c-1://x", "runs/one", "/a://b", "C:\\a", "s3:/b")] == [True] + [False] * 4


# Real runs ------------------------------------------------------------------------------------------------------------

REAL = ("algorithm=pfedseq", "rounds=3")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Result:
    return run(tiny_config(*REAL, f"output={tmp_path_factory.mktemp('expected') / 'run'}"))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_run_at_a_uri_goes_on_elsewhere_to_the_same_end(
    scheme, expected, tmp_path, tiny_config, stopped_after, capsys
):
    there = tmp_path / "there" / "run"
    uri = f"file://{there}" if scheme == "file" else "memory://somewhere/run"
    with stopped_after(1):
        run(tiny_config(*REAL, f"output={uri}"), Console())
    assert f"go on with: python -m fedsim resume {uri}" in capsys.readouterr().out
    shutil.rmtree(Path(os.environ["FEDSIM_CACHE"]) / "remote")
    assert main(["resume", uri]) == 0
    assert f"results in {uri}" in capsys.readouterr().out

    with remote.copies([uri]) as (folder,):
        summary = json.loads((folder / "summary.json").read_text())
        for key in ("accuracy", "unseen", "bytes", "failures", "status"):
            assert summary[key] == expected.summary[key]
        rounds = [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rounds == [1, 2, 3] and len(list((folder / "tensorboard").iterdir())) == 2
        for name in ("clients.csv", "partition.npz"):
            assert (folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert not folder.exists()
    if scheme == "file":
        assert {path.name for path in there.iterdir()} == {path.name for path in expected.folder.iterdir()}


def test_a_run_at_a_uri_is_exported_and_reported(expected, tmp_path, monkeypatch):
    uri = "memory://somewhere/finished"
    shutil.copytree(expected.folder, working_folder(uri))
    remote.finish(working_folder(uri))
    monkeypatch.chdir(tmp_path)
    assert main(["export", uri, "--client", "3"]) == 0
    exported, own = load_file("client-3.safetensors"), expected.adapters(3)
    assert exported.keys() == own.keys() and all(torch.equal(exported[name], own[name]) for name in own)
    assert main(["report", uri, str(expected.folder), "--out", "report"]) == 0
    with open("report/comparison.csv", encoding="utf-8") as lines:
        assert [row["run"] for row in csv.DictReader(lines)] == ["finished", "run"]
