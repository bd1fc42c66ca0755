"""Pictures of a comparison: each function gives a matplotlib `Figure`; pyplot and its global state are not touched."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.results import RunRow
from headinit.analysis.statistics import BlockAnalysis, Ranking, interquartile_mean, is_share
from headinit.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart with every common colour blindness; yellow left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _FAINT = "#222222", "#D9D9D9"
_LONGEST_LABEL = 28
_REGRESSION = ("mae", "mse", "r2", "pearson", "spearman")


def png_bytes(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as a PNG file.

    Example:
        >>> png_bytes(head_spectra({"he": [2.0, 1.0]}))[:4]
        b'\\x89PNG'
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the font does not have are drawn as boxes
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 144) -> Path:
    """Write the figure as PNG, making its folder if need be.

    Example:
        >>> import tempfile
        >>> save_figure(head_spectra({"he": [2.0, 1.0]}), Path(tempfile.mkdtemp(), "spectra.png")).name
        'spectra.png'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png_bytes(figure, dpi))
    return target


def chosen_rows(rows: Iterable[RunRow], block: BlockAnalysis) -> dict[str, list[RunRow]]:
    """The runs of each scheme of a block at the setting that validation chose, in the block's order.

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> list(chosen_rows(rows, analyse(rows)[0]))
        ['he']
    """
    settings = {summary.init: (summary.lr, summary.weight_decay) for summary in block.summaries}
    found: dict[str, list[RunRow]] = {init: [] for init in settings}
    for row in _rows_of(rows, block):
        if settings.get(row.init) == (row.lr, row.weight_decay):
            found[row.init].append(row)
    return found


def learning_curves(rows: Iterable[RunRow], block: BlockAnalysis) -> Figure:
    """Validation accuracy against steps: mean over the seeds, band from the least to the greatest.

    The axis starts where the lowest curve is after a tenth of the steps; the rise from chance before that is cut off.

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> learning_curves(rows, analyse(rows)[0]).axes[0].get_ylabel()
        'validation accuracy (%)'
    """
    figure, axes = _figure(8.0, 4.6)
    schemes = chosen_rows(rows, block)
    drawn, regression = 0, block.metric in _REGRESSION
    scale = 1.0 if regression else 100.0
    for place, (init, own) in enumerate(schemes.items()):
        histories = [sorted(dict(row.history).items()) for row in own if row.history]
        if not histories:
            continue
        steps = np.array(sorted({step for history in histories for step, _ in history}), dtype=np.float64)
        # A run that stopped early keeps its last value.
        points = [np.array(history, dtype=np.float64).T for history in histories]
        curves = scale * np.array([np.interp(steps, times, values) for times, values in points])
        style = _style(place)
        marker = style["marker"] if len(steps) < 25 else None
        axes.plot(steps, curves.mean(axis=0), label=_text(init), **{**style, "marker": marker}, markersize=4)
        if len(curves) > 1:
            axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.13, lw=0)
        drawn += 1
    if drawn:
        _skip_the_rise(axes)
    height = "validation correlation" if regression else "validation accuracy (%)"
    _label(axes, f"Learning curves: {block.title}", "optimizer steps", height)
    _legend_beside(axes, drawn)
    return figure


def rate_heat_map(rows: Iterable[RunRow], block: BlockAnalysis) -> Figure:
    """Mean validation score by scheme and learning rate; the chosen cell has a frame.

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> rate_heat_map(rows, analyse(rows)[0]).axes[0].texts[0].get_text()
        '80.0'
    """
    own = _rows_of(rows, block)
    inits, rates = [summary.init for summary in block.summaries], sorted({row.lr for row in own})
    values = np.full((len(inits), len(rates)), np.nan)
    for i, init in enumerate(inits):
        for j, rate in enumerate(rates):
            values[i, j] = _best_mean(own, init, rate, block)
    scale = 100.0 if is_share(block.metric) else 1.0
    figure, axes = _figure(2.6 + 0.95 * len(rates), 1.4 + 0.36 * len(inits))
    _draw_cells(figure, axes, values * scale, block.metric)
    for i, summary in enumerate(block.summaries):
        _frame_cell(axes, i, rates.index(summary.lr))
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(inits)), [_text(init) for init in inits])
    _label(
        axes, f"Validation {block.metric} by learning rate: {block.title}", "learning rate of the head", "", grid=None
    )
    return figure


