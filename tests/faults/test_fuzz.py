"""Inputs that nobody meant: each is read as what it is, or refused in one line, and nothing is half-written.

What is drawn is the same in every run of the tests.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import write_run
from trees import png, write

from fedsim import checkpoint, config, report
from fedsim.__main__ import main
from fedsim.env import Ragged, save_partition
from fedsim.envs.saved import labels_crc32, load_partition
from fedsim.envs.source import decode_cache, listing
from fedsim.errors import CheckpointError, ConfigError, DataError

Damage = Callable[[bytes], bytes]

TEXTS = (
    "", "x", "-1", "0", "7", "1e309", "nan", "-.inf", "9" * 20, "9" * 5000, "[", "[" * 2000, "{a: {b: c}}", "[1, [2]]",
    "null", "true", "2024-13-45", "!!bool maybe", "!!int ''", "!!timestamp x", "!!python/object:os.system {}",
    "&a [*a]", "${seed}", "${oc.env:NO_SUCH_NAME}", "${", "~nobody/x", "../..", "/", "x" * 300, "a/" * 2000, "[/x]",
    "a\nb", "\udcff", "os:path", "no.such:Class", ".x:Y", "pfedseq", "shapes", "local", "é", "\u2028",
)  # fmt: skip
PIECES = ("\n", ": ", "- ", "seed", "env: ", "  a: &a ", "*a", "<<: ", "? ", "'", "\t", "#", "\0", "\ufeff")


def keys() -> list[str]:
    """All that can be set but where it is written and who is told."""
    sections = {"algorithm": config.algorithm_class("pfedseq").Config, "env": config.env_class("shapes").Config}
    found = [f"{section}.{key}" for section, schema in {**config.SECTIONS, **sections}.items()
             for key in schema.__dataclass_fields__ if section != "tracking"]  # fmt: skip
    return [*found, *config._PICKS, *(key for key in config._Top.__dataclass_fields__ if key != "output")]


def examples(number: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=number, database=None)


leaves = st.none() | st.booleans() | st.floats() | st.integers(-(10**30), 10**30) | st.text(max_size=6)
junk = st.recursive(
    leaves | st.sampled_from([*TEXTS, "a\0b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What happens to a file's bytes: cut, a bit flipped, a piece written over, an end doubled, or all replaced."""
    kind, share = draw(st.sampled_from(("cut", "flip", "over", "double", "other"))), draw(st.floats(0, 0.999))
    bit, piece = draw(st.integers(0, 7)), draw(st.binary(max_size=12))

    def damage(content: bytes) -> bytes:
        at = int(share * len(content))
        before, after = content[:at], content[at:]
        return {
            "cut": before,
            "flip": before + bytes(byte ^ 1 << bit for byte in after[:1]) + after[1:],
            "over": before + piece + after[len(piece) :],
            "double": content + after,
            "other": piece,
        }[kind]

    return damage


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Something else in the place of a branch of a tree of dicts and lists, or nothing at all."""
    steps, other, gone = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)), draw(junk), draw(st.booleans())

    def mutated(tree: Any, path: list[int]) -> Any:
        if not path or not isinstance(tree, (dict, list)) or not tree:
            return other
        items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
        key, value = items[path[0] % len(items)]
        kept = [] if gone and len(path) == 1 else [(key, mutated(value, path[1:]))]
        at = path[0] % len(items)
        items[at : at + 1] = kept
        return dict(items) if isinstance(tree, dict) else [value for _, value in items]

    return lambda tree: mutated(tree, steps)


@contextmanager
def folder() -> Iterator[Path]:
    """One for an example; ``tmp_path`` would be one for all examples of a test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def command(*arguments: str) -> int:
    """The exit code: what is refused is told in lines of its own, and no exception comes out."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*arguments])
    out.flush()
    err.flush()
    told = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert code in (0, 2), told
    if code == 2:
        assert told.endswith("\n") and all(line.startswith("fedsim: ") for line in told[:-1].split("\n")), told
    return code


def listed(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# Configurations --------------------------------------------------------------------------------------------------


@functools.cache
def tiny_tree() -> dict[str, Any]:
    return config.to_tree(config.load(None, TINY))


def loaded(content: bytes) -> None:
    with folder() as path, suppress(ConfigError):
        (path / "mine.yaml").write_bytes(content)
        config.load(path / "mine.yaml")


@examples(60)
@given(st.lists(mutations(), min_size=1, max_size=3))
def test_a_configuration_of_wrong_things(changes):
    tree = functools.reduce(lambda tree, change: change(tree), changes, tiny_tree())
    loaded(yaml.safe_dump(tree).encode())


@examples(60)
@given(st.lists(st.sampled_from([*TEXTS, *PIECES])), damages())
def test_a_configuration_that_is_hardly_one(parts, damage):
    loaded(damage(yaml.safe_dump(tiny_tree()).encode()) + "".join(parts).encode("utf-8", "surrogateescape"))


def test_a_configuration_of_a_few_lines_that_unfolds_without_end(tmp_path):
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (tmp_path / "mine.yaml").write_text(f"a0: &a0 [x]\n{laughs}")
    with pytest.raises(ConfigError, match="its aliases unfold into more than 100000 values"):
        config.load(tmp_path / "mine.yaml")


@examples(50)
@given(st.lists(st.tuples(st.sampled_from(keys()), st.sampled_from(TEXTS)), min_size=1, max_size=2))
def test_settings_of_wrong_things(pairs):
    with folder() as path:
        texts = [f"{key}={value}" for key, value in pairs]
        command("run", *TINY, f"output={path / 'run'}", *texts, "--dry-run")
        assert not any(path.iterdir())


@pytest.mark.parametrize("kind", ["resume", "report", "export", "run"])
def test_a_folder_or_a_file_of_any_name(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = {"export": ["--client", "0"], "run": ["rounds=0"]}.get(kind, [])
    for name in TEXTS:
        if not name.startswith("-"):
            assert command(kind, name, *rest) == 2
    assert not any(tmp_path.iterdir())


# Run folders -----------------------------------------------------------------------------------------------------

RUN_FILES = ("config.yaml", "metrics.jsonl", "clients.csv", "summary.json", "partition.npz")
CHECKPOINT_FILES = ("state.safetensors", "state.json", "changes.journal", "manifest.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, and both of their checkpoints."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert command("run", *TINY, "algorithm=pfedseq", f"output={path}") == 0
    return path


@contextmanager
def damaged(run: Path, name: str, damage: Damage) -> Iterator[Path]:
    """A copy of the folder in which this happened to this file."""
    with folder() as path:
        shutil.copytree(run, path / "run")
        (path / "run" / name).write_bytes(damage((run / name).read_bytes()))
        yield path / "run"


@examples(6)
@given(st.sampled_from(CHECKPOINT_FILES), damages())
def test_a_damaged_checkpoint_is_passed_over(finished, name, damage):
    with damaged(finished, f"checkpoints/round-00002/{name}", damage) as run:
        assert command("resume", str(run)) == 0
        assert accuracy(run) == accuracy(finished)


def accuracy(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())["accuracy"]


@examples(25)
@given(st.sampled_from(CHECKPOINT_FILES), damages())
def test_the_only_checkpoint_if_damaged_is_not_used_and_nothing_is_touched(finished, name, damage):
    file = f"checkpoints/round-00002/{name}"
    with damaged(finished, file, damage) as run:
        shutil.rmtree(run / "checkpoints" / "round-00001")
        before, (found, content) = listed(run), ((one / file).read_bytes() for one in (run, finished))
        if not (found.startswith(content) if name == "changes.journal" else found == content):
            assert command("resume", str(run)) == command("export", str(run), "--client", "0") == 2
            assert listed(run) == before


@examples(40)
@given(st.sampled_from(("state.json", "manifest.json")), mutations())
def test_a_checkpoint_of_wrong_things_with_the_right_checksums(finished, name, change):
    with damaged(finished / "checkpoints" / "round-00002", name, lambda content: content) as path:
        (path / name).write_text(json.dumps(change(json.loads((path / name).read_text()))))
        if name == "state.json":
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["files"][name] = checkpoint._facts(path / name)
            (path / "manifest.json").write_text(json.dumps(manifest))
        with suppress(CheckpointError):
            checkpoint.load(path)


@examples(12)
@given(st.sampled_from(RUN_FILES), damages(), st.sampled_from(("resume", "export")))
def test_a_damaged_run_goes_on_or_is_refused(finished, name, damage, kind):
    with damaged(finished, name, damage) as run:
        before = listed(run)
        if command(kind, str(run), *(["--client", "0"] if kind == "export" else [])) == 2:
            assert listed(run) == before


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that can be compared; what draws is left out, for it takes a second."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "_write_page", lambda *_: None)
        yield write_run(tmp_path_factory.mktemp("reported") / "run", [0.1, 0.2, 0.3, 0.4], measured=[{"a": 1.0}] * 2)


def compared(run: Path) -> None:
    if command("report", str(run), "--out", str(run.parent / "out")) == 2:
        assert not (run.parent / "out").exists()


@examples(40)
@given(st.sampled_from(RUN_FILES), damages())
def test_a_damaged_run_is_compared_or_refused(reported, name, damage):
    with damaged(reported, name, damage) as run:
        compared(run)


@examples(80)
@given(st.sampled_from(("config.yaml", "summary.json", "metrics.jsonl")), mutations())
def test_a_run_of_wrong_things_is_compared_or_refused(reported, name, change):
    def mutated(content: bytes) -> bytes:
        if name == "config.yaml":
            return yaml.safe_dump(change(yaml.safe_load(content))).encode()
        first, *rest = content.splitlines()
        return b"\n".join([json.dumps(change(json.loads(first))).encode(), *rest])

    with damaged(reported, name, mutated) as run:
        compared(run)


# Data ------------------------------------------------------------------------------------------------------------

FILES = {f"{name}/{i}.png": png((40 * i, 90, 200)) for name in ("cats", "dogs") for i in range(3)}
NAMES = (
    "", "/", ".", "..", "../x.png", "/etc/x.png", "C:\\x.png", "a\\..\\x.png", "a//b.png", "./a/b.png", ".a/a.png",
    "cats/0.png", "cats/0.png/1.png", "cats", "cats/", "dogs/x.png/", "x.png", "a/b/c/d.png", "train/a/0.png",
    "é/ü.png", "a\udcff/0.png", "\x01/\n.png", "x" * 200 + "/0.png", "CATS/0.png", "__MACOSX/0.png",
)  # fmt: skip


@functools.cache
def archive(kind: str) -> bytes:
    with folder() as path:
        write(path / f"photos.{kind}", FILES, kind)
        return (path / f"photos.{kind}").read_bytes()


def decoded(path: Path) -> None:
    """It is decoded whole, or refused; the cache holds what is whole, and nothing else."""
    cache = path.parent / "cache"
    try:
        decode_cache(listing(path), 4, cache)
    except DataError as error:
        assert path.name in str(error) and "\n" not in str(error)
        assert not cache.exists() or not any(cache.iterdir())
    else:
        assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".npy"]


@examples(120)
@given(st.sampled_from(("zip", "tar", "tar.gz")), damages())
def test_a_damaged_archive(kind, damage):
    with folder() as path:
        (path / f"photos.{kind}").write_bytes(damage(archive(kind)))
        decoded(path / f"photos.{kind}")


@examples(80)
@given(
    st.sampled_from(("zip", "tar")), st.lists(st.tuples(st.sampled_from(NAMES), damages()), max_size=3), st.booleans()
)
def test_an_archive_of_odd_names_and_images(kind, odd, alone):
    contents = {**({} if alone else FILES), **{name: damage(png()) for name, damage in odd}}
    with folder() as path:
        with odd_archive(path / f"photos.{kind}") as add:
            for name, content in contents.items():
                add(name, content)
        decoded(path / f"photos.{kind}")


@contextmanager
def odd_archive(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            yield lambda name, content: zipped.writestr(name.encode("utf-8", "replace").decode() or "?", content)
        return
    with tarfile.open(path, "w", errors="surrogateescape") as tarred:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tarred.addfile(info, io.BytesIO(content))

        yield add


def test_a_tar_whose_member_has_less_than_no_bytes(tmp_path):
    """To ``tarfile``, the member after it is this one again."""
    content = bytearray(archive("tar"))
    content[124:136] = (-512).to_bytes(12, "big", signed=True)  # the size, in its binary form
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "photos.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"photos\.tar' is damaged: 'cats/0\.png' has -512 bytes"):
        listing(tmp_path / "photos.tar")


LABELS = np.arange(12) % 3
ABOUT = {"images": 12, "labels_crc32": labels_crc32(LABELS)}
TRAIN, TEST = (Ragged.of([np.arange(start + 3 * k, start + 3 * k + 3) for k in range(2)]) for start in (0, 6))
numbers = st.integers(-(2**63), 2**63 - 1)


@functools.cache
def partition_file() -> bytes:
    with folder() as path:
        save_partition(path / "p.npz", TRAIN, TEST, ABOUT, LABELS)
        return (path / "p.npz").read_bytes()


@examples(150)
@given(damages())
def test_a_damaged_partition_is_refused_or_what_was_saved(damage):
    with folder() as path:
        (path / "p.npz").write_bytes(damage(partition_file()))
        try:
            found = load_partition(path / "p.npz", LABELS)
        except DataError as error:
            assert "p.npz" in str(error) and "\n" not in str(error)
        else:
            for one, other in zip(found, (TRAIN, TEST), strict=True):
                np.testing.assert_array_equal(one.values, other.values)
                np.testing.assert_array_equal(one.offsets, other.offsets)


@examples(50)
@given(st.lists(st.integers(-1, 12) | numbers, max_size=4), st.lists(st.integers(0, 6) | numbers, max_size=5))
def test_a_partition_of_wrong_numbers(values, offsets):
    odd = Ragged(np.array(values, dtype=np.int64), np.array(offsets, dtype=np.int64))
    with folder() as path, suppress(DataError):
        save_partition(path / "p.npz", odd, TEST, ABOUT)
        found, _ = load_partition(path / "p.npz", LABELS)
        assert all(0 <= index < 6 for client in range(len(found)) for index in found[client])


def test_offsets_that_go_round(tmp_path):
    """Each step is upwards, modulo 2^64."""
    odd = Ragged(np.array([0]), np.array([0, 2**63 - 1, -(2**63), -1, 1]))
    save_partition(tmp_path / "p.npz", odd, TEST, ABOUT)
    with pytest.raises(DataError, match="the train lists are damaged"):
        load_partition(tmp_path / "p.npz", LABELS)
