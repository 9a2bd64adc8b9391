"""The pictures of a comparison, drawn by matplotlib: as PNG for a paper, and as SVG for a page, light or dark.

In the SVG every colour is a variable of the page's style sheet (``page.html``), so that one picture serves both.
"""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from fedsim.comparison import Row, Task
from fedsim.results import Point

# Eight are told apart, by people who see no red or green, too; what is beyond them is drawn in grey.
SERIES = ("#2a78d6", "#1baf7a", "#eda100", "#008300", "#4a3aa7", "#e34948", "#e87ba4", "#eb6834")
MARKERS = "os^DvPX*"
INK, MUTED, FAINT, GRID, SURFACE = "#0b0b0b", "#6b6a64", "#bcbab1", "#e1e0d9", "#fcfcfb"
AGES = ("#9dc3ef", "#5a97de", "#1f5fae")  # of others' past, from this round's to the oldest
OWN_AGES = ("#9fe0c6", "#3fbf90", "#0f6b4a")  # and of a client's own
ATTENTION = {
    "attention_own_0": ("own, this round", OWN_AGES[0]),
    "attention_own_1_3": ("own, 1 to 3 rounds ago", OWN_AGES[1]),
    "attention_own_4": ("own, 4 rounds ago or more", OWN_AGES[2]),
    "attention_others_0": ("others, this round", AGES[0]),
    "attention_others_1_3": ("others, 1 to 3 rounds ago", AGES[1]),
    "attention_others_4": ("others, 4 rounds ago or more", AGES[2]),
}
"""Whose past an answer is made of: by metric, what it is called and its colour."""

VARIABLES = {
    **{color: f"--series-{number}" for number, color in enumerate(SERIES)},
    **{color: f"--age-{number}" for number, color in enumerate(AGES)},
    **{color: f"--own-age-{number}" for number, color in enumerate(OWN_AGES)},
    **{INK: "--ink", MUTED: "--muted", FAINT: "--faint", GRID: "--grid", SURFACE: "--surface"},
}
_STYLE = {
    **{"font.size": 9.0, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK},
    **{"axes.edgecolor": GRID, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID},
    **{"axes.axisbelow": True, "grid.linewidth": 0.7, "lines.linewidth": 1.8, "lines.markersize": 4.5},
    **{"legend.frameon": False, "legend.fontsize": 8.5, "figure.dpi": 144.0, "svg.fonttype": "none"},
    **{
        "svg.hashsalt": "fedsim",
        "text.parse_math": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    },
}
_WIDE, _HIGH = 4.0, 2.7  # inches: its texts can still be read on a phone


@dataclass(frozen=True)
class Picture:
    """A figure, ready to be shown.

    Attributes:
        name: what kind it is; its file is called so, too.
        title: what it shows.
        svg: the element, to stand in a page.
    """

    name: str
    title: str
    svg: str


