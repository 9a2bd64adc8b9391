"""Checkpoints: what is saved comes back; what is damaged is named. What is journaled: ``test_journal.py``."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import results

from fedsim.checkpoint import folder_of, load, newest, prune, save
from fedsim.config import Config
from fedsim.errors import CheckpointError
from fedsim.simulation import resume, run

FILES = ("state.safetensors", "state.json", "changes.journal", "manifest.json")


def written(checkpoints: Path, *rounds: int) -> list[Path]:
    folders = [folder_of(checkpoints, round) for round in rounds]
    for round, folder in zip(rounds, folders, strict=True):
        save(folder, {"round": round, "w": torch.arange(64.0)})
    return folders


def flip(path: Path) -> None:
    """One bit of the last byte but one."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_round_trip_of_a_nested_tree(tmp_path: Path) -> None:
    tree: dict[Any, Any] = {
        "none": None, "true": True, "int": 3, "float": 0.1, "text": "ä", "list": [1, [2.5, "x"], {}], "empty": {},
        3: {"int keys": {0: "zero"}}, "deep": {"w": torch.tensor([1.5, -2.0]), "list": [torch.tensor([[1]])]},
    }  # fmt: skip
    save(tmp_path / "c", tree)
    back = load(tmp_path / "c")
    assert torch.equal(back["deep"].pop("w"), tree["deep"].pop("w"))
    assert torch.equal(back["deep"]["list"].pop(), tree["deep"]["list"].pop())
    assert back == tree
    assert type(back["true"]) is bool and type(back["int"]) is int


