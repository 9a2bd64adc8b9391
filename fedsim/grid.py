"""What a sweep runs: variants, grids and random draws of settings, from a sweep file and a command line.

    runs = variants x the sweep file's grid x the command line's grid x samples of what is searched

Every run's configuration is resolved before the first one starts, so that every mistake is told at once. A sample is a
function of its number and the key: all variants and seeds meet the same ones, and more samples are the old ones and new
ones.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedsim import config as configuration
from fedsim.config import CONFIGS, Config
from fedsim.errors import ConfigError, nearest
from fedsim.rng import stream

KEYS = ("config", "settings", "variants", "grid", "samples")  # of a sweep file
SWEEPS = CONFIGS / "sweeps"
LONGEST_NAME = 100  # characters of a run folder's name

Settings = dict[str, str]  # key -> text, as it stands behind the = on the command line


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: its folder's.
        label: its row in the table; runs that differ in nothing but the seed share it.
        swept: what tells it from the others: its variant, and its values of the grid's keys.
        settings: all that is set on top of the configuration.
    """

    name: str
    label: str
    swept: Settings
    settings: Settings


@dataclass(frozen=True)
class Sweep:
    """What is to be run: a configuration, settings for all runs, named variants of it, and a grid.

    Attributes:
        config: the configuration's name or file.
        settings: of all runs, by key.
        variants: names, and what each of them sets.
        grid: values by key; a value may be a distribution (``Uniform``), of which there are ``samples``.
        samples: draws of each distribution.
    """

    config: str
    settings: Settings
    variants: dict[str, Settings]
    grid: dict[str, list[str]]
    samples: int = 0

    @property
    def short(self) -> dict[str, str]:
        """The grid's keys without their sections, where that tells them apart."""
        tails = Counter(_tail(key) for key in self.grid)
        return {key: _tail(key) if tails[_tail(key)] == 1 else key for key in self.grid}

    def runs(self) -> list[Run]:
        points = [point for texts in itertools.product(*self.grid.values()) for point in self._samples(texts)]
        points = [point for at, point in enumerate(points) if point not in points[:at]]
        found = [(variant, point) for variant in self.variants or {"": {}} for point in points]
        names = _folders([self._parts(variant, point) for variant, point in found])
        return [
            Run(
                name,
                " ".join(self._parts(variant, {key: point[key] for key in point if key != "seed"})) or "run",
                ({"variant": variant} if variant else {}) | point,
                _merged(self.settings, self.variants.get(variant, {}), point),
            )
            for name, (variant, point) in zip(names, found, strict=True)
        ]

    def _samples(self, texts: tuple[str, ...]) -> list[Settings]:
        """The points of one cell of the grid: as many as there are samples, where a value is a distribution."""
        values = dict(zip(self.grid, texts, strict=True))
        searched = {key: found for key, text in values.items() if (found := Uniform.read(text))}
        return [
            values | {key: distribution.sample(key, number) for key, distribution in searched.items()}
            for number in range(self.samples if searched else 1)
        ]

    def _parts(self, variant: str, point: Settings) -> list[str]:
        """``["fedavg", "lr=0.1", "seed=0"]``."""
        return [*([variant] if variant else []), *(f"{self.short[key]}={text}" for key, text in point.items())]

    def to_yaml(self) -> str:
        """A sweep file that reads as this sweep."""
        variants = {name: overrides(settings) for name, settings in self.variants.items()}
        tree = {"config": self.config, "settings": overrides(self.settings), "variants": variants, "grid": self.grid}
        return yaml.safe_dump(tree | {"samples": self.samples}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Uniform:
    """A distribution to search: ``uniform(low, high)``, ``loguniform(low, high)`` or ``randint(low, high)``.

    Attributes:
        kind: ``uniform``, ``loguniform`` or ``randint``; the last gives whole numbers below ``high``.
        low, high: the bounds.
    """

    kind: str
    low: float
    high: float

    @classmethod
    def read(cls, text: str) -> Uniform | None:
        """The distribution that a text names; ``None``: it is a value.

        Raises:
            ValueError: it is a distribution with bounds that make none.
        """
        match = re.fullmatch(r"(uniform|loguniform|randint)\((.*)\)", text.strip())
        if match is None:
            return None
        try:
            low, high = (float(bound) for bound in match[2].split(","))
        except ValueError:
            raise ValueError(f"{text!r} needs two numbers, as in {match[1]}(1, 8)") from None
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{text!r} needs finite bounds")
        if not (low < high and (low > 0 or match[1] != "loguniform")):
            raise ValueError(f"{text!r} needs {'0 < ' * (match[1] == 'loguniform')}low < high")
        if not math.isfinite(high - low):
            raise ValueError(f"{text!r} is too wide: high - low is infinite")
        if match[1] == "randint" and not (low.is_integer() and high.is_integer() and -(2**63) <= low < high <= 2**63):
            raise ValueError(f"{text!r} needs whole numbers from -2^63 to 2^63")
        return cls(match[1], low, high)

    def sample(self, key: str, number: int) -> str:
        """The value with this number, to four digits."""
        rng = stream(0, f"sweep.{key}", number)
        if self.kind == "randint":
            return str(rng.integers(int(self.low), int(self.high)))
        if self.kind == "loguniform":
            return f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.4g}"
        return f"{rng.uniform(self.low, self.high):.4g}"


