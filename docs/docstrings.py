"""How the docstrings of this project are read for the reference: what is not of Google's style is brought into it.

Called by griffe (``extensions`` in ``mkdocs.yml``).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+):(.*\n?(?:\1 +.*\n?)*)", re.MULTILINE)


class OneEach(griffe.Extension):
    """Every docstring, as ``tabled`` and ``one_each`` leave it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = one_each(tabled(obj.docstring.value))


def one_each(text: str) -> str:
    """``x, delta: …`` as a line for each name, so that the names are checked, and their types found."""

    def lines(found: re.Match[str]) -> str:
        indent, names, told = found.groups()
        return "".join(f"{indent}{name}:{told.rstrip()}\n" for name in names.split(", "))

    return _TOGETHER.sub(lines, text)


def tabled(text: str) -> str:
    """Simple tables (``===== =====`` above and below two columns) as those of Markdown."""
    made: list[str] = []
    width = 0  # of the first column, inside of a table
    for line in text.splitlines():
        border = re.fullmatch(r"(=+) =+", line.strip())
        if border:
            made += [""] if width else ["", "| | |", "|---|---|"]
            width = 0 if width else len(border[1]) + 1
        elif width and not line[:width].strip():
            made[-1] = f"{made[-1].removesuffix('|')}{line.strip()} |"
        elif width:
            made.append(f"| {line[:width].strip()} | {line[width:].strip()} |")
        else:
            made.append(line)
    return "\n".join(made)