def test_tensors_under_keys_that_look_alike_stay_apart(tmp_path: Path) -> None:
    save(tmp_path / "c", {1: torch.zeros(1), "1": torch.ones(1), "a/b": torch.ones(2), "a": {"b": torch.ones(3)}})
    back = load(tmp_path / "c")
    assert (back[1].tolist(), back["1"].tolist(), len(back["a/b"]), len(back["a"]["b"])) == ([0.0], [1.0], 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_tensors_keep_type_shape_and_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = {"scalar": torch.tensor(1).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    tree["matrix"] = torch.arange(6).view(2, 3).to(dtype)
    save(tmp_path / "c", tree)
    back = load(tmp_path / "c")
    assert list(back) == list(tree)
    for name, value in tree.items():
        assert back[name].dtype == dtype and torch.equal(back[name], value) and back[name].shape == value.shape


def test_tensors_may_share_memory_be_strided_and_need_gradients(tmp_path: Path) -> None:
    w = torch.arange(6.0).view(2, 3).requires_grad_()
    save(tmp_path / "c", {"w": w, "same": w, "transposed": w.t(), "row": w[1]})
    back = load(tmp_path / "c")
    assert torch.equal(back["same"], w) and torch.equal(back["transposed"], w.t()) and torch.equal(back["row"], w[1])
    assert not back["w"].requires_grad


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (parameter**2).sum().backward()
        optimizer.step()

    parameter = torch.tensor([1.0, -2.0], requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=0.1)
    step(parameter, adam)
    save(tmp_path / "c", {"parameter": parameter, "adam": adam.state_dict()})
    saved = load(tmp_path / "c")
    assert list(saved["adam"]["state"]) == [0]  # an int: JSON alone would have made it a text

    restored = saved["parameter"].requires_grad_()
    other = torch.optim.Adam([restored], lr=9.0)
    other.load_state_dict(saved["adam"])
    step(parameter, adam)
    step(restored, other)
    assert torch.equal(restored, parameter)


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = written(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr("fedsim.checkpoint._flush", full_disk)
        written(tmp_path, 2)
    told = f"{tmp_path / 'round-00002'}: cannot be written: [Errno 28] No space left on device"
    assert str(caught.value) == told
    assert newest(tmp_path) == (first, []) and list(tmp_path.iterdir()) == [first]


def test_what_cannot_be_saved_is_named_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold '/a/1', a set"):
        save(tmp_path / "c", {"a": [1, {2}]})
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_four_files_is_left(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, 7)
    assert folder == tmp_path / "round-00007"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted((folder.name, *FILES))


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path / "c", {"a": 1})
    (tmp_path / "c" / "stray").touch()
    save(tmp_path / "c", {"a": 2})
    assert load(tmp_path / "c") == {"a": 2}
    assert not (tmp_path / "c" / "stray").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_killed_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed at a rename, the first of which puts the old one aside; or when the old one is deleted."""
    folder = folder_of(tmp_path, 3)
    save(folder, {"of": "old"})
    original, done = Path.rename, iter(range(renames))

    def rename(self: Path, target: Path) -> Path:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        save(folder, {"of": "new"})
        raise KeyboardInterrupt
    found, damaged = newest(tmp_path)
    assert found is not None and damaged == []
    assert load(found) == {"of": "new" if renames == 2 else "old"}
    save(folder, {"of": "next"})
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    (folder,) = written(tmp_path, 1)
    damage(folder / name)
    assert refused(folder) == f"{folder / name}: damaged (its checksum is not the manifest's)"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (folder,) = written(tmp_path, 1)
    (folder / name).unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: not a whole checkpoint: ") and f"{folder / name}" in message


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert refused(tmp_path / "round-00001").startswith(f"{tmp_path / 'round-00001'}: not a whole checkpoint")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2, "files": {}}'])
def test_a_manifest_that_says_nothing(tmp_path: Path, text: str) -> None:
    (folder,) = written(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    assert refused(folder).startswith(f"{folder}: not a whole checkpoint: ")


def test_another_format_is_refused(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert refused(folder) == f"{folder}: format 1, this version reads 2"


def test_newest_passes_over_the_damaged_and_says_so(tmp_path: Path) -> None:
    written(tmp_path, 2, 9, 10)
    flip(tmp_path / "round-00010" / "state.safetensors")
    (tmp_path / "round-00009" / "manifest.json").unlink()
    found, damaged = newest(tmp_path)
    assert found == tmp_path / "round-00002"
    assert [("round-00010" in damaged[0]), ("round-00009" in damaged[1])] == [True, True] and len(damaged) == 2


def test_newest_and_prune_go_by_the_number(tmp_path: Path) -> None:
    written(tmp_path, 99999, 100000)
    (tmp_path / "round-0000x").mkdir()
    assert newest(tmp_path) == (tmp_path / "round-100000", [])
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0000x", "round-100000"]


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "no such folder") == (None, [])


def test_what_a_killed_save_left_is_no_checkpoint_and_no_hindrance(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    (tmp_path / "round-00002").rename(tmp_path / "round-00002.tmp")
    assert newest(tmp_path) == (tmp_path / "round-00001", [])
    written(tmp_path, 2)
    assert newest(tmp_path) == (tmp_path / "round-00002", [])
    assert not (tmp_path / "round-00002.tmp").exists()


def test_what_was_just_written_stays_and_later_ones_go_whatever_they_hold(tmp_path: Path) -> None:
    """The run went back to round 4, and wrote 5 anew."""
    written(tmp_path, 4, 6, 8)
    truncate(tmp_path / "round-00006" / "state.json")
    (five,) = written(tmp_path, 5)
    prune(tmp_path, 1, until=5)
    assert list(tmp_path.iterdir()) == [five] and newest(tmp_path) == (five, [])


def test_a_checkpoint_that_was_written_elsewhere_is_not_missed(tmp_path: Path) -> None:
    """The central actor's machine has round 5; of the driver's folder, the newest two stay."""
    written(tmp_path, 2, 3, 4, 7)
    prune(tmp_path, 2, until=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00003", "round-00004"]


def test_a_run_that_went_back_past_damaged_checkpoints_ends_with_its_own(
    tiny_config: Callable[..., Config], tmp_path: Path, stopped_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    settings = ["rounds=3", "checkpoint.keep=1"]
    run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}"))
    with stopped_after(1):
        run(tiny_config(*settings, f"output={tmp_path / 'run'}"))
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in (2, 9):
        shutil.copytree(folder_of(checkpoints, 1), folder_of(checkpoints, later))
        truncate(folder_of(checkpoints, later) / "state.safetensors")
    resume(tmp_path / "run")
    assert newest(checkpoints) == (folder_of(checkpoints, 3), [])
    assert results(tmp_path / "run") == results(tmp_path / "undisturbed")


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    written(tmp_path, 1, 9, 10, 11)
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00010", "round-00011"]
    prune(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 2


def test_tensors_come_back_as_they_lay_in_memory(tmp_path: Path) -> None:
    across, odd = torch.arange(6.0).view(2, 3).t(), torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    tree = {"one": torch.ones(1), "across": across, "odd": odd, "flat": torch.arange(3.0), "few": across[:, :1]}
    save(tmp_path / "round-00001", tree)
    loaded = load(tmp_path / "round-00001")
    for name, value in tree.items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].data_ptr() % 64 == torch.ones(1).data_ptr() % 64 == 0
        if name != "few":  # which had gaps
            assert loaded[name].stride() == value.stride()