def overrides(settings: Settings) -> list[str]:
    return [f"{key}={text}" for key, text in settings.items()]


def _tail(key: str) -> str:
    return key.rpartition(".")[2]


def _merged(*layers: Settings) -> Settings:
    """Later layers win, and come later: ``model.options.depth`` has to follow ``model.options``."""
    merged: Settings = {}
    for layer in layers:
        merged = {key: text for key, text in merged.items() if key not in layer} | layer
    return merged


def _folders(parts: Sequence[Sequence[str]]) -> list[str]:
    """A safe folder name for each; with a hash where two would share one, also where case does not count."""
    safe = ["-".join(_safe(part) for part in own) or "run" for own in parts]
    taken = Counter(name.lower() for name in safe)
    names = []
    for name, own in zip(safe, parts, strict=True):
        if len(name) > LONGEST_NAME or taken[name.lower()] > 1:
            digest = hashlib.sha256("\n".join(own).encode()).hexdigest()[:8]
            name = f"{name[: LONGEST_NAME - 9]}-{digest}"
        names.append(name)
    return names


def _safe(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "_", part).replace("=_", "=").strip("._")


def plan(path: str | None, texts: Sequence[str], samples: int | None = None) -> tuple[Sweep, dict[str, Config]]:
    """The sweep of a file (a sweep file, or a configuration) and a command line, and the configuration of each run.

    ``samples``: of what is searched; by default as many as the file says.

    Raises:
        ConfigError: with every mistake found, each of them once.
    """
    mistakes: list[str] = []
    sweep = _with_command_line(load(path, mistakes), texts, mistakes)
    sweep = _searched(replace(sweep, samples=sweep.samples if samples is None else samples), mistakes)
    configs = {}
    for run in sweep.runs() if sweep.config else []:
        try:
            configs[run.name] = configuration.load(sweep.config, overrides(run.settings))
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))
    return sweep, configs


def split(text: str) -> list[str]:
    """The values in ``a, [b, c], f(d, e), 'g, h'``: between commas outside of brackets and quotes; quotes go.

    Raises:
        ValueError: a value is empty, or a bracket or quote is not closed.
    """
    depth, quote, parts = 0, "", [""]
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (depth or not parts[-1].strip()):  # within a word it is an apostrophe
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    parts = [part.strip() for part in parts]
    if depth or quote:
        raise ValueError(f"a bracket or a quote in {text!r} is not closed")
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"an empty value in {text!r}")
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts]