def scheme_scores(block: BlockAnalysis) -> Figure:
    """One point per run, with mean and 95 % interval (bar) and interquartile mean (diamond), best scheme on top.

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> scheme_scores(analyse(rows)[0]).axes[0].get_xlabel()
        'validation accuracy (%)'
    """
    figure, axes = _figure(8.0, 1.3 + 0.38 * len(block.summaries))
    scale = 100.0 if is_share(block.metric) else 1.0
    for place, summary in enumerate(block.summaries):
        values = scale * np.array(sorted(summary.scores.values()))
        colour = _style(place)["color"]
        # Points side by side: a fixed spread, so that the picture is the same every time.
        spread = ((np.arange(len(values)) * 0.618) % 1 - 0.5) * 0.36
        axes.scatter(values, place + spread, s=22, color=colour, alpha=0.55, linewidths=0, zorder=2)
        if summary.mean is not None:
            if summary.mean.low is not None and summary.mean.high is not None:
                axes.plot(
                    [scale * summary.mean.low, scale * summary.mean.high], [place] * 2, color=_INK, lw=2, zorder=3
                )
            axes.plot(scale * summary.mean.estimate, place, marker="|", markersize=13, mew=2.2, color=_INK, zorder=4)
            iqm = scale * float(interquartile_mean(values / scale))
            axes.plot(iqm, place, marker="D", markersize=5, mfc="white", mec=_INK, zorder=5)
    axes.set_yticks(range(len(block.summaries)), [_text(s.init) for s in block.summaries])
    axes.set_ylim(len(block.summaries) - 0.5, -0.5)
    name = "test" if block.split == "test" else "validation"
    _label(axes, f"Runs by scheme: {block.title}", f"{name} {_unit(block.metric)}", "", grid="x")
    return figure


def start_overview(block: BlockAnalysis, chance_loss: float | None = None) -> Figure:
    """Loss and gradient into the features at the start, by scheme; a dashed line at the loss of chance.

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> len(start_overview(analyse(rows)[0], chance_loss=2.3).axes)
        2
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.4 + 0.34 * len(block.summaries)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [_text(summary.init) for summary in block.summaries]
    for axes, field in ((left, "init_loss"), (right, "feature_gradient")):
        for place, summary in enumerate(block.summaries):
            value = getattr(summary, field)
            if value is not None:
                axes.plot([0, value], [place] * 2, color=_FAINT, lw=3, zorder=1)
                axes.plot(value, place, marker="o", color=COLOURS[0], markersize=7, zorder=2)
                axes.annotate(f"{value:.3g}", (value, place), (7, 0), textcoords="offset points", va="center", size=8)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        _tidy(axes, "x")
    if chance_loss is not None:
        left.axvline(chance_loss, color=COLOURS[1], ls="--", lw=1.2)
        left.set_title(f"dashed: ln K = {chance_loss:.3f}", fontsize=9, color=COLOURS[1])
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("initial loss (nats)")
    right.set_xlabel("mean gradient norm into the features")
    figure.suptitle(_text(f"Where the heads start: {block.title}", 90), fontsize=11, color=_INK)
    return figure


def logit_histograms(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Logits at the start, a panel per scheme on a shared axis.

    Args:
        histograms: scheme -> ``edges`` (bins + 1) and ``counts`` (bins), as `logit_histogram` gives them.

    Raises:
        DataError: there is no histogram.

    Example:
        >>> len(logit_histograms({"he": {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}}).axes)
        1
    """
    from matplotlib.figure import Figure

    if not histograms:
        raise DataError("Cannot draw logit histograms: there are none. Give one for each scheme.")
    columns = min(4, len(histograms))
    lines = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.6, 1.55 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for place, (init, histogram) in enumerate(histograms.items()):
        edges, counts = np.asarray(histogram["edges"], dtype=float), np.asarray(histogram["counts"], dtype=float)
        grid[place].stairs(counts / max(counts.sum(), 1), edges, fill=True, color=COLOURS[0], alpha=0.85)
        grid[place].set_title(_text(init), fontsize=9, color=_INK)
        grid[place].set_yticks([])
        _tidy(grid[place], None)
    for axes in grid[len(histograms) :]:
        axes.set_visible(False)
    figure.supxlabel("logit at the start (each panel has its own scale)", fontsize=9)
    figure.supylabel("share", fontsize=9)
    figure.suptitle("Logits at the start", fontsize=11, color=_INK)
    return figure


