"""The page of a report: one HTML file that stands by itself. What is said is gathered here; ``page.html`` says how.

The template escapes all that it is given (names, paths and settings are the user's) but the pictures, whose texts
matplotlib has escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedsim import __version__
from fedsim.comparison import Difference, Row, Task, as_text, by_client, over_seeds, shown, signed
from fedsim.figures import ATTENTION, MARKERS, SERIES, VARIABLES, Picture
from fedsim.results import FinishedRun

WORST = 10  # clients that are named

_OF_A_CLIENT = ("samples", "test_samples", "rounds")
_GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖★", strict=True))


@dataclass(frozen=True)
class Column:
    """A number of the table.

    Attributes:
        measure: its key in ``summary.json``, flat.
        heading, about: what it is called, and what it is.
        sign: 1 where more is better, -1 where less is.
    """

    measure: str
    heading: str
    about: str
    sign: int = 1


COLUMNS = (
    Column("accuracy.mean", "accuracy", "mean over clients of the model that each of them ends up with"),
    Column("accuracy.p10", "10th percentile", "accuracy that a tenth of the clients stays below"),
    Column("accuracy.min", "worst client", "accuracy of the worst client"),
    Column("accuracy.sent", "as sent", "mean accuracy of what the server sent, before any local training"),
    Column("accuracy.global", "global", "mean accuracy of the server's average, where there is one"),
    Column("bytes.up", "up", "bytes from clients to the server", -1),
    Column("bytes.down", "down", "bytes from the server to clients", -1),
    Column("seconds.total", "seconds", "of the whole run, with its evaluations", -1),
)


def render(
    tasks: Sequence[Task],
    pictures: Sequence[Sequence[Picture]],
    counts: Sequence[np.ndarray | None],
    skipped: Sequence[str],
    swept: Sequence[Picture] = (),
) -> str:
    """The page.

    Args:
        tasks: what is compared.
        pictures: of each task.
        counts: of each task, images of every client in every class ``[N, classes]``, where they are known.
        skipped: a line for every folder that was left out.
        swept: what a sweep draws against its settings, of all tasks together.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        version=__version__,
        columns=COLUMNS,
        skipped=skipped,
        swept=[_element(picture) for picture in swept],
        attention=[(name, VARIABLES[color]) for name, color in ATTENTION.values()],
        tasks=[_section(*of_task) for of_task in zip(tasks, pictures, counts, strict=True)],
    )


def _section(task: Task, pictures: Sequence[Picture], counts: np.ndarray | None) -> dict[str, Any]:
    runs = [run for row in task.rows for run in row.runs]
    differing = task.differing()
    shared = {key: value for key, value in task.best.settings.items() if key not in differing}
    return {
        "label": task.label,
        "verdict": _verdict(task),
        "facts": _facts(runs),
        "rows": _table(task),
        "pictures": {picture.name: _element(picture) for picture in pictures},
        "inside": [_element(picture) for picture in pictures if picture.name.startswith(("attention-", "mix-"))],
        "worst": _worst(task, counts),
        "darkest": None if counts is None else int(counts.max()),
        "seed": task.shared_seed,
        "differing": {key: [as_text(value) for value in values] for key, values in differing.items()},
        "shared": {key: as_text(value) for key, value in shared.items()},
        "runs": [_run(run) for run in runs],
    }


def _element(picture: Picture) -> dict[str, Any]:
    return {"title": picture.title, "svg": Markup(picture.svg)}


def _verdict(task: Task) -> str:
    """The result in a sentence."""
    best, mean = task.best, shown("accuracy.mean", task.best.mean("accuracy.mean"))
    if len(task.rows) == 1:
        return f"{best.label}: {mean} ({_seeds(len(best.runs))})"
    second = task.rows[1]
    difference = task.difference(second)
    if difference is None:
        return f"Best: {best.label}, {mean}. It has no seed in common with the next, {second.label}"
    lead = signed(-difference.mean, difference.standard_error)
    return f"Best: {best.label}, {mean}; to the next, {second.label}: {lead} ({_seeds(len(difference.by_seed))})"


def _seeds(number: int) -> str:
    return f"{number} seeds" if number > 1 else "1 seed"