def load(path: str | None, mistakes: list[str]) -> Sweep:
    tree = configuration.read(_find(path))
    if not tree.keys() & set(KEYS):
        return Sweep(path or "quickstart", {}, {}, {})
    mistakes += [f"{key}: unknown key{nearest(str(key), KEYS)}" for key in tree if key not in KEYS]
    config = tree.get("config")
    if not isinstance(config, str):
        mistakes.append("config: needs the name or the file of a configuration")
        config = ""
    variants = {}
    for name, settings in _section(tree, "variants", mistakes).items():
        if re.fullmatch(r"[\w+-]+", str(name)):
            variants[str(name)] = _pairs(settings, f"variants.{name}: ", mistakes)
        else:
            mistakes.append(f"variants: {name!r} is not a name of letters, digits, _, + and -")
    grid = {}
    for key, values in _section(tree, "grid", mistakes).items():
        if isinstance(values, list) and values:
            grid[str(key)] = [_as_text(value) for value in values]
        else:
            mistakes.append(f"grid.{key}: not a list of values")
    samples = tree.get("samples", 0)
    if type(samples) is not int or samples < 0:
        mistakes.append(f"samples: {samples!r} is not a number of samples")
        samples = 0
    return Sweep(config, _pairs(tree.get("settings"), "settings: ", mistakes), variants, grid, samples)


def _searched(sweep: Sweep, mistakes: list[str]) -> Sweep:
    """The sweep without distributions that are none; each of them is a mistake, and so is a search without samples."""
    grid: dict[str, list[str]] = {key: [] for key in sweep.grid}
    searched = False
    for key, texts in sweep.grid.items():
        for text in texts:
            try:
                searched |= Uniform.read(text) is not None
                grid[key].append(text)
            except ValueError as error:
                searched = True
                mistakes.append(f"{key}: {error}")
    if searched and sweep.samples < 1:
        mistakes.append("--samples: how many, of what is searched?")
    if sweep.samples and not searched:
        mistakes.append("--samples: nothing is searched; write key=loguniform(low, high)")
    return replace(sweep, grid={key: texts for key, texts in grid.items() if texts})


def _find(path: str | None) -> Path:
    shipped = {file.stem: file for file in SWEEPS.glob("*.yaml")}
    if path in shipped and not Path(path).is_file():
        return shipped[path]
    try:
        return configuration.find(path)
    except ConfigError:
        names = [*shipped, *(file.stem for file in CONFIGS.glob("*.yaml"))]
        raise ConfigError([f"config: no file {str(path)!r}{nearest(Path(str(path)).stem, names)}"]) from None


def _section(tree: Mapping[Any, Any], name: str, mistakes: list[str]) -> Mapping[Any, Any]:
    value = tree.get(name)
    if value is not None and not isinstance(value, Mapping):
        mistakes.append(f"{name}: {value!r} is not a section with keys")
        return {}
    return value or {}


def _pairs(texts: Any, where: str, mistakes: list[str]) -> Settings:
    """``["local.lr=0.1"]`` as ``{"local.lr": "0.1"}``; the later of two settings of one key holds."""
    if texts is not None and not isinstance(texts, (list, tuple)):
        mistakes.append(f"{where}not a list of key=value")
        return {}
    pairs: Settings = {}
    for text in texts or ():
        key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not (key and equals):
            mistakes.append(f"{where}{text!r} is not key=value")
        else:
            pairs = _merged(pairs, {key: value})
    return pairs


def _as_text(value: Any) -> str:
    """``[adapter, head]``, ``true``, ``0.1``: a value of YAML as it is written on the command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _with_command_line(sweep: Sweep, texts: Sequence[str], mistakes: list[str]) -> Sweep:
    """What the command line sets or sweeps is neither set nor swept by the file."""
    fixed: Settings = {}
    grid: dict[str, list[str]] = {}
    for key, text in _pairs(texts, "", mistakes).items():
        try:
            values = split(text)
        except ValueError as error:
            mistakes.append(f"{key}: {error}")
            continue
        if len(values) == 1 and not re.match(r"(uniform|loguniform|randint)\(", values[0]):
            fixed[key] = values[0]
        else:
            grid[key] = values
    given = {*fixed, *grid}
    variants = {
        name: {key: text for key, text in settings.items() if key not in given}
        for name, settings in sweep.variants.items()
    }
    grid = {key: values for key, values in sweep.grid.items() if key not in given} | grid
    sweep = replace(sweep, settings=_merged(sweep.settings, fixed), variants=variants, grid=grid)
    for key, values in sweep.grid.items():
        mistakes += [f"{key}: {text!r} stands there twice" for text, times in Counter(values).items() if times > 1]
    if "output" in {*sweep.settings, *itertools.chain(*sweep.variants.values()), *sweep.grid}:
        mistakes.append("output: every run of a sweep has a folder of its own; --out says where")
    return sweep
