"""The report of a comparison: one HTML file with its pictures inside, CSV and JSON tables, a table for the terminal."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headinit.analysis import plots
from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.results import RunRow, plain, write_json, write_text
from headinit.analysis.statistics import (
    BlockAnalysis,
    Interval,
    SchemeSummary,
    analyse,
    conclude,
    conclude_block,
    conclude_ranking,
    has_failed,
    is_share,
    pair_of,
    rank_over_data,
    setting_text,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

THUMBNAIL = 128
"""Side of the pictures of confused examples, in pixels."""


@dataclass(frozen=True)
class ConfusedExample:
    """An example that the winner got wrong.

    Attributes:
        content: a picture (encoded bytes, or the path of its file), or a text.
        true, predicted: class names.
        confidence: probability of the predicted class.
        name: what to call it: its file, or "file.tsv line 12".
    """

    content: bytes | Path | str
    true: str
    predicted: str
    confidence: float
    name: str = ""


@dataclass(frozen=True)
class Winner:
    """What the report shows of the best head.

    Attributes:
        title: which run it is, such as ``"ridge at lr 0.01, seed 0"``.
        confusion: `(K, K)` counts, row = true class; None to leave it out.
        class_names: K names.
        confused: the most confident mistakes, worst first.
    """

    title: str
    confusion: Any = None
    class_names: Sequence[str] = ()
    confused: Sequence[ConfusedExample] = ()


@dataclass(frozen=True)
class Starts:
    """How the heads start, for the report.

    Attributes:
        chance_loss: ln K.
        histograms: scheme -> `logit_histogram` of its head before training.
        spectra: scheme -> singular values of its weight.
        warnings: scheme -> sentences of `start_diagnostics`.
    """

    chance_loss: float | None = None
    histograms: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    spectra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)


def write_report(
    path: str | os.PathLike[str],
    rows: Iterable[RunRow],
    *,
    title: str = "Comparison of head initialisations",
    metric: str = "accuracy",
    majority: Mapping[str, float] | None = None,
    margin: float = 0.005,
    starts: Starts | None = None,
    winner: Winner | None = None,
    configuration: Mapping[str, Any] | None = None,
    plot_folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write the report: one HTML file that needs no network and no script.

    Args:
        path: the file to write, atomically.
        rows: the runs.
        title: heading of the page.
        metric, majority, margin, seed: as for `headinit.analysis.statistics.conclusion`.
        starts: how the heads start.
        winner: confusion matrix and mistakes of the best head.
        configuration: shown at the end, as JSON.
        plot_folder: also write the pictures there, as PNG files.

    Raises:
        DataError: no run has a score.

    Example:
        >>> import tempfile
        >>> rows = [RunRow(init=name, lr=0.1, seed=s, val={"accuracy": base}) for name, base in
        ...         (("he", 0.8), ("ridge", 0.9)) for s in range(2)]
        >>> page = write_report(Path(tempfile.mkdtemp(), "report.html"), rows).read_text()
        >>> "<h1>Comparison of head initialisations</h1>" in page
        True
    """
    kept = list(rows)
    analyses = analyse(kept, metric, majority, seed)
    pictures = _Pictures(None if plot_folder is None else Path(plot_folder))
    body = [
        _conclusion_section(analyses, margin, pictures),
        *(_block_section(block, kept, margin, pictures, starts, number) for number, block in enumerate(analyses)),
        _starts_section(starts, pictures, [summary.init for summary in analyses[0].summaries]),
        _winner_section(winner, pictures),
        _failures_section(kept, metric, majority),
        _configuration_section(configuration),
    ]
    return write_text(path, _page(title, "\n".join(part for part in body if part)))