def styles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour and marker of each row, the same in all figures."""
    beyond = [(FAINT, "")] * max(0, len(rows) - len(SERIES))
    return [*zip(SERIES, MARKERS, strict=True), *beyond][: len(rows)]


def draw(task: Task, counts: np.ndarray | None, folder: Path, prefix: str) -> list[Picture]:
    """All pictures of a task; each is written into the folder as PNG, too.

    Args:
        task: what is compared.
        counts: images of every client in every class ``[N, classes]``, where they are known.
        folder: for the PNG files; it exists.
        prefix: of their names.
    """
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figures = {
            **(_differences(task) if len(task.rows) > 1 else {}),
            **_curves(task),
            **_distribution(task),
            **(_partition(counts) if counts is not None else {}),
            **_attention(task),
            **_mix(task),
        }
        pictures = []
        for name, (figure, title, legend) in figures.items():
            pictures.append(Picture(name, title, _svg(figure)))
            _png(figure, title, legend, folder / f"{prefix}{name}.png")
    return pictures


def draw_sweep(rows: Sequence[Mapping[str, Any]], key: str, name: str, folder: Path) -> Picture:
    """Accuracy, and seconds, against a setting that was swept; written as PNG, too, with the same legend.

    Args:
        rows: lines of a sweep's ``table.csv``, as dicts; ``key`` is a number in all of them.
        key: the setting; what else was swept tells the lines apart.
        name: what ``runs`` in the rows calls it.
        folder: for the PNG file; it exists.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: float(row[key])):
        others = re.sub(rf"(?<!\S){re.escape(f'{name}={row[key]}')}(?!\S)", "", row["runs"])
        lines.setdefault(" ".join(others.split()), []).append(row)
    places = [float(row[key]) for row in rows]
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(2 * _WIDE, _HIGH), layout="constrained")
        legend: list[Line2D | Patch] = []
        for axes, measure, title in zip(
            figure.subplots(1, 2), ("accuracy.mean", "seconds.total"), ("accuracy", "seconds"), strict=True
        ):
            for (label, own), color, marker in zip(lines.items(), itertools.cycle(SERIES), itertools.cycle(MARKERS)):
                x, y = ([float(row[name]) for row in own] for name in (key, measure))
                axes.errorbar(x, y, [row[f"{measure}.std"] or 0 for row in own], color=color, marker=marker)
                if measure == "seconds.total" and label:
                    legend.append(Line2D([], [], color=color, marker=marker, label=label))
            if min(places) > 0 and max(places) >= 20 * min(places):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(title=title, xlabel=key)
        axes.set_ylim(bottom=0)  # a cost
        _add_legend(figure, legend)
        picture = Picture(f"sweep-{name}", f"Accuracy and seconds by {key}", _svg(figure))
        _png(figure, picture.title, [], folder / f"{picture.name}.png")
    return picture


Drawn = dict[str, tuple[Figure, str, list[Line2D | Patch]]]
"""By name: a figure, its title, and the legend of its file (a page has one for all)."""


def _axes(wide: float = _WIDE, high: float = _HIGH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(wide, high), layout="constrained")
    return figure, figure.subplots()


def _lines(rows: Sequence[Row]) -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=color, marker=marker, label=row.label)
        for row, (color, marker) in zip(rows, styles(rows), strict=True)
    ]


def _differences(task: Task) -> Drawn:
    rows = task.rows[1:]
    figure, axes = _axes(high=1.1 + 0.27 * len(rows))
    for place, (row, (color, marker)) in enumerate(zip(rows, styles(task.rows)[1:], strict=True)):
        difference = task.difference(row)
        if difference is None:
            continue
        seeds = list(difference.by_seed.values())
        axes.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.35, markeredgewidth=0)
        error = difference.standard_error or 0.0
        axes.errorbar(difference.mean, place, xerr=error, marker=marker, color=color, capsize=3, elinewidth=1.5)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set(yticks=range(len(rows)), yticklabels=[_short(row.label) for row in rows], ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel("difference in accuracy")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    return {"differences": (figure, "Differences to the best row", [])}


def _curves(task: Task) -> Drawn:
    most = max(point.bytes for row in task.rows for run in row.runs for point in run.points)
    unit, divisor = ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20) if most >= 1 << 20 else ("KiB", 1 << 10)
    against: list[tuple[str, str, Callable[[Point], float]]] = [
        ("rounds", "round", lambda point: point.round),
        ("bytes", f"{unit} sent, up and down", lambda point: point.bytes / divisor),
        ("seconds", "seconds", lambda point: point.seconds),
    ]
    drawn: Drawn = {}
    for name, label, of in against:
        figure, axes = _axes()
        for row, (color, marker) in reversed(list(zip(task.rows, styles(task.rows), strict=True))):
            points = row.points()
            if not points:
                continue
            x = [statistics.fmean(of(point) for point in seeds) for seeds in points]
            accuracies = np.array([[point.accuracy for point in seeds] for seeds in points])
            if len(row.runs) > 1:
                axes.fill_between(x, accuracies.min(1), accuracies.max(1), color=color, alpha=0.15, linewidth=0)
            axes.plot(x, accuracies.mean(1), color=color, marker=marker)
        axes.set(xlabel=label, ylabel="accuracy, mean over clients")
        axes.set_xlim(left=0)
        if name == "rounds":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn[f"accuracy-{name}"] = figure, f"Accuracy against {name}", _lines(task.rows)
    return drawn


