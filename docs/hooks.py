"""What the documentation's site is made of, beside the pages in this folder.

- Tables made from the code stand where a page says ``<!-- table: settings -->`` or ``<!-- table: algorithms -->``.
- Every shipped algorithm has a page of its docstring, settings and source, ``reference/algorithms/NAME.md``.
- README, CONTRIBUTING and CHANGELOG of the repository's root are pages, too.
- Links are written for the repository, so that they work there. On the site, a link to a module leads to its place in
  the reference, one to a page to that page, and one to any other file into the repository (``repo_url`` in
  ``mkdocs.yml``), or nowhere while that has no address.

Called by mkdocs (``hooks`` in ``mkdocs.yml``), which is imported here only where it calls.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import posixpath
import re
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsim import config as configuration
from fedsim import registry
from fedsim.algorithm import Algorithm
from fedsim.env import Env
from fedsim.envs.partition import PartitionConfig
from fedsim.report import first_line

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE = ("algorithms", "envs", "configs")  # packages of fedsim that stand beside it

_LINK = re.compile(r"```.*?```|\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)", re.DOTALL)


# Tables --------------------------------------------------------------------------------------------------------------


def settings_tables() -> str:
    """Every key of the configuration, from the dataclasses that define them."""
    shared = _rows(PartitionConfig, "env.")
    made = [_section("## The run", "Settings that stand in no section.", _rows(configuration._Top, ""))]
    for name, schema in configuration.SECTIONS.items():
        made.append(_section(f"## {name}", _doc(schema), _rows(schema, f"{name}.")))
    made.append(_section("## env", f"{_doc(PartitionConfig)} Every shipped env has these.", shared))
    for name in registry.names("fedsim.envs", Env):
        schema = configuration.env_class(name).Config
        own = [row for row in _rows(schema, "env.") if row not in shared]
        made.append(_section(f"### env={name}", f"{_doc(schema)} Only what is not as above:", own))
    schemas = {
        name: configuration.algorithm_class(name).Config for name in registry.names("fedsim.algorithms", Algorithm)
    }
    plain = ", ".join(f"`{name}`" for name, schema in schemas.items() if not dataclasses.fields(schema))
    made.append(f"## algorithm\n\nThe settings of each algorithm are `algorithm.KEY`. These have none: {plain}.\n")
    for name, schema in schemas.items():
        if dataclasses.fields(schema):
            made.append(_section(f"### algorithm={name}", "", _rows(schema, "algorithm.")))
    return "\n".join(made)


def _section(heading: str, told: str, rows: list[str]) -> str:
    return "\n".join([heading, "", told, "", "| key | default | values | what |", "|---|---|---|---|", *rows, ""])


def _doc(schema: type) -> str:
    return " ".join((schema.__doc__ or "").split())


def _rows(schema: type, prefix: str) -> list[str]:
    hints = typing.get_type_hints(schema)
    return [
        f"| `{prefix}{field.name}` | {_value(_default(field))} | {_values(hints[field.name], field.metadata)} "
        f"| {_cell(field.metadata.get('doc', ''))} |"
        for field in dataclasses.fields(schema)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _value(value: Any) -> str:
    """As it is written behind ``key=``."""
    if value in (None, ""):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


def _values(hint: Any, limits: Mapping[str, Any]) -> str:
    """What is accepted: choices, or a kind and its range."""
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    names = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    inner = [option for option in typing.get_args(hint) if option in names]
    kind = names.get(hint) or (names[inner[0]] if inner and typing.get_origin(hint) is not dict else "mapping")
    if limits.get("zero"):
        return f"{kind}, at least 1, or `{limits['zero']}`"
    if low is None and high is None:
        return kind
    if high is None:
        return f"{kind}, at least {low:g}"
    return f"{kind}, {low:g} … {high:g}" if high < 1e9 else f"{kind}, {low:g} … 2^{int(high).bit_length()} − 1"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def algorithms_table() -> str:
    """The shipped algorithms, from the registry."""
    rows = ["| name | kind | what | paper | lines |", "|---|---|---|---|---|"]
    for name in registry.names("fedsim.algorithms", Algorithm):
        found = configuration.algorithm_class(name)
        source = (ROOT / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
        told = (f"[`{name}`](../algorithms/{name}.py)", found.kind, _cell(first_line(found)), _cell(found.paper))
        rows.append(f"| {' | '.join(told)} | {lines_of_code(source)} |")
    return "\n".join(rows) + "\n"


def algorithm_page(name: str) -> str:
    """An algorithm's docstring, its settings, and its file from below the docstring on."""
    found = configuration.algorithm_class(name)
    source = (ROOT / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
    below = source.splitlines()[ast.parse(source).body[0].end_lineno :]
    rows = _rows(found.Config, "algorithm.")
    return "\n".join(
        [
            f"# {name}",
            f"\n{first_line(found)} `algorithm={name}`, {found.kind}.\n",
            f"::: fedsim.algorithms.{name}\n    options: {{members: [], show_root_toc_entry: false}}\n",
            _section("## Settings", "", rows) if rows else "",
            "## Source\n",
            "\n".join(["```python", *below, "```", ""]),
        ]
    )


def lines_of_code(source: str) -> int:
    """Lines of a module that are neither blank nor of a docstring."""
    lines = source.splitlines()
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(bool(line.strip()) and number not in told for number, line in enumerate(lines, 1))


TABLES: dict[str, Callable[[], str]] = {"settings": settings_tables, "algorithms": algorithms_table}


# Text ----------------------------------------------------------------------------------------------------------------


def linked(text: str, source: str, page: str, pages: Mapping[str, str], repository: str) -> str:
    """A page's text with its links as they are on the site.

    Args:
        text: Markdown.
        source: the page's file in the repository; its links are relative to that.
        page: the page on the site.
        pages: the site's pages, by the path in the repository of what they show.
        repository: its address; ``""``: what leads there is no link.
    """

    def target(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        if path is None:
            return found[0]  # code
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        shown, _, own = pages.get(file, "").partition("#")
        if shown:
            anchor = anchor or (f"#{own}" if own else "")
            return f"[{words}]({posixpath.relpath(shown, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / file).exists():
            return found[0]  # a mistake, which mkdocs tells
        return f"[{words}]({repository}/blob/HEAD/{file}{anchor})" if repository else words

    return _LINK.sub(target, text)


# What mkdocs calls ---------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    # What reads the sources knows folders only, and nothing of setup.py's package_dir: here they lie as imported.
    house = config.extra["house"] = tempfile.TemporaryDirectory()
    package = f"{house.name}/fedsim"
    for folder, copy in [(ROOT / "fedsim", package), *((ROOT / name, f"{package}/{name}") for name in OUTSIDE)]:
        shutil.copytree(folder, copy, copy_function=os.symlink)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [house.name]
    return config


on_config.mkdocs_priority = 50  # type: ignore[attr-defined]  # before mkdocstrings reads its paths


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File, InclusionLevel

    for file, page in FROM_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    for name in registry.names("fedsim.algorithms", Algorithm):
        page = f"reference/algorithms/{name}.md"
        files.append(File.generated(config, page, content=algorithm_page(name), inclusion=InclusionLevel.NOT_IN_NAV))
    pages = config.extra["pages"] = {"algorithms": "algorithms.md"}
    for file in files:
        pages[_source(file.src_uri)] = file.src_uri
        if file.is_documentation_page():
            for module in re.findall(r"^::: (\S+)", file.content_string, re.MULTILINE):
                pages |= {path: f"{file.src_uri}#{module}" for path in _sources(module)}
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    for name, table in TABLES.items():
        marker = f"<!-- table: {name} -->"
        markdown = markdown.replace(marker, table()) if marker in markdown else markdown
    own, repository = page.file.src_uri, config.repo_url.rstrip("/")
    return linked(markdown, _source(own), own, config.extra["pages"], repository)


def _source(page: str) -> str:
    """A page's file in the repository."""
    return next((file for file, own in FROM_ROOT.items() if own == page), f"docs/{page}")


def _sources(module: str) -> Iterator[str]:
    """A module's file in the repository, and its folder if it is a package."""
    parts = module.split(".")
    path = "/".join(parts[1:] if parts[1:2] and parts[1] in OUTSIDE else parts)
    if (ROOT / path).is_dir():
        yield path
        path = f"{path}/__init__"
    yield f"{path}.py"
