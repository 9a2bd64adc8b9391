"""The command line: run, resume, sweep, report, export, list."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsim import __version__
from fedsim.errors import ConfigError, FedsimError, UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit code: 0, 1 for a failed run, 2 for a mistake of the caller, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file's name need not be text
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional settings on one side of an option only; the others are left over.
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(options, "settings")):
        parser.error(f"unknown option {rest[0]!r}")
    if rest:
        options.settings += rest
    try:
        return options.command(options)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"fedsim: {line}", file=sys.stderr)
        return 2
    except FedsimError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fedsim: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fedsim", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fedsim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="one simulation", description="Runs one simulation.")
    command.add_argument(
        "settings", nargs="*", metavar="[CONFIG] [key=value ...]",
        help="a YAML file or the name of a shipped one (default: quickstart), then settings",
    )  # fmt: skip
    command.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, and stop"
    )
    command.set_defaults(command=_run)
    command = commands.add_parser("resume", help="go on where a run stopped")
    command.add_argument("folder", metavar="RUN_DIR", help="a run's folder, or its URI")
    command.set_defaults(command=_resume)
    command = commands.add_parser(
        "sweep", help="a grid of runs on one Ray cluster, and one table",
        description="Runs the product of all key=a,b,c, and --samples draws of key=loguniform(low, high), each run "
        "with simulators of its own. The same command with the same --out goes on where a sweep stopped; so does "
        "--resume.",
    )  # fmt: skip
    command.add_argument(
        "settings", nargs="*", metavar="[CONFIG_OR_SWEEP] [key=a,b,c ...]",
        help="as for run, or a sweep file or the name of a shipped one; then settings, swept where they have commas "
        "outside of brackets and quotes, searched where they are uniform(low, high), loguniform(low, high) or "
        "randint(low, high)",
    )  # fmt: skip
    command.add_argument("--out", type=Path, help="the sweep's folder (default: runs/<time>-sweep)")
    command.add_argument("--resume", type=Path, metavar="DIR", help="go on with the sweep in this folder, and no more")
    command.add_argument("--jobs", type=int, help="most runs at a time (default: as many as the cluster has room for)")
    command.add_argument("--samples", type=int, help="draws of what is searched")
    command.add_argument(
        "--early-stop", action="store_true",
        help="stop runs that fall behind others (ASHA), by held-out samples: needs eval.validation",
    )  # fmt: skip
    command.set_defaults(command=_sweep)
    command = commands.add_parser("report", help="compare finished runs: table, CSV, one HTML page with pictures")
    command.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a run's folder or URI, or one of runs'")
    command.add_argument("--out", type=Path, default=Path("report"), help="folder for the files (default: report)")
    command.set_defaults(command=_report)
    command = commands.add_parser("export", help="a client's adapters and head, for use without fedsim")
    command.add_argument("folder", metavar="RUN_DIR", help="a run's folder, or its URI")
    command.add_argument("--client", type=int, required=True, metavar="ID")
    command.add_argument(
        "--out", type=Path, metavar="FILE",
        help="default: export/client-ID.safetensors in the run's folder; of a URI: client-ID.safetensors",
    )  # fmt: skip
    command.add_argument("--backbone", action="store_true", help="put the frozen backbone into the file, too")
    command.set_defaults(command=_export)
    command = commands.add_parser("list", help="what there is to choose from")
    command.add_argument("what", nargs="?", choices=("algorithms", "envs", "models", "configs"), help="default: all")
    command.set_defaults(command=_list)
    return parser


def _run(options: argparse.Namespace) -> int:
    from fedsim import config as configuration
    from fedsim.simulation import run

    config = configuration.load(*_config_and_settings(options.settings))
    if options.dry_run:
        from fedsim.report import print_plan

        print_plan(config)
        return 0
    run(config, Console())
    return 0


def _config_and_settings(texts: list[str]) -> tuple[str | None, list[str]]:
    """A configuration may stand before the settings; its path may have a ``=``, as the folders of a sweep have."""
    if texts and ("=" not in texts[0] or os.path.isfile(texts[0])):  # pathlib's raises where a name is too long
        return texts[0], texts[1:]
    return None, texts


def _sweep(options: argparse.Namespace) -> int:
    from fedsim.grid import plan
    from fedsim.sweep import run_sweep

    counts = {"--jobs": options.jobs, "--samples": options.samples}
    if mistakes := [f"{name}: {n} is below 1" for name, n in counts.items() if n is not None and n < 1]:
        raise ConfigError(mistakes)
    if options.resume and (options.settings or options.out or options.samples):
        raise ConfigError(["--resume: the folder says what to run; leave settings, --out and --samples out"])
    path, settings = _config_and_settings(options.settings)
    if options.resume:
        path = str(options.resume / "sweep.yaml")
        if not os.path.isfile(path):
            raise ConfigError([f"--resume: {options.resume} is not the folder of a sweep (no sweep.yaml)"])
    sweep, configs = plan(path, settings, options.samples)
    out = options.resume or options.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep")
    again = ["python", "-m", "fedsim", "sweep", "--resume", str(out)]
    again += ["--jobs", str(options.jobs)] if options.jobs else []
    again += ["--early-stop"] if options.early_stop else []
    console = Console(width=_width())
    done = run_sweep(sweep, configs, out, console, shlex.join(again), options.jobs, options.early_stop)
    return 0 if done else 1


def _width() -> int | None:
    """Of the console: a log may be wider than the 80 columns that rich gives to what is no terminal."""
    return None if sys.stdout.isatty() else 160


def _resume(options: argparse.Namespace) -> int:
    from fedsim.simulation import resume

    resume(options.folder, Console())
    return 0


def _report(options: argparse.Namespace) -> int:
    from fedsim.remote import copies
    from fedsim.report import report

    with copies(options.folders) as folders:
        report(folders, options.out, Console())
    return 0


def _export(options: argparse.Namespace) -> int:
    from fedsim.export import export
    from fedsim.remote import copies
    from fedsim.uri import is_uri

    console = Console()
    out = options.out or (Path(f"client-{options.client}.safetensors") if is_uri(options.folder) else None)
    with copies([options.folder]) as (folder,):
        for written in export(folder, options.client, out, options.backbone, console):
            console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _list(options: argparse.Namespace) -> int:
    from fedsim.report import catalogue

    console = Console(width=_width())
    for title, rows in catalogue(options.what):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
