"""Trees of class folders, read from a folder or straight from a ``.zip``, ``.tar`` or ``.tar.gz``, and decoded once.

The tree's form decides what is a class, a domain or a split; ``archive.py`` reads the files.
"""

from __future__ import annotations

import io
import itertools
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedsim.cache import cached, create
from fedsim.errors import DataError, nearest

from .archive import Member, contents, fingerprint, members, one_line

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif")
SPLITS = {"train": False, "test": True, "val": True, "valid": True, "validation": True}
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")  # whatever a file's name says; others run other programs
READING = 1  # raise it with every change of the images' order or pixels: it keys the cache


@dataclass(frozen=True)
class Listing:
    """The images of a tree of class folders, by name.

    Attributes:
        path: the folder or archive.
        members: ``[N]``, the images' paths inside it.
        labels: ``[N] int64``, in the order of the sorted class names.
        classes: the class names, sorted.
        domains: ``[N]``, each image's domain, where the tree has domains.
        is_test: ``[N] bool``, where the tree has a test split.
        layout: the tree's form, such as ``<split>/<class>``.
        fingerprint: changes when the source does.
    """

    path: Path
    members: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    domains: np.ndarray | None
    is_test: np.ndarray | None
    layout: str
    fingerprint: str


def existing(path: str) -> Path:
    """``env.path`` as a path that exists.

    Raises:
        DataError: it is not set, or there is no such file; names the nearest one beside it.
    """
    if not path:
        raise DataError("env.path is not set: a folder, .zip, .tar or .tar.gz of class folders")
    found = Path(os.path.expanduser(path))
    if os.path.exists(found):  # pathlib's raises where a name is too long
        return found
    beside = [entry.name for entry in found.parent.iterdir()] if os.path.isdir(found.parent) else []
    hint = nearest(found.name, beside)
    raise DataError(f"env.path: no file or folder {path!r}{hint if 'did you mean' in hint else ''}")


def listing(path: Path) -> Listing:
    """Lists a tree of class folders.

    Its layout is one of ``<class>``, ``<split>/<class>``, ``<domain>/<class>``, ``<split>/<domain>/<class>`` and
    ``<folder>/<domain>/<class>``, with images in the class folders; folders around all of it are skipped. A split is
    called train, test, val, valid or validation; beside ``test``, the last three count as train. In the last layout
    (Omniglot), a class belongs to its domain and is named ``<domain>/<class>``; elsewhere domains share their classes.

    Raises:
        DataError: no images, an unsafe or damaged archive, an empty folder, or no such layout.
    """
    found = members(path)
    images = sorted((m for m in found if not m.is_folder and m.name.lower().endswith(IMAGES)), key=lambda m: m.name)
    if not images:
        raise DataError(f"{str(path)!r} has no images ({' '.join(IMAGES)}) in class folders")
    names = [image.name for image in images]
    for first, second in itertools.pairwise(names):
        if first == second:
            raise DataError(f"{str(path)!r} has two members called {first!r}")
    parts = _below_root(path, names)
    _no_empty_folder(path, found, names, depth=names[0].count("/"))
    layout, classes, domains, is_test = _layout(path, parts)
    known, labels = np.unique(classes, return_inverse=True)
    _same_classes(path, known, labels, is_test)
    return Listing(path, tuple(names), labels.astype(np.int64), tuple(map(str, known)), domains, is_test, layout,
                   fingerprint(path, images))  # fmt: skip


def decode_cache(source: Listing, px: int, cache: Path, verify: bool = False) -> Path:
    """Decodes all images once into ``[N, 3, px, px] uint8`` RGB, in the order of the listing.

    An image's shorter side becomes ``px`` (bicubic, antialiased), then its centre is cut out. Where all images are
    squares of one smaller size, they stay as they are.

    Args:
        source: what to decode.
        px: edge of the model's input.
        cache: folder of the cache.
        verify: compares an existing entry's sha256, not only its size.

    Raises:
        DataError: an image or the archive is damaged, or the cache cannot be written.
    """

    def write(path: Path) -> None:
        edge = _first_edge(source, px)
        if not _decode(source, edge, path, only_this_size=edge < px):
            _decode(source, px, path, only_this_size=False)

    about = {"source": str(source.path.resolve()), "fingerprint": source.fingerprint, "px": px, "reading": READING,
             "count": len(source.members), "classes": len(source.classes)}  # fmt: skip
    return cached(cache, source.path.name.split(".")[0] or "images", about, write, verify)