def _facts(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """What was evaluated, on what, by which versions: where runs differ, all that there is."""
    first, data = runs[0], runs[0].about.get("data", {})
    versions = [run.about.get("versions", {}) for run in runs]
    packages = dict.fromkeys(package for own in versions for package in own)
    return {
        "Evaluated": evaluated(first),
        "Round": f"the last one, {_all(run.summary['rounds'] for run in runs)}; no earlier round is ever picked",
        "Seeds": _all(sorted({run.seed for run in runs})),
        "Data": ", ".join([str(first.summary["env"]), *_counted(first, data)]),
        "Backbone": _all(str(run.summary.get("model")) for run in runs),
        "Versions": ", ".join(f"{name} {_all(own.get(name) for own in versions)}" for name in packages) or "not known",
        "Commit": _all((run.about.get("commit") or "not from a checkout") for run in runs),
    }


def _counted(run: FinishedRun, data: Mapping[str, Any]) -> list[str]:
    partition = data.get("partition")
    return [
        f"{len(run.clients['client'])} clients",
        f"{int(run.clients['samples'].sum())} training and {int(run.clients['test_samples'].sum())} evaluated samples",
        *([f"{data['classes']} classes"] if "classes" in data else []),
        *([f"partition {partition}"] if partition else []),
    ]


def evaluated(run: FinishedRun) -> str:
    """Which samples the accuracies are of, in plain words."""
    share, unseen = run.settings.get("eval.validation"), run.settings.get("eval.unseen")
    before = run.about.get("data", {}).get("evaluated")
    if share:
        told = f"training samples of each client that were held out (eval.validation={share}); not the test split"
    elif before:
        told = f"held-out training samples of the saved split ({before}); not the test split"
    else:
        told = "each client's own test split"
    return f"{told}; {unseen:.0%} of the clients never trained (eval.unseen)" if unseen else told


def _all(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _table(task: Task) -> list[dict[str, Any]]:
    means = {column: [row.mean(column.measure) for row in task.rows] for column in COLUMNS}
    rows = []
    for number, (row, key) in enumerate(zip(task.rows, _keys(task.rows), strict=True)):
        cells = []
        for column, values in means.items():
            known = [column.sign * value for value in values if value is not None]
            own = values[number]
            best = len(task.rows) > 1 and own is not None and column.sign * own == max(known)
            std = over_seeds([run.summary.get(column.measure) for run in row.runs])[1]
            spread = f" ± {shown(column.measure, std)}" if column is COLUMNS[0] and std is not None else ""
            cells.append({"text": shown(column.measure, own) + spread, "best": best, "about": column.about})
        difference = None if number == 0 else task.difference(row)
        rows.append({**key, "seeds": [run.seed for run in row.runs], "cells": cells, **_told(difference)})
    return rows


def _keys(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Labels with the colour and the sign that they have in the pictures."""
    return [
        {
            "label": row.label,
            "series": number if number < len(SERIES) else None,
            "glyph": _GLYPHS[MARKERS[number]] if number < len(SERIES) else "–",
        }
        for number, row in enumerate(rows)
    ]


def _told(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"difference": None, "pairs": 0, "better": 0, "worse": 0}
    return {
        "difference": signed(difference.mean, difference.standard_error),
        "pairs": len(difference.by_seed),
        "better": difference.better,
        "worse": difference.worse,
    }


def _worst(task: Task, counts: np.ndarray | None) -> dict[str, Any]:
    """The worst clients under the best row, and how all rows that have this seed do on them."""
    held = [(key, row.by_seed.get(task.shared_seed)) for row, key in zip(task.rows, _keys(task.rows), strict=True)]
    shown_rows = [(key, by_client(run)) for key, run in held if run is not None]
    found = []
    for client in task.worst_clients(WORST):
        accuracies = [own[client]["accuracy"] for _, own in shown_rows]
        facts = {name: int(value) for name, value in shown_rows[0][1][client].items() if name in _OF_A_CLIENT}
        classes = {} if counts is None else {"classes": int((counts[client] > 0).sum())}
        marks = [
            {"text": f"{value:.3f}", "best": len(accuracies) > 1 and value == max(accuracies)} for value in accuracies
        ]
        found.append({"client": client, "facts": {**facts, **classes}, "accuracies": marks})
    return {"keys": [key for key, _ in shown_rows], "clients": found}


def _run(run: FinishedRun) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "rounds": run.summary["rounds"],
        "accuracy": shown("accuracy.mean", run.summary["accuracy.mean"]),
        "commit": (run.about.get("commit") or "–")[:10],
    }