def head_spectra(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values of the head's weight by scheme, logarithmic; a value of exactly 0 has no place on that axis.

    Example:
        >>> head_spectra({"zeros": [0.0, 0.0]}).axes[0].get_legend().get_texts()[0].get_text()
        'zeros (all zero)'
    """
    figure, axes = _figure(8.0, 4.2)
    drawn = 0
    for place, (init, values) in enumerate(spectra.items()):
        positive = np.array([value for value in values if value > 0], dtype=np.float64)
        zeros = len(values) - len(positive)
        note = " (all zero)" if not len(positive) else f" ({zeros} zero)" if zeros else ""
        axes.plot(np.arange(1, len(positive) + 1), positive, label=_text(init) + note, **_style(place), markersize=4)
        drawn += 1
    if any(value > 0 for values in spectra.values() for value in values):
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:.2g}")
    _count_on(axes)
    _label(axes, "Spectra of the heads' weights", "number of the singular value", "singular value")
    _legend_beside(axes, drawn)
    return figure


def confusion_map(counts: Any, class_names: Sequence[str] = (), title: str = "Confusion matrix") -> Figure:
    """Rows are true classes, columns predictions; colour is the share of the row, the numbers are counts.

    Args:
        counts: `(K, K)` array or tensor.
        class_names: K names; numbers are used where there are none, and over 40 classes only some are written.
        title: heading.

    Example:
        >>> confusion_map([[5, 1], [0, 6]], ["cat", "dog"]).axes[0].get_xlabel()
        'predicted class'
    """
    table = np.asarray(counts, dtype=np.float64)
    size = len(table)
    names = [_text(name, 20) for name in class_names] or [str(k) for k in range(size)]
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    extent = min(10.0, max(3.4, 1.6 + 0.42 * size))
    figure, axes = _figure(extent + 0.8, extent)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= 20:
        for i, j in np.argwhere(table > 0):
            colour = "white" if shares[i, j] > 0.55 else _INK
            axes.text(j, i, f"{int(table[i, j])}", ha="center", va="center", size=8 if size <= 12 else 6, color=colour)
    every = max(1, math.ceil(size / 40))
    crowded = max(len(name) for name in names) > (8 if size <= 4 else 3)
    ticks = range(0, size, every)
    axes.set_xticks(ticks, [names[k] for k in ticks], rotation=90 if crowded else 0, fontsize=8)
    axes.set_yticks(ticks, [names[k] for k in ticks], fontsize=8)
    figure.colorbar(picture, ax=axes, shrink=0.75, label="share of the true class")
    _label(axes, title, "predicted class", "true class", grid=None)
    return figure


def expected_best_curves(block: BlockAnalysis) -> Figure:
    """Expected best validation score when n of the tried settings are drawn at random (Dodge et al. 2019).

    Example:
        >>> from headinit.analysis.statistics import analyse
        >>> rows = [RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.8}, history=[(0, 0.1), (9, 0.8)])]
        >>> expected_best_curves(analyse(rows)[0]).axes[0].get_xlabel()
        'number of settings tried'
    """
    figure, axes = _figure(8.0, 4.2)
    scale = 100.0 if is_share(block.metric) else 1.0
    for place, summary in enumerate(block.summaries):
        budget = np.arange(1, len(summary.best_of) + 1)
        label = _text(summary.init)
        axes.plot(budget, scale * np.array(summary.best_of), label=label, **_style(place), markersize=5)
    _count_on(axes)
    _label(
        axes,
        f"What a tuning budget buys: {block.title}",
        "number of settings tried",
        f"expected best validation {_unit(block.metric)}",
    )
    _legend_beside(axes, len(block.summaries))
    return figure


def rate_sweep(rates: Sequence[float], losses: Sequence[float], suggestion: float) -> Figure:
    """The smoothed training loss against a learning rate that grows at every step, and the rate to take.

    Example:
        >>> len(rate_sweep([1e-3, 1e-2, 1e-1], [1.0, 0.5, 2.0], 1e-2).axes)
        1
    """
    figure, axes = _figure(6.4, 3.8)
    axes.plot(rates, losses, color=COLOURS[0])
    axes.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"taken: {suggestion:.2g}")
    axes.set_xscale("log")
    _label(axes, "Learning-rate sweep", "learning rate of the new parameters", "training loss, smoothed")
    axes.legend(frameon=False)
    return figure


def critical_difference_diagram(ranking: Ranking) -> Figure:
    """Mean ranks on a line, best on the left; bars join schemes that cannot be told apart (Demsar 2006).

    Example:
        >>> from headinit.analysis.statistics import rank_schemes
        >>> ranking = rank_schemes(["he", "ridge"], ["digits", "trec"], np.array([[0.8, 0.9], [0.7, 0.8]]))
        >>> critical_difference_diagram(ranking).axes[0].get_title()
        'Mean rank over 2 settings (1 is best)'
    """
    names, ranks = list(ranking.mean_ranks), list(ranking.mean_ranks.values())
    count = len(names)
    half = math.ceil(count / 2)
    depth = 0.9 + 0.28 * len(ranking.cliques)
    figure, axes = _figure(8.0, 1.5 + 0.3 * (half + len(ranking.cliques)))
    axes.plot([1, count], [0, 0], color=_INK, lw=1.4)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, 0.14], color=_INK, lw=1.2)
        axes.text(tick, 0.24, str(tick), ha="center", va="bottom", size=9)
    axes.plot([1, min(count, 1 + ranking.critical_difference)], [1.05, 1.05], color=COLOURS[1], lw=2.5)
    axes.text(1, 1.15, f"critical difference {ranking.critical_difference:.2f}", size=8, va="bottom", color=COLOURS[1])
    for place, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = place < half
        level = -depth - 0.42 * (place if left else count - 1 - place)
        edge = 1.0 - 0.06 * count if left else count + 0.06 * count
        axes.plot([rank, rank, edge], [0, level, level], color=COLOURS[0], lw=1.1)
        text = f"{_text(name)}  {rank:.2f}" if left else f"{rank:.2f}  {_text(name)}"
        axes.text(edge, level, f" {text} ", ha="right" if left else "left", va="center", size=9)
    for place, clique in enumerate(ranking.cliques):
        ends = ranking.mean_ranks[clique[0]] - 0.03, ranking.mean_ranks[clique[-1]] + 0.03
        axes.plot(ends, [-0.3 - 0.28 * place] * 2, color=_INK, lw=4, solid_capstyle="butt")
    axes.set_axis_off()
    axes.set_title(f"Mean rank over {len(ranking.data)} settings (1 is best)", fontsize=11, color=_INK, pad=10)
    return figure


def _skip_the_rise(axes: Axes) -> None:
    """Start the axis where the lowest curve is after a tenth of the steps: most start at chance.."""
    lines = [line for line in axes.get_lines() if len(np.atleast_1d(line.get_xdata())) > 2]
    if not lines:
        return
    last = max(float(np.max(line.get_xdata())) for line in lines)
    kept = [np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) >= 0.1 * last] for line in lines]
    low, high = min(float(y.min()) for y in kept), max(float(y.max()) for y in kept)
    if high > low:
        axes.set_ylim(low - 0.15 * (high - low), high + 0.08 * (high - low))


def _rows_of(rows: Iterable[RunRow], block: BlockAnalysis) -> list[RunRow]:
    place = (block.data, block.freeze, block.per_class)
    return [row for row in rows if (row.data, row.freeze, row.per_class) == place]


def _best_mean(rows: Sequence[RunRow], init: str, rate: float, block: BlockAnalysis) -> float:
    """Mean validation score of a cell; where weight decays differ, at the one that was chosen if it was run there."""
    decay = next(summary.weight_decay for summary in block.summaries if summary.init == init)
    cell = [row for row in rows if row.init == init and row.lr == rate]
    cell = [row for row in cell if row.weight_decay == decay] or cell
    values = [float(v) for v in (row.val.get(block.metric) for row in cell) if v is not None and math.isfinite(v)]
    return float(np.mean(values)) if values else math.nan


def _draw_cells(figure: Figure, axes: Axes, values: np.ndarray, metric: str) -> None:
    """Coloured cells with their numbers; brighter is better.

    The worst tenth shares one colour, so that a failed cell does not hide the differences between the others.
    """
    known = values[np.isfinite(values)]
    better = HIGHER_IS_BETTER.get(metric, True)
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    worst = low if better else high
    if len(known) > 1:
        low, high = (float(np.quantile(known, 0.1)), high) if better else (low, float(np.quantile(known, 0.9)))
    clipped = worst < low if better else worst > high
    high = high if high > low else low + 1e-9
    picture = axes.imshow(values, cmap="cividis" if better else "cividis_r", vmin=low, vmax=high, aspect="auto")
    form = "{:.1f}" if is_share(metric) else "{:.3f}"
    for (i, j), value in np.ndenumerate(values):
        if not math.isfinite(value):
            axes.text(j, i, "no score", ha="center", va="center", size=7, color="#777777")
            continue
        dark = (value - low) / (high - low) < 0.5 if better else (value - low) / (high - low) > 0.5
        axes.text(j, i, form.format(value), ha="center", va="center", size=9, color="white" if dark else _INK)
    extend = ("min" if better else "max") if clipped else "neither"
    figure.colorbar(picture, ax=axes, label=_unit(metric), extend=extend)


def _frame_cell(axes: Axes, line: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.48, line - 0.46)
    axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=COLOURS[1], lw=2.2))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _style(place: int) -> dict[str, Any]:
    """Colour, dash and marker of the scheme at this place; the three together never repeat within 32."""
    line = _LINES[(place // len(COLOURS)) % len(_LINES)]
    marker = _MARKERS[(place + place // len(COLOURS)) % len(_MARKERS)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": line, "marker": marker, "linewidth": 1.7}


def _label(axes: Axes, title: str, x: str, y: str, grid: str | None = "y") -> None:
    axes.set_title(_text(title, 90), fontsize=11, color=_INK, pad=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _tidy(axes, grid)


def _tidy(axes: Axes, grid: str | None) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)
    if grid is not None:
        axes.grid(True, axis=grid, color=_FAINT, lw=0.7)  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def _count_on(axes: Axes) -> None:
    """Whole numbers alone on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_beside(axes: Axes, entries: int) -> None:
    if entries:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=2.6)


def _unit(metric: str) -> str:
    return f"{metric} (%)" if is_share(metric) else metric


def _text(value: object, longest: int = _LONGEST_LABEL) -> str:
    """A label that matplotlib shows as it is: one line, no mathematics between dollar signs, kept in legends."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    text = text.replace("\\", "＼").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