def _decode(source: Listing, edge: int, path: Path, only_this_size: bool) -> bool:
    images = create(path, (len(source.members), 3, edge, edge))
    where = {name: at for at, name in enumerate(source.members)}
    for name, content in contents(source.path, where):
        pixels = _pixels(source.path, name, content, edge, only_this_size)
        if pixels is None:
            return False
        images[where[name]] = pixels.transpose(2, 0, 1)
    return True


def _first_edge(source: Listing, px: int) -> int:
    """The edge of the first image stored if it is a square smaller than ``px``, else ``px``."""
    name, content = next(contents(source.path, source.members))
    with _image(source.path, name, content) as image:
        width, height = image.size
    return width if width == height and width < px else px


def _pixels(path: Path, name: str, content: bytes, edge: int, only_this_size: bool) -> np.ndarray | None:
    """``[edge, edge, 3] uint8``; None where only images of this size are wanted and this is another."""
    with _image(path, name, content) as image:
        if only_this_size and image.size != (edge, edge):
            return None
        return np.asarray(square(image.convert("RGB"), edge))


@contextmanager
def _image(path: Path, name: str, content: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{str(path)!r}: image {name!r} cannot be decoded: it is no image of a known format") from None
    except Exception as error:  # what decoders of a damaged image raise is not documented
        raise DataError(f"{str(path)!r}: image {name!r} cannot be decoded: {one_line(error)}") from None


def square(image: Image.Image, edge: int) -> Image.Image:
    """The shorter side brought to ``edge``, then the centre of the longer one."""
    if image.size == (edge, edge):
        return image
    scale = edge / min(image.size)
    width, height = (max(edge, round(side * scale)) for side in image.size)
    left, top = (width - edge) // 2, (height - edge) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + edge, top + edge))


def _below_root(path: Path, names: list[str]) -> list[tuple[str, ...]]:
    """Each image's folders, without those that all share; the class folder stays."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    for name, parts in zip(names, folders, strict=True):
        if not parts:
            raise DataError(f"{str(path)!r}: {name!r} lies in no class folder")
        if len(parts) != len(folders[0]):
            raise DataError(f"{str(path)!r}: {name!r} is not as deep in folders as {names[0]!r}")
    shared = 0
    while shared < len(folders[0]) - 1 and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    return [parts[shared:] for parts in folders]


def _no_empty_folder(path: Path, found: list[Member], names: list[str], depth: int) -> None:
    used = {parent for name in names for parent in _parents(name)}
    folders = {member.name for member in found if member.is_folder}
    for folder in sorted(folders | {parent for member in found for parent in _parents(member.name)}):
        if folder and folder not in used and folder.count("/") < depth:
            raise DataError(f"{str(path)!r}: folder {folder!r} has no images")


def _parents(name: str) -> Iterator[str]:
    while name := posixpath.dirname(name):
        yield name


def _layout(path: Path, parts: list[tuple[str, ...]]) -> tuple[str, list[str], np.ndarray | None, np.ndarray | None]:
    """Layout, class names ``[N]``, domains and test mask."""
    depth = len(parts[0])
    tops = {part[0] for part in parts}
    splits = {top for top in tops if top.lower() in SPLITS} if depth > 1 else set()
    if depth > 3:
        raise DataError(f"{str(path)!r}: {'/'.join(parts[0])!r} is too deep; at most <split>/<domain>/<class>")
    if splits and splits != tops:
        odd = min(tops - splits)
        raise DataError(f"{str(path)!r}: folder {odd!r} lies beside the splits {', '.join(sorted(splits))} but is none")
    classes = [part[-1] for part in parts]
    domains = np.array([part[-2] for part in parts]) if depth - bool(splits) > 1 else None
    if depth == 3 and not splits:
        return "<folder>/<domain>/<class>", ["/".join(part[1:]) for part in parts], domains, None
    layout = "/".join(["<split>"] * bool(splits) + ["<domain>"] * (domains is not None) + ["<class>"])
    return layout, classes, domains, _is_test(path, [part[0].lower() for part in parts]) if splits else None


def _is_test(path: Path, tops: list[str]) -> np.ndarray:
    has_test = "test" in tops
    is_test = np.array([top == "test" if has_test else SPLITS[top] for top in tops])
    if is_test.all() or not is_test.any():
        raise DataError(f"{str(path)!r}: the splits {', '.join(sorted(set(tops)))} are no pair of train and test")
    return is_test


def _same_classes(path: Path, classes: np.ndarray, labels: np.ndarray, is_test: np.ndarray | None) -> None:
    if is_test is None:
        return
    train, test = set(labels[~is_test].tolist()), set(labels[is_test].tolist())
    for label in sorted(train ^ test):
        has, lacks = ("train", "test") if label in train else ("test", "train")
        raise DataError(f"{str(path)!r}: class {str(classes[label])!r} is in {has} but not in {lacks}")
