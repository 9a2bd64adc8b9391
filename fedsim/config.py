"""The configuration: a typed schema filled from YAML and ``key=value``; every mistake is reported at once.

``algorithm`` and ``env`` are sections whose fields are those of the class that their ``name`` picks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from fedsim import registry
from fedsim.algorithm import Algorithm
from fedsim.env import Env
from fedsim.errors import ConfigError, nearest, own_code
from fedsim.schema import Raw, as_section, build, plain, refuse_endless, setting

CONFIGS = Path(str(resources.files("fedsim.configs")))
# Arguments of timm.create_model that name files or addresses of weights, which some of its versions unpickle.
_WEIGHTS_OPTIONS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    name: str = setting("vit_tiny_patch16_224", "any timm vision transformer")
    weights: str = setting(
        "pretrained",
        "'pretrained' (timm's, downloaded), a .safetensors file, 'public' (made here from the env), or 'random'",
    )
    img_size: int = setting(224, "edge of the input in pixels; position embeddings are resampled", low=8, high=4096)
    options: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of timm.create_model"})
    mean: float | None = setting(None, "mean of the normalised input, all channels; default: the weights' own")
    std: float | None = setting(None, "its standard deviation; default: the weights' own", low=1e-6)
    cached_prefix: str = setting(
        "off",
        "with adapters in the last blocks only: compute what lies before them once, and keep it on disk in this type",
        choices=("off", "fp16", "fp32"),
    )

    def __post_init__(self) -> None:
        for name in _WEIGHTS_OPTIONS:
            if name in self.options:
                raise ValueError(f"options.{name}: weights are set by model.weights alone")


@dataclass(frozen=True)
class AdapterConfig:
    """The trainable adapters."""

    kind: str = setting("sequential", "form of the adapter", choices=("sequential", "parallel", "lora", "none"))
    width: int = setting(8, "bottleneck width, or LoRA's rank", low=1, high=4096)
    blocks: str = setting("all", "'all' transformer blocks, or 'last:N'")
    scale: float = setting(1.0, "factor of the adapter's output; LoRA's alpha / rank")
    targets: tuple[str, ...] = setting(("qkv", "mlp"), "for LoRA: linears that are adapted", choices=("qkv", "mlp"))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"all|last:[1-9]\d*", self.blocks):
            raise ValueError(f"blocks {self.blocks!r} is not 'all' or 'last:N'")

    def count(self, depth: int) -> int:
        """How many of ``depth`` blocks, from the last, carry an adapter.

        Raises:
            ConfigError: the model has fewer blocks.
        """
        if self.kind == "none":
            return 0
        number = depth if self.blocks == "all" else int(self.blocks.removeprefix("last:"))
        if number > depth:
            raise ConfigError([f"adapter.blocks: {self.blocks!r}, but the model has {depth} blocks"])
        return number


@dataclass(frozen=True)
class LocalConfig:
    """A client's local training. What an optimiser remembers starts at zero in every round."""

    epochs: int = setting(1, "local epochs a round", low=1)
    batch_size: int = setting(16, "samples a step", low=1)
    optimizer: str = setting("sgd", "the local optimiser", choices=("sgd", "adam", "adamw"))
    lr: float = setting(0.05, "learning rate", low=0)
    schedule: str = setting(
        "constant", "of the learning rate over rounds; cosine: to zero", choices=("constant", "cosine", "step")
    )
    step_rounds: int = setting(10, "for schedule=step: rounds between steps", low=1)
    step_factor: float = setting(0.5, "for schedule=step: factor of the learning rate at every step", low=0, high=1)
    momentum: float = setting(0.0, "momentum, for sgd", low=0, high=1)
    betas: tuple[float, ...] = setting((0.9, 0.999), "for adam and adamw: decay of both moments", low=0, high=1)
    eps: float = setting(1e-8, "for adam and adamw: added to the denominator", low=1e-15)
    weight_decay: float = setting(0.0, "L2 penalty's factor; decoupled from the gradient for adamw", low=0)
    clip: float = setting(0.0, "largest L2 norm of a client's gradient in a step; 0: any", low=0)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or 1 in self.betas:
            raise ValueError(f"betas {list(self.betas)} are not two numbers below 1")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is for sgd; {self.optimizer} has betas")

    def in_round(self, round: int, rounds: int) -> LocalConfig:
        """The settings of a round, from 0, of so many: with its own learning rate."""
        factor = {
            "constant": 1.0,
            "cosine": (1 + math.cos(math.pi * round / rounds)) / 2,
            "step": self.step_factor ** (round // self.step_rounds),
        }[self.schedule]
        return dataclasses.replace(self, lr=self.lr * factor)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on every client's own test split, or on training samples that are held out in its place."""

    every: int = setting(10, "evaluate every so many rounds, and after the last", low=1)
    batch_size: int = setting(32, "test samples of a client in one batch", low=1)
    validation: float = setting(
        0.0,
        "share of each client's training samples that is held out and evaluated in place of its test split: to choose "
        "settings",
        low=0,
        high=0.9,
    )
    unseen: float = setting(
        0.0, "share of the clients that never train, only are evaluated (summary.json: unseen)", low=0, high=0.9
    )


@dataclass(frozen=True)
class BackendConfig:
    """Where clients are simulated."""

    name: str = setting("ray", "'ray' (actors), or 'local' (this process, no Ray)", choices=("ray", "local"))
    simulators: int = setting(0, "Ray actors that train blocks; 0: one a CPU, or per_gpu for each GPU", low=0)
    per_gpu: int = setting(2, "simulators that share a GPU; auto: found by trying before round 1", low=0, zero="auto")
    gpu_fraction: float = setting(0.0, "share of a GPU that one simulator reserves; 0: 1 / per_gpu", low=0, high=1)
    block_size: int = setting(
        8,
        "most clients that are trained together as one batch; auto: found by trying before round 1",
        low=0,
        zero="auto",
    )
    threads: int = setting(1, "CPU threads of a simulator and of the server; part of the arithmetic", low=1, high=1024)
    address: str = setting("", "Ray cluster to join; default: $RAY_ADDRESS, else a new local one")
    dashboard: bool = setting(True, "start the Ray dashboard (local clusters)")
    start_timeout_s: float = setting(
        300.0, "seconds that an actor may take to start, and a block while none was timed", low=1
    )
    min_deadline_s: float = setting(
        60.0,
        "a block, or a server's step, is hung after ten times what the slowest took, but not before so many seconds",
        low=1,
    )
    max_attempts: int = setting(3, "how often a client that has a block of its own kills its simulator", low=1)
    on_client_error: str = setting(
        "raise", "then the run stops, or goes on without the client", choices=("raise", "quarantine")
    )
    give_up_after_s: float = setting(600.0, "seconds without simulators, or server, after which the run stops", low=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the whole run."""

    every: int = setting(1, "rounds between checkpoints", low=1)
    keep: int = setting(2, "newest checkpoints that are kept", low=1)


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beyond the run folder and Ray; see ``docs/watching.md``."""

    project: str = setting("fedsim", "the project in W&B, the experiment in MLflow")
    wandb: bool = setting(False, 'send to Weights & Biases (pip install "fedsim-ray[wandb]")')
    wandb_offline: bool = setting(False, "send nothing: keep it in the run folder for `wandb sync`")
    mlflow: str = setting("", 'send to the MLflow at this tracking URI (pip install "fedsim-ray[mlflow]")')

    def __post_init__(self) -> None:
        if self.wandb_offline and not self.wandb:
            raise ValueError("wandb_offline is for wandb=true")
        if self.mlflow.lower() in ("true", "false"):
            raise ValueError(f"mlflow is a URI such as sqlite:///mlflow.db or http://host:5000, not {self.mlflow!r}")


@dataclass(frozen=True)
class Choice:
    """A section whose fields depend on its name.

    Attributes:
        name: a shipped name, or ``module:Class``.
        settings: an instance of the class's ``Config``.
    """

    name: str
    settings: Any


@dataclass(frozen=True)
class Config:
    """One simulation, resolved. See ``load``."""

    algorithm: Choice
    env: Choice
    model: ModelConfig
    adapter: AdapterConfig
    local: LocalConfig
    eval: EvalConfig
    backend: BackendConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    seed: int
    rounds: int
    cohort: float
    output: str
    precision: str
    nonfinite: str


@dataclass(frozen=True)
class _Top:
    """The settings that stand in no section."""

    seed: int = setting(0, "the run's seed; every random stream is a function of it", low=0, high=2**63 - 1)
    rounds: int = setting(50, "communication rounds", low=1)
    cohort: float = setting(10, "clients a round: a count from 1, or a share below 1", low=0)
    output: str = setting("", "the run folder, or a URI such as s3://bucket/run; default: runs/<time>-<algorithm>")
    precision: str = setting("fp32", "arithmetic of the backbone", choices=("fp32", "bf16"))
    nonfinite: str = setting(
        "raise",
        "where an update is NaN or infinite the run stops, or goes on without it in this round ('skip', counted)",
        choices=("raise", "skip"),
    )


# `section=NAME` sets this key of the section.
_PICKS = {"algorithm": "name", "env": "name", "model": "name", "adapter": "kind", "backend": "name"}


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "local": LocalConfig,
    "eval": EvalConfig,
    "backend": BackendConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file (default: the quickstart) and ``key=value`` overrides.

    Raises:
        ConfigError: with every mistake found.
        OwnCodeError: a user's own module, or its ``Config``, failed.
    """
    mistakes: list[str] = []
    tree = _read(find(path))
    tree.pop("about", None)  # a run folder's config.yaml tells what ran; it configures nothing
    _override(tree, overrides, mistakes)
    return resolve(tree, mistakes)


def find(path: str | Path | None) -> Path:
    """The file itself, or a shipped configuration of that name."""
    shipped = {file.stem: file for file in CONFIGS.glob("*.yaml")}
    if path is None:
        return shipped["quickstart"]
    if os.path.isfile(path):  # pathlib's raises where a name is too long
        return Path(path)
    if str(path) in shipped:
        return shipped[str(path)]
    raise ConfigError([f"config: no file {str(path)!r}{nearest(Path(path).stem, shipped)}"])


def _read(path: Path) -> dict[str, Any]:
    return {section: _expand(section, value) for section, value in read(path).items()}


def read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, its interpolations resolved.

    Raises:
        ConfigError: it is no YAML, or no mapping by names.
    """
    try:
        refuse_endless(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader))
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # constructors of YAML and resolvers of OmegaConf raise what a value makes them
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError([f"{path}: not a mapping of settings"])
    return {str(section): value for section, value in tree.items()}


def _expand(section: str, value: Any) -> Any:
    """``algorithm: ditto`` is short for ``algorithm: {name: ditto}``."""
    return {_PICKS[section]: value} if section in _PICKS and isinstance(value, str) else value


def _override(tree: dict[str, Any], overrides: Sequence[str], mistakes: list[str]) -> None:
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if key and equals:
            pairs.append((key, value))
        else:
            mistakes.append(f"{text!r} is not key=value")
    for key, value in sorted(pairs, key=lambda pair: pair[0] not in _PICKS):  # picks decide which settings there are
        if key in _PICKS:
            _pick(tree, key, value)
        else:
            _set(tree, key, Raw(value), mistakes)


def _set(tree: dict[str, Any], key: str, value: Raw, mistakes: list[str]) -> None:
    *sections, name = key.split(".")
    for section in sections:
        try:
            tree[section] = as_section(tree.get(section))
        except ValueError:
            mistakes.append(f"{key}: {section!r} is not a section")
            return
        tree = tree[section]
    tree[name] = value


def _pick(tree: dict[str, Any], section: str, value: str) -> None:
    old = tree.get(section, {})
    picked = _PICKS[section]
    if section == "algorithm" and isinstance(old, dict) and old.get("name") != value:
        old = {}  # the file's settings are those of another algorithm
    if section == "env" and isinstance(old, dict) and old.get("name") != value:
        old = _shared_settings(old, value)
    tree[section] = {**(old if isinstance(old, dict) else {}), picked: value}


def _shared_settings(old: dict[str, Any], name: str) -> dict[str, Any]:
    """The file's env settings that the newly picked env knows too (how clients are split), without its paths."""
    try:
        known = {field.name for field in dataclasses.fields(env_class(name).Config)}
    except ConfigError:
        return {}  # reported when the section is resolved
    return {key: value for key, value in old.items() if key in known and key != "path"}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class that ``algorithm.name`` means."""
    return registry.resolve(name, "fedsim.algorithms", Algorithm, "algorithm")


def env_class(name: str) -> type[Env]:
    """The class that ``env.name`` means."""
    return registry.resolve(name, "fedsim.envs", Env, "env")


def resolve(tree: dict[str, Any], mistakes: list[str] | None = None) -> Config:
    """The typed configuration of a plain tree.

    Raises:
        ConfigError: with every mistake found, and those already in ``mistakes``.
    """
    mistakes = [] if mistakes is None else mistakes
    top_names = [field.name for field in dataclasses.fields(_Top)]
    for key in tree:
        if key not in [*SECTIONS, "algorithm", "env", *top_names]:
            mistakes.append(f"{key}: unknown key{nearest(key, [*SECTIONS, 'algorithm', 'env', *top_names])}")
    built: dict[str, Any] = {name: build(schema, tree.get(name), name, mistakes) for name, schema in SECTIONS.items()}
    for section, find_class in (("algorithm", algorithm_class), ("env", env_class)):
        built[section] = _choose(section, tree.get(section), find_class, mistakes)
    top = build(_Top, {key: value for key, value in tree.items() if key in top_names}, "", mistakes)
    if top is not None and not (0 < top.cohort < 1 or (top.cohort >= 1 and float(top.cohort).is_integer())):
        mistakes.append(f"cohort: {top.cohort} is neither a count of clients (1, 2, …) nor a share between 0 and 1")
    if mistakes:
        raise ConfigError(mistakes)
    return Config(**built, **dataclasses.asdict(top))


def _choose(section: str, value: Any, find_class: Callable[[str], Any], mistakes: list[str]) -> Choice | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        mistakes.append(f"{section}: needs a name ({section}=NAME)")
        return None
    try:
        found = find_class(value["name"])
    except ConfigError as error:
        mistakes.extend(error.mistakes)
        return None
    name, settings = str(value["name"]), {key: item for key, item in value.items() if key != "name"}
    with own_code(f"{section}={name}: Config"):
        built = build(found.Config, settings, section, mistakes)
    try:
        json.dumps({} if built is None else plain(dataclasses.asdict(built)))
    except (TypeError, ValueError) as error:
        mistakes.append(f"{section}: the Config of {name} holds what no configuration file can ({error})")
    return Choice(name, built)


def to_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration as a plain tree that ``resolve`` reads back."""
    tree = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, Choice):
            value = {"name": value.name, **dataclasses.asdict(value.settings)}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        tree[entry.name] = value
    return plain(tree)
