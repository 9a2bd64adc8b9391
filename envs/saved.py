"""Saved splits, read again: whether a file is whole, and of these images. ``fedsim.env.save_partition`` writes them."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.env import PARTITION_ARRAYS, Ragged
from fedsim.errors import DataError

from .archive import one_line


def labels_crc32(labels: np.ndarray) -> int:
    """Tells the same images in the same order from others, as far as labels can."""
    return zlib.crc32(np.ascontiguousarray(labels, dtype="<i8").tobytes())


def load_partition(path: str | Path, labels: np.ndarray) -> tuple[Ragged, Ragged]:
    """Reads a saved split and checks that it is one of these images.

    Raises:
        DataError: missing, damaged, or of other images.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):  # pathlib's raises where a name is too long
        raise DataError(f"env.partition_file: no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in PARTITION_ARRAYS if name not in file.files]
            if missing:
                raise DataError(f"partition {str(path)!r}: array {missing[0]!r} is missing")
            parts = [file[name] for name in PARTITION_ARRAYS]
        about = dict(json.loads(str(parts.pop())))
    except DataError:
        raise
    except Exception as error:  # what readers of a damaged archive raise is not documented
        raise DataError(f"partition {str(path)!r}: not a saved partition ({one_line(error)})") from None
    train, test = Ragged(*parts[:2]), Ragged(*parts[2:])
    mistake = _mistake(train, test, about, labels)
    if mistake:
        raise DataError(f"partition {str(path)!r}: {mistake}")
    return train, test


def _mistake(train: Ragged, test: Ragged, about: dict[str, Any], labels: np.ndarray) -> str:
    if about.get("images") != len(labels):
        return f"made for {about.get('images')} images, the source has {len(labels)}"
    for name, lists in (("train", train), ("test", test)):
        if not _whole(lists):
            return f"the {name} lists are damaged"
        if lists.sizes.min() == 0:
            return f"client {lists.sizes.argmin()} has no {name} images"
        if lists.values.min() < 0 or lists.values.max() >= len(labels):
            return f"{name} index {lists.values[(lists.values < 0) | (lists.values >= len(labels))][0]} is out of range"
    if len(train) != len(test):
        return f"train lists of {len(train)} clients, test lists of {len(test)}"
    if len(np.unique(train.values)) < len(train.values):
        return "a training image is held twice"
    if np.intersect1d(train.values, test.values).size:
        return "an image is in both a train and a test list"
    if about.get("labels_crc32") != labels_crc32(labels):
        return "made for other labels, or the same images in another order"
    return ""


def _whole(lists: Ragged) -> bool:
    values, offsets = lists.values, lists.offsets
    whole_numbers = values.dtype == np.int64 and offsets.dtype == np.int64 and values.ndim == offsets.ndim == 1
    return bool(whole_numbers and len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(values)
                and (offsets[1:] >= offsets[:-1]).all())  # fmt: skip