def write_comparison(
    folder: str | os.PathLike[str],
    rows: Iterable[RunRow],
    *,
    metric: str = "accuracy",
    majority: Mapping[str, float] | None = None,
    margin: float = 0.005,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write `comparison.csv` (one line per run) and `comparison.json` (conclusion, statistics, runs).

    Returns:
        The two paths.

    Example:
        >>> import tempfile
        >>> table, _ = write_comparison(tempfile.mkdtemp(), [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8})])
        >>> table.read_text().splitlines()[1].startswith("he,0.1,0.0,0,0,all")
        True
    """
    kept = list(rows)
    analyses = analyse(kept, metric, majority, seed)
    flat = [_flat(row) for row in kept]
    names = list(dict.fromkeys(name for line in flat for name in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    content = {
        "conclusion": conclude(analyses, margin),
        "metric": metric,
        "blocks": [_block_as_json(block, margin) for block in analyses],
        "ranking": rank_over_data(analyses),
        "runs": kept,
    }
    target = Path(folder)
    return write_text(target / "comparison.csv", buffer.getvalue()), write_json(target / "comparison.json", content)


def comparison_table(
    rows: Iterable[RunRow],
    *,
    metric: str = "accuracy",
    majority: Mapping[str, float] | None = None,
    margin: float = 0.005,
    seed: int = 0,
) -> Table:
    """The comparison as a table for the terminal.

    Example:
        >>> rows = [RunRow(init="he", lr=0.1, seed=s, val={"accuracy": 0.8}) for s in range(2)]
        >>> comparison_table(rows).row_count
        1
    """
    from rich.text import Text

    analyses = analyse(list(rows), metric, majority, seed)
    split = "test" if all(block.split == "test" for block in analyses) else "validation"
    heads = ["scheme", "setting", f"{split} {_unit(metric)}", "IQM", "std", "failed", "steps to 90 %", "verdict"]
    table = _table(heads)
    for block in analyses:
        if len(analyses) > 1:
            table.add_section()
            table.add_row(Text(block.title, style="bold"))
        for summary in block.summaries:
            standing = _standing(block, summary, margin)
            cells = [
                summary.init,
                setting_text(summary, block),
                _interval(summary.mean, metric),
                _number(summary.iqm.estimate if summary.iqm else None, metric),
                _number(summary.std, metric, 2),
                f"{summary.failed_anywhere}/{summary.runs_anywhere}",
                _plain_number(summary.steps_to_90),
                standing,
            ]
            table.add_row(*(Text(cell) for cell in cells), style="bold" if standing == "best" else None)
    return table


def progress_table(rows: Iterable[RunRow], *, metric: str = "accuracy", expected: int | None = None) -> Table:
    """A cheap table to show while runs are still coming in: no tests, validation only.

    Args:
        rows: the runs so far; there may be none.
        metric: what to show.
        expected: number of runs in all, for the title.

    Example:
        >>> progress_table([], expected=10).title
        '0 of 10 runs'
    """
    from rich.text import Text

    kept = list(rows)
    table = _table(["scheme", "runs", "best lr so far", f"its validation {_unit(metric)}", "failed"])
    table.title = f"{len(kept)} of {expected} runs" if expected is not None else f"{len(kept)} runs"
    sign = 1 if HIGHER_IS_BETTER.get(metric, True) else -1
    found = []
    for key in dict.fromkeys((row.data, row.freeze, row.per_class, row.init) for row in kept):
        own = [row for row in kept if (row.data, row.freeze, row.per_class, row.init) == key]
        means = {rate: _mean_score(own, rate, metric) for rate in {row.lr for row in own}}
        known = {rate: value for rate, value in means.items() if value is not None}
        best = max(known, key=lambda rate: sign * known[rate]) if known else None
        found.append((key, own, best, None if best is None else known[best]))
    found.sort(key=lambda entry: -math.inf if entry[3] is None else sign * entry[3], reverse=True)
    several = len({(row.data, row.freeze, row.per_class) for row in kept}) > 1
    for (data, freeze, per_class, init), own, best, value in found:
        place = f" ({data}, freeze={freeze}{f', {per_class} per class' if per_class else ''})" if several else ""
        failed = sum(has_failed(row, metric) for row in own)
        cells = [f"{init}{place}", str(len(own)), _plain_number(best), _number(value, metric), str(failed or "")]
        table.add_row(*(Text(cell) for cell in cells))
    return table


class _Pictures:
    """Turns figures into `<img>` elements with the PNG inside, and keeps the files where that is asked for."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def embed(self, name: str, figure: Figure, description: str) -> str:
        content = plots.png_bytes(figure)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.png").write_bytes(content)
        # Drawn at 1.5 pixels per CSS pixel; the width stands in bytes 16 to 20 of a PNG file.
        width = round(int.from_bytes(content[16:20], "big") / 1.5)
        return f'<figure class="plot">{_image(content, description, width)}</figure>'


def _image(content: bytes, description: str, width: int, style: str = "") -> str:
    encoded = base64.b64encode(content).decode("ascii")
    kind = f' class="{style}"' if style else ""
    return f'<img{kind} width="{width}" alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def _conclusion_section(analyses: Sequence[BlockAnalysis], margin: float, pictures: _Pictures) -> str:
    parts = []
    for block in analyses:
        first, *others = conclude_block(block, margin).split("\n")
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in others)
        parts.append(f"<p><strong>{html.escape(first)}</strong></p><ul>{lines}</ul>")
    ranking = rank_over_data(analyses)
    if ranking is not None:
        parts.append(f"<p>{html.escape(conclude_ranking(ranking))}</p>")
        diagram = plots.critical_difference_diagram(ranking)
        parts.append(pictures.embed("critical_difference", diagram, "Critical difference diagram of the mean ranks"))
    return _section("Conclusion", "".join(parts), "conclusion")


