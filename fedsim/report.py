"""What a person reads: the plan of a run, the catalogue of choices, and the comparison of finished runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import timm
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedsim import config as configuration
from fedsim import registry, remote
from fedsim.algorithm import Algorithm
from fedsim.comparison import MEASURES, Row, Task, by_client, over_seeds, shown, signed, tasks
from fedsim.config import Config
from fedsim.env import Env
from fedsim.errors import OutputError
from fedsim.files import write_atomically
from fedsim.plan import prepare
from fedsim.results import class_counts, find, flat_summary, read
from fedsim.simulation import output_folder


def print_plan(config: Config) -> None:
    """``run --dry-run``: the resolved configuration, blocks, actors and memory."""
    folder = output_folder(config)
    plan = prepare(config)
    print(yaml.safe_dump(configuration.to_tree(config), sort_keys=False).rstrip())
    print(f"\nplan\n  output        {remote.shown(folder)}")
    data = plan.workload.data
    print(f"  clients       {data.num_clients}, {plan.cohort} a round, {len(data.classes)} classes")
    print(f"  row           {plan.workload.task.layout.size} elements: {plan.workload.task.layout.groups}")
    print(f"  blocks        {plan.describe_blocks() or 'of a size that is found by trying before round 1'}")
    simulators = config.backend.simulators or "one a CPU or per_gpu for each GPU"
    print(f"  simulators    {'1, in this process' if config.backend.name == 'local' else simulators}")
    for name, mib in plan.about["memory_mib"].items():
        print(f"  memory        {mib:9.1f} MiB  {name}")


def catalogue(what: str | None) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Tables of what there is: ``(title, rows)``."""
    if what in (None, "algorithms"):
        found = [(name, configuration.algorithm_class(name)) for name in registry.names("fedsim.algorithms", Algorithm)]
        yield "algorithms", [(name, c.kind, first_line(c), c.paper) for name, c in found]
    if what in (None, "envs"):
        names = registry.names("fedsim.envs", Env)
        yield "envs", [(name, first_line(configuration.env_class(name))) for name in names]
    if what in (None, "configs"):
        for title, folder in (("configs", configuration.CONFIGS), ("sweeps", configuration.CONFIGS / "sweeps")):
            files = sorted(folder.glob("*.yaml"))
            yield title, [(file.stem, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for file in files]
    if what == "models":
        yield "models (timm's vision transformers)", [(name,) for name in timm.list_models(module="vision_transformer")]
    elif what is None:
        count = len(timm.list_models(module="vision_transformer"))
        yield "models", [(f"{count} of timm's vision transformers; python -m fedsim list models prints them",)]


def first_line(described: type) -> str:
    return (described.__doc__ or "").strip().splitlines()[0] if described.__doc__ else ""


def report(
    paths: Sequence[Path],
    out: Path,
    console: Console,
    swept: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Compares finished runs: a table, CSV files, and, where the extra ``report`` is installed, a page with pictures.

    Args:
        paths: run folders, and folders of run folders such as a sweep's; what is no finished run is said and left out.
        out: folder for the files: ``comparison.csv`` (a line a run), ``table.csv`` (a line a row of the table),
            ``clients.csv`` (a line a client of a run), ``index.html`` and the pictures as PNG.
        console: for a person.
        swept: of a sweep, the lines of its own ``table.csv``.
        curves: its keys against which accuracy and seconds are drawn, each with what the lines call it.

    Raises:
        OutputError: there is no finished run at all, or ``out`` cannot be written.
    """
    runs, skipped = [], []
    for folder in find(paths):
        try:
            runs.append(read(folder))
        except OutputError as error:
            skipped.append(str(error))
    if not runs:
        raise OutputError("\n".join(skipped) or f"{paths[0]}: no run folder")
    for line in skipped:
        console.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
    compared = tasks(runs)
    rows = [[_row(task, row) for row in task.rows] for task in compared]
    for task, own in zip(compared, rows, strict=True):
        console.print(f"[bold]{escape(task.label)}[/bold]", highlight=False)
        console.print(_paired_table(own))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "comparison.csv", [{"run": run.folder.name, **run.summary} for run in runs])
        write_csv(out / "table.csv", [row for own in rows for row in own])
        write_csv(out / "clients.csv", _client_rows(compared))
        page = _write_page(out, compared, skipped, swept, curves)
    except OSError as error:
        raise OutputError(f"--out: {out} cannot be written to ({error.strerror})") from None
    written = page or "comparison.csv, table.csv and clients.csv"
    console.print(f"{written} in {out}", highlight=False, markup=False, soft_wrap=True)
    if page is None:
        console.print('no page: it takes matplotlib and jinja2; pip install "fedsim-ray[report]"', markup=False)


def _row(task: Task, row: Row) -> dict[str, Any]:
    """A line of ``table.csv``."""
    difference = task.difference(row)
    swept = {"task": task.label, "seeds": " ".join(str(run.seed) for run in row.runs)}
    return {
        **over_seeds_row(row.label, swept, [run.summary for run in row.runs]),
        "difference": difference and difference.mean,
        "difference.error": difference and difference.standard_error,
        "difference.seeds": difference and len(difference.by_seed),
        "clients.better": difference and difference.better,
        "clients.worse": difference and difference.worse,
    }


def _paired_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What of ``table.csv`` fits into 80 columns."""
    table = _columns(["means over seeds", "n", "accuracy", "to the best", "p10", "sent", "up", "seconds"])
    table.columns[0].overflow = "fold"
    for number, row in enumerate(rows):
        n, measures = row["difference.seeds"], ("accuracy.p10", "accuracy.sent", "bytes.up", "seconds.total")
        against = "best" if number == 0 else "–" if n is None else signed(row["difference"], row["difference.error"])
        cells = [row["runs"], str(row["n"]), shown("accuracy", row["accuracy.mean"]), against]
        cells += [shown(measure, row[measure]) for measure in measures]
        table.add_row(*map(Text, cells), style=None if number else "bold")
    table.caption = "to the best: paired over seeds, ± standard error"
    return table


def _client_rows(compared: Sequence[Task]) -> list[dict[str, Any]]:
    return [
        {"task": task.label, "row": row.label, "seed": run.seed, **line}
        for task in compared for row in task.rows for run in row.runs for line in by_client(run).values()
    ]  # fmt: skip


def _write_page(
    out: Path,
    compared: Sequence[Task],
    skipped: Sequence[str],
    swept: Sequence[Mapping[str, Any]],
    curves: Mapping[str, str],
) -> str | None:
    """Writes ``index.html`` and the PNG files; what to say of them. ``None`` where what draws is not installed."""
    try:
        from fedsim import figures, page
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        return None
    counts = [_counts(task) for task in compared]
    pictures = [
        figures.draw(task, known, out, f"{number}-" if len(compared) > 1 else "")
        for number, (task, known) in enumerate(zip(compared, counts, strict=True), 1)
    ]
    drawn = [figures.draw_sweep(swept, key, name, out) for key, name in curves.items()]
    write_atomically(out / "index.html", page.render(compared, pictures, counts, skipped, drawn))
    return f"index.html, {len(drawn) + sum(map(len, pictures))} pictures and three CSV files"


def _counts(task: Task) -> np.ndarray | None:
    """Of the run whose clients the page names."""
    run = task.best.by_seed[task.shared_seed]
    counts = class_counts(run.folder)
    return counts if counts is not None and len(counts) == len(run.clients["client"]) else None


def _columns(names: Sequence[str]) -> Table:
    """A table without rows: texts on the left, numbers behind them."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for every key of any row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list({key: None for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def over_seeds_row(label: str, swept: Mapping[str, str], summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of ``table.csv``: means, and sample standard deviations of two runs or more."""
    row: dict[str, Any] = {"runs": label, **swept, "n": len(summaries)}
    for measure in MEASURES:
        row[measure], row[f"{measure}.std"] = over_seeds([summary.get(measure) for summary in summaries])
    return row


def seeds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of ``table.csv`` for a person."""
    table = _columns(["mean ± std over n runs", "n", *MEASURES.values()])
    best = max((row["accuracy.mean"] for row in rows if row["accuracy.mean"] is not None), default=None)
    for row in rows:
        cells = [row["runs"], str(row["n"])]
        for measure in MEASURES:
            std = row[f"{measure}.std"]
            cells.append(shown(measure, row[measure]) + (f" ± {shown(measure, std)}" if std else ""))
        is_best = best is not None and row["accuracy.mean"] == best
        cells[2] += " *" if is_best else "  "
        table.add_row(*(Text(cell) for cell in cells), style="bold" if is_best else None)
    table.caption = "* the best mean"
    return table


# Of a sweep ----------------------------------------------------------------------------------------------------------


class SweptRun(Protocol):
    """What is asked of a sweep's run here."""

    @property
    def name(self) -> str: ...  # its folder's
    @property
    def label(self) -> str: ...  # its row's in the table
    @property
    def swept(self) -> Mapping[str, str]: ...


def write_results(out: Path, runs: Sequence[SweptRun], failed: Container[str] = ()) -> list[dict[str, Any]]:
    """Writes ``results.csv``, a row a run, and ``table.csv``: over seeds, of the runs that have finished; its rows.

    ``failed``: names of the runs that will not go on by themselves.
    """
    summaries = [flat_summary(out / run.name) for run in runs]
    pairs = list(zip(runs, summaries, strict=True))
    write_csv(
        out / "results.csv",
        [
            {"run": run.name, **run.swept, **(summary or {"status": "failed" if run.name in failed else "unfinished"})}
            for run, summary in pairs
        ],
    )
    groups: dict[str, list[tuple[SweptRun, dict[str, Any]]]] = {}
    for run, summary in pairs:
        if summary:
            groups.setdefault(run.label, []).append((run, summary))
    rows = []
    for label, group in groups.items():
        swept = {key: text for key, text in group[0][0].swept.items() if key != "seed"}
        rows.append(over_seeds_row(label, swept, [summary for _, summary in group]))
    write_csv(out / "table.csv", rows)
    return rows
