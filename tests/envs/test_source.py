"""Reading trees of class folders, safely, and decoding them once."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import KINDS, Tree, encoded, png

from fedsim import cache
from fedsim.cache import cached, room
from fedsim.envs import archive
from fedsim.envs.source import decode_cache, existing, listing
from fedsim.errors import DataError

PLAIN = {"cat/1.png": png((1, 0, 0)), "cat/2.png": png((2, 0, 0)), "ant/1.png": png((3, 0, 0))}


def refused(path: Path) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(DataError) as caught:
        listing(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_class_folders(tree: Tree, kind: str) -> None:
    found = listing(tree(PLAIN, kind))
    assert found.classes == ("ant", "cat")
    assert found.members == ("ant/1.png", "cat/1.png", "cat/2.png")
    assert found.labels.tolist() == [0, 1, 1]
    assert (found.layout, found.domains, found.is_test) == ("<class>", None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_around_all_are_skipped(tree: Tree, kind: str) -> None:
    found = listing(tree({f"data/set/{name}": content for name, content in PLAIN.items()}, kind))
    assert (found.layout, found.classes) == ("<class>", ("ant", "cat"))
    assert found.members[0] == "data/set/ant/1.png"


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation", "Test"])
def test_splits(tree: Tree, test: str) -> None:
    files = {f"{part}/{name}": content for part in ("train", test) for name, content in PLAIN.items()}
    found = listing(tree(files))
    assert (found.layout, found.classes, found.domains) == ("<split>/<class>", ("ant", "cat"), None)
    assert found.is_test is not None
    assert {name for name, tested in zip(found.members, found.is_test, strict=True) if tested} == {
        f"{test}/{name}" for name in PLAIN
    }


def test_beside_a_test_split_validation_is_for_training(tree: Tree) -> None:
    files = {f"{part}/{name}": content for part in ("train", "val", "test") for name, content in PLAIN.items()}
    found = listing(tree(files))
    assert found.is_test is not None
    assert found.is_test.tolist() == [name.startswith("test/") for name in found.members]


def test_domains(tree: Tree) -> None:
    found = listing(tree({f"{part}/{name}": content for part in ("photo", "ink") for name, content in PLAIN.items()}))
    assert (found.layout, found.classes, found.is_test) == ("<domain>/<class>", ("ant", "cat"), None)
    assert found.domains is not None and found.domains.tolist() == ["ink"] * 3 + ["photo"] * 3


def test_splits_of_domains(tree: Tree) -> None:
    parts = ("train/ink", "train/photo", "test/ink", "test/photo")
    found = listing(tree({f"{part}/{name}": content for part in parts for name, content in PLAIN.items()}))
    assert (found.layout, found.classes) == ("<split>/<domain>/<class>", ("ant", "cat"))
    assert found.domains is not None and found.domains.tolist() == (["ink"] * 3 + ["photo"] * 3) * 2
    assert found.is_test is not None and found.is_test.tolist() == [True] * 6 + [False] * 6


def test_folders_of_domains_are_merged_and_their_classes_stay_apart(tree: Tree) -> None:
    found = listing(tree({f"{part}/{name}": png() for part in ("back/greek", "eval/latin") for name in PLAIN}))
    assert found.layout == "<folder>/<domain>/<class>"
    assert found.classes == ("greek/ant", "greek/cat", "latin/ant", "latin/cat")
    assert found.labels.tolist() == [0, 1, 1, 2, 3, 3]
    assert found.is_test is None
    assert found.domains is not None and found.domains.tolist() == ["greek"] * 3 + ["latin"] * 3


def test_a_class_called_train_is_a_class(tree: Tree) -> None:
    assert listing(tree({"train/1.png": png(), "tree/1.png": png()})).classes == ("train", "tree")


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_files_and_other_files_are_left_out(tree: Tree, kind: str) -> None:
    clutter = [".git/x.png", "__MACOSX/cat/._1.png", "cat/.DS_Store", "cat/notes.txt", "about.md"]
    assert listing(tree({**PLAIN, **dict.fromkeys(clutter, b"")}, kind)).members == (
        "ant/1.png",
        "cat/1.png",
        "cat/2.png",
    )


def test_all_extensions(tree: Tree) -> None:
    names = [f"a/{at}.{kind}" for at, kind in enumerate(["PNG", "jpg", "Jpeg", "bmp", "webp", "gif", "tif"])]
    assert listing(tree(dict.fromkeys(names, png()))).members == tuple(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_folder_without_images(tree: Tree, kind: str) -> None:
    assert "folder 'dog' has no images" in refused(tree({**PLAIN, "dog/": b""}, kind))


def test_a_class_folder_with_other_files_only(tree: Tree) -> None:
    assert "folder 'dog' has no images" in refused(tree({**PLAIN, "dog/readme.txt": b"?"}, "zip"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_at_all(tree: Tree, kind: str) -> None:
    assert "has no images (.png .jpg" in refused(tree({"readme.txt": b"?"}, kind))


def test_train_and_test_of_different_classes(tree: Tree) -> None:
    files = {"train/cat/1.png": png(), "train/dog/1.png": png(), "test/cat/1.png": png()}
    assert refused(tree(files)).endswith("class 'dog' is in train but not in test")
    assert refused(tree({**files, "test/eel/1.png": png(), "test/dog/1.png": png()}, name="more")).endswith(
        "class 'eel' is in test but not in train"
    )


def test_a_folder_beside_the_splits(tree: Tree) -> None:
    files = {"train/cat/1.png": png(), "test/cat/1.png": png(), "extra/cat/1.png": png()}
    assert refused(tree(files)).endswith("folder 'extra' lies beside the splits test, train but is none")


def test_two_splits_that_are_no_pair(tree: Tree) -> None:
    files = {"val/cat/1.png": png(), "valid/cat/1.png": png()}
    assert refused(tree(files)).endswith("the splits val, valid are no pair of train and test")


def test_images_at_different_depths(tree: Tree) -> None:
    assert "'x/cat/3.png' is not as deep in folders as 'ant/1.png'" in refused(tree({**PLAIN, "x/cat/3.png": png()}))


def test_an_image_outside_of_any_folder(tree: Tree) -> None:
    assert refused(tree({**PLAIN, "x.png": png()})).endswith("'x.png' lies in no class folder")
    assert refused(tree({"1.png": png()}, name="flat")).endswith("'1.png' lies in no class folder")


def test_too_deep(tree: Tree) -> None:
    files = {"a/b/c/d/1.png": png(), "b/b/c/d/1.png": png()}
    assert refused(tree(files)).endswith("'a/b/c/d' is too deep; at most <split>/<domain>/<class>")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", ["../cat/1.png", "cat/../../1.png", "/cat/1.png", "C:/cat/1.png", "cat\\..\\1.png"])
def test_paths_that_point_outside(tree: Tree, kind: str, name: str) -> None:
    assert "points outside of the archive, which is refused" in refused(tree({**PLAIN, name: png()}, kind))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tree: Tree, kind: bytes) -> None:
    path = tree(PLAIN, "tar")
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("cat/3.png")
        link.type, link.linkname = kind, "/etc/passwd"
        file.addfile(link)
    assert refused(path).endswith("'cat/3.png' is a link or a device, which is refused")


def test_a_link_in_a_zip(tree: Tree) -> None:
    path = tree(PLAIN, "zip")
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("cat/3.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    assert refused(path).endswith("'cat/3.png' is a link, which is refused")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.7, 0.9])
def test_a_truncated_archive(tree: Tree, kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    path = tree({f"cat/{at:02}.png": encoded(pixels) for at, pixels in enumerate(noise)}, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "damaged" in refused(path)


def test_a_tar_cut_between_two_members(tree: Tree) -> None:
    path = tree(PLAIN, "tar")
    path.write_bytes(path.read_bytes()[: 2 * 1024])  # each member takes a header and a block of content
    assert refused(path).endswith("is damaged: its end is missing")


def test_a_member_twice(tree: Tree) -> None:
    path = tree(PLAIN, "zip")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("cat/1.png", png())
    assert refused(path).endswith("has two members called 'cat/1.png'")


def test_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "images.rar"
    path.write_bytes(b"Rar!")
    assert refused(path).endswith("is neither a folder nor an archive (.zip .tar .tar.gz .tgz)")


def test_a_link_to_the_folder_above_ends(tree: Tree) -> None:
    path = tree(PLAIN)
    (path / "cat" / "again").symlink_to(path)
    assert "is not as deep in folders" in refused(path)


def test_a_path_with_a_typing_mistake(tree: Tree) -> None:
    path = tree(PLAIN, "zip")
    with pytest.raises(DataError) as caught:
        existing(str(path.parent / "sourc.zip"))
    assert str(caught.value).endswith("sourc.zip', did you mean 'source.zip'?")


def test_a_path_without_anything_like_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        existing(str(tmp_path / "nowhere" / "x"))
    assert str(caught.value) == f"env.path: no file or folder {str(tmp_path / 'nowhere' / 'x')!r}"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    assert existing("~/set") == tmp_path / "set"


# ---- decoding


def decoded(path: Path, px: int, folder: Path) -> np.ndarray:
    return np.load(decode_cache(listing(path), px, folder))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_in_the_listing_s_order(tree: Tree, tmp_path: Path, kind: str) -> None:
    images = decoded(tree(PLAIN, kind), 8, tmp_path / "cache")
    assert images.shape == (3, 3, 4, 4) and images.dtype == np.uint8
    assert images[:, :, 0, 0].tolist() == [[3, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert (images == images[:, :, :1, :1]).all()


def test_the_centre_is_cut_out(tree: Tree, tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(8)
    images = decoded(tree({"a/1.png": encoded(pixels)}), 4, tmp_path / "cache")
    assert images[0, 0].tolist() == [[2, 3, 4, 5]] * 4


def test_larger_images_are_made_smaller_without_aliasing(tree: Tree, tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(200)
    images = decoded(tree({"a/1.png": encoded(board.astype(np.uint8))}), 8, tmp_path / "cache")
    assert images.shape == (1, 3, 8, 8)
    assert abs(images.astype(int) - 100).max() <= 3  # picking single pixels would give 0 or 200


def test_sizes_that_differ_are_all_brought_to_px(tree: Tree, tmp_path: Path) -> None:
    files = {"a/1.png": png((9, 9, 9), (4, 4)), "a/2.png": png((7, 7, 7), (6, 6)), "a/3.png": png((5, 5, 5), (40, 20))}
    images = decoded(tree(files), 8, tmp_path / "cache")
    assert images.shape == (3, 3, 8, 8)
    assert images[:, 0, 3, 3].tolist() == [9, 7, 5]


def test_small_images_that_are_no_squares_are_brought_to_px(tree: Tree, tmp_path: Path) -> None:
    assert decoded(tree({"a/1.png": png(size=(4, 6))}), 8, tmp_path / "cache").shape == (1, 3, 8, 8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tree: Tree, tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    images = decoded(tree({f"a/1.{'tif' if mode == 'CMYK' else 'png'}": buffer.getvalue()}), 4, tmp_path / "cache")
    assert (images == 255).all()


NOISE = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("content", [b"", b"no image", NOISE[:20], NOISE[:900], NOISE[:60] + b"\0" * 40 + NOISE[100:]])
def test_a_damaged_image_is_named_and_leaves_nothing_behind(tree: Tree, tmp_path: Path, content: bytes) -> None:
    path = tree({**PLAIN, "cat/bad.png": content})
    with pytest.raises(DataError, match=r"image 'cat/bad\.png' cannot be decoded"):
        decoded(path, 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_image_that_another_program_would_have_to_draw(tree: Tree, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    with pytest.raises(DataError, match=r"image 'a/1\.png' cannot be decoded: it is no image of a known format"):
        decoded(tree({"a/1.png": buffer.getvalue()}), 4, tmp_path / "cache")


def test_a_decompression_bomb(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"image 'a/1.png' cannot be decoded: .*decompression bomb"):
        decoded(tree({"a/1.png": png(size=(20, 20))}), 8, tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_above_the_bound(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    path = tree({**PLAIN, "cat/big.png": bytes(1001)}, kind)
    with pytest.raises(DataError, match=r"'cat/big\.png' has 1001 bytes, more than 1000"):
        decoded(path, 8, tmp_path / "cache")


ARCHIVES = KINDS[1:]


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("name", ["about.bin", ".cache/about.bin"])
def test_a_file_above_the_bound_that_is_no_image(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    path = tree({**PLAIN, name: bytes(1001)}, kind)
    assert refused(path).endswith(f"{name!r} has 1001 bytes, more than 1000")


def test_a_large_file_in_a_folder_is_not_read_and_not_refused(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    assert len(listing(tree({**PLAIN, "about.bin": bytes(1001)})).members) == 3


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tgz"])
def test_an_archive_that_unfolds_into_too_much(tree: Tree, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1000)
    path = tree({**PLAIN, **{f"cat/{at}.bin": bytes(10**6) for at in range(20)}}, kind)
    most = 100 * path.stat().st_size
    assert most < 20 * 10**6
    assert refused(path).endswith(f"its files have more than {most} bytes, as those of a decompression bomb")
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 21 * 10**6)
    assert len(listing(path).members) == 3


def test_an_archive_of_five_gib_of_images_is_none_that_unfolds_into_too_much(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        for at in range(80):  # their contents are holes
            image = tarfile.TarInfo(f"cat/{at:02}.png")
            image.size = archive.MAX_BYTES
            file.write(image.tobuf())
            file.seek(image.size, os.SEEK_CUR)
        file.write(bytes(1024))
    assert path.stat().st_size > 5 * 2**30
    assert len(listing(path).members) == 80


def test_an_image_that_is_larger_than_its_zip_declares(tree: Tree, tmp_path: Path) -> None:
    size = 2**25 + 1
    path = tree({"cat/1.png": bytes(size)}, "zip")
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 9)))
    tracemalloc.start()
    with pytest.raises(DataError, match="cannot be read, it may be damaged: Bad CRC-32"):
        decoded(path, 8, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_an_image_of_a_damaged_zip(tree: Tree, tmp_path: Path) -> None:
    path = tree(PLAIN, "zip")
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read, it may be damaged"):
        decoded(path, 8, tmp_path / "cache")


# ---- the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each decoding."""
    calls: list[int] = []

    def create(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        calls.append(shape[0])
        return cache.create(path, shape)

    monkeypatch.setattr("fedsim.envs.source.create", create)
    return calls


def test_an_entry_is_used_again(tree: Tree, tmp_path: Path, counted: list[int]) -> None:
    found = listing(tree(PLAIN))
    first, again = (decode_cache(found, 8, tmp_path / "cache") for _ in range(2))
    assert first == again and len(counted) == 1
    decode_cache(found, 2, tmp_path / "cache")
    assert len(counted) == 2


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_changed_source_is_decoded_anew(tree: Tree, tmp_path: Path, counted: list[int], kind: str) -> None:
    old = decode_cache(listing(tree(PLAIN, kind)), 8, tmp_path / "cache")
    new = decode_cache(listing(tree({**PLAIN, "ant/2.png": png()}, kind)), 8, tmp_path / "cache")
    assert counted == [3, 4] and old != new


def test_the_manifest(tree: Tree, tmp_path: Path) -> None:
    image_file = decode_cache(listing(tree(PLAIN)), 8, tmp_path / "cache")
    facts = json.loads(image_file.with_suffix(".json").read_text())
    assert facts["shape"] == [3, 3, 4, 4] and facts["bytes"] == image_file.stat().st_size
    assert (facts["about"]["count"], facts["about"]["classes"], facts["about"]["px"]) == (3, 2, 8)
    assert sorted(path.name for path in image_file.parent.iterdir()) == sorted(
        [image_file.name, image_file.with_suffix(".json").name]
    )


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest cut", "manifest gone", "manifest of another"])
def test_a_broken_entry_is_made_anew(tree: Tree, tmp_path: Path, counted: list[int], damage: str) -> None:
    found = listing(tree(PLAIN))
    image_file = decode_cache(found, 8, tmp_path / "cache")
    manifest, wanted = image_file.with_suffix(".json"), image_file.read_bytes()
    broken = manifest if "manifest" in damage else image_file
    if "gone" in damage:
        broken.unlink()
    elif "cut" in damage:
        broken.write_bytes(broken.read_bytes()[:-5])
    else:
        manifest.write_text(manifest.read_text().replace('"px": 8', '"px": 9'))
    assert decode_cache(found, 8, tmp_path / "cache") == image_file
    assert len(counted) == 2 and image_file.read_bytes() == wanted


def test_a_flipped_bit_is_found_on_request(tree: Tree, tmp_path: Path, counted: list[int]) -> None:
    found = listing(tree(PLAIN))
    image_file = decode_cache(found, 8, tmp_path / "cache")
    content = bytearray(image_file.read_bytes())
    wanted, content[-1] = bytes(content), content[-1] ^ 1
    image_file.write_bytes(content)
    decode_cache(found, 8, tmp_path / "cache")
    assert len(counted) == 1
    decode_cache(found, 8, tmp_path / "cache", verify=True)
    assert len(counted) == 2 and image_file.read_bytes() == wanted


def test_two_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path) -> None:
        cache.create(path, (2, 3, 4, 4))[:] = 7

    def write_while_another_does(path: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            others.append(cached(tmp_path, "x", {"a": 1}, write))
        write(path)

    others: list[Path] = []
    assert [cached(tmp_path, "x", {"a": 1}, write_while_another_does)] == others
    assert (np.load(others[0]) == 7).all()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_line(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"cache .* cannot be written: .*No space left on device"):
        decoded(tree(PLAIN), 8, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_where_nothing_can_be_written_is_no_full_disk(tmp_path: Path) -> None:
    assert room(tmp_path / "not" / "yet") > 0 and not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"^cache '/proc/x' cannot be written: "):
        room(Path("/proc/x"))


def test_a_cache_that_cannot_be_a_folder(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        decoded(tree(PLAIN), 8, tmp_path / "cache")