def _block_section(
    block: BlockAnalysis,
    rows: Sequence[RunRow],
    margin: float,
    pictures: _Pictures,
    starts: Starts | None,
    number: int,
) -> str:
    own = [row for row in rows if (row.data, row.freeze, row.per_class) == (block.data, block.freeze, block.per_class)]
    prefix = f"{number + 1:02d}_"
    parts = [_results_table(block, margin)]
    parts.append(pictures.embed(f"{prefix}scores", plots.scheme_scores(block), "Score of every run, by scheme"))
    if any(row.history for row in own):
        figure = plots.learning_curves(own, block)
        parts.append(pictures.embed(f"{prefix}curves", figure, "Learning curves with bands over the seeds"))
    parts.append(_speed_table(block))
    figure = plots.rate_heat_map(own, block)
    parts.append(pictures.embed(f"{prefix}heat_map", figure, "Validation score by scheme and learning rate"))
    if any(len(summary.best_of) > 1 for summary in block.summaries):
        figure = plots.expected_best_curves(block)
        parts.append(pictures.embed(f"{prefix}expected_best", figure, "Expected best validation score by budget"))
    if any(summary.init_loss is not None for summary in block.summaries):
        figure = plots.start_overview(block, starts.chance_loss if starts else None)
        parts.append(pictures.embed(f"{prefix}start", figure, "Loss and gradient into the features at the start"))
    return _section(f"Results: {block.title}", "".join(parts))


def _results_table(block: BlockAnalysis, margin: float) -> str:
    heads = ["scheme", "chosen setting", f"{_split_name(block)} {_unit(block.metric)}", "IQM", "std", "runs", "failed"]
    heads += ["difference from the best", "p (Holm)", "verdict"]
    lines = []
    for summary in block.summaries:
        pair = pair_of(block, block.summaries[0].init, summary.init) if summary is not block.summaries[0] else None
        standing = _standing(block, summary, margin)
        difference, p = "", ""
        if pair is not None:
            sign = 1 if pair.first == summary.init else -1
            bounds = [None if b is None else sign * b for b in (pair.difference.low, pair.difference.high)]
            low, high = (bounds[0], bounds[1]) if sign == 1 else (bounds[1], bounds[0])
            turned = Interval(sign * pair.difference.estimate, low, high)
            difference, p = _interval(turned, block.metric, signed=True), _p(pair.adjusted_p)
        cells = [
            _cell(summary.init, "name"),
            _cell(setting_text(summary, block)),
            _cell(_interval(summary.mean, block.metric), "number"),
            _cell(_number(summary.iqm.estimate if summary.iqm else None, block.metric), "number"),
            _cell(_number(summary.std, block.metric, 2), "number"),
            _cell(str(summary.runs), "number"),
            _cell(f"{summary.failed_anywhere} of {summary.runs_anywhere}", "number"),
            _cell(difference, "number"),
            _cell(p, "number"),
            f'<td><span class="chip {standing.replace(" ", "-")}">{html.escape(standing)}</span></td>',
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Mean of the runs that did not fail, with the 95 % BCa bootstrap interval in brackets; differences are paired "
        "by seed and split; failed runs are counted over all settings."
    )
    return _html_table(heads, lines, note)


