"""The report: complete, self-contained, escaped, and shown by a real browser."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from headinit.analysis.diagnostics import head_spectrum, logit_histogram
from headinit.analysis.report import (
    ConfusedExample,
    Starts,
    Winner,
    comparison_table,
    progress_table,
    write_comparison,
    write_report,
)
from headinit.analysis.results import RunRow
from headinit.analysis.statistics import analyse, conclusion
from headinit.errors import DataError

ATTACK = "<script>alert(1)</script>"
BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


def rows_of(names: tuple[str, ...] = ("he", "ridge"), seeds: int = 3, data: tuple[str, ...] = ("digits",)):
    return [
        RunRow(
            init=name,
            lr=lr,
            seed=seed,
            val={"accuracy": 0.5 + 0.1 * k - lr + seed / 100},
            test={"accuracy": 0.5 + 0.1 * k + seed / 100},
            history=[(0, 0.1), (10, 0.4), (20, 0.5 + 0.1 * k)],
            steps=20,
            init_loss=2.3 + k,
            feature_gradient=0.1 * k,
            seconds=1.0,
            data=source,
        )
        for source in data
        for k, name in enumerate(names)
        for lr in (0.01, 0.1)
        for seed in range(seeds)
    ]


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


def full_report(folder: Path, names: tuple[str, ...] = ("he", ATTACK)) -> Path:
    file = folder / f"{ATTACK.replace('/', '_')}.jpg"
    file.write_bytes(picture("L", (300, 200), "JPEG"))
    diverged = RunRow(init=ATTACK, lr=0.1, seed=7, val={}, data="digits", status=ATTACK)
    winner = Winner(
        title=f"{ATTACK} at lr 0.01",
        confusion=torch.tensor([[5, 2], [1, 6]]),
        class_names=(ATTACK, '" onerror="alert(1)'),
        confused=[
            ConfusedExample(picture(), ATTACK, "cat", 0.9, ATTACK),
            ConfusedExample(file, "cat", '"><img src=x>', 0.8, str(file)),
            ConfusedExample(b"<svg onload=alert(1)>", "cat", "dog", 0.7),
            ConfusedExample(folder / "gone.png", "cat", "dog", 0.6),
            ConfusedExample(f"A text with {ATTACK}", "cat", "dog", 0.5),
        ],
    )
    starts = Starts(
        chance_loss=math.log(2),
        histograms={name: logit_histogram(torch.randn(9, 2)) for name in names},
        spectra={name: head_spectrum(torch.randn(2, 5)) for name in names},
        warnings={ATTACK: [f"dead start {ATTACK}"]},
    )
    return write_report(
        folder / "report.html",
        [*rows_of(names), diverged],
        title=f"Report {ATTACK}",
        starts=starts,
        winner=winner,
        configuration={"init": list(names), "note": ATTACK},
        plot_folder=folder / "plots",
    )


class Page(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text = full_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "iframe", "object", "svg"} & set(page.tags)
    assert page.handlers == []
    assert all(source.startswith("data:") for source in page.sources)
    assert "http" not in re.sub(r'http-equiv="', "", text.replace(text[text.find("base64,") :], ""))
    assert not re.search(r"url\(|@import", text)
    for element in (ATTACK, '" onerror="alert(1)', '"><img src=x>'):
        assert element not in text
        assert element in page.text  # shown as it is
    pictures = [source for source in page.sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 10
    for source in pictures:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))).load()
    assert page.text.count("unreadable picture") == 2
    assert len(list((tmp_path / "plots").glob("*.png"))) == 8


def test_report_has_every_section_and_the_conclusion(tmp_path: Path) -> None:
    rows = rows_of()
    text = Page(full_report(tmp_path, ("he", "ridge")).read_text(encoding="utf-8")).text
    for section in (
        "Conclusion",
        "Results: digits",
        "Where the heads start",
        "The best head",
        "Failed",
        "Configuration",
    ):
        assert section in text
    plain = Page(write_report(tmp_path / "plain.html", rows).read_text(encoding="utf-8")).text
    for line in conclusion(rows).splitlines():
        assert line in plain
    mean = analyse(rows)[0].summaries[0].mean
    assert f"{100 * mean.estimate:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]" in plain
    assert "Where the heads start" not in plain
    assert "Configuration" not in plain


def test_report_over_data_sets_has_the_ranking(tmp_path: Path) -> None:
    rows = rows_of(("he", "ridge", "lda"), data=("digits", "trec", "pets"))
    path = write_report(tmp_path / "report.html", rows, plot_folder=tmp_path)
    assert "Mean ranks over 3 settings" in path.read_text(encoding="utf-8")
    assert (tmp_path / "critical_difference.png").is_file()
    assert len(list(tmp_path.glob("03_*.png"))) == 5


def test_a_bad_comparison_leaves_nothing_behind(tmp_path: Path) -> None:
    for write in (write_report, write_comparison):
        with pytest.raises(DataError, match="none of 0 runs"):
            write(tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_the_report(tmp_path: Path) -> None:
    path = full_report(tmp_path)
    page = path.read_text(encoding="utf-8")
    # The same file with a probe, and the policy widened for it, so that the browser can tell what it saw.
    probe = (
        "<script>addEventListener('load', () => { const out = document.createElement('output');"
        "const images = [...document.images];"
        "out.textContent = 'PROBE ' + JSON.stringify({images: images.length,"
        "decoded: images.filter(i => i.complete && i.naturalWidth > 0).length,"
        "requests: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name),"
        "title: document.title, wide: document.documentElement.scrollWidth - innerWidth,"
        "scripts: document.scripts.length}) + ' END'; document.body.append(out); });</script>"
    )
    widened = page.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    (tmp_path / "probe.html").write_text(widened.replace("</head>", f"{probe}</head>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --window-size=1200,900"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "probe.html").as_uri()
    shown = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True).stdout
    answer = re.search(r"<output>PROBE (.*?) END</output>", shown, re.DOTALL)
    assert answer is not None
    seen = json.loads(html.unescape(answer.group(1)))
    assert seen["images"] == seen["decoded"] == 10
    assert seen["requests"] == []
    assert seen["title"] == f"Report {ATTACK}"
    assert seen["scripts"] == 1  # the probe's
    assert seen["wide"] <= 0  # nothing sticks out of the window


def test_csv_and_json(tmp_path: Path) -> None:
    rows = [
        *rows_of(),
        RunRow(init='a,"b"', lr=1.0, seed=0, val={"accuracy": float("nan")}, data="digits", status="diverged"),
    ]
    table, content = write_comparison(tmp_path, rows)
    lines = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    assert len(lines) == len(rows)
    assert [float(line["test_accuracy"]) for line in lines[:-1]] == [row.test["accuracy"] for row in rows[:-1]]
    assert (lines[-1]["init"], lines[-1]["val_accuracy"], lines[-1]["test_accuracy"]) == ('a,"b"', "", "")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(content.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["conclusion"] == conclusion(rows)
    assert len(found["runs"]) == len(rows)
    first = found["blocks"][0]["summaries"][0]
    assert (first["init"], first["verdict"], first["lr"]) == ("ridge", "best", 0.01)
    assert [entry["score"] for entry in first["scores"]] == pytest.approx([0.6, 0.61, 0.62])
    assert found["blocks"][0]["comparisons"][0]["pairs"] == 3


def shown(table) -> str:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_terminal_tables_show_names_as_they_are() -> None:
    rows = rows_of(("he", "[red]ridge[/nope]"))
    text = shown(comparison_table(rows))
    assert "[red]ridge[/nope]" in text
    assert re.search(r"\[red\]ridge\[/nope\] +lr 0\.01 +61\.0 \[60\.0, 6\d\.\d\] .* best", text)
    assert "likely behind" in text
    progress = shown(progress_table([*rows, RunRow(init="new", lr=0.1, seed=0, val={}, data="digits")], expected=99))
    assert "13 of 99 runs" in progress
    assert re.search(r"\[red\]ridge\[/nope\] +6 +0\.01 +60\.0", progress)
    assert re.search(r"new +1 +- +- +1", progress)
    several = shown(comparison_table(rows_of(data=("digits", "trec"))))
    assert "trec, freeze=all" in several


def test_confusion_may_be_any_array_and_perfect(tmp_path: Path) -> None:
    winner = Winner("ridge", np.diag([3, 4]), ("a", "b"))
    assert "No mistakes." in write_report(tmp_path / "r.html", rows_of(), winner=winner).read_text(encoding="utf-8")
