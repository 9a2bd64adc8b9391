"""What the documentation shows works as it stands there.

Of a page, in its order: ``python`` runs, or is a file where its first line names one (``# my_envs.py``); ``yaml`` is a
file; of ``sh`` every line runs; ``text`` and ``diff`` are read. Every run is as small as the tiny one.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import played
from conftest import TINY
from torch import nn

from fedsim import config, registry
from fedsim import simulation as running
from fedsim.__main__ import main
from fedsim.algorithm import Algorithm
from fedsim.config import Config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUN = ("index.md", "tutorial.md", "sweeps.md", "how-to/algorithm.md", "how-to/env.md", "how-to/adapter.md")
SMALL = ["rounds=1", *(text for text in TINY if re.match(r"(model|adapter|backend)\b", text))]


def imported(name: str) -> ModuleType:
    """A module of the docs' folder."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = imported("hooks")


def blocks(page: str, kind: str = "") -> list[tuple[str, str]]:
    """``(kind, content)`` of a page's fenced blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(own, content) for own, content in found if kind in ("", own)]


def write_files(page: str, folder: Path) -> None:
    for kind, content in blocks(page):
        if kind in ("python", "yaml") and (name := file_name(content)):
            (folder / name).write_text(content, encoding="utf-8")


def file_name(content: str) -> str:
    named = re.match(r"# (\w+\.(?:py|yaml))\n", content)
    return named[1] if named else ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose modules can be imported, and are forgotten again; every run that is set up is small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    load = config.load

    def small(path: str | Path | None, overrides: Any = ()) -> Config:
        given = {text.partition("=")[0] for text in overrides}
        return load(path, [*overrides, *(text for text in SMALL if text.partition("=")[0] not in given)])

    monkeypatch.setattr(config, "load", small)
    monkeypatch.setattr("fedsim.sweep.run_sweep", swept_in_this_process)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def swept_in_this_process(sweep: Any, configs: Mapping[str, Config], out: Path, *_: Any, **__: Any) -> bool:
    for name, swept in configs.items():
        running.run(replace(swept, output=str(out / name)))
    return True


def command(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if arguments[:2] == ["-m", "fedsim"]:
        assert main(arguments[2:]) == 0, line
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
    else:
        extra = re.fullmatch(r"pip install -e \"\.\[(\w+)]\"", line)
        assert extra and f'"{extra[1]}": [' in (ROOT / "setup.py").read_text(encoding="utf-8"), line


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_a_page_works(page, here):
    write_files(page, here)
    names: dict[str, Any] = {}
    for kind, content in blocks(page):
        if kind == "sh":
            for line in content.splitlines():
                command(line)
        elif kind == "python":
            exec(compile(content, f"{page}: {content.splitlines()[0]}", "exec"), names)
        else:
            assert kind in ("yaml", "text", "diff"), f"{page}: nobody checks a block of {kind!r}"
    for name, test in list(names.items()):
        if name.startswith("test_"):
            test()


# The worked examples -------------------------------------------------------------------------------------------------

UNEVEN = ("env.partition=dirichlet", "env.alpha=0.3", "cohort=8")


def test_the_loop_of_its_own_is_fedavg_bit_for_bit(here, tiny_config):
    write_files("how-to/algorithm.md", here)
    averages = [played(tiny_config(f"algorithm={name}", *UNEVEN))[1].average() for name in ("by_step:ByStep", "fedavg")]
    assert torch.equal(*averages)


@pytest.mark.parametrize("name", ["running_mean:RunningMean", "by_step:ByStep"])
def test_a_block_of_clients_of_unequal_size_equals_blocks_of_one(here, tiny_config, name):
    write_files("how-to/algorithm.md", here)
    kept = []
    for size in (8, 1):
        _, server = played(tiny_config(f"algorithm={name}", *UNEVEN, f"backend.block_size={size}"))
        kept.append({"w": server.average(), **server.store.read(np.arange(8))})
    torch.testing.assert_close(*kept, rtol=0, atol=1e-5)


def test_the_writers_env_gives_each_writer_its_own_images(here):
    write_files("how-to/env.md", here)
    from my_envs import Writers  # type: ignore[import-not-found]

    images = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    writers = np.array([1, 0, 1, 0, 1, 0, 1, 1])
    np.savez("drawn.npz", images=images, labels=np.arange(8) % 2, writers=writers)
    data = Writers(Writers.Config(path="drawn.npz", test_share=0.4)).build(0, 4, here / "cache")
    for client, own in enumerate([{1, 3, 5}, {0, 2, 4, 6, 7}]):
        assert {*data.train[client], *data.test[client]} == own
        assert (len(data.train[client]), len(data.test[client])) == ((2, 1), (3, 2))[client]
    assert data.images[:, 0, 0, 0].tolist() == list(range(8)) and data.images.shape == (8, 3, 4, 4)
    assert data.classes == ("0", "1") and data.about["clients"] == 2


def test_the_adapter_goes_into_the_engine_by_the_lines_that_are_shown():
    patched = {}
    for _, diff in blocks("how-to/adapter.md", "diff"):
        file, _, changes = diff.removeprefix("--- ").partition("\n")
        before, after = (
            "".join(f"{line[1:]}\n" for line in changes.splitlines() if line[0] in (" ", sign)) for sign in "-+"
        )
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(before) == 1, file
        patched[file] = source.replace(before, after)
    adapter = next(content for _, content in blocks("how-to/adapter.md", "python") if "class ScaledMlp" in content)
    engine: dict[str, Any] = {"__name__": "fedsim.models.adapters"}
    exec(patched["fedsim/models/adapters.py"], engine)
    exec(adapter, engine)
    block = SimpleNamespace(mlp=SimpleNamespace(fc2=nn.Linear(4, 6)))
    engine["attach"]([block], "scaled", 8, 1.0, ())
    assert block.mlp.scale.shape == (6,)
    compile(patched["fedsim/config.py"], "config.py", "exec")


# What the site is made of --------------------------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_reference():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(named) == len(set(named))
    files = [file.relative_to(ROOT) for file in (ROOT / "fedsim").rglob("*.py") if file.name != "__main__.py"]
    files += [Path("fedsim") / file.relative_to(ROOT) for file in (ROOT / "envs").glob("*.py")]
    modules = {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}
    assert set(named) == modules - {"fedsim"}


def test_settings_has_every_key_with_its_default_and_range():
    page = hooks.settings_tables()
    for name in registry.names("fedsim.algorithms", Algorithm):
        found = config.algorithm_class(name).Config
        own = page.partition(f"\n### algorithm={name}\n")[2].partition("\n#")[0]
        assert bool(own) == bool(fields(found)), name
        for field in fields(found):
            assert f"| `algorithm.{field.name}` |" in own
    rows = page.splitlines()
    assert any(row.startswith("| `seed` | `0` | whole number, 0 … 2^63 − 1 | the run's seed") for row in rows)
    assert "| `local.lr` | `0.05` | number, at least 0 | learning rate |" in rows
    assert "| `local.betas` | `[0.9, 0.999]` | number, 0 … 1 | for adam and adamw: decay of both moments |" in rows
    assert "| `backend.name` | `ray` | `ray`, `local` | 'ray' (actors), or 'local' (this process, no Ray) |" in rows
    assert "| `model.options` | `{}` | mapping | further arguments of timm.create_model |" in rows
    assert any(row.startswith("| `model.mean` | – | number | mean of the normalised input") for row in rows)
    assert sum(row.startswith("| `env.alpha` |") for row in rows) == 1  # once for all envs
    assert sum(row.startswith("| `env.num_clients` |") for row in rows) == 2  # and where an env's own differs


def test_lines_of_code_are_neither_blank_nor_of_a_docstring():
    told = '"""One.\n\nTwo."""\n\nx = 1  # a line\n\n\ndef f():\n    """Three."""\n'
    source = told + '    return """no\n    docstring"""\n# a line\n'
    assert hooks.lines_of_code(source) == 5


def test_the_table_of_algorithms_has_a_row_for_each():
    rows = hooks.algorithms_table().splitlines()[2:]
    assert [re.match(r"\| \[`(\w+)`]", row)[1] for row in rows] == registry.names("fedsim.algorithms", Algorithm)
    row = next(row for row in rows if "`fedprox`" in row)
    what = "FedAvg whose clients are pulled back to what they were sent."
    assert row.split(" | ")[1:4] == ["global", what, "Li et al., MLSys 2020 (arXiv 1812.06127)"]


PAGES = {
    "docs/results.md": "results.md",
    "docs/how-to/env.md": "how-to/env.md",
    "docs/quickstart.png": "quickstart.png",
    "fedsim/env.py": "reference/env.md#fedsim.env",
}


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("README.md", "readme.md", "[r](docs/results.md#q)", "[r](results.md#q)"),
        ("README.md", "readme.md", "![p](docs/quickstart.png)", "![p](quickstart.png)"),
        ("docs/pfedseq.md", "pfedseq.md", "[`e`](../fedsim/env.py)", "[`e`](reference/env.md#fedsim.env)"),
        ("docs/how-to/a.md", "how-to/a.md", "[e](../../fedsim/env.py)", "[e](../reference/env.md#fedsim.env)"),
        ("docs/how-to/env.md", "how-to/env.md", "[r](../results.md)", "[r](../results.md)"),
        ("docs/results.md", "results.md", "[e](how-to/env.md)", "[e](how-to/env.md)"),
        ("README.md", "readme.md", "[m](Makefile#L1)", "[m](https://host/us/blob/HEAD/Makefile#L1)"),
        ("README.md", "readme.md", "[x](nowhere.md)", "[x](nowhere.md)"),
        ("README.md", "readme.md", "[x](https://a/docs/results.md) [y](#docs)", None),
        ("README.md", "readme.md", "```\n[r](docs/results.md)\n```", None),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(source, page, text, expected):
    assert hooks.linked(text, source, page, PAGES, "https://host/us") == (expected or text)


def test_without_a_repository_its_files_are_plain_text():
    assert hooks.linked("see [the `Makefile`](Makefile).", "README.md", "readme.md", PAGES, "") == "see the `Makefile`."


@pytest.fixture
def docstrings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that griffe calls, which the tests do without."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))  # type: ignore[arg-type]
    return imported("docstrings")


def test_simple_tables_of_docstrings_become_tables(docstrings):
    table = ["==== =====", "``C``  clients", "     and more", "``d``  length", "==== ====="]
    made = ["", "| | |", "|---|---|", "| ``C`` | clients and more |", "| ``d`` | length |", ""]
    assert docstrings.tabled("\n".join(["Shapes:", *table, "After."])) == "\n".join(["Shapes:", *made, "After."])
    assert docstrings.tabled("a == b\n\nTitle\n=====") == "a == b\n\nTitle\n====="


def test_names_that_share_a_line_get_one_each(docstrings):
    text = "Args:\n    x, y: two,\n        of a kind.\n    z: one.\n\nReturns:\n    a, b"
    each = "Args:\n    x: two,\n        of a kind.\n    y: two,\n        of a kind.\n    z: one.\n\nReturns:\n    a, b"
    assert docstrings.one_each(text) == each
    assert docstrings.one_each("Here, there: no list.") == "Here, there: no list."
