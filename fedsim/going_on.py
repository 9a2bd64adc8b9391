"""What a run that goes on must have in common with itself as it began: settings, metrics, data, backbone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsim import checkpoint, remote
from fedsim.config import Config, to_tree
from fedsim.errors import CheckpointError
from fedsim.plan import Plan
from fedsim.provenance import versions
from fedsim.schema import from_yaml

_MAY_CHANGE = ("output", "checkpoint", "tracking", "nonfinite", "eval.every", "model.weights", "backend")
"""Keys and sections that a run may go on with other values of; what ``model.weights`` hold is compared by itself."""
_MAY_NOT = ("backend.threads", "backend.block_size")
"""But for these of them: they are part of the arithmetic."""


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that results depend on, by name, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(to_tree(config))).items():
        found |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return {key: value for key, value in found.items() if key in _MAY_NOT or not _may_change(key)}


def _may_change(key: str) -> bool:
    return key in _MAY_CHANGE or key.partition(".")[0] in _MAY_CHANGE


def refuse_other_settings(folder: Path, newest: Path, config: Config) -> None:
    """A run goes on only with the settings that its results depend on; but it may have more rounds.

    What a checkpoint does not name is of a later version, or in one of an earlier version, and is accepted.

    Raises:
        CheckpointError: they are others; with the first difference.
    """
    facts, now = checkpoint.facts_of(newest), settings_of(config)
    try:
        before, done = facts.get("settings", {}), facts["round"]
        parts = (_difference(key, value, now.get(key)) for key, value in before.items() if key != "rounds")
        found = next(filter(None, parts), "") or _other_rounds(before.get("rounds", config.rounds), done, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{newest}: of another version of fedsim ({error})") from None
    if found:
        raise CheckpointError(
            f"{remote.shown(folder)}: the settings are not what the run began with (config.yaml, {found})"
        )


def _other_rounds(then: int, done: int, config: Config) -> str:
    """What is wrong with a number of rounds that was another one when so many were done; empty: nothing."""
    now, local = config.rounds, config.local
    if now < done or now == done != then:  # the last round of a run is evaluated, which this one may not have been
        return f"rounds: {now}, where {done} are done"
    if now != then and local.in_round(done - 1, now) != local.in_round(done - 1, then):
        return f"rounds: {then} then, {now} now, on which local.schedule={local.schedule} depends"
    return ""


def refuse_gap(folder: Path, newest: Path) -> None:
    """A run goes on only with a line of ``metrics.jsonl`` for each of the rounds done.

    Raises:
        CheckpointError: there are fewer.
    """
    path, done = folder / "metrics.jsonl", checkpoint.round_of(newest)
    lines = 0
    if path.is_file():
        with path.open("rb") as file:
            lines = sum(line.endswith(b"\n") for line in islice(file, done))
    if lines < done:
        raise CheckpointError(
            f"{remote.shown(folder)}: metrics.jsonl has {lines} whole lines of {done} rounds; to go on from an older "
            f"checkpoint, delete checkpoints/{newest.name}"
        )


def refuse_other_inputs(folder: Path, plan: Plan, console: Console) -> None:
    """A run goes on only over the data and the backbone that it began with; other versions are told.

    Raises:
        CheckpointError: these are others; with the first difference.
    """
    before = from_yaml((folder / "config.yaml").read_text(encoding="utf-8")).get("about")
    before = before if isinstance(before, dict) else {}
    for name, what in (("data", "env's data are"), ("backbone", "backbone is"), ("row", "adapters' layout is")):
        if found := _difference(f"about.{name}", before.get(name), json.loads(json.dumps(plan.about[name]))):
            raise CheckpointError(f"{folder}: the {what} not what the run began with (config.yaml, {found})")
    if found := _difference("about.versions", before.get("versions"), versions()):
        told = f"the run began with other versions, results may differ in their last digits ({found})"
        console.print(told, highlight=False, markup=False, soft_wrap=True)  # what is quoted may look like markup


def _difference(name: str, before: Any, now: Any) -> str:
    """The first value in which two trees differ, by its name; empty: there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = (_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in dict.fromkeys([*before, *now]))
        return next(filter(None, parts), "")
    return "" if before == now else f"{name}: {str(before)[:80]} then, {str(now)[:80]} now"
