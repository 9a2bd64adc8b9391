"""The report: its files, and the page as a browser reads it, with numbers worked out by hand."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image
from rich.console import Console
from run_folders import write_run

import fedsim
from fedsim.__main__ import main
from fedsim.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ODD = 'x <i>&"$a$'  # a folder's name that HTML, SVG and matplotlib must not take for theirs


class Page(HTMLParser):
    """A page's visible text, its tables by class, and its attributes.

    Attributes:
        text: without the style sheet.
        tables: by class, rows of cells ``(text, class)``.
        attributes: all ``(tag, name, value)``.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tables, self.attributes = "", {}, []
        self._inside: list[str] = []
        self._rows: list[list[tuple[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.text += " "
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._inside.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(given.get("class"), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", given.get("class") or ""))

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass  # meta and the like have no end

    def handle_data(self, data):
        if "style" in self._inside:
            return
        self.text += data
        if {"td", "th"} & set(self._inside):
            text, kind = self._rows[-1][-1]
            self._rows[-1][-1] = f"{text} {data.strip()}".strip(), kind

    def column(self, table: str, heading: str) -> list[tuple[str, str]]:
        """The cells below a heading."""
        (place,) = [number for number, (text, _) in enumerate(self.tables[table][0]) if text == heading]
        return [row[place] for row in self.tables[table][1:]]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``report`` of two rows over two seeds, a row with an odd name, a second task, and three folders that are none.

    Ditto's means are 0.6 and 0.8, FedAvg's 0.5 and 0.6; FedAvg once more, seed 0: 0.3.
    """
    folder = tmp_path_factory.mktemp("report")
    own = {"attention_own_0": 0.25, "attention_others_0": 0.25, "attention_others_1_3": 0.5, "attention_others_4": 0.0}
    ditto = ("algorithm=ditto",)
    write_run(folder / "runs" / "d0", [0.6, 0.4, 0.8, 0.6], *ditto, "seed=0", measured=(own, own))
    write_run(folder / "runs" / "d1", [0.8] * 4, *ditto, "seed=1", bytes=(2048, 2048), measured=(own, own))
    write_run(folder / "runs" / "f0", [0.5, 0.4, 0.7, 0.4], "seed=0", average=0.25, seconds=5)
    write_run(folder / "runs" / "f1", [0.9, 0.5, 0.5, 0.5], "seed=1", average=0.5, seconds=8)
    write_run(folder / ODD, [0.3] * 4, "seed=0", average=0.125, seconds=8)
    write_run(folder / "held", [0.5] * 4, "eval.validation=0.25", measured=({"mix_0": 0.5}, {"mix_0": 0.75}))
    write_run(folder / "damaged <b>", [0.5] * 4)
    (folder / "damaged <b>" / "metrics.jsonl").write_text("{")
    write_run(folder / "stopped", [0.5] * 4)
    summary = folder / "stopped" / "summary.json"
    summary.write_text(summary.read_text().replace("finished", "interrupted"))
    given = [folder / name for name in ("runs", ODD, "held", "damaged <b>", "stopped", "nowhere")]
    assert main(["report", *map(str, given), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    return (made / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html.partition("<h1>shapes validation=0.25</h1>")[0])


def test_the_table_has_means_over_seeds_and_marks_the_best(page):
    def column(heading: str) -> list[str]:
        return [text + (" best" if kind == "best" else "") for text, kind in page.column("comparison", heading)]

    assert column("row") == ["● ditto", "■ fedavg (f0)", f"▲ fedavg ({ODD})"]
    assert column("seeds") == ["2", "2", "1"]
    # Deviations: 0.2 and 0.1 over the square root of two.
    assert column("accuracy") == ["0.700 ± 0.141 best", "0.550 ± 0.071", "0.300"]
    assert column("worst client") == ["0.600 best", "0.450", "0.300"]
    assert column("10th percentile") == ["0.610 best", "0.460", "0.310"]
    assert column("as sent") == ["0.350 best", "0.275", "0.150"]
    assert column("global") == ["–", "0.375 best", "0.125"]
    assert column("up") == ["1.5 KiB", "1.0 KiB best", "1.0 KiB best"]
    assert column("down") == ["2.0 KiB best"] * 3
    assert column("seconds") == ["10.0", "6.5 best", "8.0"]


def test_differences_are_paired_over_seeds(page):
    # Seed 0: 0.5 - 0.6; seed 1: 0.6 - 0.8. Mean -0.15, standard error 0.1 / 2. The odd one: 0.3 - 0.6, seed 0 alone.
    found = [text for text, _ in page.column("comparison", "difference to the best")]
    assert found == ["–", "−0.150 ± 0.050", "−0.300"]
    # Seed 0: 0.5 0.4 0.7 0.4 against 0.6 0.4 0.8 0.6; seed 1: 0.9 0.5 0.5 0.5 against 0.8.
    assert [text for text, _ in page.column("comparison", "clients better\xa0/\xa0worse")] == ["–", "1 / 6", "0 / 4"]
    assert "Best: ditto, 0.700; to the next, fedavg (f0): +0.150 ± 0.050 (2 seeds)" in page.text


def test_the_worst_clients_are_named_with_all_rows_accuracies(page):
    heading, *clients = page.tables["worst"]
    assert [text for text, _ in heading] == [
        "client",
        "training samples",
        "evaluated",
        "rounds",
        "classes",
        "●",
        "■",
        "▲",
    ]
    told = [[f"{text}*" if kind == "best" else text for text, kind in row] for row in clients]
    assert told == [
        ["1", "2", "10", "1", "2", "0.400*", "0.400*", "0.300"],
        ["0", "3", "10", "0", "2", "0.600*", "0.500", "0.300"],
        ["3", "2", "10", "3", "2", "0.600*", "0.400", "0.300"],
        ["2", "1", "10", "2", "1", "0.800*", "0.700", "0.300"],
    ]


def test_what_was_evaluated_and_by_what_is_said(page, html):
    assert "Evaluated each client's own test split" in " ".join(page.text.split())
    facts = " ".join(page.text.split())
    assert "Round the last one, 2; no earlier round is ever picked" in facts
    assert "Seeds 0, 1" in facts
    assert "Data shapes, 4 clients, 8 training and 40 evaluated samples, 3 classes, partition pathological" in facts
    assert "Versions fedsim 0.1.0, torch 2.6.0" in facts and "Commit abc0, abc1" in facts
    other = " ".join(Page(html.partition("<h1>shapes validation=0.25</h1>")[2]).text.split())
    assert "held out (eval.validation=0.25); not the test split" in other


def test_what_is_left_out_is_said_on_the_page_and_on_the_console(page, made, capsys):
    told = [line.strip() for line in page.text.splitlines() if str(made.parent) in line]
    assert [line.removeprefix(f"{made.parent}/").partition(" (")[0] for line in told[:3]] == [
        "damaged <b>/metrics.jsonl: damaged", "stopped: not a finished run", "nowhere: not a finished run",
    ]  # fmt: skip
    assert main(["report", str(made.parent / "stopped")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"not a finished run (interrupted); python -m fedsim resume {made.parent / 'stopped'}")
    assert main(["report", str(made / "table.csv")]) == 2
    assert capsys.readouterr().err == f"fedsim: {made / 'table.csv'}: no run folder\n"


def test_pictures_are_in_the_page_and_beside_it(page, html, made):
    titles = re.findall(r'role="img" aria-label="([^"]+)"><?\s*<svg', html)
    first = ["Differences to the best row", "Accuracy against rounds", "Accuracy against bytes",
             "Accuracy against seconds", "Distribution over clients",
             "Training images of every client, by class"]  # fmt: skip
    assert titles == [*first, "ditto", *first[1:], "The memory&#39;s share in what fedavg sends"]
    assert sorted(file.name for file in made.glob("*.png")) == sorted(
        [f"{task}-{name}.png" for task in "12" for name in ("accuracy-bytes", "accuracy-rounds", "accuracy-seconds",
         "clients", "partition")] + ["1-differences.png", "1-attention-1.png", "2-mix-1.png"]
    )  # fmt: skip
    for file in made.glob("*.png"):
        with Image.open(file) as image:
            assert image.width > 500 and len(image.getcolors(1 << 20) or []) != 1
    assert "The darkest square: 2 images." in page.text
    assert all(f"■ {name}" in " ".join(page.text.split()) for name in ("own, this round", "others, 1 to 3 rounds ago"))


def test_the_page_stands_by_itself_and_shows_names_as_they_are(html):
    everything = Page(html)
    assert "http:" not in html and "https:" not in html and "<script" not in html and "@import" not in html
    links = [value for _, name, value in everything.attributes if name in ("src", "href", "xlink:href", "action")]
    assert links and all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))
    assert not {"i", "b <", "link", "iframe"} & {tag for tag, _, _ in everything.attributes}
    assert "<i>" not in html and ODD in everything.text
    # Colours are those of the style sheet, light or dark: none stands in a picture.
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--series-0)" in pictures
    assert not set(re.findall(r"(?:fill|stroke): (#\w+)", pictures))


def test_the_files_hold_a_line_a_run_a_row_and_a_client(made):
    runs = rows(made / "comparison.csv")
    assert [(row["run"], row["algorithm"], row["seed"]) for row in runs] == [
        ("d0", "ditto", "0"), ("d1", "ditto", "1"), ("f0", "fedavg", "0"), ("f1", "fedavg", "1"), (ODD, "fedavg", "0"),
        ("held", "fedavg", "0"),
    ]  # fmt: skip
    table = rows(made / "table.csv")
    assert [(row["task"], row["runs"], row["seeds"], row["n"]) for row in table] == [
        ("shapes validation=0.0", "ditto", "0 1", "2"), ("shapes validation=0.0", "fedavg (f0)", "0 1", "2"),
        ("shapes validation=0.0", f"fedavg ({ODD})", "0", "1"), ("shapes validation=0.25", "fedavg", "0", "1"),
    ]  # fmt: skip
    assert [float(table[1][key]) for key in ("difference", "difference.error", "difference.seeds")] == pytest.approx(
        [-0.15, 0.05, 2]
    )
    assert (table[2]["difference.error"], table[2]["clients.worse"]) == ("", "4")
    clients = rows(made / "clients.csv")
    assert len(clients) == 6 * 4
    assert [clients[1][key] for key in ("row", "seed", "client", "accuracy")] == ["ditto", "0", "1.0", "0.4"]


def test_what_a_sweep_draws_against_its_settings_leads_the_page(tmp_path):
    write_run(tmp_path / "run", [0.5] * 4)
    swept = [
        {"runs": f"{variant} server_lr=10 lr={lr}", "local.lr": lr, "accuracy.mean": accuracy,
         "accuracy.mean.std": None, "seconds.total": 1.0, "seconds.total.std": 0.5}
        for variant, accuracy in (("one", 0.25), ("two", 0.75)) for lr in ("100", "10", "1000")
    ]  # fmt: skip
    report([tmp_path / "run"], tmp_path / "out", Console(quiet=True), swept, {"local.lr": "lr"})
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'role="img" aria-label="([^"]+)"><?\s*(<svg.*?</svg>)', html, re.DOTALL)
    title, picture = pictures[0]
    assert (title, pictures[1][0]) == ("Accuracy and seconds by local.lr", "Accuracy against rounds")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert [texts.count(text) for text in ("10", "100", "1000", "local.lr")] == [2] * 4  # on both axes
    assert [text for text in texts if "server_lr" in text] == ["one server_lr=10", "two server_lr=10"]  # the legend
    with Image.open(tmp_path / "out" / "sweep-lr.png") as image:
        assert image.width > 1000


def test_without_what_draws_the_table_and_the_files_are_made(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", [0.5] * 4)
    for name in ("figures", "page"):
        monkeypatch.delitem(sys.modules, f"fedsim.{name}", raising=False)
        monkeypatch.delattr(fedsim, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == 'no page: it takes matplotlib and jinja2; pip install "fedsim-ray[report]"'
    assert any(line.split()[:3] == ["fedavg", "1", "0.500"] for line in printed)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"comparison.csv", "table.csv", "clients.csv"}


def test_a_folder_that_cannot_be_written_to_costs_one_line(tmp_path, capsys):
    write_run(tmp_path / "run", [0.5] * 4)
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_real_runs_of_a_sweeps_folder_are_compared(tmp_path, capsys):
    for algorithm in ("fedavg", "local"):
        assert main(["run", *TINY, f"algorithm={algorithm}", f"output={tmp_path / 'sweep' / algorithm}"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]) == 0
    means = {row["algorithm"]: float(row["accuracy.mean"]) for row in rows(tmp_path / "out" / "comparison.csv")}
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    told = {row[0][0].split()[-1]: row[2][0] for row in page.tables["comparison"][1:]}
    assert told == {algorithm: f"{mean:.3f}" for algorithm, mean in means.items()}
    assert "index.html, 6 pictures and three CSV files in" in capsys.readouterr().out.splitlines()[-1]


# In a real browser ---------------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_fits_a_phone_and_is_light_or_dark(made, html, tmp_path):
    measuring = tmp_path / "measuring.html"
    script = "document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`"
    measuring.write_text(f"{html}<script>{script}</script>", encoding="utf-8")
    (width, of) = re.findall(
        r"<title>(\d+) of (\d+)</title>", browse(measuring, tmp_path, "--window-size=390,800", "--dump-dom")
    )[0]
    assert width == of
    for scheme, ground in ((0, (26, 26, 25)), (1, (252, 252, 251))):
        shot = tmp_path / f"{scheme}.png"
        browse(made / "index.html", tmp_path, "--window-size=800,600", f"--screenshot={shot}",
               f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
        with Image.open(shot) as image:
            assert image.convert("RGB").getpixel((2, 2)) == ground
            assert len(image.getcolors(1 << 20)) > 20
