"""Drawn shapes: an env that needs no data. A class is a shape with a texture; a client has a style of its own.

The style (three colours, a range of rotations, a kind of ground) differs between clients and says nothing of the class.
Shape-texture pairs that no client holds, in many styles, are the public data.

Shapes: n images drawn together, px their edge.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedsim.cache import cached, create, room
from fedsim.env import Env, FederatedData, Ragged
from fedsim.errors import DataError
from fedsim.rng import stream
from fedsim.schema import setting

from .partition import PartitionConfig, facts, partition

DRAWING = 2  # raise it with every change of a pixel: it keys the cache
CHUNK = 256  # images drawn at once: their planes stay in the processor's cache
PUBLIC_STYLES = 64

Plane = np.ndarray  # [n, px, px] float32


def _star(u: Plane, v: Plane) -> Plane:
    """Five points: the angle folded onto one half point, then the distance to its straight edge."""
    radius, fifth = np.hypot(u, v), np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)
    tip, notch = np.array([1.1, 0.0]), 0.48 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    return (radius * np.cos(angle) - np.float32(tip[0])) * np.float32(edge[1]) - radius * np.sin(angle) * np.float32(
        edge[0]
    )


def _heart(u: Plane, v: Plane) -> Plane:
    """A square on its corner, and a disc on each of its upper sides."""
    return np.minimum(np.hypot(np.abs(u) - 0.39, v + 0.29) - 0.55, (np.abs(u) + np.abs(v - 0.1) - 0.78) * 0.707)


# Signed distances, below 0 inside; u to the right, v downwards, a shape about 1 in radius.
SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.92,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": lambda u, v: np.maximum(v - 0.6, 0.866 * np.abs(u) - 0.5 * v - 0.52),
    "star": _star,
    "cross": lambda u, v: np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.32, np.maximum(np.abs(u), np.abs(v)) - 0.96),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.27,
    "heart": _heart,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 0.98, 0.78 - np.hypot(u - 0.5, v)),
}

# Which of the two inks: above 0 the second. In the shape's own coordinates, so that texture and outline turn together.
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "solid": lambda u, v: np.full_like(u, -1.0),
    "stripes": lambda u, v: np.sin(10.5 * v),
    "dots": lambda u, v: 1.5 * (np.cos(10 * u) + np.cos(10 * v)) - 1.0,
    "checker": lambda u, v: 2.0 * np.sin(6.6 * u) * np.sin(6.6 * v),
    "target": lambda u, v: np.sin(11.0 * np.hypot(u, v) + 0.6),
}
COMBINATIONS = len(SHAPES) * len(TEXTURES)


class Shapes(Env):
    """Shapes drawn by the project itself: no data, no download."""

    @dataclass(frozen=True)
    class Config(PartitionConfig):
        """How many images of what; the rest as in ``PartitionConfig``, with defaults for a first run."""

        num_clients: int = setting(24, "clients, each with a style of its own", low=1, high=100_000_000)
        partition: str = setting(
            "pathological",
            "as in PartitionConfig; each client's images are drawn for it, so neither 'domain' nor 'file'",
            choices=("iid", "dirichlet", "pathological"),
        )
        classes_per_client: int = setting(4, "classes of each client under 'pathological'", low=1)
        samples_per_client: int = setting(
            60, "training images of a client; under 'dirichlet' the mean", low=1, high=100_000
        )
        test_samples_per_client: int = setting(20, "test images of a client, likewise", low=1, high=100_000)
        classes: int = setting(
            12, "classes that clients hold; the other shape-texture pairs are public", low=2, high=COMBINATIONS - 4
        )
        px: int = setting(
            32, "edge of the drawn images (or the model's input, where that is smaller)", low=16, high=512
        )
        public_per_class: int = setting(400, "public images of each class that no client holds", low=1, high=10_000)

    def build(self, seed: int, px: int, cache: Path) -> FederatedData:
        config, px = self.config, min(self.config.px, px)
        self._refuse_without_room(px, cache)
        labels, train, test = self._split(seed)
        owners = np.concatenate([np.repeat(np.arange(len(part)), part.sizes) for part in (train, test)])

        def write(path: Path) -> None:
            images, at = create(path, (len(labels), 3, px, px)), 0
            for drawn in _draw(labels, owners, px, seed, "shapes"):
                images[at : (at := at + len(drawn))] = drawn

        about = {"env": "shapes", "drawing": DRAWING, "seed": seed, **asdict(config), "px": px}
        image_file = cached(cache, "shapes", about, write)
        source = {"source": "drawn", "layout": "shape-texture", "classes": config.classes, "px": px}
        names = tuple(map(name, range(config.classes)))
        return FederatedData(image_file, labels, names, train, test, source | facts(labels, config, train, test))

    def public(self, px: int) -> tuple[np.ndarray, np.ndarray]:
        """Images of the classes that no client holds, in many styles; the same for every seed."""
        labels = np.repeat(np.arange(self.config.classes, COMBINATIONS), self.config.public_per_class)
        styles = np.arange(len(labels)) % PUBLIC_STYLES
        images = np.concatenate(list(_draw(labels, styles, min(self.config.px, px), 0, "shapes public")))
        return images, labels - self.config.classes

    def _refuse_without_room(self, px: int, cache: Path) -> None:
        config = self.config
        images = config.num_clients * (config.samples_per_client + config.test_samples_per_client)
        needed = 3 * px * px * images
        if needed > (free := room(cache)):
            told = f"{images} images take {needed / 2**30:.0f} GiB, {str(cache)!r} has {free / 2**30:.0f} GiB left"
            raise DataError(f"env.num_clients={config.num_clients}: {told}")

    def _split(self, seed: int) -> tuple[np.ndarray, Ragged, Ragged]:
        """Labels split as a source's would be; each client's share is then numbered anew, to be drawn in its style."""
        config = self.config
        sizes = np.array([config.samples_per_client, config.test_samples_per_client]) * config.num_clients
        pool = np.concatenate([np.arange(size) % config.classes for size in sizes])
        uncapped = replace(config, samples_per_client=0, test_samples_per_client=0)
        train, test = partition(pool, uncapped, seed, is_test=np.arange(len(pool)) >= sizes[0])
        first = len(train.values)
        labels = pool[np.concatenate([train.values, test.values])]
        numbered = np.arange(len(labels))
        return labels, Ragged(numbered[:first], train.offsets), Ragged(numbered[first:], test.offsets)


def pair(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and texture of a class: their numbers, 8 and 5, share no divisor, so 40 labels give all 40 pairs."""
    return label % len(SHAPES), label % len(TEXTURES)


