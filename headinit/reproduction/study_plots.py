"""The pictures of a study: every test as an interval, and what each start knew before it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headinit.analysis.plots import COLOURS, save_figure
from headinit.reproduction.study import Question
from headinit.reproduction.study_text import MARGIN, standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VERDICTS = {"ahead": COLOURS[2], "level": COLOURS[0], "not told apart": COLOURS[7], "behind": COLOURS[1]}


def write_pictures(questions: Sequence[Question], lines: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write the pictures of a study into a folder, as PNG files.

    Args:
        questions: see `study_text.questions_of`; those about accuracy are drawn.
        lines: see `study.summary_lines`.
        folder: where they go.

    Returns:
        Their paths: ``differences_STAGE.png`` for the first word of each question, ``starts_STAGE.png`` by stage.
    """
    found = []
    families: dict[str, list[Question]] = {}
    for asked in questions:
        if asked.name.endswith("accuracy") and len(asked.pairs) > 1:
            families.setdefault(asked.name.split(",")[0].split(" ")[0], []).append(asked)
    for name, family in families.items():
        found.append(save_figure(differences(family), folder / f"differences_{name}.png"))
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage and line["start_val_accuracy"] is not None]
        if len({line["init"] for line in own}) > 1:
            found.append(save_figure(starts_and_ends(own), folder / f"starts_{stage}.png"))
    return found


def differences(questions: Sequence[Question]) -> Figure:
    """A panel a question: each scheme's difference from the reference in points of accuracy, with its 95 % interval.

    Example:
        >>> from headinit.analysis.statistics import compare_with
        >>> scores = {"torch": {(0, 0): 0.5, (0, 1): 0.6}, "zeros": {(0, 0): 0.6, (0, 1): 0.65}}
        >>> differences([Question("small: accuracy", compare_with("torch", scores))]).axes[0].get_title()
        'small'
    """
    from matplotlib.figure import Figure

    order = [pair.first for pair in sorted(questions[-1].pairs, key=lambda pair: pair.difference.estimate)]
    figure = Figure(figsize=(2.0 + 3.0 * len(questions), 1.5 + 0.24 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    for axes, asked in zip(panels, questions, strict=True):
        for pair in asked.pairs:
            low, high, middle = (pair.difference.low, pair.difference.high, pair.difference.estimate)
            place, colour = order.index(pair.first), _VERDICTS[standing(pair)]
            if low is not None and high is not None:
                axes.plot([100 * low, 100 * high], [place, place], color=colour, lw=2)
            axes.plot([100 * middle], [place], "o", color=colour, ms=5)
        axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#EEEEEE", zorder=0)
        axes.axvline(0, color="#888888", lw=0.8, zorder=1)
        axes.set_yticks(range(len(order)), order)
        against = asked.pairs[0].second
        _finish(axes, asked.name.removesuffix(": accuracy"), f"points of accuracy over {against}")
    handles = [panels[0].plot([], [], "o-", color=colour, label=name)[0] for name, colour in _VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def starts_and_ends(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel a learning rate: mean validation accuracy over the sets, before the first step and at the best epoch.

    Example:
        >>> line = {"lr": 0.1, "init": "zeros", "share": "", "start_val_accuracy": 0.5, "val_accuracy": 0.9}
        >>> starts_and_ends([line]).axes[0].get_title()
        'learning rate 0.1'
    """
    from matplotlib.figure import Figure

    rates = sorted({line["lr"] for line in lines})
    ends = _means(lines, rates[-1], "val_accuracy")
    order = sorted(ends, key=lambda scheme: ends[scheme])
    figure = Figure(figsize=(2.0 + 2.6 * len(rates), 1.3 + 0.24 * len(order)), layout="constrained")
    for axes, rate in zip(
        figure.subplots(1, len(rates), sharey=True, sharex=True, squeeze=False)[0], rates, strict=True
    ):
        first, last = (_means(lines, rate, key) for key in ("start_val_accuracy", "val_accuracy"))
        for place, scheme in enumerate(order):
            axes.plot([first[scheme], last[scheme]], [place, place], color="#BBBBBB", lw=2, zorder=1)
        axes.scatter(
            [first[s] for s in order], range(len(order)), s=26, facecolor="white", edgecolor=COLOURS[1], zorder=2
        )
        axes.scatter([last[s] for s in order], range(len(order)), s=26, color=COLOURS[0], zorder=2)
        axes.set_yticks(range(len(order)), order)
        _finish(axes, f"learning rate {rate:g}", "validation accuracy, %")
    figure.axes[0].text(
        0.02, 1.0, "hollow: before the first step", transform=figure.axes[0].transAxes, fontsize=7, va="top"
    )
    return figure


def _means(lines: Sequence[Mapping[str, Any]], rate: float, key: str) -> dict[str, float]:
    """Mean of a column over the sets and shares, in percent, by scheme."""
    schemes = dict.fromkeys(line["init"] for line in lines)
    return {s: 100 * float(np.mean([ln[key] for ln in lines if (ln["init"], ln["lr"]) == (s, rate)])) for s in schemes}


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, axis="x", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