def _speed_table(block: BlockAnalysis) -> str:
    heads = ["scheme", "steps to 90 %", "steps to 99 %", "seconds to 90 %", "seconds to 99 %", "area under the curve"]
    heads += ["seconds per run", "initial loss", "gradient into the features"]
    lines = []
    for s in block.summaries:
        values = [s.steps_to_90, s.steps_to_99, s.seconds_to_90, s.seconds_to_99, s.area, s.seconds]
        values += [s.init_loss, s.feature_gradient]
        cells = [_cell(s.init, "name"), *(_cell(_plain_number(value), "number") for value in values)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Steps and seconds until validation first reaches 90 % or 99 % of the best value that any run here has (median "
        "over the seeds; a dash where most runs never do)."
    )
    return _html_table(heads, lines, note)


def _starts_section(starts: Starts | None, pictures: _Pictures, order: Sequence[str]) -> str:
    if starts is None:
        return ""
    parts = []
    entries = [f"<li>{html.escape(init)}: {html.escape(w)}</li>" for init, ws in starts.warnings.items() for w in ws]
    if entries:
        parts.append(f"<ul>{''.join(entries)}</ul>")
    if starts.histograms:
        figure = plots.logit_histograms(_in_order(starts.histograms, order))
        parts.append(pictures.embed("logit_histograms", figure, "Histograms of the logits at the start"))
    if starts.spectra:
        figure = plots.head_spectra(_in_order(starts.spectra, order))
        parts.append(pictures.embed("head_spectra", figure, "Singular values of the heads' weights"))
    return _section("Where the heads start", "".join(parts)) if parts else ""


def _in_order(entries: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The entries in the order of the results, so that a scheme has the same colour in every picture."""
    known = [name for name in order if name in entries]
    return {name: entries[name] for name in [*known, *(name for name in entries if name not in order)]}


def _winner_section(winner: Winner | None, pictures: _Pictures) -> str:
    if winner is None:
        return ""
    parts = []
    if winner.confusion is not None:
        figure = plots.confusion_map(winner.confusion, winner.class_names, f"Confusion matrix: {winner.title}")
        parts.append(pictures.embed("confusion", figure, "Confusion matrix of the best head"))
        parts.append(_confused_pairs(np.asarray(winner.confusion), winner.class_names))
    if winner.confused:
        cards = "".join(map(_card, winner.confused))
        parts.append(f'<h3>Most confident mistakes</h3><div class="gallery">{cards}</div>')
    return _section(f"The best head: {winner.title}", "".join(parts)) if parts else ""


def _confused_pairs(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """The pairs of classes that are mixed up most, in words: the picture's labels may be too small to read."""
    names = list(class_names) or [str(k) for k in range(len(counts))]
    errors = [(int(counts[i, j]), i, j) for i in range(len(counts)) for j in range(len(counts)) if i != j]
    worst = [entry for entry in sorted(errors, key=lambda e: (-e[0], e[1], e[2]))[:8] if entry[0]]
    if not worst:
        return "<p>No mistakes.</p>"
    heads = ["true", "predicted", "examples", "share of the true class"]
    lines = []
    for count, i, j in worst:
        share = f"{count / counts[i].sum():.1%}"
        cells = [_cell(names[i], "name"), _cell(names[j], "name"), _cell(str(count), "number"), _cell(share, "number")]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _html_table(heads, lines, "")


def _card(example: ConfusedExample) -> str:
    text = isinstance(example.content, str)
    shown = f"<blockquote>{html.escape(str(example.content)[:400])}</blockquote>" if text else _thumbnail(example)
    caption = (
        f"true <b>{html.escape(example.true)}</b><br>predicted <b>{html.escape(example.predicted)}</b> "
        f"({example.confidence:.0%})"
    )
    name = f"<br><small>{html.escape(example.name)}</small>" if example.name else ""
    return f'<figure class="card{" text" if text else ""}">{shown}<figcaption>{caption}{name}</figcaption></figure>'


def _thumbnail(example: ConfusedExample) -> str:
    """The picture, encoded anew as a small PNG: whatever the file holds, nothing but pixels reaches the page."""
    from PIL import Image

    source = io.BytesIO(example.content) if isinstance(example.content, bytes) else example.content
    try:
        with Image.open(source) as opened:  # type: ignore[arg-type]
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return '<div class="missing">unreadable picture</div>'
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    tiny = max(picture.size) < THUMBNAIL
    description = f"{example.true}, predicted {example.predicted}"
    return _image(buffer.getvalue(), description, THUMBNAIL, "tiny" if tiny else "")


def _failures_section(rows: Sequence[RunRow], metric: str, majority: Mapping[str, float] | None) -> str:
    failed = [row for row in rows if has_failed(row, metric, (majority or {}).get(row.data))]
    if not failed:
        return ""
    lines = []
    for row in failed[:200]:
        why = row.status if row.status != "finished" else "at or below the majority class"
        values = [row.data, row.freeze, row.init, f"{row.lr:g}", str(row.seed), str(row.split_seed), why]
        lines.append(f"<tr>{''.join(map(_cell, values))}</tr>")
    table = _html_table(["data", "freeze", "scheme", "lr", "seed", "split seed", "why"], lines, "")
    return _section("Failed runs", f"<details><summary>{len(failed)} of {len(rows)} runs</summary>{table}</details>")


def _configuration_section(configuration: Mapping[str, Any] | None) -> str:
    if not configuration:
        return ""
    text = json.dumps(plain(configuration), indent=2, ensure_ascii=False, allow_nan=False)
    return _section("Configuration", f"<pre>{html.escape(text)}</pre>")


def _section(title: str, body: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f"<section{kind}><h2>{html.escape(title)}</h2>{body}</section>"


def _html_table(heads: Sequence[str], lines: Sequence[str], note: str) -> str:
    first = lines[0].split("<td")[1:] if lines else []
    kinds = [' class="number"' if cell.startswith(' class="number"') else "" for cell in first] or [""] * len(heads)
    head = "".join(f'<th scope="col"{kind}>{html.escape(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{caption}'


def _cell(text: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f"<td{kind}>{html.escape(text)}</td>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --page: #f5f6f8; --card: #ffffff; --line: #dfe3e8;
  --accent: #0072b2; --good: #00785a; --bad: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --page: #14181c; --card: #1d2329;
  --line: #343c45; --accent: #6cbcec; --good: #4fd0a5; --bad: #ff9a57; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 8px 0 20px; }
h2 { font-size: 1.2rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 20px 0 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin: 0 0 20px; }
section.conclusion { border-left: 5px solid var(--accent); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: 6px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th.number { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { font-weight: 600; }
.note, figcaption, small { color: var(--soft); font-size: .85rem; }
.note { margin: 6px 0 18px; }
.chip { padding: 1px 9px; border: 1px solid currentColor; border-radius: 99px; white-space: nowrap;
  color: var(--soft); }
.chip.best, .chip.level { color: var(--good); }
.chip.behind, .chip.likely-behind, .chip.failed { color: var(--bad); }
figure { margin: 0; }
figure.plot { background: #fff; border-radius: 8px; padding: 10px; margin: 14px 0; text-align: center; }
figure.plot img { max-width: 100%; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: 14px; }
.card { width: 150px; } .card.text { width: 320px; }
.card img { width: 128px; height: 128px; object-fit: contain; background: #8883; border-radius: 6px; display: block; }
.card img.tiny { image-rendering: pixelated; }
.missing { width: 128px; height: 128px; display: grid; place-items: center; background: #8883; border-radius: 6px; }
blockquote { margin: 0 0 6px; padding: 8px 12px; border-left: 3px solid var(--line); }
pre { overflow-x: auto; font-size: .8rem; }
@media print { body { background: #fff; max-width: none; } section { break-inside: avoid; } }
"""


def _page(title: str, body: str) -> str:
    # The policy forbids every request and script, whatever a name in the data may hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _standing(block: BlockAnalysis, summary: SchemeSummary, margin: float) -> str:
    if summary.mean is None:
        return "failed"
    best = block.summaries[0]
    if summary is best:
        return "best"
    pair = pair_of(block, best.init, summary.init)
    return "not told apart" if pair is None else verdict(pair, margin).lower()


def _block_as_json(block: BlockAnalysis, margin: float) -> dict[str, Any]:
    content = dataclasses.asdict(block)
    for entry, summary in zip(content["summaries"], block.summaries, strict=True):
        entry["verdict"] = _standing(block, summary, margin)
        units = summary.scores.items()
        entry["scores"] = [{"split_seed": split, "seed": seed, "score": score} for (split, seed), score in units]
    return content


def _flat(row: RunRow) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for entry in dataclasses.fields(row):
        value = getattr(row, entry.name)
        if entry.name in ("val", "test"):
            line.update({f"{entry.name}_{name}": plain(score) for name, score in value.items()})
        elif entry.name != "history":
            line[entry.name] = plain(value)
    factors = ("init", "lr", "weight_decay", "seed", "split_seed", "freeze", "per_class", "data")
    return {**{name: line[name] for name in factors}, **{k: v for k, v in line.items() if k not in factors}}


def _table(columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < 2 or name == "verdict" else "right")
    return table


def _mean_score(rows: Sequence[RunRow], rate: float, metric: str) -> float | None:
    values = [row.val.get(metric) for row in rows if row.lr == rate]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _split_name(block: BlockAnalysis) -> str:
    return "test" if block.split == "test" else "validation"


def _unit(metric: str) -> str:
    return f"{metric} (%)" if is_share(metric) else metric


def _number(value: float | None, metric: str, digits: int | None = None, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    scale, usual = (100.0, 1) if is_share(metric) else (1.0, 3)
    places = max(usual, digits or 0)
    return f"{round(scale * value, places) + 0.0:{'+' if signed else ''}.{places}f}"  # + 0.0: no -0.0


def _interval(interval: Interval | None, metric: str, signed: bool = False) -> str:
    if interval is None:
        return "-"
    text = _number(interval.estimate, metric, signed=signed)
    if interval.low is None or interval.high is None:
        return text
    low, high = (_number(bound, metric, signed=signed) for bound in (interval.low, interval.high))
    return f"{text} [{low}, {high}]"


def _plain_number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