def name(label: int) -> str:
    """``"solid circle"``."""
    shape, texture = pair(np.int64(label))
    return f"{list(TEXTURES)[texture]} {list(SHAPES)[shape]}"


def _draw(labels: np.ndarray, styles: np.ndarray, px: int, seed: int, purpose: str) -> Iterator[np.ndarray]:
    """Images in the order of ``labels``, in pieces ``[<= CHUNK, 3, px, px] uint8``."""
    poses = np.empty((len(labels), 8), dtype=np.float32)
    colours = np.empty((len(labels), 3, 3), dtype=np.float32)
    order = np.argsort(styles, kind="stable")
    starts = np.flatnonzero(np.diff(styles[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        rng = stream(seed, purpose, client=int(styles[rows[0]]))
        poses[rows], colours[rows] = _styled(rng, len(rows))
    grain = stream(seed, f"{purpose} grain")
    for at in range(0, len(labels), CHUNK):
        piece = slice(at, at + CHUNK)
        yield _rendered(labels[piece], poses[piece], colours[piece], px, grain)


def _styled(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses ``[n, 8]`` and colours ``[n, 3, 3]`` (two inks and the ground, RGB in 0 … 1) of one style's images."""
    lightness = rng.permutation([0.22, 0.55, 0.86]) + rng.uniform(-0.05, 0.05, 3)
    saturation = rng.uniform([0.5, 0.5, 0.1], [0.95, 0.95, 0.5])
    palette = [colorsys.hls_to_rgb(*hls) for hls in zip(rng.random(3), lightness, saturation, strict=True)]
    turn, spread, ground = rng.uniform(-np.pi / 2, np.pi / 2), rng.uniform(0.1, 0.7), rng.integers(4)
    poses = np.stack([
        turn + spread * rng.uniform(-1, 1, n),  # rotation
        rng.uniform(0.5, 0.78, n),  # radius, in half edges
        *rng.uniform(-0.2, 0.2, (2, n)),  # centre
        rng.uniform(-np.pi, np.pi, n),  # direction of the ground
        np.full(n, ground == 1), np.full(n, ground == 2), np.full(n, ground == 3),
    ], axis=1)  # fmt: skip
    return poses, np.array(palette) + rng.uniform(-0.06, 0.06, (n, 3, 3))


def _rendered(
    labels: np.ndarray, poses: np.ndarray, colours: np.ndarray, px: int, grain: np.random.Generator
) -> np.ndarray:
    turn, radius, right, down, direction, *ground = poses.T[:, :, None, None]
    x = ((np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1)[None, None, :]
    y = x.transpose(0, 2, 1)
    u = ((x - right) * np.cos(turn) + (y - down) * np.sin(turn)) / radius
    v = ((y - down) * np.cos(turn) - (x - right) * np.sin(turn)) / radius
    shapes, textures = pair(labels)
    # One pixel's step from inside to outside, and from ink to ink: edges without stairs.
    inside = np.clip(0.5 - _by_kind(shapes, list(SHAPES.values()), u, v) * radius * (px / 2), 0, 1)
    second = np.clip(0.5 + _by_kind(textures, list(TEXTURES.values()), u, v) * radius * (px / 20), 0, 1)
    along = x * np.cos(direction) + y * np.sin(direction)
    noise = grain.standard_normal(u.shape, dtype=np.float32)
    shade = 0.22 * along * ground[0] + 0.09 * np.sin(16 * along) * ground[1] + 0.10 * noise * ground[2]
    image = np.empty((len(labels), 3, px, px), dtype=np.float32)
    for channel in range(3):
        one, two, back = colours[:, :, channel].T[:, :, None, None]
        ink = one + (two - one) * second
        image[:, channel] = ink * inside + (back + shade) * (1 - inside) + 0.03 * noise
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _by_kind(kinds: np.ndarray, functions: list[Callable[[Plane, Plane], Plane]], u: Plane, v: Plane) -> Plane:
    values = np.empty_like(u)
    for kind in np.unique(kinds):
        chosen = kinds == kind
        values[chosen] = functions[kind](u[chosen], v[chosen])
    return values