def _distribution(task: Task) -> Drawn:
    figure, axes = _axes()
    for row, (color, _) in reversed(list(zip(task.rows, styles(task.rows), strict=True))):
        values, shares = row.distribution()
        axes.step([values[0], *values], [0, *shares], where="post", color=color)
    axes.set(xlabel="accuracy of a client", ylabel="share of clients with no more", ylim=(0, 1.01))
    return {"clients": (figure, "Distribution over clients", _lines(task.rows))}


def _partition(counts: np.ndarray) -> Drawn:
    clients, classes = counts.shape
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    sizes, grid = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    # One hue, from nothing to opaque: it can be read on light and on dark ground.
    cells = np.empty((classes, clients, 4), dtype=np.float32)
    cells[..., :3] = to_rgba(SERIES[0])[:3]
    cells[..., 3] = (counts.T / max(1, counts.max())) ** 0.5
    grid.imshow(cells, aspect="auto", origin="lower", extent=(-0.5, clients - 0.5, -0.5, classes - 0.5))
    grid.set(xlabel="client", ylabel="class")
    grid.grid(visible=False)
    sizes.stairs(counts.sum(1), np.arange(clients + 1) - 0.5, fill=True, color=SERIES[0])
    sizes.set(ylabel="images", ylim=(0, None))
    sizes.grid(axis="x", visible=False)
    for axis in (grid.xaxis, grid.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return {"partition": (figure, "Training images of every client, by class", [])}


def _attention(task: Task) -> Drawn:
    drawn: Drawn = {}
    for row in task.rows:
        rounds, shares = row.measured("attention_")
        known = {name: ATTENTION[name] for name in ATTENTION if name in shares}
        if len(rounds) < 2 or not known:
            continue
        figure, axes = _axes()
        colors = [color for _, color in known.values()]
        axes.stackplot(rounds, *(shares[name] for name in known), colors=colors, edgecolor=SURFACE, linewidth=0.6)
        axes.set(xlabel="round", ylabel="share of an answer", ylim=(0, 1), xlim=(rounds[0], rounds[-1]))
        legend: list[Line2D | Patch] = [Patch(color=color, label=label) for label, color in known.values()]
        drawn[f"attention-{len(drawn) + 1}"] = figure, _short(row.label), legend
    return drawn


def _mix(task: Task) -> Drawn:
    drawn: Drawn = {}
    for row in task.rows:
        rounds, shares = row.measured("mix_")
        if len(rounds) < 2 or all(len(set(values)) == 1 for values in shares.values()):
            continue
        figure, axes = _axes()
        for (name, values), color, dashes in zip(shares.items(), SERIES, ("-", "--", ":", "-.") * 2, strict=False):
            axes.plot(rounds, values, dashes, color=color, label=name.replace("_", " "))
        axes.legend()
        axes.set(xlabel="round", ylabel="the memory's share", ylim=(-0.02, 1.02), xlim=(rounds[0], rounds[-1]))
        drawn[f"mix-{len(drawn) + 1}"] = figure, f"The memory's share in what {_short(row.label)} sends", []
    return drawn


def _short(label: str, most: int = 30) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _svg(figure: Figure) -> str:
    """The picture as an element of a page: without what only a file needs, its colours as variables."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Type": None, "Format": None, "Creator": None})
    text = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", text)  # figure_1 and the like: other pictures have them, too
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def _png(figure: Figure, title: str, legend: Sequence[Line2D | Patch], path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _add_legend(figure, legend)
    figure.savefig(path, facecolor=SURFACE)


def _add_legend(figure: Figure, legend: Sequence[Line2D | Patch]) -> None:
    if legend:
        wide, high = figure.get_size_inches()
        figure.set_size_inches(wide, high + 0.17 * len(legend))
        figure.legend(handles=legend, loc="outside lower left", ncols=1)
